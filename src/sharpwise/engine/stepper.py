"""One step over all parameters: read state -> sums -> direction -> lr and multiplier -> decay -> rounding -> write."""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sharpwise.engine import kernels
from sharpwise.engine.fused import Fused, exactly
from sharpwise.engine.items import SMALL, Item, Pool, gather_small, pool_blocks
from sharpwise.engine.jobs import Jobs, OnePass, elements, one_pass
from sharpwise.engine.loops import Step
from sharpwise.engine.mesh import Bucket, ReduceGroup
from sharpwise.engine.multipliers import Multipliers
from sharpwise.engine.options import Options
from sharpwise.engine.plan import Entry
from sharpwise.engine.reductions import Reductions
from sharpwise.engine.scalars import Clock, Numbers, rounded
from sharpwise.engine.sums import SquareSum, Sums
from sharpwise.shards import local


class Ready(NamedTuple):
    """The call of the graph that moves an item.

    Calls are made ready for all items before the first is made: a kernel leaves nothing in the cache, and what is done
    between two of them takes several times as long.
    """

    item: Item
    p: Tensor
    call: kernels.Call

    def go(self) -> None:
        """Make it."""
        graph, args = self.call
        graph(args)
        self.item.scatter(self.p)


class Stepper:
    """Executes steps over entries whose state is allocated. Rebuilt whenever those change.

    Attributes:
        skipped: steps left out since this was built; `squares`: sum of g*g in the last step, None if it was not read.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        state: Any,
        options: Options,
        compiler: kernels.Compiler,
        multipliers: Multipliers,
    ) -> None:
        self.entries = list(entries)
        self.multipliers = multipliers
        self.state, self.options = state, options
        self.clock = Clock(entries, state)
        total = sum(e.param.numel() for e in entries)
        device = local(entries[0].param).device if entries else torch.device("cpu")
        pays = total >= kernels.COMPILE_TOTAL and kernels.compiler_present(device)
        compiles = options.compile is True or (options.compile is None and pays)
        self.compiler = compiler if compiles else None
        self.fast = options.compile is not False
        # Graphs clip by the way; torch's kernel is given scaled copies, which pays for what is not compiled.
        torchs = self.fast and options.decoupled and not options.stochastic_rounding
        clips = self.compiler is not None and options.max_grad_norm is not None
        most = kernels.COMPILE_EACH - 1 if clips else math.inf
        by_torch = [e for e in entries if torchs and e.param.numel() <= most and exactly(e, state[e.param])]
        fixed = options.block_lr is None or not (options.varies or options.block_lr.follows_lr)
        self.fused = Fused(by_torch, state, self._scales_decay, fixed)
        theirs = {id(e) for e in self.fused.entries}
        rest = [e for e in entries if id(e) not in theirs]
        # A buffer shifts the boundaries of torch's vector loops, whose lerp rounds differently at the edges: the
        # eager reference, bit-equal to torch, does without.
        self.items = gather_small(rest, state, SMALL if self.fast else -1)
        self.one_pass: dict[int, OnePass] = {}
        self.elements: dict[int, Step] = {}
        if self.compiler is not None and options.decoupled and not options.stochastic_rounding:
            for item in self.items:
                if not options.guarded and (way := one_pass(item, self.compiler)) is not None:
                    self.one_pass[id(item)] = way
                elif (loop := elements(item, self.compiler)) is not None:
                    self.elements[id(item)] = loop
        self.pools = pool_blocks([item for item in self.items if id(item) not in self.one_pass], state)
        self.skipped: Tensor | int = 0
        self.squares: SquareSum | None = None
        self._sorts: dict[int, int] = {}
        self._sort_numbers: dict[Any, int] = {}
        self._now: dict[Any, Numbers] = {}

    # Made at the first step, not when state is bound: every process has to take part where a group has to be made.
    @cached_property
    def team(self) -> ReduceGroup:
        """The processes that hold parts of these parameters."""
        return ReduceGroup.of(e.shard for e in self.entries)

    @cached_property
    def sums(self) -> Sums:
        """What reads the gradients before anything moves.

        The last bit of the clipping factor may turn the rounding of anything narrow: there it must not depend on where
        gradients are cut, so that they are added up in fp64.
        """
        kept = [t for e in self.entries for t in (e.param, *self.state[e.param].values()) if isinstance(t, Tensor)]
        clips = self.options.max_grad_norm is not None
        exact = not self.fast or (clips and any(t.dtype.itemsize < 4 for t in kept))
        return Sums(self.team, self.compiler, self.options.guarded, exact)

    # -- the step ------------------------------------------------------------------------------------------------

    def run(self, active: Sequence[Entry]) -> None:
        """Take a step with the entries that have gradients, unless it is skipped for a non-finite one."""
        ids = {id(e) for e in active}
        items = list(self._live_items(ids))
        grads = [item.gradient() for item in items]
        fused = [e for e in self.fused.entries if id(e) in ids]
        sums: list[SquareSum | None] = [None] * len(items)
        ok, clip = True, None
        reductions, bucket = Reductions(self.team, items, grads, self.state, self.clock.hyper), Bucket(self.team)
        reductions.begin(bucket)
        left = [i for i, item in enumerate(items) if self._way(item, grads[i]) is None]
        found, self.squares = self.sums.of([items[i] for i in left], [grads[i] for i in left], fused, bucket)
        for i, squares in zip(left, found, strict=True):
            sums[i] = squares
        if self.options.guarded:
            ok, clip = self._guard(self.squares, active)
            if ok is False:
                return
        reductions.run(clip)
        together = {id(pool) for pool in self.pools if self.clock.together([e for i in pool.items for e in i.parts])}
        # What can be wrong shows up to here. From here on things are written: first counts, then all else.
        self.clock.begin(active)
        if self.multipliers.advance(active, ok, self.team):
            self._sorts.clear()
        self.clock.advance(active, ok)
        self._now.clear()
        jobs = Jobs()
        for item, g in zip(items, grads, strict=True):
            if (way := self._way(item, g)) is not None:
                jobs.add_blocks(item, way, g, self._numbers(item, True, None))
        jobs.go()
        rates = self._block_phase(items, sums, together, ok, clip)
        jobs = Jobs()
        moves = [self._move(items[i], grads[i], rates[i], reductions, jobs, ok, clip) for i in left]
        for ready in filter(None, moves):
            ready.go()
        jobs.go()
        self.fused.move(ids, self.clock, self.multipliers.now, ok, clip)
        # Graphs and the kernel of torch write past autograd: what it saved for a backward pass has changed.
        increment_version([e.param for e in active])

    def _live_items(self, ids: set[int]) -> Iterator[Item]:
        for item in self.items:
            live = [id(e) in ids for e in item.parts]
            if not item.flat:
                yield from [item] if live[0] else []
            elif all(live) and self.clock.together(item.parts):
                yield item
            else:  # a missing gradient, or one that was missing before: the views serve one by one
                yield from (single for single, here in zip(item.singles, live, strict=True) if here)

    def _guard(self, total: SquareSum | None, active: Sequence[Entry]) -> tuple[Any, Any]:
        """Whether to step (True, False, or a device tensor), and the factor on the gradients (None: 1)."""
        options = self.options
        if total is None:
            return True, None
        clip: Any = None
        if options.max_grad_norm is not None:
            # In the unit of the sum: the norm itself may be beyond fp64.
            clip = options.max_grad_norm / total.unit / (total.values.sqrt() + 1e-6 / total.unit)
            clip = torch.clamp(clip, max=1.0)
            clip = float(clip) if self.clock.on_host else clip
        if options.on_nonfinite == "ignore":
            return True, clip
        if options.on_nonfinite == "skip" and not self.clock.on_host:
            ok = torch.isfinite(total.values)
            self.skipped = self.skipped + (~ok).long()
            return ok, clip
        if math.isfinite(total.values):
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

    # -- blocks ----------------------------------------------------------------------------------------------------

    def _block_phase(
        self, items: Sequence[Item], sums: list[SquareSum | None], together: set[int], ok: Any, clip: Any
    ) -> list[Tensor | None]:
        """New block state, and lr / (bias correction * denominator) per block of every item without its multiplier.

        All items of a pool at once, unless some lack gradients or have taken other numbers of steps.
        """
        where = {id(item): i for i, item in enumerate(items)}
        rates: list[Tensor | None] = [None] * len(items)
        parts: list[Pool] = []
        for pool in self.pools:
            whole = id(pool) in together and all(id(item) in where for item in pool.items)
            parts += [pool] if whole else [Pool.of_one(item) for item in items if pool.has(item)]
        parts += [
            Pool.of_one(item) for item in items if id(item) in self.one_pass and sums[where[id(item)]] is not None
        ]
        for part in parts:
            mine = [where[id(item)] for item in part.items]
            squares = [s for i in mine if (s := sums[i]) is not None]
            found = self._one_block_phase(part, SquareSum.joined(squares), ok, clip)
            for i, rate in zip(mine, found.split([len(s.values) for s in squares]), strict=True):
                rates[i] = rate
        return rates

    def _one_block_phase(self, pool: Pool, squares: SquareSum, ok: Any, clip: Any) -> Tensor:
        entry = pool.items[0].parts[0]
        lr, _, of_rule = self.clock.rates(entry)
        rate = lr / of_rule.get("bias_correction", 1.0)
        if self.compiler is not None:
            # Rounded as in the graph that works this out by the way: sharded or not, the same bits.
            of_rule = {k: rounded(value, entry.dtype) for k, value in of_rule.items()}
        mean = squares.mean(pool.counts, clip)
        old = {name: tensor.to(entry.dtype) for name, tensor in pool.state.items()}
        new, denominator = entry.rule.block_phase(old, mean, of_rule)
        for name, tensor in pool.state.items():
            tensor.copy_(new[name] if ok is True else torch.where(ok, new[name], tensor))
        return rounded(rate, entry.dtype) / denominator

    # -- moving ----------------------------------------------------------------------------------------------------

    def _move(
        self, item: Item, g: Tensor, block_rate: Tensor | None, reductions: Reductions, jobs: Jobs, ok: Any, clip: Any
    ) -> Ready | None:
        """Add what moves a matrix to the jobs of loops, or return what moves it by a graph, made ready; whatever else
        there is has been moved when this returns.
        """
        now = self._numbers(item, ok, clip)
        dtype = item.layout.dtype
        row_step = None if block_rate is None else item.layout.spread(block_rate).to(dtype)
        if row_step is None:
            row_step = None if now.uniform else now.by_row("step", item)
        elif not now.uniform:
            row_step = row_step * now.by_row("multiplier", item)
        elif now.multipliers[0] != 1.0:
            row_step = row_step * now.multipliers[0]
        row_decay = now.by_row("decay", item) if now.decays_by_row else None
        loop = self.elements.get(id(item))
        if loop is not None and g.dtype == item.parts[0].param.dtype:
            jobs.add_elements(item, loop, g, now, row_step, row_decay)
            return None
        noise = None
        if self.options.stochastic_rounding:
            noise = item.noise(int(item.parts[0].group["seed"]), self.clock.t(item.parts[0]))
        p = item.parameter()
        located = reductions.localized(item, now.scalars, ok)
        if located is not None:
            kernels.update(located, now.scalars, p, g, item.stored, row_step, row_decay, noise)
            item.scatter(p)
            return None
        if self.compiler is not None and item.numel >= kernels.COMPILE_EACH and min(item.layout.shape) > 1:
            packed = now.packed(dtype, p.device)
            call = self.compiler.update_call(
                item.graphs, item.layout.rule, now.scalars, packed, p, g, item.stored, row_step, row_decay, noise
            )
            ready = None if call is None else Ready(item, p, call)
            if ready is not None and item.copied:
                ready.go()  # else the copies of all would be held at once
                return None
            if ready is not None:
                return ready
        size = kernels.piece(p) if self.fast else kernels.CHUNK
        _eager(item, now.scalars, p, g, row_step, row_decay, noise, size)
        item.scatter(p)
        return None

    def _way(self, item: Item, g: Tensor) -> OnePass | None:
        """How an item moves together with its blocks; None if their sums are taken first."""
        way = self.one_pass.get(id(item))
        return way if way is not None and g.dtype == item.parts[0].param.dtype else None

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
        multipliers = tuple(m for e in item.parts for m in self.multipliers.now(e))
        on = (d for e in item.parts for d in e.decays)
        # Decay follows the multiplier or not, and may be off for some segments.
        decays = tuple((m if self._scales_decay else 1.0) * d for m, d in zip(multipliers, on, strict=True))
        # Those that vary stay per row where they are equal for once: the other way would be another graph.
        uniform = len(set(multipliers)) == 1 and (len(multipliers) == 1 or not self.options.varies)
        level = len(set(decays)) == 1 and (uniform or not self.options.varies or not self._scales_decay)
        rate = lr / of_rule.get("bias_correction", 1.0)
        s = {name: value for name, value in of_rule.items() if name != "bias_correction"}
        has_blocks = item.layout.rule.has_blocks  # their rate is multiplied row by row
        s["step"] = rate * multipliers[0] if uniform and not has_blocks else rate
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


def _eager(item: Item, s: dict[str, Any], p: Tensor, g: Tensor, step: Any, decay: Any, noise: Any, size: int) -> None:
    """In pieces, so that temporaries stay small."""
    size = max(1, size * p.shape[0] // max(item.numel, 1))
    for i in range(0, p.shape[0], size):
        j = slice(i, i + size)
        own = None if noise is None else kernels.Noise(_cut(noise.row, j), noise.column, _cut(noise.key, j))
        stored = [t[j] for t in item.stored]
        kernels.update(item.layout.rule, s, p[j], g[j], stored, _cut(step, j), _cut(decay, j), own)


def _cut(tensor: Tensor | None, rows: slice) -> Any:
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[rows]
