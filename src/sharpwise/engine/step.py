"""The order of a step, whatever the combination.

    gradients -> sums over blocks, norm, first terms of reductions (one collective) -> guard (skip? clip?) -> reductions
    -> scalars of the step -> multipliers -> count -> block state -> every back end moves its views

A view moves so: load -> clip, coupled decay -> direction -> decay, move -> store; see `backends.reference.update`.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sharpwise.engine.backends import Backends
from sharpwise.engine.backends.base import Found
from sharpwise.engine.backends.triton import Guard
from sharpwise.engine.backends.triton_launch import refused
from sharpwise.engine.counter import StepCounter
from sharpwise.engine.mesh import Bucket, ReduceGroup
from sharpwise.engine.multipliers import Multipliers
from sharpwise.engine.norms import SquareSum, Sums
from sharpwise.engine.options import Options
from sharpwise.engine.phase import BlockPhase
from sharpwise.engine.plan import Plan
from sharpwise.engine.reductions import Reductions
from sharpwise.engine.scalars import StepScalars, on_device
from sharpwise.engine.view import ParamView
from sharpwise.shards import local


class Stepper:
    """Executes steps over views whose state is allocated. Rebuilt whenever those change.

    Attributes:
        squares: sum of g*g in the last step, None if it was not read.
    """

    def __init__(
        self, views: Sequence[ParamView], state: Any, options: Options, backends: Backends, multipliers: Multipliers
    ) -> None:
        self.views, self.options, self.multipliers = list(views), options, multipliers
        self.named = list({id(view.param): (view.name, view.param) for view in views}.values())
        places = {id(param): i for i, (_, param) in enumerate(self.named)}
        self._of_view = [places[id(view.param)] for view in views]
        self._reduces = any(view.rule.reductions for view in views)
        self._active: tuple[list[bool], list[ParamView]] = ([], [])
        # Where some are on the CPU, the host has to know what the gradients of all sum up to.
        self.on_host = decided_by_host(views)
        # Whether a step is taken is known on the host, unless a device decides and nobody reads it.
        self.counter = StepCounter(views, state, self.on_host or options.on_nonfinite != "skip")
        for view in views:
            view.attach(state[view.param])
        block_lr = options.block_lr
        self.scalars = StepScalars(
            views,
            self.counter,
            decoupled=options.decoupled,
            scales_decay=block_lr is not None and block_lr.decay == "scaled",
            stochastic=options.stochastic_rounding,
            varies=options.varies,
            follows_lr=block_lr is not None and block_lr.follows_lr,
            now=multipliers.now,
        )
        self.plan = Plan(backends, views, options)
        self.phase = BlockPhase(self.scalars, rounds=self.plan.compiles)
        for view in views:  # what is compiled is built now, before anything is written
            self.plan.choose(view, view.param.dtype)
        self.guard: Guard | None = None
        self._taken: Tensor | None = None
        self._skipped: Tensor | int = 0
        self.squares: SquareSum | None = None

    @property
    def skipped(self) -> int:
        """Steps left out since this was built, or since they were noted."""
        return int(self._skipped) + (0 if self.guard is None else int(self.guard.skipped))

    def note_skipped(self) -> int:
        """`skipped`, which begins anew."""
        found, self._skipped = self.skipped, 0
        if self.guard is not None:
            self.guard.skipped.zero_()
        return found

    # Made at the first step, not when state is bound: every process has to take part where a group has to be made.
    @cached_property
    def group(self) -> ReduceGroup:
        """The processes that hold parts of these parameters."""
        return ReduceGroup.of(view.shard for view in self.views)

    @cached_property
    def sums(self) -> Sums:
        """What reads the gradients before anything moves.

        The last bit of the clipping factor may turn the rounding of anything narrow: there it must not depend on where
        gradients are cut, so that they are added up in fp64.
        """
        kept = [t for view in self.views for t in (view.param, *view.own.values())]
        clips = self.options.max_grad_norm is not None
        exact = not self.plan.fast or (clips and any(t.dtype.itemsize < 4 for t in kept))
        kernel = self.plan.backends.cpp if self.plan.compiles else None
        return Sums(self.group, kernel, self.options.guarded, exact)

    def run(self, gradients: Sequence[Tensor | None], scaling: "Scaling | None" = None) -> None:
        """Take a step with the parameters that have gradients, unless it is skipped for a non-finite one.

        Args:
            gradients: local ones, of the parameters in `named`.
            scaling: what a `torch.amp.GradScaler` says of them.
        """
        active, grads = self._with_gradients(gradients)
        if scaling is not None and scaling.decided_by_device:
            self.counter.leave_to_device()
        scalars, (works, by_block) = self.scalars, self.plan.works(active, grads)
        bucket, pairs = Bucket(self.group), zip(active, grads, strict=True) if self._reduces else ()
        reductions = Reductions(self.group, pairs, scalars.hyper)
        reductions.begin(bucket)
        given = [
            backend.squares(
                own, [grads[i] for i in places], [self.sums.wants_total and not by_block[i] for i in places]
            )
            for backend, places, own in works
            if backend.by_table
        ]
        sums, total = self.sums.of(active, grads, by_block, bucket, given)
        if total is not None:
            total = total.on_host() if self.on_host else total
            self.squares = total if scaling is None else total.times(scaling.factor)
        ok, clip = self._guard(self.squares, active, scaling)
        if ok is False:
            return
        reductions.run(clip)
        scalars.begin(active, works)
        # What can be wrong shows up to here. From here on things are written.
        if self.multipliers.advance(active, ok, self.group):
            scalars.multipliers_changed()
        scalars.ok, scalars.clip = ok, clip
        self.counter.advance(active, ok, self._taken)
        found = Found(self.phase.run(active, sums), reductions.localized(scalars))
        for backend, places, views in works:
            backend.step(views, [grads[i] for i in places], scalars, found)
        # Kernels write past autograd: what it saved for a backward pass has changed.
        increment_version([view.param for view in active])

    def grad_dtype(self, view: ParamView) -> torch.dtype:
        """The type of its gradient, if it has one; else that of the parameter."""
        return view.param.dtype if view.param.grad is None else view.param.grad.dtype

    def _with_gradients(self, gradients: Sequence[Tensor | None]) -> tuple[list[ParamView], list[Tensor]]:
        """The views that move, the same list as long as they are the same, and their gradients."""
        held = [gradients[i] is not None for i in self._of_view]
        if held != self._active[0]:
            self._active = held, [view for view, has in zip(self.views, held, strict=True) if has]
        return self._active[1], [g for i in self._of_view if (g := gradients[i]) is not None]

    def _guard(
        self, total: SquareSum | None, active: Sequence[ParamView], scaling: "Scaling | None"
    ) -> tuple[Any, Any]:
        """Whether to step (True, False, or a device tensor), and the factor on the gradients (None: 1)."""
        options, ok = self.options, True if scaling is None else scaling.ok
        clip: Any = None
        self._taken = None
        if scaling is None and total is not None and (guard := self._device_guard(total)) is not None:
            self._taken = guard.taken if guard.skips else None
            return guard(total.values)
        if options.max_grad_norm is not None and total is not None:
            # In the unit of the sum: the norm itself may be beyond fp64.
            if self.on_host and type(total.unit) is float and total.unit:
                clip = options.max_grad_norm / total.unit / (math.sqrt(total.values) + 1e-6 / total.unit)
                clip = 1.0 if clip > 1.0 else clip  # NaN stays
            else:
                clip = options.max_grad_norm / total.unit / (total.values.sqrt() + 1e-6 / total.unit)
                clip = torch.clamp(clip, max=1.0)
                clip = float(clip) if self.on_host else clip
        if scaling is not None and scaling.factor is not None:
            scale = on_device(scaling.factor, clip.device) if isinstance(clip, Tensor) else scaling.factor
            clip = scale if clip is None else clip * scale
        if total is None or options.on_nonfinite == "ignore":
            return ok, clip
        if options.on_nonfinite == "skip" and not self.on_host:
            finite = torch.isfinite(total.values)
            self._skipped = self._skipped + ~finite
            return (ok and finite if isinstance(ok, bool) else finite & on_device(ok, finite.device)), clip
        if math.isfinite(total.values):
            return ok, clip
        if options.on_nonfinite == "skip":
            self._skipped = self._skipped + 1
            return False, clip
        if ok is not True and not bool(ok):  # the scaler leaves it out, as it looks for a scale
            return False, clip
        raise FloatingPointError(_not_finite(active))

    def _device_guard(self, total: SquareSum) -> Guard | None:
        """What decides in one launch, on a device that our own kernels run on."""
        device, options = total.values.device, self.options
        plain = not isinstance(total.unit, Tensor) and total.unit == 1.0
        if self.on_host or not self.plan.fast or options.on_nonfinite == "raise" or not plain or refused(device):
            return None
        if self.guard is None or self.guard.device != device:
            self._skipped = self.skipped
            self.guard = Guard(device, options.max_grad_norm, options.on_nonfinite == "skip")
        return self.guard


def decided_by_host(views: Sequence[ParamView]) -> bool:
    """Whether the host reads what it decides by: some are on the CPU, where there is nothing to wait for."""
    return any(view.device.type == "cpu" for view in views)


class Scaling:
    """What a GradScaler says of the gradients of a step: how they are scaled, and whether one is not finite.

    Attributes:
        factor: that undoes the scale, None if there is none; ok: whether to step (False, True or a device tensor).

    Args:
        read: whether the host has to know both, wherever they are.
    """

    def __init__(self, scale: Tensor | None, found_inf: Tensor | None, read: bool) -> None:
        on_host = read or all(t is None or t.device.type == "cpu" for t in (scale, found_inf))
        factor = None if scale is None else scale.double().reciprocal()
        self.factor = factor if factor is None or not on_host else float(factor)
        ok: Any = True if found_inf is None else found_inf == 0
        self.ok = bool(ok) if on_host else ok
        self.decided_by_device = isinstance(self.ok, Tensor)


def _not_finite(active: Sequence[ParamView]) -> str:
    params = {view.name: view.param for view in active}
    names = [name for name, p in params.items() if not torch.isfinite(local(p.grad)).all()]  # type: ignore[arg-type]
    return (
        f"gradients are not finite: {', '.join(names[:5]) or 'on another rank'}"
        f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}; nothing was changed. "
        f"on_nonfinite='skip' leaves such steps out, 'ignore' takes them as torch does"
    )
