"""The spectrum of each matrix: PL_Alpha_Hill, as in LLR (arXiv 2605.22297), stable rank and norms.

The equations are in `sharpwise.block_lr.tail`. At initialization alpha is nothing but the shape of the matrix, so that
of a random matrix of the same shape stands beside it.
"""

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import torch
from torch import nn

from sharpwise.block_lr.tail import (
    Convention,
    Spectrum,
    alpha_hill,
    alpha_of_random,
    gram_eigenvalues,
    marchenko_pastur,
)
from sharpwise.blocks import Segment
from sharpwise.blocks.map import Blocks, blocks_for
from sharpwise.probes.estimate import Cost, Estimate, Measurement
from sharpwise.probes.parts import about, choose, labels, named_parameters, whole

LEAST = 50


@torch.no_grad()
def spectrum(
    model: nn.Module,
    *,
    blocks: Blocks = None,
    select: str | Iterable[str] | None = None,
    convention: Convention = "hill",
    least: int = LEAST,
    eigenvalues: bool = False,
) -> Measurement:
    """Tail exponent, stable rank and norms of each matrix of a model; q, k and v of a fused one apart, experts each.

    Quantities, all exact up to rounding: "alpha", "alpha of a random matrix" (the value for its shape), "stable rank"
    (sum of eigenvalues over the largest, 0 of a zero matrix), "spectral norm", "frobenius norm". Where a matrix has no
    alpha (fewer than `least` eigenvalues, rank of half of them or less, all of them alike) the warnings say so;
    matrices that are not finite have no values at all.

    Args:
        model: it is left as it was.
        blocks: the map of its segments, or overrides for the one that is made.
        select: roles, block types or globs on names of parameters; None takes all matrices.
        convention: "hill" for the formula above, "published" for that of the released code (5 (alpha - 1)/n more).
        least: eigenvalues that a matrix needs to have an alpha.
        eigenvalues: keep those of each matrix, ascending, in `arrays` of the result.

    Raises:
        ValueError: nothing matches `select`, or there is no matrix among it; an unknown convention.
    """
    if convention not in get_args(Convention):
        raise ValueError(f"spectrum: convention: got {convention!r}, allowed: {', '.join(get_args(Convention))}")
    began = time.perf_counter()
    known = blocks_for(model, blocks, "spectrum")
    parameters, names = named_parameters(model, known), labels(known)
    chosen = [segment for segment in choose(known, select) if segment.is_matrix and segment.numel]
    if not chosen:
        raise ValueError(f"select={select!r} matches no matrix, only vectors; a spectrum is of matrices")
    estimates: list[Estimate] = []
    warnings: list[str] = []
    arrays: dict[str, Any] = {}
    for segment in chosen:
        for copy, matrix in enumerate(segment.matrices(whole(parameters[segment.name]))):
            label = f"{names[segment]}[{copy}]" if segment.stacked else names[segment]
            spec = Spectrum.of(matrix)
            if eigenvalues and spec is not None:
                arrays[label] = spec.eigenvalues.tolist()
            found, problem = _values(spec, matrix.shape, convention, least)
            estimates += _estimates(segment, label, found, matrix.numel())
            if problem:
                warnings.append(f"{label}: {problem}")
    settings = {"convention": convention, "least": least, "random": "quantiles of Marchenko and Pastur's law"}
    cost = Cost(seconds=time.perf_counter() - began)
    return Measurement("spectrum", estimates, settings=settings, cost=cost, warnings=warnings, arrays=arrays)


def _estimates(segment: Segment, label: str, found: dict[str, float], elements: int) -> Iterator[Estimate]:
    for quantity, value in found.items():
        yield Estimate(
            quantity, "segment", label, value, 0.0, "exact", segment.layer, elements=elements, notes=about(segment)
        )


def _values(
    spec: Spectrum | None, shape: torch.Size, convention: Convention, least: int
) -> tuple[dict[str, float], str]:
    """The quantities of a matrix, and what is the matter where some are missing."""
    if spec is None:
        return {}, "some of its elements are not finite"
    found = {"stable rank": spec.stable_rank, "spectral norm": spec.norm, "frobenius norm": spec.frobenius}
    n = len(spec.scaled)
    if n < least:
        return found, f"no alpha: it has {n} eigenvalues, at least {least} are needed"
    alpha = alpha_hill(spec.scaled, convention)
    if alpha is None:
        what = "all its elements are zero" if spec.norm == 0 else "half of its eigenvalues or more are zero"
        return found, f"no alpha: {what}"
    if alpha == math.inf:
        return found, "no alpha: its eigenvalues are all alike, there is no tail"
    rows, columns = shape
    random = alpha_of_random(rows, columns, convention)
    return {"alpha": alpha, "alpha of a random matrix": random, **found}, ""


__all__ = ["Convention", "alpha_hill", "alpha_of_random", "gram_eigenvalues", "marchenko_pastur", "spectrum"]
