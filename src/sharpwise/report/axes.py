"""The scale of an axis: where a value lies on it, and where its ticks are."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sharpwise.report.plot import Node
from sharpwise.report.text import short

TICKS = 7  # at most so many, where nothing else is asked for


class Scale:
    """The scale of an axis: linear, logarithmic, or of names.

    Args:
        axis: of a figure; where it has no range, that of the `values` is taken.
        values: all that is drawn along it.
        room: a share to add at both ends of what was found so.
    """

    def __init__(self, axis: Node, values: Iterable[Any], room: float = 0.0) -> None:
        self.axis, self.log = axis, axis.type == "log"
        self.names: tuple[str, ...] = ()
        known = [value for value in values if value is not None]
        if axis.type == "category" or any(isinstance(value, str) for value in known):
            self.names = tuple(dict.fromkeys(map(str, known)))
            self.low, self.high = -0.5, max(len(self.names), 1) - 0.5
        elif axis.range:
            self.low, self.high = axis.range
        else:
            found = [self._units(value) for value in known if math.isfinite(self._units(value))] or [0.0, 1.0]
            low, high = min(found), max(found)
            more = (high - low) * room or (0.0 if high > low else 0.5)
            self.low, self.high = low - more, high + more

    def _units(self, value: Any) -> float:
        """In units of the range."""
        if self.names:
            return float(self.names.index(str(value))) if isinstance(value, str) else float(value)
        if value is None:
            return math.nan
        if self.log:
            return math.log10(value) if value > 0 else -math.inf if value == 0 else math.nan
        return float(value)

    def at(self, value: Any) -> float:
        """Where a value lies, 0 at the low end of the axis and 1 at its high end; nan where it has no place."""
        return self.of_range(self._units(value))

    def of_range(self, units: float) -> float:
        """The same for what is given in units of the range, as the places of notes are."""
        place = (units - self.low) / (self.high - self.low)
        return max(min(place, 1e3), -1e3)

    def ticks(self) -> list[tuple[float, str]]:
        """Places, 0 to 1, and labels."""
        axis = self.axis
        if axis.tickvals is not None:
            return [(self.at(value), str(text)) for value, text in zip(axis.tickvals, axis.ticktext, strict=True)]
        if self.names:
            return [(self.at(name), name) for name in self.names]
        low, high = sorted((self.low, self.high))
        most = axis.nticks or TICKS
        values = _powers(low, high, axis.dtick, most) if self.log else _linear(low, high, axis.dtick, most)
        labels = [_in_powers(value) if self.log else _label(value, values, axis.tickformat) for value in values]
        return [(self.at(value), label) for value, label in zip(values, labels, strict=True)]


def _linear(low: float, high: float, step: float | None, most: int) -> list[float]:
    if step is None:
        unit = 10.0 ** math.floor(math.log10((high - low) / most))
        step = next(unit * k for k in (1, 2, 5, 10, 20) if (high - low) / (unit * k) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _powers(low: float, high: float, dtick: Any, most: int) -> list[float]:
    """1, 2 and 5 of each power where few powers are in reach, else powers alone."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    fine = [k * 10.0**power for power in powers for k in (1, 2, 5)]
    coarse = [10.0**power for power in powers]
    inside = [value for value in coarse if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    if dtick == "D2" or len(inside) < 2:
        inside = [value for value in fine if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    return inside[:: math.ceil(len(inside) / most) or 1]


def _in_powers(value: float) -> str:
    return f"{value:g}" if 1e-2 <= value < 1e5 else _exponent(value)


def _exponent(value: float) -> str:
    """
    >>> _exponent(2e-05), _exponent(-2.5e6), _exponent(0.0)
    ('2e-5', '-2.5e6', '0')
    """
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if value else "0"


def _label(value: float, values: Sequence[float], form: str | None) -> str:
    if form == ",d":
        return f"{value:,.0f}"
    largest = max(map(abs, values))
    if form == "~s" or largest >= 1e3:
        return "0" if value == 0 else (f"{value / 1000:g}k" if 1e3 <= abs(value) < 1e4 else short(value))
    if 0 < largest < 1e-2:
        return _exponent(value)
    return f"{value:.10g}"
