"""Per-block learning rates that follow a measurement: of what, when, and how the multipliers get there.

The engine measures where one is due, before the step that follows `taken` steps (from 0), and asks `multipliers` what
follows. From the multipliers as they are, it goes there linearly over `soft` steps:

    m(t) = m_before + (m_after - m_before) min((t - begin + 1) / soft, 1)

m_before is where the path before led at the step of the measurement. Each factor of a product has its own path; within
an ablation of a product it is that of what was measured last, and the longest of what was measured together. All of it
is saved, so that a resumed run has the same multipliers at every step.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sharpwise.block_lr.base import MeasuredLR, is_number

PEAK: Literal["peak"] = "peak"
"""In place of a first step: when the learning rate has reached its peak."""


@dataclass(frozen=True, kw_only=True)
class PhasedLR(MeasuredLR):
    """Base of block_lrs that are measured at a cadence, in a phase of the training.

    Args:
        start, stop: first and last step of the phase: a whole number of steps, or a fraction of `total_steps`, which
            the optimizer then has to be told. start="peak": at multiples of `every`, but for those at which the
            learning rate is higher than ever before, as in a warm-up. stop=None: never. Multipliers stay as they are
            after the last measurement.
        every: steps between measurements.
        soft: steps in which multipliers go to their new values; None: `every`.
    """

    start: float | Literal["peak"] = 0
    stop: float | None = None
    every: int = 100
    soft: int | None = None

    unit: ClassVar[str] = "a whole number of steps >= 0 or a fraction of the training in (0, 1)"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start", "stop"):
            value = getattr(self, name)
            word = {"start": PEAK, "stop": None}[name]
            if value != word and not _is_phase(value):
                also = f", or {PEAK!r}" if name == "start" else ""
                raise ValueError(f"{self.name}: {name} must be {self.unit}{also}, got {value!r}")
        for name, least in (("every", 1), ("soft", 0)):
            value = getattr(self, name)
            if not (value is None and name == "soft") and (type(value) is not int or value < least):
                raise ValueError(f"{self.name}: {name} must be a whole number of steps >= {least}, got {value!r}")

    @property
    def smooth(self) -> int:
        return self.every if self.soft is None else self.soft

    def due(self, taken: int, total_steps: int | None) -> bool:
        start, stop = self.phase(total_steps)
        if self.after_warmup and not taken:
            return False
        return start <= taken and (stop is None or taken <= stop) and (taken - start) % self.every == 0

    @property
    def after_warmup(self) -> bool:
        return self.start == PEAK

    def check_length(self, total_steps: int | None) -> None:
        self.phase(total_steps)

    def phase(self, total_steps: int | None) -> tuple[int, int | None]:
        """First and last step of the phase.

        Raises:
            ValueError: one is a fraction, and `total_steps` is not known; or it stops before it starts.
        """
        start = 0 if isinstance(self.start, str) else self._steps("start", self.start, total_steps)
        stop = None if self.stop is None else self._steps("stop", self.stop, total_steps)
        if stop is not None and stop < start:
            raise ValueError(f"{self.name}: it would stop at step {stop}, before it starts, at {start}")
        return start, stop

    def _steps(self, name: str, value: float, total_steps: int | None) -> int:
        if not _is_fraction(value):
            return int(value)
        if total_steps is None:
            raise ValueError(
                f"{self.name}: {name}={value:g} is a fraction of the training, and nothing says how long that is; give "
                f"total_steps= to the optimizer, or {name} as a whole number of steps"
            )
        return round(value * total_steps)


def _is_fraction(value: Any) -> bool:
    return is_number(value) and 0.0 < value < 1.0


def _is_phase(value: Any) -> bool:
    if isinstance(value, float) and value == 1.0:
        return False  # one step, or all of the training?
    return is_number(value) and (_is_fraction(value) or (0 <= value < math.inf and value == int(value)))
