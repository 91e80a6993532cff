"""One step over all parameters: read state -> sums -> direction -> lr and multiplier -> decay -> rounding -> write."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sharpwise.block_lr import BlockLR
from sharpwise.engine import kernels
from sharpwise.engine.items import SMALL, Item, Pool, gather_small, pool_blocks
from sharpwise.engine.mesh import local
from sharpwise.engine.plan import Entry
from sharpwise.engine.scalars import Clock, Numbers
from sharpwise.engine.sums import Sums
from sharpwise.rules import AdamW


@dataclass(frozen=True)
class Options:
    """What holds for the whole optimizer, whatever the rule."""

    decoupled: bool = True
    block_lr: BlockLR | None = None
    stochastic_rounding: bool = False
    seed: int = 0
    max_grad_norm: float | None = None
    on_nonfinite: Literal["ignore", "raise", "skip"] = "ignore"
    compile: bool | None = None

    @property
    def guarded(self) -> bool:
        """Whether the gradients are read once before the step."""
        return self.max_grad_norm is not None or self.on_nonfinite != "ignore"


class Stepper:
    """Executes steps over entries whose state is allocated. Rebuilt whenever those change."""

    def __init__(self, entries: Sequence[Entry], state: Any, options: Options, compiler: kernels.Compiler) -> None:
        self.entries = list(entries)
        self.options = options
        self.clock = Clock(entries, state)
        total = sum(e.param.numel() for e in entries)
        device = local(entries[0].param).device if entries else torch.device("cpu")
        pays = total >= kernels.COMPILE_TOTAL and kernels.compiler_present(device)
        compiles = options.compile is True or (options.compile is None and pays)
        self.compiler = compiler if compiles else None
        self.fused = {id(e): (e, state[e.param]) for e in entries if self._torch_has_it(e, state)}
        rest = [e for e in entries if id(e) not in self.fused]
        # A buffer shifts the boundaries of torch's vector loops, whose lerp rounds differently at the edges: the
        # eager reference, bit-equal to torch, does without.
        self.items = gather_small(rest, state, -1 if options.compile is False else SMALL)
        self.pools = pool_blocks(self.items, state)
        self.skipped: Tensor | int = 0
        self._sorts: dict[int, int] = {}
        self._sort_numbers: dict[Any, int] = {}
        self._now: dict[Any, Numbers] = {}

    def _torch_has_it(self, entry: Entry, state: Any) -> bool:
        """Whether torch's fused kernel computes exactly this update, of the whole or of ranges of its rows."""
        tensors = [entry.param, *(t for n, t in state[entry.param].items() if n in entry.rule.state)]
        return (
            type(entry.rule) is AdamW
            and self.options.compile is not False
            and self.options.max_grad_norm is None
            and self.options.decoupled
            and not self.options.stochastic_rounding
            and min(entry.multipliers) > 0
            and (entry.uniform or _in_ranges(entry))
            and local(entry.param).device.type in ("cpu", "cuda")
            and all(local(t).dtype == torch.float32 and local(t).is_contiguous() for t in tensors)
        )

    # -- the step ------------------------------------------------------------------------------------------------

    def run(self, active: Sequence[Entry]) -> None:
        """Take a step with the entries that have gradients, unless it is skipped for a non-finite one."""
        ids = {id(e) for e in active}
        items = list(self._live_items(ids))
        fused = [pair for key, pair in self.fused.items() if key in ids]
        grads = [item.gradient() for item in items]
        sums, total = Sums(self.compiler, self.options.guarded).of(items, grads, [e for e, _ in fused])
        ok, clip = self._guard(total, active)
        if ok is False:
            return
        together = {id(pool) for pool in self.pools if self.clock.together([e for i in pool.items for e in i.parts])}
        self.clock.advance(active, ok)
        self._now.clear()
        self._track_peak(active)
        rates = self._block_phase(items, sums, together, ok, clip)
        for item, g, rate in zip(items, grads, rates, strict=True):
            self._move(item, g, rate, ok, clip)
        self._move_fused(fused, ok)

    def _live_items(self, ids: set[int]) -> Iterator[Item]:
        for item in self.items:
            live = [id(e) in ids for e in item.parts]
            if not item.flat:
                yield from [item] if live[0] else []
            elif all(live) and self.clock.together(item.parts):
                yield item
            else:  # a missing gradient, or one that was missing before: the views serve one by one
                yield from (single for single, here in zip(item.singles, live, strict=True) if here)

    def _guard(self, total: Tensor | None, active: Sequence[Entry]) -> tuple[Any, Any]:
        """Whether to step (True, False, or a device tensor), and the factor on the gradients (None: 1)."""
        options = self.options
        if total is None:
            return True, None
        clip: Any = None
        if options.max_grad_norm is not None:
            clip = torch.clamp(options.max_grad_norm / (total.sqrt() + 1e-6), max=1.0)
            clip = float(clip) if self.clock.on_host else clip
        if options.on_nonfinite == "ignore":
            return True, clip
        if options.on_nonfinite == "skip" and not self.clock.on_host:
            ok = torch.isfinite(total)
            self.skipped = self.skipped + (~ok).long()
            return ok, clip
        if math.isfinite(total):
            return True, clip
        if options.on_nonfinite == "skip":
            self.skipped = self.skipped + 1
            return False, clip
        names = [e.name for e in active if not torch.isfinite(local(e.param.grad)).all()]  # type: ignore[arg-type]
        raise FloatingPointError(
            f"gradients are not finite: {', '.join(names[:5]) or 'on another rank'}"
            f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}; nothing was changed. "
            f"on_nonfinite='skip' leaves such steps out, 'ignore' takes them as torch does"
        )

    def _track_peak(self, active: Sequence[Entry]) -> None:
        if self.options.block_lr is not None and self.options.block_lr.follows_lr:
            for group in {id(e.group): e.group for e in active}.values():
                group["peak_lr"] = max(float(group["peak_lr"]), float(group["lr"]))

    def multipliers_now(self, entry: Entry) -> tuple[float, ...]:
        """Multipliers of an entry's segments at the current learning rate."""
        block_lr = self.options.block_lr
        if block_lr is None or not block_lr.follows_lr:
            return entry.multipliers
        lr, peak = float(entry.group["lr"]), float(entry.group["peak_lr"])
        return tuple(block_lr.effective(m, lr, max(peak, lr)) for m in entry.multipliers)

    # -- blocks ----------------------------------------------------------------------------------------------------

    def _block_phase(
        self, items: Sequence[Item], sums: list[Tensor | None], together: set[int], ok: Any, clip: Any
    ) -> list[Tensor | None]:
        """New block state, and lr / (bias correction * denominator) per block of every item without its multiplier.

        All items of a pool at once, unless some lack gradients or have taken other numbers of steps.
        """
        where = {id(item): i for i, item in enumerate(items)}
        rates: list[Tensor | None] = [None] * len(items)
        for pool in self.pools:
            whole = id(pool) in together and all(id(item) in where for item in pool.items)
            for part in [pool] if whole else [Pool.of_one(item) for item in items if pool.has(item)]:
                mine = [where[id(item)] for item in part.items]
                squares = [s for i in mine if (s := sums[i]) is not None]
                found = self._one_block_phase(part, torch.cat(squares), ok, clip)
                for i, rate in zip(mine, found.split([len(s) for s in squares]), strict=True):
                    rates[i] = rate
        return rates

    def _one_block_phase(self, pool: Pool, squares: Tensor, ok: Any, clip: Any) -> Tensor:
        entry = pool.items[0].parts[0]
        lr, _, of_rule = self.clock.rates(entry)
        mean = (squares / pool.counts).to(entry.dtype)
        mean = mean if clip is None else mean * (clip * clip)
        old = {name: tensor.to(entry.dtype) for name, tensor in pool.state.items()}
        new, denominator = entry.rule.block_phase(old, mean, of_rule)
        for name, tensor in pool.state.items():
            tensor.copy_(new[name] if ok is True else torch.where(ok, new[name], tensor))
        return denominator.reciprocal_().mul_(lr / of_rule.get("bias_correction", 1.0))

    # -- moving ----------------------------------------------------------------------------------------------------

    def _move(self, item: Item, g: Tensor, block_rate: Tensor | None, ok: Any, clip: Any) -> None:
        now = self._numbers(item, ok, clip)
        dtype = item.layout.dtype
        row_step = None if block_rate is None else item.layout.spread(block_rate)
        row_decay: Tensor | None = None
        if not now.uniform:
            by_row = item.spread_segments(now.multipliers)
            row_step = by_row * now.rate if row_step is None else row_step * by_row
        elif row_step is not None and now.multipliers[0] != 1.0:
            row_step = row_step * now.multipliers[0]
        if now.decays_by_row:
            row_decay = (1 - item.spread_segments(now.decays) * now.lr_decay).to(dtype)
        if row_step is not None and row_step.dtype != dtype:
            row_step = row_step.to(dtype)
        noise = None
        if self.options.stochastic_rounding:
            noise = item.noise(int(item.parts[0].group["seed"]), self.clock.t(item.parts[0]))
        p = item.parameter()
        if self.compiler is not None and item.numel >= kernels.COMPILE_EACH and min(item.layout.shape) > 1:
            packed = now.packed(dtype, p.device)
            self.compiler.update(
                item.graphs, item.layout.rule, now.scalars, packed, p, g, item.stored, row_step, row_decay, noise
            )
        else:
            _eager(item, now.scalars, p, g, row_step, row_decay, noise)
        item.scatter(p)

    def _numbers(self, item: Item, ok: Any, clip: Any) -> Numbers:
        """The numbers of this step, worked out once for all items that share them."""
        first = item.parts[0]
        key = self._sort_of(item), self.clock.t(first) if self.clock.on_host else id(first)
        found = self._now.get(key)
        if found is None:
            found = self._now[key] = self._work_out(item, ok, clip)
        return found

    def _sort_of(self, item: Item) -> int:
        """Items of one sort share their numbers as long as they have taken the same number of steps."""
        known = self._sorts.get(id(item))
        if known is None:
            parts = item.parts
            sort = (id(parts[0].group), parts[0].rule, tuple((e.multipliers, e.decays) for e in parts))
            known = self._sorts[id(item)] = self._sort_numbers.setdefault(sort, len(self._sort_numbers))
        return known

    def _work_out(self, item: Item, ok: Any, clip: Any) -> Numbers:
        lr, wd, of_rule = self.clock.rates(item.parts[0])
        multipliers = tuple(m for e in item.parts for m in self.multipliers_now(e))
        on = (d for e in item.parts for d in e.decays)
        # Decay follows the multiplier or not, and may be off for some segments.
        decays = tuple((m if self._scales_decay else 1.0) * d for m, d in zip(multipliers, on, strict=True))
        uniform, level = len(set(multipliers)) == 1, len(set(decays)) == 1
        rate = lr / of_rule.get("bias_correction", 1.0)
        s = {name: value for name, value in of_rule.items() if name != "bias_correction"}
        s["step"] = rate * multipliers[0] if uniform else rate
        if wd is not None and not self.options.decoupled:
            s["weight_decay"] = wd
        elif wd is not None and level:
            s["decay"] = 1 - lr * decays[0] * wd
        if clip is not None:
            s["clip"] = clip
        if ok is not True:
            s["ok"] = ok
        lr_decay = None if wd is None or level or not self.options.decoupled else lr * wd
        return Numbers(s, rate, lr_decay, multipliers, decays, uniform)

    @property
    def _scales_decay(self) -> bool:
        return self.options.block_lr is not None and self.options.block_lr.decay == "scaled"

    def _move_fused(self, pairs: Sequence[tuple[Entry, Any]], ok: Any) -> None:
        """Torch's own kernel for lists, one call per learning rate."""
        calls: dict[tuple[Any, ...], list[tuple[Entry, Any, slice | None]]] = {}
        for entry, own in pairs:
            factors = zip(self.multipliers_now(entry), entry.decays, entry.segments, strict=True)
            if entry.uniform:
                calls.setdefault((id(entry.group), *next(factors)[:2]), []).append((entry, own, None))
                continue
            for m, decays, segment in factors:
                rows = slice(segment.start, segment.start + segment.length)
                calls.setdefault((id(entry.group), m, decays), []).append((entry, own, rows))
        for (_, m, decays), part in calls.items():
            group = part[0][0].group
            lr, wd, _ = self.clock.rates(part[0][0])
            b1, b2 = group["betas"]
            torch._fused_adamw_(
                [_range(local(e.param), rows) for e, _, rows in part],
                [_range(local(e.param.grad).contiguous(), rows) for e, _, rows in part],  # type: ignore[arg-type]
                [_range(local(own["exp_avg"]), rows) for _, own, rows in part],
                [_range(local(own["exp_avg_sq"]), rows) for _, own, rows in part],
                [],
                [own["step"] for _, own, _ in part],
                lr=(lr * m).float() if isinstance(lr, Tensor) else lr * m,
                beta1=b1,
                beta2=b2,
                weight_decay=0.0 if wd is None or not decays else wd if self._scales_decay else wd / m,
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=None if ok is True else (~ok).to(torch.float32).view(()),
            )


def _range(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _in_ranges(entry: Entry) -> bool:
    """Whether the segments of an unsharded parameter are ranges of its leading dimension."""
    return not entry.shard.groups and all(s.dim == 0 and s.count == 1 for s in entry.segments)


def _eager(
    item: Item, s: dict[str, Any], p: Tensor, g: Tensor, step: Tensor | None, decay: Tensor | None, noise: Any
) -> None:
    """In pieces, so that temporaries stay small."""
    size = max(1, kernels.CHUNK * p.shape[0] // max(item.numel, 1))
    for i in range(0, p.shape[0], size):
        j = slice(i, i + size)
        own = None if noise is None else kernels.Noise(_cut(noise.row, j), noise.column, _cut(noise.key, j))
        stored = [t[j] for t in item.stored]
        kernels.update(item.layout.rule, s, p[j], g[j], stored, _cut(step, j), _cut(decay, j), own)


def _cut(tensor: Tensor | None, rows: slice) -> Any:
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[rows]
