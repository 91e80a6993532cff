"""What combines with what, as literal tables, and the checks of the options that all constructors have."""

import inspect
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from sharpwise.block_lr import Ablation, BlockLR, GradientSNR, MeasuredLR, Product, SharpnessLR, make_block_lr
from sharpwise.block_lr.base import is_number
from sharpwise.block_lr.spelling import BLOCK_LRS
from sharpwise.blocks import BlockMap
from sharpwise.engine.measuring import no_second_moment_message
from sharpwise.engine.options import Options, Storage
from sharpwise.hints import kind_of, nearest
from sharpwise.probes.fisher import sharpness_by_name
from sharpwise.storage import BF16, FP32, Dense, Format

T = TypeVar("T")

STORAGES: dict[str, Dense] = {"fp32": FP32, "bf16": BF16}
"""Every storage of element state by name."""

_ALL_LRS = ("blockwise", "gradient_snr", "layer_decay", "llr", "per_role")
COMBINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "adam-mini": ((*_ALL_LRS, "sharpness"), ("fp32", "bf16")),
    "adamw": ((*_ALL_LRS, "sharpness"), ("fp32", "bf16")),
    "lion": (_ALL_LRS, ("fp32", "bf16")),
    "muon": (_ALL_LRS, ("fp32", "bf16")),
    "sgd": (_ALL_LRS, ("fp32", "bf16")),
    "sgd-sai": (tuple(lr for lr in _ALL_LRS if lr != "gradient_snr"), ("fp32", "bf16")),
}
"""What combines: optimizer -> (block_lrs, storages); ablations and products of block_lrs combine as they do, and one
that measures by a probe goes with any rule. The battery runs over exactly this table, and all of `ABLATIONS`."""


def engine_arguments(
    who: str,
    name: str,
    decoupled: bool = True,
    own_lr: BlockLR | None = None,
    *,
    model: nn.Module | None,
    blocks: BlockMap | Mapping[str, Any] | None,
    strict: bool,
    block_lr: str | Mapping[str, Any] | BlockLR | None,
    storage: Literal["fp32", "bf16"] | Format,
    stochastic_rounding: bool,
    seed: int,
    no_decay: Collection[str],
    cautious_decay: bool,
    max_grad_norm: float | None,
    on_nonfinite: Literal["ignore", "raise", "skip"],
    compile: bool | None,
    total_steps: int | None,
    probe_batches: Iterable[Any] | None,
) -> dict[str, Any]:
    """Arguments of `BlockOptimizer`, but for the rule and its numbers, from the options that all constructors have.

    None of the options has a default here: a constructor that forgets to hand one on fails.

    Args:
        who: the constructor, for messages.
        name: of the optimizer, as in `COMBINES`.
        decoupled: whether weight decay is.
        own_lr: a learning rate per block that belongs to the optimizer; `block_lr` comes on top.

    Raises:
        TypeError, ValueError: for options of a wrong kind or out of range, and for what does not combine.
    """
    per_block = _block_lr_of(who, block_lr)
    where = Storage(storage if isinstance(storage, Format) else _one_of(who, "storage", storage, STORAGES))
    _check_combination(who, name, per_block, storage)
    if own_lr is not None:
        per_block = own_lr if per_block is None else own_lr * per_block
    if max_grad_norm is not None and not (is_number(max_grad_norm) and 0.0 < max_grad_norm < math.inf):
        raise ValueError(f"{who}: max_grad_norm must be a finite number > 0, or None, got {max_grad_norm!r}")
    if type(seed) is not int:
        raise TypeError(f"{who}: seed must be a whole number, got {seed!r}")
    flags = {"stochastic_rounding": stochastic_rounding, "strict": strict, "cautious_decay": cautious_decay}
    for key, flag in flags.items():
        if type(flag) is not bool:
            raise TypeError(f"{who}: {key} must be True or False, got {flag!r}")
    if cautious_decay and not decoupled:
        raise ValueError(
            f"{who}: cautious_decay=True is for decay that shrinks the parameter, here it is added to the gradient; "
            f"give decoupled_weight_decay=True as well"
        )
    if compile not in (None, True, False):
        raise ValueError(f"{who}: compile must be None or True (kernels), or False (the reference), got {compile!r}")
    if on_nonfinite not in ("ignore", "raise", "skip"):
        raise ValueError(f"{who}: on_nonfinite must be 'ignore', 'raise' or 'skip', got {on_nonfinite!r}")
    if total_steps is not None and (type(total_steps) is not int or total_steps < 1):
        raise ValueError(f"{who}: total_steps must be a whole number >= 1, got {total_steps!r}")
    options = Options(
        decoupled,
        cautious_decay,
        per_block,
        None,
        where,
        stochastic_rounding,
        seed,
        max_grad_norm,
        on_nonfinite,
        compile,
        total_steps,
        _batches_of(who, probe_batches),
        sharpness_by_name,
    )
    return {
        "options": options,
        "blocks": blocks,
        "model": model,
        "strict": strict,
        "no_decay": no_decay,
        "who": who,
    }


COMMON = tuple(name for name, p in inspect.signature(engine_arguments).parameters.items() if p.kind is p.KEYWORD_ONLY)
"""The options that all constructors have."""


def _block_lr_of(who: str, spec: Any) -> BlockLR | None:
    try:
        return make_block_lr(spec)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{who}: {error}") from None


def _batches_of(who: str, given: Any) -> Any:
    """What `sharpwise.probes.sharpness` takes, to be read more than once."""
    if given is None or isinstance(given, (Tensor, Mapping)):
        return given
    if not isinstance(given, Iterable):
        raise TypeError(f"{who}: probe_batches must be a list of batches, or one, got {kind_of(given)}")
    batches = given if isinstance(given, (list, tuple)) else list(given)
    if not batches:
        raise ValueError(
            f"{who}: probe_batches is empty; give a list of batches, as sharpwise.probes.sharpness takes them"
        )
    return batches


def _one_of(who: str, what: str, name: str, table: Mapping[str, T]) -> T:
    if name not in table:
        raise ValueError(
            f"{who}: no {what} is called {name!r}{nearest(str(name), table)}; there are {', '.join(sorted(table))}"
        )
    return table[name]


def _check_combination(who: str, name: str, block_lr: BlockLR | None, storage: str | Format) -> None:
    lrs, storages = COMBINES[name]
    known = all(part.name in lrs or part.name not in BLOCK_LRS or _probes(part) for part in _parts(block_lr))
    if not known or not (isinstance(storage, Format) or storage in storages):
        for part in _parts(block_lr):
            if isinstance(part, SharpnessLR) and not known:
                raise ValueError(f"{who}: {no_second_moment_message(part, name)}")
            if isinstance(part, GradientSNR) and not known and part.name in BLOCK_LRS:
                raise ValueError(
                    f"{who}: it scales by the first gradient already, got block_lr={block_lr}; leave that out"
                )
        raise ValueError(
            f"{who}: {name} with block_lr={block_lr!r} and storage={storage!r} is not supported; "
            f"{name} combines with block_lr {', '.join(lrs)} and storage {', '.join(storages)}"
        )


def _probes(block_lr: BlockLR) -> bool:
    return isinstance(block_lr, MeasuredLR) and block_lr.measures == "probe"


def _parts(block_lr: BlockLR | None) -> list[BlockLR]:
    """What a block_lr is made of."""
    if isinstance(block_lr, Product):
        return [part for factor in block_lr.factors for part in _parts(factor)]
    return _parts(block_lr.of) if isinstance(block_lr, Ablation) else [] if block_lr is None else [block_lr]
