"""The named constructors, `create_optimizer`, and the literal tables of what there is and what combines with what.

All constructors take the same first argument and the same options (`Common`).
"""

import fnmatch
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, TypedDict, TypeVar, Unpack

from torch import Tensor, nn

from sharpwise import rules
from sharpwise.block_lr import Ablation, BlockLR, GradientSNR, MeasuredLR, Product, SharpnessLR, make_block_lr
from sharpwise.block_lr.base import is_number
from sharpwise.block_lr.spelling import ABLATIONS as ABLATIONS
from sharpwise.block_lr.spelling import BLOCK_LRS
from sharpwise.blocks import BlockMap, Cut
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.measuring import no_second_moment_message
from sharpwise.engine.options import Options
from sharpwise.hints import kind_of, nearest
from sharpwise.probes.fisher import sharpness_by_name
from sharpwise.storage import BF16, FP32, Dense

T = TypeVar("T")


class Common(TypedDict, total=False):
    """Options of every optimizer.

    Attributes:
        model: the model that the tensors or groups given first belong to; found by identity.
        blocks: a BlockMap, or overrides by glob (`{"*.my_proj.weight": "up"}`) for what sharpwise cannot know.
        strict: raise where a parameter is not explained, even if nothing depends on it.
        block_lr: multiplier of lr per block: a spelling such as "blockwise", "blockwise(emb=5)" or
            "reversed(blockwise)", a table with `name` and arguments, an instance, or None; see `make_block_lr`.
        storage: element state in "fp32" or "bf16". Block state is always fp32. A second moment in bf16 stops moving
            where (1 - b2) is below its last bit (b2 > 0.99) unless it is rounded stochastically.
        stochastic_rounding: round to bf16 (state and parameters of that type) stochastically, by a hash of
            (seed, step, element).
        seed: of stochastic rounding.
        no_decay: roles without weight decay, and "bias", such as `("norm", "bias")`.
        max_grad_norm: clip the global gradient norm to this inside the step; gradients themselves are left as they are.
        on_nonfinite: NaN or infinite gradients: "ignore" (as torch), "raise" before anything changes, "skip" the step.
        compile: None (compile where it pays), True (all matrices), False (eager: the reference).
        total_steps: steps of the whole training, for a block_lr with phases that are fractions of it.
        probe_batches: batches for a block_lr that probes the model, as `sharpwise.probes.sharpness` takes them.
    """

    model: nn.Module | None
    blocks: BlockMap | Mapping[str, Any] | None
    strict: bool
    block_lr: str | Mapping[str, Any] | BlockLR | None
    storage: Literal["fp32", "bf16"]
    stochastic_rounding: bool
    seed: int
    no_decay: Collection[str]
    max_grad_norm: float | None
    on_nonfinite: Literal["ignore", "raise", "skip"]
    compile: bool | None
    total_steps: int | None
    probe_batches: Iterable[Any] | None


def AdamW(
    first: Any,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.01,
    **options: Unpack[Common],
) -> BlockOptimizer:
    """AdamW: `sharpwise.rules.adamw`. State: two numbers per element.

    Args:
        first: a model, (name, tensor) pairs, or parameter groups (then with `model=`).
        lr: step size, in units of the parameter per step (the update of an element is at most about lr).
        betas, eps: see the rule.
        weight_decay: decoupled; an element shrinks by lr * weight_decay per step.
        **options: see `Common`.

    Raises:
        TypeError, ValueError: for arguments out of range or parameters that cannot be placed.

    Example:
        >>> import torch, sharpwise
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = sharpwise.AdamW(model, lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """
    return _build("AdamW", first, rules.AdamW(betas, eps), lr, weight_decay, **options)


def AdamMini(
    first: Any,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.01,
    *,
    v_by: Cut = "row",
    cut: Cut | None = None,
    **options: Unpack[Common],
) -> BlockOptimizer:
    """Adam-mini: `sharpwise.rules.adam_mini`. State: one number per element, and one per block.

    Use AdamW's hyperparameters as a start; its stable range of lr and warm-up is narrower.

    Args:
        first, lr, betas, eps, weight_decay, **options: as in `AdamW`.
        v_by: cut of the value projection, "row" or "tensor".
        cut: None (by role), or one cut for everything: "tensor" (models that are no transformers) or "element" (AdamW).

    Raises:
        TypeError: where heads are needed and not known; ValueError: for roles not known, or arguments out of range.
    """
    rule = rules.AdamMini(betas, eps, v_by, cut)
    return _build("AdamMini", first, rule, lr, weight_decay, **options)


def Lion(
    first: Any,
    lr: float | Tensor = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float | Tensor = 0.0,
    **options: Unpack[Common],
) -> BlockOptimizer:
    """Lion: `sharpwise.rules.lion`. State: one number per element. Every element moves by exactly lr.

    Args:
        first, lr, betas, weight_decay, **options: as in `AdamW`; lr is best 3 to 10 times smaller, decay larger.
    """
    return _build("Lion", first, rules.Lion(betas), lr, weight_decay, **options)


