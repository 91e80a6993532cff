"""The picture of a density of eigenvalues, as stochastic Lanczos quadrature finds it: smoothed, with its interval."""

import math
from collections.abc import Sequence

import numpy as np

from sharpwise.probes.estimate import Measurement
from sharpwise.probes.lanczos import Density
from sharpwise.report import figures
from sharpwise.report.curves import rounded
from sharpwise.report.plot import Figure

HEIGHT = 320
SIZE = "weights"  # the array of a measurement that has a density


def has_density(measurement: Measurement) -> bool:
    """Whether there is a density in it to draw."""
    return len(measurement.arrays.get(SIZE, ())) > 0


def density_curve(measurements: Sequence[Measurement]) -> Figure:
    """A line per measurement, named by its step; of a single one with a band of its 95% interval.

    The y axis is logarithmic and reaches down to where one eigenvalue in ten times the dimension would stand: most
    are near zero, and what is looked for are the few that are not.

    Raises:
        ValueError: there is no density to draw.
    """
    found = [Density.of(one) for one in measurements if has_density(one)]
    if not found:
        raise ValueError("there is no density to draw")
    curves = [one.curve() for one in found]
    peak = max(float(y.max()) for _, y, _ in curves)
    floor = peak * max(0.1 / max(float(one.settings.get("dim", 1)) for one in found), 1e-12)
    figure = figures.figure("eigenvalue", "density (log scale)", HEIGHT)
    palette = list(figures.TYPE_COLOURS.values())[1:]
    for i, (one, (x, y, error)) in enumerate(zip(found, curves, strict=True)):
        name = "" if one.step is None else f"step {one.step:,}"
        colour = palette[i % len(palette)]
        if error is not None and len(found) == 1:
            figure.add_scatter(
                x=rounded([*x, *x[::-1]]),
                y=_logged([*(y + error), *(y - error)[::-1]], floor),
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillcolor=figures.faded(colour, 0.2),
                hoverinfo="skip",
                showlegend=False,
            )
        figure.add_scatter(
            x=rounded(x),
            y=_logged(y, floor),
            mode="lines",
            line={"width": 2, "color": colour},
            name=name,
            hovertemplate=f"{name}{'<br>' if name else ''}%{{x:.3g}}: %{{y:.2g}}<extra></extra>",
        )
    figure.update_yaxes(type="log", range=[math.log10(floor), math.log10(peak * 2)], nticks=6)
    figure.update_xaxes(nticks=6)
    figure.update_layout(showlegend=len(found) > 1, margin={"r": 14})
    return figure


def _logged(values: Sequence[float] | np.ndarray, floor: float) -> list[float]:
    """What is below the axis stays below it; zero has no place on a logarithmic one."""
    return rounded(np.maximum(np.asarray(values, dtype=np.float64), floor / 10), 4)


__all__ = ["density_curve", "has_density"]
