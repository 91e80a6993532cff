"""The order of a step, whatever the combination.

    gradients -> sums over blocks, norm, first terms of reductions (one collective) -> guard (skip? clip?) -> reductions
    -> scalars of the step -> multipliers -> count -> block state -> control -> every back end moves its views

A view moves so: load -> clip, coupled decay -> direction -> decay, move -> store; see `backends.reference.update`. With
a control that is done twice: as far as the direction, for its sums, and then all of it, by rates and decays of rows.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sharpwise.engine import capture
from sharpwise.engine.backends import Backends
from sharpwise.engine.backends.base import Found
from sharpwise.engine.backends.products import Products
from sharpwise.engine.control import Bounds
from sharpwise.engine.counter import StepCounter
from sharpwise.engine.guard import Guard, Scaling, decided_by_host
from sharpwise.engine.mesh import Bucket, ReduceGroup
from sharpwise.engine.multipliers import Multipliers
from sharpwise.engine.norms import Sums
from sharpwise.engine.options import Options
from sharpwise.engine.phase import BlockPhase
from sharpwise.engine.plan import Plan
from sharpwise.engine.reductions import Reductions
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import ThinRule


class Stepper:
    """Executes steps over views whose state is allocated. Rebuilt whenever those change.

    Attributes:
        named: the parameters; guard: decides whether steps are taken, and counts those that are not.
        captured: whether a step is part of a CUDA graph.
    """

    def __init__(
        self, views: Sequence[ParamView], state: Any, options: Options, backends: Backends, multipliers: Multipliers
    ) -> None:
        self.views, self.options, self.multipliers = list(views), options, multipliers
        self.named = list({id(view.param): (view.name, view.param) for view in views}.values())
        places = {id(param): i for i, (_, param) in enumerate(self.named)}
        self._of_view = [places[id(view.param)] for view in views]
        self._reduces = any(view.rule.reductions for view in views)
        self.captured = False
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
            cautious=options.cautious,
            scales_decay=block_lr is not None and block_lr.decay == "scaled",
            stochastic=options.stochastic_rounding,
            now=multipliers.now,
        )
        self.plan = Plan(backends, views, options)
        self.phase = BlockPhase(self.scalars)
        for view in views:  # what is compiled is built now, before anything is written
            self.plan.choose(view, view.param.dtype)
        self.bounds = None if options.control is None else Bounds(options.control, backends, self.plan.kernels)
        self.guard = Guard(options, self.on_host, backends if self.plan.kernels else None)

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
        exact = clips and any(t.dtype.itemsize < 4 for t in kept)
        return Sums(self.group, self.plan.backends if self.plan.kernels else None, self.options.guarded, exact)

    @cached_property
    def products(self) -> Products:
        """What works out those with thin matrices."""
        own = self.plan.kernels and any(isinstance(v.rule, ThinRule) and v.device.type == "cpu" for v in self.views)
        return self.plan.backends.cpp.products if own else Products()

    def run(self, gradients: Sequence[Tensor | None], scaling: Scaling | None = None) -> None:
        """Take a step with the parameters that have gradients, unless it is skipped for a non-finite one.

        Args:
            gradients: local ones, of the parameters in `named`.
            scaling: what a `torch.amp.GradScaler` says of them.
        """
        active, grads = self._with_gradients(gradients)
        if scaling is not None and scaling.decided_by_device:
            self.counter.leave_to_device()
        scalars, (works, by_block) = self.scalars, self.plan.works(active, grads)
        scalars.clear()
        bucket, pairs = Bucket(self.group), zip(active, grads, strict=True) if self._reduces else ()
        reductions = Reductions(self.group, pairs, scalars, self.products, self.plan.kernels)
        reductions.begin(bucket)
        if self.bounds is not None:
            self.bounds.snr.begin(active, grads, bucket)
        if capture.capturing():
            capture.check(self.options, [(work.backend.name, work.views) for work in works], scalars)
            self.counter.leave_to_device()  # which counts when the graph is replayed
        total_of = [self.sums.wants_total and not own for own in by_block]
        own_grads = [[grads[i] for i in work.places] for work in works]
        prepared = [
            work.backend.prepare(work.views, own, [total_of[i] for i in work.places], scalars)
            for work, own in zip(works, own_grads, strict=True)
        ]
        sums, total = self.sums.of(active, grads, by_block, bucket, prepared)
        ok, clip = self.guard.decide(total, scaling, active)
        if ok is False:
            return
        reductions.run(clip)
        scalars.begin(active, set().union(*(own.scalars for own in prepared)))
        # What can be wrong shows up to here. From here on things are written.
        if self.multipliers.advance(active, ok, self.group):
            scalars.multipliers_changed()
        scalars.ok, scalars.clip = ok, clip
        self.counter.advance(active, ok, self.guard.taken)
        found = Found(self.phase.run(active, sums), reductions.written())
        if self.bounds is not None:
            unscale = None if scaling is None else scaling.factor
            found = self.bounds.found(active, grads, scalars, found, sums, self.group, unscale)
        for work, own in zip(works, own_grads, strict=True):
            work.backend.step(work.views, own, scalars, found)
        self.captured |= capture.capturing()
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
