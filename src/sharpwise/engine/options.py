"""What holds for a whole optimizer, whatever its rule."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from sharpwise.block_lr import BlockLR
from sharpwise.controls import Control
from sharpwise.hints import IN_A_TRAINER, nearest, without_model
from sharpwise.storage import FP32, Format

ModelProbe = Callable[..., dict[str, list[float]]]
"""(model, batches, blocks, seed=, **settings) -> a value of what is trained now: by name, one per segment. The settings
are the `probe_settings` of the block_lr, and `updates` where it asks for them. Pickled with the optimizer, so that it
has to be a function of a module."""


@dataclass(frozen=True)
class Storage:
    """How state by element rests in memory.

    Attributes:
        aux: the format of what a rule of whole matrices leaves to another rule; None for `format`.
        keep_fp32: roles whose state is in no format with blocks.
    """

    format: Format = FP32
    aux: Format | None = None
    keep_fp32: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What stands in every group: whoever loads blocks has to know their code."""
        formats = {"storage": self.format, "aux_storage": self.aux}
        return {key: format.name for key, format in formats.items() if format is not None and format.block}


@dataclass(frozen=True)
class Options:
    """What holds for the whole optimizer, whatever the rule."""

    decoupled: bool = True
    cautious: bool = False
    block_lr: BlockLR | None = None
    control: Control | None = None
    storage: Storage = Storage()
    stochastic_rounding: bool = False
    seed: int = 0
    max_grad_norm: float | None = None
    on_nonfinite: Literal["ignore", "raise", "skip"] = "ignore"
    compile: bool | None = None
    total_steps: int | None = None
    probe_batches: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    probe: ModelProbe | None = field(default=None, repr=False, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What of it stands in every group: what users read there, and what has to be saved."""
        found: dict[str, Any] = {"decoupled_weight_decay": self.decoupled, **self.storage.settings}
        if self.cautious:
            found["cautious_decay"] = True
        if self.stochastic_rounding:
            found["seed"] = self.seed
        if self.on_nonfinite == "skip":
            found["skipped_steps"] = 0
        if self.block_lr is not None:
            found |= {"peak_lr": 0.0} if self.tracks_peak else {}
            found["block_lr"] = str(self.block_lr)
        if self.control is not None:
            found |= {"control": str(self.control), "reference_lr": None}
        if self.varies:
            assert self.block_lr is not None
            found |= {"block_lr_step": 0, "multiplier_ramp": (0, 0) * len(self.block_lr.parts)}
        return found

    @property
    def varies(self) -> bool:
        """Whether multipliers change while training, each on its own."""
        return self.block_lr is not None and bool(self.block_lr.sources)

    @property
    def tracks_peak(self) -> bool:
        """Whether the largest learning rate so far has to be known."""
        own = self.block_lr
        return own is not None and (own.follows_lr or any(source.after_warmup for source in own.sources))

    @property
    def guarded(self) -> bool:
        """Whether the gradients are read once before the step."""
        return self.max_grad_norm is not None or self.on_nonfinite != "ignore"


class _OfInstances:
    """What a class is asked for by hosts that take it for an optimizer; instances have their own."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        who = owner.__name__
        if instance is None:
            raise AttributeError(
                f"{who}: an optimizer is needed here, got the class, which has no {self.name}; build one: "
                f"{who}(model, lr=...). In a Trainer: {IN_A_TRAINER}"
            )
        raise AttributeError(f"{who!r} object has no attribute {self.name!r}")


class KnownOptions:
    """Refuses options that the signature lacks, and says which it has, before Python names the first of them alone."""

    if not TYPE_CHECKING:
        param_groups = _OfInstances()
        state = _OfInstances()

    # A base of its own: `inspect.signature` takes the first of __new__ and __init__ in the order of classes.
    def __new__(cls, *given: Any, **options: Any) -> Self:
        parameters = inspect.signature(cls).parameters
        if options and not given and next(iter(parameters)) not in options:  # without any: a copy, or out of a pickle
            raise TypeError(without_model(cls.__name__))
        unknown = sorted(set(options) - set(parameters))
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise TypeError(f"{cls.__name__}: {_unknown(unknown, [*parameters][1:])}")
        return super().__new__(cls)


def _unknown(names: Sequence[str], known: Sequence[str]) -> str:
    torchs = [name for name in names if name in ("foreach", "fused", "capturable", "differentiable")]
    hint = f"; {', '.join(torchs)}: leave out, the fastest kernel is chosen by itself" if torchs else ""
    called = ", ".join(f"{name}{'' if name in torchs else nearest(name, known)}" for name in names)
    return f"no option is called {called}{hint}; options are {', '.join(known)}"
