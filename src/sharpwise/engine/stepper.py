"""One step over all parameters: read state -> sums -> direction -> lr and multiplier -> decay -> rounding -> write."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sharpwise.block_lr import BlockLR
from sharpwise.engine import kernels
from sharpwise.engine.items import SMALL, Item, gather_small
from sharpwise.engine.mesh import all_reduce, is_dtensor, local
from sharpwise.engine.plan import Entry
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
        self.compiler = compiler
        self.steps = [state[e.param]["step"] for e in entries]
        self.index = {id(e): i for i, e in enumerate(self.entries)}
        self.on_host = all(t.device.type == "cpu" for t in self.steps)
        total = sum(local(e.param).numel() for e in entries)
        device = local(entries[0].param).device if entries else torch.device("cpu")
        self.compiles = options.compile is not False and (
            options.compile is True or (total >= kernels.COMPILE_TOTAL and kernels.compiler_present(device))
        )
        fused = [e for e in entries if self._torch_has_it(e, state)]
        self.fused = {id(e): (e, state[e.param]) for e in fused}
        rest = [e for e in entries if id(e) not in self.fused]
        # A buffer shifts the boundaries of torch's vector loops, whose lerp rounds differently at the edges: the
        # eager reference, bit-equal to torch, does without.
        self.items = gather_small(rest, state, -1 if options.compile is False else SMALL)
        self.skipped: Tensor | int = 0

    def _torch_has_it(self, entry: Entry, state: Any) -> bool:
        """Whether torch's fused kernel computes exactly this update."""
        tensors = [entry.param, *(t for n, t in state[entry.param].items() if n in entry.rule.state)]
        return (
            type(entry.rule) is AdamW
            and self.options.compile is not False
            and self.options.max_grad_norm is None
            and self.options.decoupled
            and not self.options.stochastic_rounding
            and entry.uniform
            and min(entry.multipliers) > 0
            and local(entry.param).device.type in ("cpu", "cuda")
            and all(local(t).dtype == torch.float32 and local(t).is_contiguous() for t in tensors)
        )

    # -- the step ------------------------------------------------------------------------------------------------

    def run(self, active: Sequence[Entry]) -> bool:
        """Take a step with the entries that have gradients. False if it was skipped for a non-finite gradient."""
        ids = {id(e) for e in active}
        items = list(self._live_items(ids))
        fused = [pair for key, pair in self.fused.items() if key in ids]
        grads = [item.gradient() for item in items]
        means, total = self._sums(items, grads, [e for e, _ in fused])
        ok, clip = self._guard(total, active)
        if ok is False:
            return False
        self._advance_clocks(active, ok)
        self._track_peak(active)
        scalars = _ScalarCache(self)
        for item, g, mean in zip(items, grads, means, strict=True):
            self._move(item, g, mean, scalars, ok, clip)
        self._move_fused(fused, scalars, ok)
        return True

    def _live_items(self, ids: set[int]) -> Any:
        for item in self.items:
            live = [id(e) in ids for e in item.parts]
            if not item.flat:
                yield from [item] if live[0] else []
            elif all(live) and len({self._clock(e) for e in item.parts}) == 1:
                yield item
            else:  # a missing gradient, or one that was missing before: the views serve one by one
                yield from (single for single, here in zip(item.singles, live, strict=True) if here)

    def _clock(self, entry: Entry) -> Any:
        # On an accelerator, reading the counter would wait for the device; parts of an item are then stepped alike.
        return float(self.steps[self.index[id(entry)]]) if self.on_host else 0

    # -- sums between the phases -----------------------------------------------------------------------------------

    def _sums(
        self, items: Sequence[Item], grads: Sequence[Tensor], fused: Sequence[Entry], exact: bool = False
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Mean of g*g per block for every item (None without blocks), and the sum of all g*g where guarded.

        All sums that cross processes travel in one collective per group of processes.
        """
        sums: list[Tensor | None] = []
        totals: dict[tuple[Any, ...], list[Tensor]] = {}
        for item, g in zip(items, grads, strict=True):
            groups = item.layout.shard.groups
            if item.layout.rule.has_blocks:
                rows = self._row_squares(g, item.layout.dim, exact)
                sums.append(item.layout.gather(rows.reshape(-1)))
            elif self.options.guarded:
                rows = self._all_squares(g, exact)
                sums.append(None)
            else:
                sums.append(None)
                continue
            if self.options.guarded:
                totals.setdefault(groups, []).append(rows.sum())
        if self.options.guarded:
            for entry in fused:
                grad = local(entry.param.grad)  # type: ignore[arg-type]
                totals.setdefault(entry.shard.groups, []).append(self._all_squares(grad, exact).sum())
        total = self._reduce(items, sums, {k: torch.stack(v).sum() for k, v in totals.items()})
        means = [
            None if s is None else (s / item.layout.counts).to(item.layout.dtype)  # type: ignore[operator]
            for s, item in zip(sums, items, strict=True)
        ]
        if total is not None and self.on_host and not exact and not math.isfinite(total):
            # Squares above 1e38 overflow fp32 before the gradient does: only exact sums tell.
            return self._sums(items, grads, fused, exact=True)
        return means, total

    def _reduce(
        self, items: Sequence[Item], sums: list[Tensor | None], totals: dict[tuple[Any, ...], Tensor]
    ) -> Tensor | None:
        keys = {item.layout.shard.groups for item, s in zip(items, sums, strict=True) if s is not None} | set(totals)
        for groups in sorted((k for k in keys if k), key=len):
            mine = [i for i, s in enumerate(sums) if s is not None and items[i].layout.shard.groups == groups]
            parts = [sums[i] for i in mine] + ([totals[groups].view(1)] if groups in totals else [])
            flat = torch.cat(parts)  # type: ignore[arg-type]
            all_reduce(flat, groups)
            pieces = flat.split([len(part) for part in parts])  # type: ignore[arg-type]
            for i, piece in zip(mine, pieces, strict=False):
                sums[i] = piece
            if groups in totals:
                totals[groups] = pieces[-1][0]
        return torch.stack(list(totals.values())).sum() if totals else None

    def _row_squares(self, g: Tensor, dim: int, exact: bool) -> Tensor:
        if self.compiles and not exact and g.dim() == 2 and g.numel() >= kernels.COMPILE_EACH and min(g.shape) > 1:
            return self.compiler.row_squares(g, dim)
        return kernels.row_squares(g, dim)

    def _all_squares(self, g: Tensor, exact: bool) -> Tensor:
        flat = g.contiguous().view(-1)
        if flat.numel() % 4096 == 0:
            return self._row_squares(flat.view(-1, 4096), 1, exact)
        return torch.stack(
            [kernels.row_squares(part.view(1, -1), 1).sum() for part in flat.split(kernels.CHUNK)]
            or [flat.new_zeros((), dtype=torch.float64)]
        )

    def _guard(self, total: Tensor | None, active: Sequence[Entry]) -> tuple[Any, Any]:
        """Whether to step (True, False, or a device tensor), and the factor on the gradients (None: 1)."""
        options = self.options
        if total is None:
            return True, None
        clip: Any = None
        if options.max_grad_norm is not None:
            clip = torch.clamp(options.max_grad_norm / (total.sqrt() + 1e-6), max=1.0)
            clip = float(clip) if self.on_host else clip
        if options.on_nonfinite == "ignore":
            return True, clip
        if options.on_nonfinite == "skip" and not self.on_host:
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

    # -- scalars ---------------------------------------------------------------------------------------------------

    def _advance_clocks(self, active: Sequence[Entry], ok: Any) -> None:
        steps = [self.steps[self.index[id(e)]] for e in active]
        if ok is True:
            torch._foreach_add_(steps, 1)
        else:
            torch._foreach_add_(steps, [ok.to(torch.float32)] * len(steps))

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

    # -- moving ----------------------------------------------------------------------------------------------------

    def _move(self, item: Item, g: Tensor, mean: Tensor | None, scalars: "_ScalarCache", ok: Any, clip: Any) -> None:
        entry = item.layout
        s, lr, wd = scalars.of(item.parts[0])
        multipliers = tuple(m for e in item.parts for m in self.multipliers_now(e))
        row_step: Any = None
        row_decay: Tensor | None = None
        step: Any = lr / s.pop("bias_correction", 1.0)
        scaled = self.options.block_lr is not None and self.options.block_lr.decay == "scaled"
        if len(set(multipliers)) == 1:
            step = step * multipliers[0]
            decay_lr = lr * multipliers[0] if scaled else lr
        else:
            by_row = entry.spread_segments(multipliers)
            row_step, decay_lr = by_row * step, lr
            if scaled and wd is not None and self.options.decoupled:
                row_decay = (1 - by_row * (lr * wd)).to(entry.dtype)
        if mean is not None:
            old = {n: b.to(entry.dtype) for n, b in item.blocks.items()}
            mean = mean if clip is None else mean * (clip * clip)
            new, denominator = entry.rule.block_phase(old, mean, s)
            row_step = (step if row_step is None else row_step) / entry.spread(denominator)
            for name, tensor in item.blocks.items():
                tensor.copy_(new[name] if ok is True else torch.where(ok, new[name], tensor))
        if row_step is not None:
            row_step = row_step.to(entry.dtype)
        s["step"] = step
        if wd is not None and row_decay is None:
            s["decay" if self.options.decoupled else "weight_decay"] = (
                1 - decay_lr * wd if self.options.decoupled else wd
            )
        if clip is not None:
            s["clip"] = clip
        if ok is not True:
            s["ok"] = ok
        p = item.parameter()
        noise = None
        if self.options.stochastic_rounding:
            noise = item.noise(self.options.seed, scalars.t(item.parts[0]))
        self._call(item, s, p, g, (item.stored, row_step, row_decay, noise))
        item.scatter(p)

    def _call(self, item: Item, s: dict[str, Any], p: Tensor, g: Tensor, rest: tuple[Any, ...]) -> None:
        rule = item.layout.rule
        coupled = "weight_decay" in s
        if self.compiles and item.numel >= kernels.COMPILE_EACH and min(item.layout.shape) > 1:
            names = tuple(sorted(s))
            self.compiler.update(rule, names, coupled, _pack([s[n] for n in names], item.layout.dtype, p), p, g, *rest)
            return
        stored, row_step, row_decay, noise = rest
        size = max(1, kernels.CHUNK * p.shape[0] // max(item.numel, 1))
        for i in range(0, p.shape[0], size):  # in pieces, so that temporaries stay small
            j = slice(i, i + size)
            kernels.update(
                rule,
                s,
                coupled,
                p[j],
                g[j],
                [t[j] for t in stored],
                _cut(row_step, j),
                _cut(row_decay, j),
                None if noise is None else kernels.Noise(_cut(noise.row, j), noise.column, _cut(noise.key, j)),
            )

    def _move_fused(self, pairs: Sequence[tuple[Entry, Any]], scalars: "_ScalarCache", ok: Any) -> None:
        """Torch's own kernel for lists, one call per learning rate."""
        calls: dict[tuple[Any, ...], list[tuple[Entry, Any]]] = {}
        for entry, own in pairs:
            m = self.multipliers_now(entry)[0]
            calls.setdefault((id(entry.group), m, entry.decays), []).append((entry, own))
        for (_, m, _), part in calls.items():
            group = part[0][0].group
            _, lr, wd = scalars.of(part[0][0])
            base = self.options.block_lr is not None and self.options.block_lr.decay == "base"
            b1, b2 = group["betas"]
            torch._fused_adamw_(
                [local(e.param) for e, _ in part],
                [local(e.param.grad).contiguous() for e, _ in part],  # type: ignore[arg-type]
                [local(own["exp_avg"]) for _, own in part],
                [local(own["exp_avg_sq"]) for _, own in part],
                [],
                [own["step"] for _, own in part],
                lr=(lr * m).float() if isinstance(lr, Tensor) else lr * m,
                beta1=b1,
                beta2=b2,
                weight_decay=0.0 if wd is None else wd / m if base else wd,
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=None if ok is True else (~ok).to(torch.float32).view(()),
            )


class _ScalarCache:
    """Scalars of this step, worked out once per group, rule and step count."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def t(self, entry: Entry) -> Any:
        """The step count of an entry, from 1: an int, or a tensor on its device."""
        step = self.stepper.steps[self.stepper.index[id(entry)]]
        return int(step) if self.stepper.on_host else step

    def of(self, entry: Entry) -> tuple[dict[str, Any], Any, Any]:
        """The rule's scalars (a copy), the learning rate, and the weight decay (None: off)."""
        group, t = entry.group, self.t(entry)
        key = (id(group), entry.rule, t if self.stepper.on_host else id(entry))
        if key not in self.known:
            t = t if self.stepper.on_host else t.double()
            self.known[key] = entry.rule.scalars(t, {k: _live(v) for k, v in group.items() if k in entry.rule.defaults})
        wd = _live(group["weight_decay"])
        return dict(self.known[key]), _live(group["lr"]), wd if entry.decays and not _is_zero(wd) else None


def _live(value: Any) -> Any:
    """A hyperparameter as it is now: tensors on the CPU as floats, on a device left there."""
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" else value.detach().double()
    return tuple(_live(v) for v in value) if isinstance(value, (tuple, list)) else value


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _cut(tensor: Tensor | None, rows: slice) -> Any:
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[rows]


def _pack(values: Sequence[Any], dtype: torch.dtype, like: Mapping[str, Any] | Tensor) -> Tensor:
    device = like.device if isinstance(like, Tensor) else torch.device("cpu")
    if all(not isinstance(v, Tensor) for v in values):
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
    # Filling, not copying: a copy of a number from the host would wait for the device.
    return torch.stack(
        [v.to(dtype) if isinstance(v, Tensor) else torch.full((), v, dtype=dtype, device=device) for v in values]
    )


__all__ = ["Options", "Stepper", "is_dtensor"]
