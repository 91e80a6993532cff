"""What combines with what, as literal tables, and the checks of the options that all constructors have."""

import inspect
import math
from collections.abc import Collection, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, TypedDict, TypeVar, get_type_hints

from torch import Tensor, nn

from sharpwise.block_lr import Ablation, AuxLR, BlockLR, GradientSNR, MeasuredLR, Product, SharpnessLR, make_block_lr
from sharpwise.block_lr.base import is_number
from sharpwise.block_lr.spelling import BLOCK_LRS
from sharpwise.blocks import BlockMap
from sharpwise.controls import CONTROLS, Control, make_control
from sharpwise.engine.binding import check_roles_named
from sharpwise.engine.measuring import no_second_moment_message
from sharpwise.engine.options import Options, Storage
from sharpwise.hints import kind_of, nearest
from sharpwise.probes.directional import probed
from sharpwise.rules.base import lr_ratio
from sharpwise.storage import BF16, FP32, Format, Int8

T = TypeVar("T")

STORAGES: dict[str, Format] = {
    "bf16": BF16,
    "fp32": FP32,
    "int8-dynamic": Int8("dynamic"),
    "int8-dynamic-2048": Int8("dynamic", 2048),
    "int8-linear": Int8("linear"),
    "int8-linear-2048": Int8("linear", 2048),
}
"""Every storage of element state by name; behind a code of 8 bits how many elements share a scale, if not 256."""
KEEP_FP32 = ("tok_emb", "pos_emb", "head")
"""Roles whose state stays in fp32 under 8 bits, unless said otherwise: with 8 bits there, pretraining is unstable."""

_ALL_LRS = ("blockwise", "gradient_snr", "layer_decay", "llr", "per_role")
_SHORT = tuple(name for name in STORAGES if not name.endswith("-2048"))
COMBINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "adam-mini": ((*_ALL_LRS, "sharpness"), _SHORT),
    "adamw": ((*_ALL_LRS, "sharpness"), tuple(name for name in _SHORT if name != "int8-linear")),
    "adapm": ((*_ALL_LRS, "sharpness"), tuple(name for name in _SHORT if name != "int8-linear")),
    "adasgd": (_ALL_LRS, _SHORT),
    "blockwise-adam": ((*_ALL_LRS, "sharpness"), _SHORT),
    "lion": (_ALL_LRS, _SHORT),
    "muon": (_ALL_LRS, _SHORT),
    "sgd": (_ALL_LRS, _SHORT),
    "sgd-sai": (tuple(lr for lr in _ALL_LRS if lr != "gradient_snr"), _SHORT),
}
"""What combines: optimizer -> (block_lrs, storages); ablations and products of block_lrs combine as they do, and one
that measures by a probe goes with any rule; other sizes of blocks as 256. The battery runs over exactly this table, and
all of `ABLATIONS`."""

APART = ("rotated",)
"""Names of optimizers that are in no table: they take no block_lr and no control, and no mesh."""
AUX_LR = 1e-3
"""Of AdamH and MuonH for what is no hidden matrix: lr is relative to norms there."""
PRESETS: dict[str, dict[str, Any]] = {
    "adamh": {"name": "adamw", "control": "hyperball", "aux_lr": AUX_LR},
    "adamw-8bit": {"name": "adamw", "storage": "int8-dynamic"},
    "liona": {"name": "lion", "betas": [0.9, 0.9], "weight_decay": 0.1, "control": "l2"},
    "lionar": {"name": "lion", "betas": [0.9, 0.9], "weight_decay": 0.1, "control": "angular"},
    "muon-8bit": {"name": "muon", "storage": "int8-linear"},
    "muonh": {"name": "muon", "control": "hyperball", "aux_lr": AUX_LR},
}
"""Names of an optimizer with options: those of `AdamH`, `AdamW8bit`, `LionA`, `LionAR`, `Muon8bit` and `MuonH`."""
CONTROLLED = dict.fromkeys(COMBINES, tuple(CONTROLS))
"""Which controls combine with an optimizer: all, with decoupled decay. All can go with any block_lr and storage."""


class CommonOptions(TypedDict, total=False):
    """The options that all constructors have; `_OPTIONS` has their defaults, and says what they are."""

    model: nn.Module | None
    blocks: BlockMap | Mapping[str, Any] | None
    strict: bool
    block_lr: str | Mapping[str, Any] | BlockLR | None
    aux_lr: float | None
    control: str | Mapping[str, Any] | Control | None
    storage: str | Format
    keep_fp32: Collection[str] | None
    allow_unstable: bool
    stochastic_rounding: bool
    seed: int
    no_decay: Collection[str]
    cautious_decay: bool
    max_grad_norm: float | None
    on_nonfinite: Literal["ignore", "raise", "skip"]
    compile: bool | None
    total_steps: int | None
    probe_batches: Iterable[Any] | None


