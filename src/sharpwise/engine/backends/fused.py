"""Torch's own kernel for lists of tensors, for the views whose update it computes exactly."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.backends.base import LEAST, Backend, Found, Spec, pays
from sharpwise.engine.rehearsal import on_a_device
from sharpwise.engine.scalars import Row, StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.shards import local

SCRATCH = 1 << 19
"""Elements of gradients that are scaled at a time, so that the copies take little memory."""
DEVICE_SCRATCH = 1 << 22
"""The same on a device."""


class Slice(NamedTuple):
    """A segment of a view: its number, its rows (None: the whole view), and the state of these."""

    view: int
    segment: int
    rows: slice | None
    p: Tensor
    m: Tensor
    v: Tensor
    step: Tensor


class Batch(NamedTuple):
    """Whole tensors or cuts of flattened ones by their place in a list, and where copies of them lie."""

    pieces: list[tuple[int, slice | None]]
    copies: list[Tensor]
    scratch: Tensor


class Call(NamedTuple):
    """Slices of one learning rate and decay, and their tensors as the kernel takes them."""

    slices: list[Slice]
    lists: tuple[list[Tensor], ...]
    batches: list[Batch]


class TorchFused(Backend):
    """AdamW by `torch._fused_adamw_`, one call per learning rate and decay."""

    name: ClassVar[str] = "torch"

    def __init__(self) -> None:
        self._kept: tuple[Any, Any, list[Call]] = (None, None, [])
        self._slices: list[Slice] = []
        self._scratch: dict[torch.device, Tensor] = {}

    def refuses(self, spec: Spec) -> str:
        view, options = spec.view, spec.options
        if type(view.rule).__dict__.get("torch_kernel") != "adamw":
            return f"no kernel for {view.rule.name}"
        if not options.decoupled or options.stochastic_rounding:
            return "no coupled decay" if not options.decoupled else "no stochastic rounding"
        if not view.positive:
            return "a multiplier is 0, or may become 0"
        if not view.uniform and not _in_ranges(view):
            return "rates differ by column, or by scattered or sharded rows"
        if view.device.type not in ("cpu", "cuda") or not view.contiguous:
            return "not contiguous" if not view.contiguous else f"not for {view.device.type}"
        types = {view.param.dtype, spec.grad, *(view.own[name].dtype for name in view.rule.state)}
        if types != {torch.float32}:
            return f"fp32 alone, not {', '.join(sorted(str(t)[6:] for t in types - {torch.float32}))}"
        if not all(local(view.own[name]).is_contiguous() for name in view.rule.state):
            return "state is not contiguous"
        if options.max_grad_norm is not None and view.numel >= LEAST and not pays(spec):
            return "clips copies of the gradients; compiled kernels clip as they load"
        if any(on_a_device(view.group[name]) for name in ("betas", "eps", "weight_decay")):
            return "takes betas, eps and decay as numbers alone"
        return ""

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        grads = [_plain(view, g) for view, g in zip(views, grads, strict=True)]
        for call in self._calls(views, scalars):
            slices = call.slices
            first = slices[0]
            view = views[first.view]
            row = scalars.rows(view)[first.segment]
            own = [grads[s.view] if s.rows is None else grads[s.view][s.rows] for s in slices]
            clip = scalars.clip_of(view)
            # A factor of 1 on the host changes nothing, and most steps of most runs have it.
            if clip is None or (not isinstance(clip, Tensor) and clip == 1.0):
                self._move(call.lists, own, view, row, scalars)
                continue
            if not call.batches:
                call.batches.extend(self._batched(call.lists[0]))
            for batch in call.batches:
                flat = [own[i].reshape(-1) if cut is None else own[i].view(-1)[cut] for i, cut in batch.pieces]
                torch.cat(flat, out=batch.scratch)
                batch.scratch.mul_(clip)
                lists = tuple(
                    [t[i] if cut is None else t[i].view(-1)[cut] for i, cut in batch.pieces] for t in call.lists[:3]
                )
                self._move((*lists, [call.lists[3][i] for i, _ in batch.pieces]), batch.copies, view, row, scalars)

    def _move(
        self, lists: Sequence[list[Tensor]], grads: list[Tensor], view: ParamView, row: Row, scalars: StepScalars
    ) -> None:
        p, m, v, steps = lists
        group = view.group
        lr, decay = row.lr, row.weight_decay
        torch._fused_adamw_(
            p,
            grads,
            m,
            v,
            [],
            steps,
            lr=lr.float() if isinstance(lr, Tensor) else lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0 if decay is None else decay,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=scalars.left_out(view),
        )

    def _calls(self, views: Sequence[ParamView], scalars: StepScalars) -> list[Call]:
        """The slices of views by learning rate and decay; kept for the next step, where these stay as they are."""
        if self._kept[0] is views and self._kept[1] == scalars.stamp is not None:
            return self._kept[2]
        if self._kept[0] is not views:
            self._slices = [part for i, view in enumerate(views) for part in _slices(i, view, scalars)]
        sorts: dict[Any, list[Slice]] = {}
        for part in self._slices:
            view = views[part.view]
            row = scalars.rows(view)[part.segment]
            # Not by the decay of now: it may be 0, and not stay so.
            sorts.setdefault((id(view.group), view.device, row.multiplier, view.decays[part.segment]), []).append(part)
        calls = []
        for slices in sorts.values():
            lists = tuple(list(tensors) for tensors in zip(*(s[3:] for s in slices), strict=True))
            calls.append(Call(slices, lists, []))
        self._kept = views, scalars.stamp, calls
        return calls

    def _batched(self, tensors: Sequence[Tensor]) -> list[Batch]:
        device = tensors[0].device
        limit = SCRATCH if device.type == "cpu" else DEVICE_SCRATCH
        if device not in self._scratch:
            self._scratch[device] = torch.empty(limit, dtype=torch.float32, device=device)
        scratch = self._scratch[device]
        batches: list[Batch] = []
        room = 0
        for i, tensor in enumerate(tensors):
            n = tensor.numel()
            cuts = [None] if n <= limit else [slice(a, min(a + limit, n)) for a in range(0, n, limit)]
            for cut in cuts:
                size = n if cut is None else cut.stop - cut.start
                if size > room or not batches:
                    batches.append(Batch([], [], scratch[:0]))
                    room = limit
                batch, start = batches[-1], limit - room
                own = scratch[start : start + size]
                batches[-1] = Batch(
                    [*batch.pieces, (i, cut)],
                    [*batch.copies, own.view(tensor.shape) if cut is None else own],
                    scratch[: start + size],
                )
                room -= size
        return batches


def _plain(view: ParamView, g: Tensor) -> Tensor:
    """A gradient that lies as its parameter does."""
    g = g if g.is_contiguous() else g.contiguous()
    return view.rows_of(g) if view.part else g


def _in_ranges(view: ParamView) -> bool:
    """Whether the segments of an unsharded parameter are ranges of its leading dimension."""
    return not view.shard.cut and not view.part and all(s.dim == 0 and s.count == 1 for s in view.segments)


def _slices(i: int, view: ParamView, scalars: StepScalars) -> list[Slice]:
    step = scalars.counter.step(view)
    if view.part:
        p, (m, v) = view.parameter(), view.stored()
    else:
        p, (m, v) = local(view.param), (local(view.own[name]) for name in view.rule.state)
    if view.uniform:
        return [Slice(i, 0, None, p, m, v, step)]
    ranges = [slice(s.start, s.start + s.length) for s in view.segments]
    return [Slice(i, k, rows, p[rows], m[rows], v[rows], step) for k, rows in enumerate(ranges)]
