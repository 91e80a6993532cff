"""What holds for a whole optimizer, whatever its rule."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from sharpwise.block_lr import BlockLR

ModelProbe = Callable[..., dict[str, list[float]]]
"""(model, batches, blocks, seed=) -> the sharpness of what is trained now: by name, one value per segment. Pickled with
the optimizer, so that it has to be a function of a module."""


@dataclass(frozen=True)
class Options:
    """What holds for the whole optimizer, whatever the rule."""

    decoupled: bool = True
    block_lr: BlockLR | None = None
    stochastic_rounding: bool = False
    seed: int = 0
    max_grad_norm: float | None = None
    on_nonfinite: Literal["ignore", "raise", "skip"] = "ignore"
    compile: bool | None = None
    total_steps: int | None = None
    probe_batches: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    probe: ModelProbe | None = field(default=None, repr=False, compare=False)

    @property
    def varies(self) -> bool:
        """Whether multipliers change while training, each on its own."""
        return self.block_lr is not None and bool(self.block_lr.sources)

    @property
    def guarded(self) -> bool:
        """Whether the gradients are read once before the step."""
        return self.max_grad_norm is not None or self.on_nonfinite != "ignore"