_OPTIONS: dict[str, tuple[Any, str]] = {
    "model": (None, "the model that the tensors or groups of `params` belong to, each found in it by identity."),
    "blocks": (
        None,
        'a BlockMap, or overrides by glob (`{"*.my_proj.weight": "up"}`) for what sharpwise cannot know.',
    ),
    "strict": (False, "raise where a parameter is not explained, even if nothing depends on it."),
    "block_lr": (
        None,
        'multiplier of lr per block: a spelling ("blockwise(emb=5)"), a table or an instance (`make_block_lr`).',
    ),
    "aux_lr": (
        None,
        "lr of all but matrices of attention and MLP (embeddings, head, norms, biases), kept as a ratio; None for lr.",
    ),
    "control": (
        None,
        'how large updates are: "l2", "angular" ("angular(angle=sqrt)"), "hyperball", a table or an instance.',
    ),
    "storage": (
        "fp32",
        'of state by element: "fp32", "bf16", "int8-dynamic", "int8-linear" or a format; that by block is always fp32.',
    ),
    "keep_fp32": (
        None,
        "roles whose state is never in 8 bits; None for embeddings and head (no role with an 8-bit `aux_storage`).",
    ),
    "allow_unstable": (False, '"int8-linear" for second moments too, where small ones become 0.'),
    "stochastic_rounding": (
        False,
        "round to bf16 (state and parameters) stochastically, by a hash of (seed, step, element).",
    ),
    "seed": (0, "of stochastic rounding."),
    "no_decay": ((), 'roles without weight decay, and "bias", such as `("norm", "bias")`.'),
    "cautious_decay": (
        False,
        "decay only where the update moves the element towards 0 too (arXiv 2510.12402); decoupled decay.",
    ),
    "max_grad_norm": (None, "clip the global gradient norm to this inside the step; gradients are left as they are."),
    "on_nonfinite": (
        "ignore",
        'NaN or infinite gradients: "ignore" (as torch), "raise" before any change, "skip" the step.',
    ),
    "compile": (
        None,
        "None or True (kernels, where they can be built), False (torch operations alone: the reference).",
    ),
    "total_steps": (None, "steps of the whole training, for a block_lr with phases that are fractions of it."),
    "probe_batches": (
        None,
        "batches for a block_lr that probes the model, as `sharpwise.probes.sharpness` takes them.",
    ),
}
COMMON = tuple(_OPTIONS)
"""Their names."""
Constructor = TypeVar("Constructor", bound=type)


def with_common_options(kind: Constructor) -> Constructor:
    """Write the options that all constructors have into the signature and the docstring of one that takes them all."""
    own = inspect.signature(kind.__init__)  # type: ignore[misc]
    hints = get_type_hints(CommonOptions)
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, (default, _) in _OPTIONS.items()
    ]
    kind.__init__.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[misc]
    lines = "\n".join(f"        {name}: {text}" for name, (_, text) in _OPTIONS.items())
    assert kind.__doc__ is not None and kind.__doc__.count(_PLACE) == 1
    kind.__doc__ = kind.__doc__.replace(_PLACE, lines)
    return kind


_PLACE = "        **options: of all optimizers."


def engine_arguments(
    who: str,
    name: str,
    given: CommonOptions,
    lr: Any,
    *,
    decoupled: bool = True,
    own_lr: BlockLR | None = None,
    aux_storage: str | Format | None = None,
    control: Control | None = None,
) -> dict[str, Any]:
    """Arguments of `BlockOptimizer`, but for the rule and its numbers, from the options that all constructors have.

    Args:
        who: the constructor, for messages.
        name: of the optimizer, as in `COMBINES`.
        lr: that of the constructor.
        decoupled: whether weight decay is.
        own_lr: a learning rate per block that belongs to the optimizer; `block_lr` comes on top.
        aux_storage: of what a rule of whole matrices leaves to another; None for `storage`.
        control: of updates, that belongs to the optimizer.

    Raises:
        TypeError, ValueError: for options of a wrong kind or out of range, and for what does not combine.
    """
    asked: Any = SimpleNamespace(**{option: default for option, (default, _) in _OPTIONS.items()} | given)
    per_block = _block_lr_of(who, asked.block_lr)
    storage = _storage_of(who, name, asked, aux_storage)
    control = _control_of(who, name, asked, decoupled) or control
    _check_combination(who, name, per_block, asked)
    if asked.aux_lr is not None:
        aux = AuxLR(lr_ratio(who, lr, asked.aux_lr))
        own_lr = aux if own_lr is None else aux * own_lr
    if own_lr is not None:
        per_block = own_lr if per_block is None else own_lr * per_block
    _check_numbers(who, asked, decoupled)
    options = Options(
        decoupled,
        asked.cautious_decay,
        per_block,
        control,
        storage,
        asked.stochastic_rounding,
        asked.seed,
        asked.max_grad_norm,
        asked.on_nonfinite,
        asked.compile,
        asked.total_steps,
        _batches_of(who, asked.probe_batches),
        probed,
    )
    own = {key: getattr(asked, key) for key in ("blocks", "model", "strict", "no_decay")}
    return {"options": options, "who": who, **own}


