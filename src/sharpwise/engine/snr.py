"""The gradient SNR of matrices in a step, for controls that ask for it: the sums of `controls.snr`, and its state.

<g, M> and |g|^2 of matrices are read before anything moves, and ride in the first collective of the step. The state is
the same in every process. All of it is worked out by torch, in fp64, in a read of gradient and momentum of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpwise.controls import Control
from sharpwise.controls.snr import rrc_growth, snr_of, with_draw
from sharpwise.engine.backends.reference import pieces
from sharpwise.engine.layout import Layouts
from sharpwise.engine.mesh import Bucket, Partial
from sharpwise.engine.scalars import StepScalars, on_device
from sharpwise.engine.view import SNR, ParamView
from sharpwise.rules.base import MatrixRule


class GradientSNR:
    """Measures what a control asks for. Does nothing where that is nothing."""

    def __init__(self, control: Control) -> None:
        self.samples = control.snr_samples
        self._layouts = Layouts()
        self._sums: list[tuple[ParamView, Partial]] = []

    def begin(self, views: Sequence[ParamView], grads: Sequence[Tensor], bucket: Bucket) -> None:
        """Add the sums of a step to what is reduced over the processes."""
        measured = [pair for pair in zip(views, grads, strict=True) if pair[0].has_snr]
        self._sums = [(v, bucket.add(self._products(v, g), v.shard)) for v, g in measured]

    def _products(self, view: ParamView, g: Tensor) -> Tensor:
        """<g, M> and g.g of the matrices, of what is held here: fp64 [2, matrices]."""
        name = view.rule.momentum_state
        assert name is not None
        g, m = view.rows_of(g), view.stored_as(name)
        parts = [torch.zeros(2, *g[:0].sum(view.dim).shape, dtype=torch.float64, device=g.device)]
        for j in pieces(view, view.rule, cached=True):
            own, past = g[j].double(), m.piece(j).decode(view.dtype).double()
            parts.append(torch.stack([(own * past).sum(view.dim), (own * own).sum(view.dim)]))
        rows = torch.stack(parts).sum(0) if view.dim == 0 else torch.cat(parts, 1)
        matrices = view.by_unit("matrix", self._layouts)
        return torch.stack([matrices.gather(of) for of in rows.view(2, -1)])

    def finish(self, scalars: StepScalars, unscale: Any) -> dict[int, Tensor]:
        """Write the state, and give the factor of each matrix, fp64, by id of the view.

        Args:
            unscale: what undoes the scale of a loss in the gradients; None for 1.
        """
        factors = {}
        for view, partial in self._sums:
            kept, (product, square) = view.own[SNR], partial.values
            unit = 1.0 if unscale is None else on_device(unscale, view.device)
            clip = scalars.clip_of(view)
            weighed = torch.cat([kept[:, :2], _weight_before(view, kept[:, 2], scalars)[:, None]], 1)
            moved = with_draw(weighed, product * unit, square * unit * unit)
            moved[:, 2] = _with_gradient(view, moved[:, 2], 1.0 if clip is None else clip / unit, scalars)
            ok = scalars.ok_of(view)
            kept.copy_(moved if ok is True else torch.where(ok != 0, moved, kept))
            factors[id(view)] = factors_of(view, self.samples)
        self._sums = []
        return factors


def factors_of(view: ParamView, samples: int) -> Tensor:
    """The factor of each of its matrices by its state, fp64."""
    if "inputs" not in view.kept:
        sizes = [inputs for s in view.segments for inputs in [s.numel // (s.rows * s.copies)] * s.copies]
        view.kept["inputs"] = torch.tensor(sizes, dtype=torch.float64, device="cpu").to(view.device)
    found: Tensor = 1 / rrc_growth(snr_of(view.own[SNR], samples), samples, view.kept["inputs"])
    return found


def _with_gradient(view: ParamView, weight: Tensor, gradient: Any, scalars: StepScalars) -> Tensor:
    """The momentum, if gradients are numbers: `weight` before the step, and this one in it."""
    rule, s = view.rule, scalars.named(view)
    g = torch.zeros_like(weight) + gradient
    state = {name: weight if name == rule.momentum_state else torch.zeros_like(g) for name in view.elements}
    new: Mapping[str, Tensor] = (rule.input if isinstance(rule, MatrixRule) else rule.direction)(g, state, s)[0]
    return new[str(rule.momentum_state)]


def _weight_before(view: ParamView, weight: Tensor, scalars: StepScalars) -> Tensor:
    """Of state that was saved without it: as if no gradient had been clipped."""
    one, t = torch.ones_like(weight), scalars.t(view)
    kept, gain = _with_gradient(view, one, 0.0, scalars), _with_gradient(view, 0 * one, 1.0, scalars)
    return torch.where(weight == 0, gain * (1 - kept ** (t - 1)) / (1 - kept), weight)