def SGD(
    first: Any,
    lr: float | Tensor = 1e-3,
    momentum: float = 0.0,
    dampening: float | None = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    *,
    decoupled_weight_decay: bool = False,
    **options: Unpack[Common],
) -> BlockOptimizer:
    """SGD with momentum: `sharpwise.rules.sgd`, equal to torch's. State: one number per element, none without momentum.

    Args:
        first, lr, **options: as in `AdamW`; lr is in units of the parameter per unit of gradient.
        momentum, dampening, nesterov: see the rule.
        weight_decay: added to the gradient, as in torch; with `decoupled_weight_decay=True` as in `AdamW`.
    """
    rule = rules.SGD(momentum, dampening, nesterov)
    return _build("SGD", first, rule, lr, weight_decay, decoupled=decoupled_weight_decay, **options)


def SGDSaI(
    first: Any,
    lr: float | Tensor = 1e-2,
    momentum: float = 0.9,
    weight_decay: float | Tensor = 1e-2,
    *,
    normalize: Literal["none", "max"] = "none",
    **options: Unpack[Common],
) -> BlockOptimizer:
    """SGD-SaI: SGD with momentum, each block at the rate that its first gradient says: `block_lr.gradient_snr`.

    State: one number per element, half of AdamW's.

    Args:
        first, **options: as in `AdamW`; a `block_lr` comes on top, as a factor.
        lr: in units of the parameter per unit of gradient, over about sqrt(elements of the block).
        momentum: m <- momentum m + (1 - momentum) g, from m = g.
        weight_decay: decoupled; an element shrinks by lr * weight_decay per step, whatever its block.
        normalize: "none" (as released), or "max": the largest multiplier is 1 (the paper's Algorithm 1).

    Raises:
        ValueError: for arguments out of range.
    """
    rule = rules.SGD(momentum, None, False)
    return _build("SGDSaI", first, rule, lr, weight_decay, own_lr=GradientSNR(normalize=normalize), **options)


OPTIMIZERS: dict[str, Callable[..., BlockOptimizer]] = {
    "adam-mini": AdamMini,
    "adamw": AdamW,
    "lion": Lion,
    "sgd": SGD,
    "sgd-sai": SGDSaI,
}
"""Every optimizer by its one spelling."""

STORAGES: dict[str, Dense] = {"fp32": FP32, "bf16": BF16}
"""Every storage of element state by name."""

_ALL_LRS = ("blockwise", "gradient_snr", "layer_decay", "llr", "per_role")
COMBINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "adam-mini": ((*_ALL_LRS, "sharpness"), ("fp32", "bf16")),
    "adamw": ((*_ALL_LRS, "sharpness"), ("fp32", "bf16")),
    "lion": (_ALL_LRS, ("fp32", "bf16")),
    "sgd": (_ALL_LRS, ("fp32", "bf16")),
    "sgd-sai": (tuple(lr for lr in _ALL_LRS if lr != "gradient_snr"), ("fp32", "bf16")),
}
"""What combines: optimizer -> (block_lrs, storages); ablations and products of block_lrs combine as they do, and one
that measures by a probe goes with any rule. The battery runs over exactly this table, and all of `ABLATIONS`."""
WHY_NOT = {"sgd-sai": "it scales by the first gradient already"}
"""Said of what is missing in a row."""


def list_optimizers(pattern: str = "*") -> list[str]:
    """Names that `create_optimizer` takes, by glob.

    >>> list_optimizers("adam*")
    ['adam-mini', 'adamw']
    """
    return sorted(fnmatch.filter(OPTIMIZERS, pattern))


def create_optimizer(first: Any, name: str, **kwargs: Any) -> BlockOptimizer:
    """An optimizer by name, with its constructor's arguments.

    Args:
        first: as in `AdamW`.
        name: one of `list_optimizers()`, or a whole arm as `parse_arm` reads it.
        **kwargs: as the constructor takes them.

    Raises:
        ValueError: for an unknown name, or an arm whose block_lr is not the one in `kwargs`.
        TypeError: for a model or a constructor in place of the name.
    """
    given: Any = name
    if callable(given) or (isinstance(first, str) and not isinstance(given, str)):
        do = f": the model comes first, create_optimizer(model, {first!r})" if isinstance(first, str) else ""
        raise TypeError(f"create_optimizer: name must be text, such as 'adamw', got {kind_of(given)}{do}")
    settings = split_arm({**kwargs, "name": name})
    return OPTIMIZERS[settings.pop("name")](first, **settings)


def parse_arm(text: str) -> dict[str, str]:
    """What one arm of a comparison is, from its name: an optimizer, or an optimizer + a block_lr.

    Returns:
        `name` and, where there is one, `block_lr` in its canonical spelling: for `create_optimizer`, or the table
        [optimizer] of a configuration.

    Raises:
        ValueError: for an unknown optimizer, or a block_lr that `make_block_lr` refuses.

    >>> parse_arm("adam-mini+reversed(blockwise)")
    {'name': 'adam-mini', 'block_lr': 'reversed(blockwise)'}
    """
    before, plus, after = str(text).partition("+")
    name, block_lr = before.strip(), after.strip()
    if not isinstance(text, str) or name not in OPTIMIZERS:
        called = f"{name!r}{nearest(name, OPTIMIZERS)}" if isinstance(text, str) else repr(text)
        alone = not plus and name.partition("(")[0] in {*BLOCK_LRS, *ABLATIONS}
        hint = f"; it is a learning rate per block, for instance of adamw: adamw+{name}" if alone else ""
        raise ValueError(f"no optimizer is called {called}; there are {', '.join(list_optimizers())}{hint}")
    if not plus:
        return {"name": name}
    if not block_lr:
        raise ValueError(f"{text!r} names no block_lr after the +; write {name}, or for instance {name}+blockwise")
    return {"name": name, "block_lr": str(make_block_lr(block_lr))}