def _check_numbers(who: str, asked: Any, decoupled: bool) -> None:
    """Raise TypeError or ValueError for options of a wrong kind or out of range."""
    if asked.max_grad_norm is not None and not (
        is_number(asked.max_grad_norm) and 0.0 < asked.max_grad_norm < math.inf
    ):
        raise ValueError(f"{who}: max_grad_norm must be a finite number > 0, or None, got {asked.max_grad_norm!r}")
    if type(asked.seed) is not int:
        raise TypeError(f"{who}: seed must be a whole number, got {asked.seed!r}")
    flags = {option: getattr(asked, option) for option in _FLAGS}
    for key, flag in flags.items():
        if type(flag) is not bool:
            raise TypeError(f"{who}: {key} must be True or False, got {flag!r}")
    if asked.cautious_decay and not decoupled:
        raise ValueError(
            f"{who}: cautious_decay=True is for decay that shrinks the parameter, here it is added to the gradient; "
            f"give decoupled_weight_decay=True as well"
        )
    if asked.compile not in (None, True, False):
        raise ValueError(
            f"{who}: compile must be None or True (kernels), or False (the reference), got {asked.compile!r}"
        )
    if asked.on_nonfinite not in ("ignore", "raise", "skip"):
        raise ValueError(f"{who}: on_nonfinite must be 'ignore', 'raise' or 'skip', got {asked.on_nonfinite!r}")
    if asked.total_steps is not None and (type(asked.total_steps) is not int or asked.total_steps < 1):
        raise ValueError(f"{who}: total_steps must be a whole number >= 1, got {asked.total_steps!r}")


_FLAGS = ("stochastic_rounding", "strict", "cautious_decay", "allow_unstable")


def _storage_of(who: str, name: str, asked: Any, aux: str | Format | None) -> Storage:
    """What `storage`, `aux_storage`, `keep_fp32` and `allow_unstable` say."""
    format = _format_of(who, "storage", asked.storage)
    other: Format | None = FP32 if name == "muon" and format.block else None
    other = other if aux is None else _format_of(who, "aux_storage", aux)
    squares = {"adamw": format, "adapm": format, "muon": other or format}.get(name)
    if isinstance(squares, Int8) and squares.code == "linear" and not asked.allow_unstable:
        raise ValueError(
            f"{who}: {squares.name} for second moments makes the small ones 0, and their elements explode: give "
            f"{'aux_storage' if name == 'muon' else 'storage'}='int8-dynamic', or allow_unstable=True to see that"
        )
    keep = asked.keep_fp32
    if keep is None:  # to quantize the other half of a rule is to want all of it quantized
        keep = () if other is not None and other.block else KEEP_FP32
    return Storage(format, other, tuple(sorted(check_roles_named(keep, who, "keep_fp32"))))


def _format_of(who: str, option: str, given: Any) -> Format:
    return given if isinstance(given, Format) else _one_of(who, option, given, STORAGES)


def _block_lr_of(who: str, spec: Any) -> BlockLR | None:
    try:
        return make_block_lr(spec)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{who}: {error}") from None


def _control_of(who: str, name: str, asked: Any, decoupled: bool) -> Control | None:
    """The control that is asked for."""
    try:
        control = make_control(asked.control)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{who}: {error}") from None
    if control is None:
        return None
    if control.name in CONTROLS and control.name not in CONTROLLED[name]:
        raise ValueError(f"{who}: {name} combines with control {', '.join(CONTROLLED[name])}, got {control}")
    if not decoupled:
        raise ValueError(f"{who}: control={str(control)!r} is for decoupled decay; give decoupled_weight_decay=True")
    if control.holds and asked.cautious_decay:
        raise ValueError(f"{who}: what control={str(control)!r} holds does not decay; leave out cautious_decay=True")
    return control


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


def _check_combination(who: str, name: str, block_lr: BlockLR | None, asked: Any) -> None:
    lrs, storages = COMBINES[name]
    kept = isinstance(asked.storage, Format) or asked.allow_unstable or asked.storage.removesuffix("-2048") in storages
    known = all(part.name in lrs or part.name not in BLOCK_LRS or _probes(part) for part in _parts(block_lr))
    if not known or not kept:
        for part in _parts(block_lr):
            if isinstance(part, SharpnessLR) and not known:
                raise ValueError(f"{who}: {no_second_moment_message(part, name)}")
            if isinstance(part, GradientSNR) and not known and part.name in BLOCK_LRS:
                raise ValueError(
                    f"{who}: it scales by the first gradient already, got block_lr={block_lr}; leave that out"
                )
        raise ValueError(
            f"{who}: {name} with block_lr={block_lr!r} and storage={asked.storage!r} is not supported; "
            f"{name} combines with block_lr {', '.join(lrs)} and storage {', '.join(storages)}"
        )


def _probes(block_lr: BlockLR) -> bool:
    return isinstance(block_lr, MeasuredLR) and block_lr.measures == "probe"


def _parts(block_lr: BlockLR | None) -> list[BlockLR]:
    """What a block_lr is made of."""
    if isinstance(block_lr, Product):
        return [part for factor in block_lr.factors for part in _parts(factor)]
    return _parts(block_lr.of) if isinstance(block_lr, Ablation) else [] if block_lr is None else [block_lr]
