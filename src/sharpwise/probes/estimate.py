"""What a probe says: values with their uncertainty, per set of elements of the model, as one table."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sharpwise.table import Table

By = Literal["segment", "layer", "type", "role", "model"]
"""What a value is of: one segment, all of one role or type in a layer, all of a type, all of a role, or everything."""


@dataclass(frozen=True)
class Estimate:
    """One measured quantity.

    Args:
        quantity: what was measured, as "sharpness" or "alpha".
        by: what it is of; `of` is its name: a segment's, a role's or a type's.
        layer: of the transformer, None outside the stack or over all layers.
        value: in `unit`.
        error: half the width of the 95% interval of a statistical estimate, the residual bound of an eigenvalue, 0 for
            what is exact up to rounding; None where it is not known, as from one sample.
        kind: what `error` is.
        samples: independent draws that it comes from.
        elements: of the model that it is of.
        unit: of the value, and for statistical estimates of what is drawn: "per token", "per sequence".
        notes: further numbers, as of the random baseline of a spectrum.
    """

    quantity: str
    by: By
    of: str
    value: float
    error: float | None = None
    kind: Literal["t-interval", "residual", "exact"] = "t-interval"
    layer: int | None = None
    samples: int = 1
    elements: int = 0
    unit: str = ""
    notes: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What a measurement took: seconds, and gradients' worth of passes over the model.

    Args:
        seconds: of wall-clock time.
        gradients: passes forward and backward, as many as take so long.
    """

    seconds: float = 0.0
    gradients: float = 0.0


class Measurement(Sequence[Estimate]):
    """Estimates of one probe. Iterate over them, `select` some, print them, save them, or hand `rows()` to pandas.

    Args:
        probe: which.
        estimates: what it found.
        settings: what it was asked for, plain values.
        cost: of all of them.
        step: of training after which it was made.
        warnings: what a reader has to know, such as which segments have no value and why.
        arrays: longer results, such as eigenvalues, by the name of what they are of.
        environment: where, when and with what it was made, and on which text, as far as that is known.
    """

    def __init__(
        self,
        probe: str,
        estimates: Iterable[Estimate],
        *,
        settings: Mapping[str, Any] | None = None,
        cost: Cost | None = None,
        step: int | None = None,
        warnings: Iterable[str] = (),
        arrays: Mapping[str, Sequence[float]] | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        self.probe, self._estimates = probe, tuple(estimates)
        self.settings, self.cost, self.step = dict(settings or {}), cost or Cost(), step
        self.warnings, self.arrays = tuple(warnings), dict(arrays or {})
        self.environment = dict(environment or {})

    def __len__(self) -> int:
        return len(self._estimates)

    def __getitem__(self, index: Any) -> Any:
        return self._estimates[index]

    def __iter__(self) -> Iterator[Estimate]:
        return iter(self._estimates)

    def select(self, **wanted: Any) -> "Measurement":
        """Those with these values, as `select(by="type", of="VO")`."""
        return self._with([e for e in self if all(getattr(e, key) == value for key, value in wanted.items())])

    def value(self, **wanted: Any) -> float:
        """The value of the only one that `select` finds.

        Raises:
            KeyError: there is none, or more than one.
        """
        found = self.select(**wanted)
        if len(found) != 1:
            raise KeyError(f"{len(found)} estimates have {wanted}")
        return float(found[0].value)

    def at(self, step: int | None) -> "Measurement":
        """The same, marked as measured after a step of training."""
        return self._with(self, step)

    def _with(self, estimates: Iterable[Estimate], step: int | None = None) -> "Measurement":
        return Measurement(
            self.probe,
            estimates,
            settings=self.settings,
            cost=self.cost,
            step=self.step if step is None else step,
            warnings=self.warnings,
            arrays=self.arrays,
            environment=self.environment,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Plain dicts, one per estimate; `pandas.DataFrame(measurement.rows())` works."""
        return [{"step": self.step, **asdict(e), **{f"note_{k}": v for k, v in e.notes.items()}} for e in self]

    def to_json(self) -> str:
        """Everything, so that `from_json` gives it back."""
        about = {"probe": self.probe, "step": self.step, "settings": self.settings, "cost": asdict(self.cost)}
        about |= {"environment": self.environment} if self.environment else {}
        estimates = [{k: _plain(v) for k, v in asdict(e).items()} for e in self]
        arrays = {name: list(values) for name, values in self.arrays.items()}
        return json.dumps(
            {**about, "warnings": list(self.warnings), "estimates": estimates, "arrays": arrays}, indent=1
        )

    @staticmethod
    def from_json(text: str) -> "Measurement":
        """What `to_json` wrote."""
        data = json.loads(text)
        estimates = [Estimate(**{k: _number(k, v) for k, v in one.items()}) for one in data["estimates"]]
        return Measurement(
            data["probe"],
            estimates,
            settings=data["settings"],
            cost=Cost(**data["cost"]),
            step=data["step"],
            warnings=data["warnings"],
            arrays=data.get("arrays"),
            environment=data.get("environment"),
        )

    def table(self) -> Table:
        """For the terminal."""
        columns = ("quantity", "of", "layer", "value", "error", "samples", "unit")
        return Table(columns, [[getattr(e, column) for column in columns] for e in self])

    def __str__(self) -> str:
        return str(self.table())


def t_interval(draws: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent draws and half the width of its 95% interval (None from fewer than two)."""
    n = len(draws)
    mean = math.fsum(draws) / n
    if n < 2:
        return mean, None
    variance = math.fsum((x - mean) ** 2 for x in draws) / (n - 1)
    return mean, t_quantile(n - 1) * math.sqrt(variance / n)


_FEW = {1: 12.706204736, 2: 4.302652730, 3: 3.182446305, 4: 2.776445105}


def t_quantile(freedom: int) -> float:
    """Of Student's t at 0.975, to 1.1e-4 relative: tabulated for few degrees of freedom, else Cornish and Fisher's."""
    if freedom in _FEW:
        return _FEW[freedom]
    z, n = 1.959963984540054, freedom
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / n + g2 / n**2 + g3 / n**3 + g4 / n**4


def _plain(value: Any) -> Any:
    """Infinite and undefined numbers as text, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _number(key: str, value: Any) -> Any:
    return float(value) if key in ("value", "error") and isinstance(value, str) else value


__all__ = ["By", "Cost", "Estimate", "Measurement", "t_interval", "t_quantile"]