def split_arm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an optimizer, by `name`, which may be a whole arm: with its name and its block_lr apart.

    Raises:
        ValueError: as `parse_arm`; or where `block_lr` is given too, and is another one.
    """
    arm = parse_arm(settings["name"])
    given = settings.get("block_lr")
    if "block_lr" in arm and given not in (None, "") and make_block_lr(given) != make_block_lr(arm["block_lr"]):
        raise ValueError(
            f"two different block_lrs are given: {arm['block_lr']} in {settings['name']!r}, and "
            f"block_lr={make_block_lr(given)}; leave out one of them"
        )
    return {**settings, **arm}


def _build(
    who: str,
    first: Any,
    rule: rules.Rule,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    decoupled: bool = True,
    own_lr: BlockLR | None = None,
    *,
    model: nn.Module | None = None,
    blocks: BlockMap | Mapping[str, Any] | None = None,
    strict: bool = False,
    block_lr: str | Mapping[str, Any] | BlockLR | None = None,
    storage: Literal["fp32", "bf16"] = "fp32",
    stochastic_rounding: bool = False,
    seed: int = 0,
    no_decay: Collection[str] = (),
    max_grad_norm: float | None = None,
    on_nonfinite: Literal["ignore", "raise", "skip"] = "ignore",
    compile: bool | None = None,
    total_steps: int | None = None,
    probe_batches: Iterable[Any] | None = None,
    **unknown: Any,
) -> BlockOptimizer:
    if unknown:
        raise TypeError(f"{who}: {_unknown_options(who, unknown)}")
    per_block = _block_lr_of(who, block_lr)
    where = _one_of(who, "storage", storage, STORAGES)
    _check_combination(who, per_block, storage)
    if own_lr is not None:
        per_block = own_lr if per_block is None else own_lr * per_block
    if max_grad_norm is not None and not (is_number(max_grad_norm) and 0.0 < max_grad_norm < math.inf):
        raise ValueError(f"{who}: max_grad_norm must be a finite number > 0, or None, got {max_grad_norm!r}")
    if type(seed) is not int:
        raise TypeError(f"{who}: seed must be a whole number, got {seed!r}")
    for key, flag in (("stochastic_rounding", stochastic_rounding), ("strict", strict)):
        if type(flag) is not bool:
            raise TypeError(f"{who}: {key} must be True or False, got {flag!r}")
    if compile not in (None, True, False):
        raise ValueError(f"{who}: compile must be None (where it pays), True or False, got {compile!r}")
    if on_nonfinite not in ("ignore", "raise", "skip"):
        raise ValueError(f"{who}: on_nonfinite must be 'ignore', 'raise' or 'skip', got {on_nonfinite!r}")
    if total_steps is not None and (type(total_steps) is not int or total_steps < 1):
        raise ValueError(f"{who}: total_steps must be a whole number >= 1, got {total_steps!r}")
    options = Options(
        decoupled,
        per_block,
        stochastic_rounding,
        seed,
        max_grad_norm,
        on_nonfinite,
        compile,
        total_steps,
        _batches_of(who, probe_batches),
        sharpness_by_name,
    )
    return BlockOptimizer(
        first,
        rule,
        lr=lr,
        weight_decay=weight_decay,
        options=options,
        storage=where,
        blocks=blocks,
        model=model,
        strict=strict,
        no_decay=no_decay,
        who=who,
    )


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


def _unknown_options(who: str, names: Collection[str]) -> str:
    constructor = next((c for c in OPTIMIZERS.values() if c.__name__ == who), None)
    own = [] if constructor is None else [*inspect.signature(constructor).parameters][1:-1]
    known = [*own, *sorted(Common.__annotations__)]
    torchs = {"foreach", "fused", "capturable", "differentiable"} & set(names)
    hint = f"; {', '.join(sorted(torchs))}: leave out, the fastest kernel is chosen by itself" if torchs else ""
    called = ", ".join(f"{name}{'' if name in torchs else nearest(name, known)}" for name in sorted(names))
    return f"no option is called {called}{hint}; options are {', '.join(known)}"


def _check_combination(who: str, block_lr: BlockLR | None, storage: str) -> None:
    name = next(name for name, constructor in OPTIMIZERS.items() if constructor.__name__ == who)
    lrs, storages = COMBINES[name]
    known = all(part.name in lrs or part.name not in BLOCK_LRS or _probes(part) for part in _parts(block_lr))
    if not known or storage not in storages:
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
