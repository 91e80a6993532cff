"""The reference: the step of one view in torch operations, as the equations stand. It takes every view there is.

Every tensor is seen as a view whose *rows* run along one dimension. Vectors of one number per row come shaped to
broadcast against the view.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.backends.base import Backend, Found, Spec, row_decay, row_step
from sharpwise.engine.mesh import Bucket, Partial, ReduceGroup
from sharpwise.engine.program import decayed
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.stored import Stored, compute_dtype
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import Rule, add
from sharpwise.storage import Dense
from sharpwise.storage.dense import mix, step_key

CHUNK = 1 << 22
"""Elements per call: temporaries stay below 16 MiB, and tensors up to this size round exactly as torch's do."""


IN_CACHE = 1 << 17
"""Elements whose temporaries stay in the cache of a CPU."""


class Noise(NamedTuple):
    """Global element numbers (their sum broadcasts to the view) and the key of this step, for stochastic rounding."""

    row: Tensor
    column: Tensor
    key: Any


def aimed(
    rule: Rule, s: Mapping[str, Any], p: Tensor, g: Tensor, stored: Sequence[Stored]
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
    """Load, clip, coupled decay, direction: p as a number, new state, numerator and denominator. Nothing is written."""
    dtype = compute_dtype(p.dtype)
    x, g = (Stored.dense(t).decode(dtype) for t in (p, g))
    old = (held.decode(dtype) for held in stored)
    if "clip" in s and rule.stage != "move":
        g = g * s["clip"]
    if "weight_decay" in s and rule.stage != "move":
        g = add(g, x, s["weight_decay"])
    names = [name for name, kind in rule.state.items() if kind == "element"]
    return x, *rule.direction(g, dict(zip(names, old, strict=True)), s)


def update(
    rule: Rule,
    s: Mapping[str, Any],
    p: Tensor,
    g: Tensor,
    stored: Sequence[Stored],
    row_step: Tensor | None = None,
    row_decay: Tensor | None = None,
    noise: Noise | None = None,
    cautious: bool = False,
    absmax: Mapping[str, Tensor] | None = None,
) -> None:
    """Move p and its element state by one step, in place.

    Scalars besides the rule's own: `step` (lr * multiplier / bias correction), `decay` (1 - lr wd), and, where asked
    for, `clip` (factor on the gradient), `ok` (0: keep everything as it was), `weight_decay` (coupled). Cautious: decay
    only where the update and p agree in sign. absmax: of blocks of state that are not all held here, by name.
    """
    x, new, numerator, denominator = aimed(rule, s, p, g, stored)
    factor = s.get("decay") if row_decay is None else row_decay
    if factor is not None and rule.stage != "input":
        x = decayed(x, numerator, factor, cautious)
    step = s["step"] if row_step is None else row_step
    if rule.stage == "input":
        x = numerator
    elif denominator is None:
        x = add(x, numerator, -step)
    elif isinstance(step, float):
        x = torch.addcdiv(x, numerator, denominator, value=-step)
    else:
        x = x - (step * numerator) / denominator
    store(Stored.dense(p), x, s, noise, 0)
    names = [name for name, kind in rule.state.items() if kind == "element"]
    for slot, (name, held) in enumerate(zip(names, stored, strict=True), start=1):
        store(held, new[name], s, noise, slot, (absmax or {}).get(name))


def store(
    held: Stored, value: Tensor, s: Mapping[str, Any], noise: Noise | None, slot: int, absmax: Tensor | None = None
) -> None:
    """Round and write one tensor, of which `slot` is the number, unless the step is not taken."""
    rounds = held.codes.dtype == torch.bfloat16 or not (isinstance(held.format, Dense) or held.format.block)
    own = (noise.row + noise.column, mix(noise.key + slot)) if noise is not None and rounds else None
    held.copy_(held.encode(value, own, absmax), s["ok"] != 0 if "ok" in s else True)


def noise_of(view: ParamView, t: Any) -> Noise:
    """What stochastic rounding needs at step t."""
    if "index" not in view.kept:
        view.kept["index"] = view.element_index(view.device)
    step = t.long() if isinstance(t, Tensor) else int(t)
    row, column = view.kept["index"]
    return Noise(row, column, (view.key + step_key(step, int(view.group["seed"]))) & 0xFFFFFFFF)


class Reference(Backend):
    """Eager torch operations, view by view: each rounds as torch's own loop does."""

    name: ClassVar[str] = "reference"

    def refuses(self, spec: Spec) -> str:
        return ""

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        known = self._largest(views, grads, scalars, found)
        for view, g in zip(views, grads, strict=True):
            self._move(view, view.rows_of(g), scalars, found, known.get(id(view), {}))

    def _largest(
        self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found
    ) -> dict[int, dict[str, Tensor]]:
        """The largest elements of blocks of new state that a mesh cuts, by id of the view and name: one collective.

        Nothing is written. What is NaN is infinite here: a maximum over processes may lose it, and no block with
        either has numbers.
        """
        partials: dict[int, dict[str, Partial]] = {}
        bucket = Bucket(ReduceGroup.of(view.shard for view in views if view.cut_blocks), "max")
        for view, g in zip(views, grads, strict=True):
            if not view.cut_blocks:
                continue
            rule, s, p, g = found.rules.get(id(view), view.rule), scalars.named(view), view.parameter(), view.rows_of(g)
            stored = dict(zip(view.elements, view.stored(), strict=True))
            pieces_of = {name: [stored[name].measured(p[:0])] for name in view.cut_blocks}
            for j in pieces(view, rule):
                new = aimed(rule, s, p[j], g[j], [one.piece(j) for one in stored.values()])[1]
                for name, own in pieces_of.items():
                    own.append(stored[name].measured(new[name]))
            found_here = {name: torch.cat(own).nan_to_num(nan=math.inf) for name, own in pieces_of.items()}
            partials[id(view)] = {name: bucket.add(own, view.shard) for name, own in found_here.items()}
        bucket.reduce()
        return {key: {name: one.values for name, one in own.items()} for key, own in partials.items()}

    def _move(
        self, view: ParamView, g: Tensor, scalars: StepScalars, found: Found, absmax: Mapping[str, Tensor]
    ) -> None:
        step, decay = row_step(view, scalars, found), row_decay(view, scalars, found)
        s = scalars.named(view)
        noise = noise_of(view, scalars.t(view)) if scalars.stochastic else None
        p, stored = view.parameter(), view.stored()
        rule = found.rules.get(id(view), view.rule)
        for j in pieces(view, rule):
            own = None if noise is None else Noise(cut_rows(noise.row, j), noise.column, noise.key)
            lines = cut_rows(step, j), cut_rows(decay, j)
            known = {name: t[j] for name, t in absmax.items()}
            held = [one.piece(j) for one in stored]
            update(rule, s, p[j], g[j], held, *lines, own, scalars.cautious, known)
        view.write_back(p, stored)


def pieces(view: ParamView, rule: Rule, cached: bool = False) -> list[slice]:
    """A view along its first dimension, in pieces for which temporaries stay small; cached: on a CPU in its cache."""
    n, most = view.shape[0], IN_CACHE if cached and view.device.type == "cpu" else CHUNK
    size = max(1, n)
    if rule is view.rule:  # else it knows the matrix as a whole
        size = max(1, most * size // max(view.numel, 1))
    return [slice(i, i + size) for i in range(0, n, size)]


def cut_rows(tensor: Any, rows: slice) -> Any:
    """Of numbers that broadcast against a view, those of some of its rows."""
    return tensor[rows] if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[0] > 1 else tensor
