"""How far a step moves each block (Kosson et al., Analyzing & Reducing the Need for Learning Rate Warmup, 2410.23922).

    update l2          |d|,  d = w' - w
    relative update    |d| / |w|
    angle              2 asin(|w/|w| - w'/|w'|| / 2),  where |w/|w| - w'/|w'||^2 = (|d|^2 - (|w'| - |w|)^2) / (|w| |w'|)

All are of whole segments, relative updates and angles also of single neurons: output rows, of an embedding tokens. The
arc cosine of a product in fp32 reads 0 below 2.5e-3 rad, where the steps of a trained model are: differences and sums
are in fp64 here, and show 1e-6 rad. RRC, the change of what a layer gives, is in `rrc.py`.

| symbol | name |
|---|---|
| w, w' | before, after |
| d | moved |
"""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sharpwise.blocks import Segment
from sharpwise.blocks.map import Blocks, blocks_for
from sharpwise.probes.estimate import By, Cost, Estimate, Measurement
from sharpwise.probes.parts import (
    CHUNK,
    about,
    choose,
    groups,
    labels,
    named_parameters,
    whole,
)
from sharpwise.probes.rrc import rrc

BY: tuple[By, ...] = ("segment", "layer", "role", "type", "model")
QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9, "largest": 1.0}


class UpdateSize:
    """How far one step moves the weights, in any training loop. Between `before` and `after` it keeps a copy of them.

    Args:
        model: with whole or sharded parameters; of shards, all processes have to call.
        blocks: the map of its segments, or overrides for the one that is made.
        select: roles, block types or globs on names of parameters; None takes all.

    Example:
        >>> model = nn.Linear(4, 2, bias=False)
        >>> sizes = UpdateSize(model)
        >>> sizes.before()
        >>> with torch.no_grad():
        ...     _ = model.weight.neg_()
        >>> moved = sizes.after()
        >>> moved.value(quantity="relative update", by="model"), moved.value(quantity="angle", by="model")
        (2.0, 3.14159...)
    """

    def __init__(self, model: nn.Module, blocks: Blocks = None, *, select: str | Iterable[str] | None = None) -> None:
        self.model, self.blocks = model, blocks_for(model, blocks, type(self).__name__)
        self.segments = choose(self.blocks, select)
        self._names = {segment.name for segment in self.segments}
        self._parameters: dict[str, nn.Parameter] = {}
        self._before: dict[str, Tensor] = {}
        named_parameters(model, self.blocks)

    @property
    def before_state(self) -> Mapping[str, Tensor]:
        """Copies of the parameters as `before` found them, by canonical name."""
        return self._before

    @torch.no_grad()
    def before(self) -> None:
        """Copy the parameters; call it right before the optimizer's step."""
        found = named_parameters(self.model, self.blocks)
        self._parameters = {name: p for name, p in found.items() if name in self._names}
        self._before = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def after(self) -> Measurement:
        """What the step changed, exact up to rounding; the copy is given up.

        By segment, by block type and by role within a layer ("layer"), by role, by type and for the model: "update l2"
        in units of the weights, "relative update", "angle" in radians. By segment also, of matrices, "relative update
        per neuron" and "angle per neuron": the mean over output rows, with quantiles in the notes. What was zero has no
        relative update and no angle, what is not finite nothing; the warnings name it.

        Raises:
            ValueError: `before` was not called, or the model has other parameters than it had then.
        """
        began = time.perf_counter()
        rows = self.rows()
        sums = torch.stack([r.sum(1) for r in rows]).cpu()
        names, estimates, warnings = labels(self.segments), [], []
        for group in groups(self.segments, BY):
            w, d, v = sums[list(group.members)].sum(0).tolist()
            found = sizes(w, d, v)
            if group.by == "segment" and len(found) < 3:
                warnings.append(f"{group.of}: {'all its weights are zero' if found else 'weights are not finite'}")
            notes = about(self.segments[group.members[0]]) if group.by == "segment" else {}
            estimates += [
                Estimate(
                    quantity, group.by, group.of, value, 0.0, "exact", group.layer, elements=group.elements,
                    unit="rad" if quantity == "angle" else "", notes=notes,
                )
                for quantity, value in found.items()
            ]  # fmt: skip
        for segment, of_rows in zip(self.segments, rows, strict=True):
            if segment.is_matrix:
                estimates += _per_neuron(segment, names[segment], of_rows)
        self.let_go()
        return Measurement("update size", estimates, cost=Cost(time.perf_counter() - began), warnings=warnings)

    @torch.no_grad()
    def rows(self) -> list[Tensor]:
        """For each segment, sums in fp64 of w^2, d^2 and w'^2 over each of its output rows: [3, copies * rows]."""
        self._check()
        by_name: dict[str, Tensor] = {}
        for segment in self.segments:
            if segment.name not in by_name:
                before, after = self._before[segment.name], self._parameters[segment.name]
                by_name[segment.name] = _sums(whole(before), whole(after), segment)
        return [_rows_of(by_name[segment.name], segment) for segment in self.segments]

    def rrc(self, batch: Any, *, tokens: int = 1024) -> Measurement:
        """`rrc` of the step that was taken since `before`; call it before `after`."""
        self._check()
        return rrc(self.model, self._before, batch, blocks=self.blocks, tokens=tokens)

    def let_go(self) -> None:
        """Give up the copy."""
        self._before = {}

    def _check(self) -> None:
        if not self._before:
            raise ValueError(
                "UpdateSize: there is nothing to compare with; call before() first, then take a step, then this"
            )
        now = named_parameters(self.model, self.blocks)
        for name, parameter in self._parameters.items():
            if now[name] is not parameter or now[name].shape != self._before[name].shape:
                raise ValueError(
                    f"{name} is another parameter than it was at before(); wrap, shard and move the model first, and "
                    "call before() again"
                )


