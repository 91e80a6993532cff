"""Torch's own kernel for lists of tensors, for the parameters whose update it computes exactly."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.kernels import CHUNK
from sharpwise.engine.plan import Entry
from sharpwise.engine.scalars import Clock
from sharpwise.rules import AdamW
from sharpwise.shards import local

SCRATCH = 1 << 19
"""Elements of gradients that are scaled at a time, so that the copies take little memory."""


class Slice(NamedTuple):
    """A segment of a parameter: its number, its rows (None: the whole parameter), and the state of these."""

    entry: Entry
    segment: int
    rows: slice | None
    m: Tensor
    v: Tensor
    step: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the parameter's shape."""
        plain = local(tensor).contiguous()
        return plain if self.rows is None else plain[self.rows]


Sort = tuple[tuple[Any, ...], list[Slice]]
"""Group, multiplier, whether it decays; and the slices that have these in common."""


class Batch(NamedTuple):
    """Whole tensors or cuts of flattened ones by their place in a list, and where copies of them lie."""

    pieces: list[tuple[int, slice | None]]
    copies: list[Tensor]
    scratch: Tensor


class Fused:
    """AdamW by `torch._fused_adamw_`, one call per learning rate and decay.

    Args:
        scales_decay: whether decay follows the multiplier, as the kernel's does.
        fixed: whether multipliers stay as they are.
    """

    def __init__(self, entries: Sequence[Entry], state: Any, scales_decay: bool, fixed: bool) -> None:
        self.entries = list(entries)
        self._scales_decay, self._fixed = scales_decay, fixed
        self._kept: tuple[Collection[int], Sequence[Sort]] | None = None
        self._scratch: dict[torch.device, Tensor] = {}
        self._batches: dict[tuple[int, ...], list[Batch]] = {}
        self._slices = [part for e in entries for part in _slices(e, state[e.param])]

    def move(
        self, ids: Collection[int], clock: Clock, multipliers: Callable[[Entry], tuple[float, ...]], ok: Any, clip: Any
    ) -> None:
        """Move those of `ids` by one step (ok: True, or a device tensor that says whether; clip: None or a factor)."""
        for (_, m, decays), parts in self._sorted(ids, multipliers):
            group = parts[0].entry.group
            lr, wd, _ = clock.rates(parts[0].entry)
            wd = 0.0 if wd is None or not decays else wd if self._scales_decay else wd / m
            grads: list[Tensor] = [s.of(s.entry.param.grad) for s in parts]  # type: ignore[arg-type]
            lists = [s.of(s.entry.param) for s in parts], grads, [s.m for s in parts], [s.v for s in parts]
            # A factor of 1 on the host changes nothing, and most steps of most runs have it.
            whole = clip is None or (not isinstance(clip, Tensor) and clip == 1.0)
            steps = [s.step for s in parts]
            for p, g, m_, v_, t in [(*lists, steps)] if whole else self._scaled(parts, lists, clip):
                torch._fused_adamw_(
                    p,
                    g,
                    m_,
                    v_,
                    [],
                    t,
                    lr=(lr * m).float() if isinstance(lr, Tensor) else lr * m,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=wd,
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                    found_inf=None if ok is True else (~ok).to(torch.float32).view(()),
                )

    def _sorted(self, ids: Collection[int], multipliers: Callable[[Entry], tuple[float, ...]]) -> Sequence[Sort]:
        """The slices of `ids` by group, multiplier and decay; kept, where multipliers stay, for the next step."""
        if self._kept is not None and self._kept[0] == ids:
            return self._kept[1]
        calls: dict[tuple[Any, ...], list[Slice]] = {}
        now: dict[int, tuple[float, ...]] = {}
        for part in self._slices:
            entry = part.entry
            if (which := id(entry)) in ids:
                if which not in now:
                    now[which] = multipliers(entry)
                sort = id(entry.group), now[which][part.segment], entry.decays[part.segment]
                calls.setdefault(sort, []).append(part)
        found = list(calls.items())
        self._kept = (ids, found) if self._fixed else None
        return found

    def _scaled(self, parts: Sequence[Slice], lists: Sequence[Sequence[Tensor]], clip: Any) -> Iterator[Any]:
        """The lists in batches, with copies of the gradients times `clip`: the kernel would scale them in place."""
        key = tuple(map(id, parts))
        if key not in self._batches:
            latest = list(self._batches.items())[-2 * len(self._slices) :]
            self._batches = {**dict(latest), key: self._batched(lists[0])}
        for batch in self._batches[key]:
            p, g, m, v = ([t[i] if cut is None else t[i].view(-1)[cut] for i, cut in batch.pieces] for t in lists)
            torch._foreach_copy_(batch.copies, g)
            batch.scratch.mul_(clip)
            yield p, batch.copies, m, v, [parts[i].step for i, _ in batch.pieces]

    def _batched(self, tensors: Sequence[Tensor]) -> list[Batch]:
        device = tensors[0].device
        limit = SCRATCH if device.type == "cpu" else CHUNK
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


def exactly(entry: Entry, state: Any) -> bool:
    """Whether torch's kernel computes this update but for clipping: of the whole, or of ranges of its rows."""
    tensors = [entry.param, *(t for n, t in state.items() if n in entry.rule.state)]
    return (
        type(entry.rule) is AdamW
        and entry.positive
        and (entry.uniform or _in_ranges(entry))
        and local(entry.param).device.type in ("cpu", "cuda")
        and all(local(t).dtype == torch.float32 and local(t).is_contiguous() for t in tensors)
    )


def _in_ranges(entry: Entry) -> bool:
    """Whether the segments of an unsharded parameter are ranges of its leading dimension."""
    return not entry.shard.cut and all(s.dim == 0 and s.count == 1 for s in entry.segments)


def _slices(entry: Entry, own: Any) -> Iterator[Slice]:
    m, v = local(own["exp_avg"]), local(own["exp_avg_sq"])
    if entry.uniform:
        yield Slice(entry, 0, None, m, v, own["step"])
        return
    for i, segment in enumerate(entry.segments):
        rows = slice(segment.start, segment.start + segment.length)
        yield Slice(entry, i, rows, m[rows], v[rows], own["step"])