def sizes(w: float, d: float, v: float) -> dict[str, float]:
    """The quantities from the sums of squares of the weights before, the update, and the weights after."""
    if not (math.isfinite(w) and math.isfinite(d) and math.isfinite(v)):
        return {}
    found = {"update l2": math.sqrt(d)}
    if w > 0:
        found["relative update"] = math.sqrt(d / w)
    if w > 0 and v > 0:
        found["angle"] = float(angles(*torch.tensor([[w], [d], [v]], dtype=torch.float64, device="cpu")))
    return found


def angles(w: Tensor, d: Tensor, v: Tensor) -> Tensor:
    """Angles in radians from the same sums, fp64; nan where one of the vectors is zero."""
    lengths = w.sqrt() * v.sqrt()
    chord = (d - (v.sqrt() - w.sqrt()).square()).clamp(min=0) / lengths
    return 2 * torch.asin((chord.sqrt() / 2).clamp(max=1))


def _per_neuron(segment: Segment, label: str, sums: Tensor) -> list[Estimate]:
    w, d, v = sums
    values = {"relative update per neuron": (d / w).sqrt(), "angle per neuron": angles(w, d, v)}
    estimates = []
    for quantity, all_rows in values.items():
        known = all_rows[all_rows.isfinite()].cpu()
        if not len(known):
            continue
        at = torch.quantile(known, torch.tensor(list(QUANTILES.values()), dtype=known.dtype, device="cpu")).tolist()
        estimates.append(
            Estimate(
                quantity, "segment", label, float(known.mean()), 0.0, "exact", segment.layer, len(known),
                segment.numel, "rad" if quantity.startswith("angle") else "",
                {**about(segment), **dict(zip(QUANTILES, at, strict=True))},
            )
        )  # fmt: skip
    return estimates


def _sums(before: Tensor, after: Tensor, segment: Segment) -> Tensor:
    """Sums of w^2, d^2, w'^2 for all output rows of the parameter, [3, copies, rows]; in fp64, a part at a time."""
    if not before.dim():
        before, after = before[None], after[None]
    others, kept_first = segment.inputs, segment.stacked or segment.first_dim == 0
    size = max(CHUNK // max(before[:1].numel(), 1), 1)
    parts = []
    for b, a in zip(before.split(size), after.split(size), strict=True):
        w, v = b.double(), a.double()
        squares = [x.square_() for x in (v - w, w, v)]
        parts.append(torch.stack([squares[i].sum(others) if others else squares[i] for i in (1, 0, 2)]))
    # Output rows along the dimension that was split follow each other; elsewhere every part has a share of each row.
    sums = torch.cat(parts, 1) if kept_first else torch.stack(parts).sum(0)
    return sums.reshape(3, segment.copies, segment.output_size)


def _rows_of(sums: Tensor, segment: Segment) -> Tensor:
    if segment.whole and segment.count == 1:
        return sums.flatten(1)
    return sums.index_select(2, segment.row_index(sums.device)).flatten(1)


__all__ = ["UpdateSize"]
