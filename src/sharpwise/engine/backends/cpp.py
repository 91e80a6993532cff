"""Our own kernels in C++, for the CPU: all views of a step in one call per rule and types.

Where a view lies whole in this process, a block is summed up and moved in one pass: a row while it is in the cache, and
the gradient comes from memory once. Elsewhere the sums come first, and the elements are moved by rates per block.
"""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from sharpwise.engine.backends import loops
from sharpwise.engine.backends.base import Backend, Found, Spec, built, compiler_present, say_once, tensors_refused
from sharpwise.engine.backends.cpp_print import Form
from sharpwise.engine.backends.launch import LaunchTable, index_refused, is_columns, units_of
from sharpwise.engine.backends.loops import SHARED
from sharpwise.engine.backends.products import OwnProducts, Products
from sharpwise.engine.layout import Rectangle
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import HELD, ParamView
from sharpwise.storage import Dense

ONE_THREAD = 1 << 20
"""Elements up to which one thread may do it all: a position embedding, one block."""
ABSENT = "no C++ compiler"


class Cpp(Backend):
    """Loops written around the arithmetic of a rule, which is traced, and not written twice."""

    name: ClassVar[str] = "cpp"

    def __init__(self) -> None:
        self._kernels: dict[Any, Any] = {}  # or why they cannot be built

    @property
    def built(self) -> int:
        return len({kernel.source for kernel in self._kernels.values() if not isinstance(kernel, str)})

    def refuses(self, spec: Spec) -> str:
        view = spec.view
        view.kept.pop(("cpp", spec.grad), None)
        if view.device.type != "cpu":
            return f"not for {view.device.type}"
        if not compiler_present():
            say_once(f"{ABSENT}: steps on the CPU are the reference's, as right and slower; install g++ or clang++")
            return ABSENT
        if view.rule.reductions:
            return "the rule looks at whole matrices"
        if not view.numel:
            return "empty"
        if view.copied or not (view.contiguous or is_columns(view)):
            return "state is not contiguous" if view.contiguous else "not contiguous"
        if reason := tensors_refused(view, spec.grad):
            return reason
        if spec.options.stochastic_rounding and (reason := index_refused(view)):
            return reason
        kernel = self._kernel_of(spec)
        if isinstance(kernel, str):
            return kernel
        view.kept["cpp", spec.grad] = spec  # what moves here, as others ask
        return ""

    def sums_blocks(self, spec: Spec) -> bool:
        if spec.controlled:  # the control wants to know the direction before anything moves
            return False
        # Gradients that are read for their norm have their columns summed up there: it takes longer than reading them.
        columns = not spec.view.by_row and spec.view.numel >= SHARED
        return not (spec.options.guarded and columns) and bool(self._one_pass(spec))

    def bounds(self, spec: Spec) -> bool:
        if not spec.controlled:
            return False
        view, key = spec.view, ("bounds", spec.grad)
        if key not in view.kept:  # asked at every step
            by_row = view.by_row and view.shape[1] > 1
            rows = view.unit == "row" and not view.cuts_rows and (by_row or not (view.by_row or view.rule.has_blocks))
            found = (rows or bool(units_of(view))) and getattr(self._kernel_of(spec), "control", None) is not None
            view.kept[key] = found and (not view.holds or view.origin.own[HELD].dtype == torch.float32)
        return bool(view.kept[key])

    def _one_pass(self, spec: Spec) -> Sequence[Rectangle]:
        """The runs of a view that moves in one pass; none if it does not, or has too little for all threads."""
        view = spec.view
        if not view.rule.has_blocks:
            return ()
        threads = torch.get_num_threads()
        key = "one pass", threads
        if key not in view.kept:
            runs = _whole(view) if len(_form(spec).state) == len(view.rule.state) else []
            # Threads share blocks of rows, or rows of columns by the eight.
            blocks = min((run.blocks for run in runs), default=0)
            shared = blocks if view.dim == 1 else view.shape[0] // 8
            serial = shared < 2 * threads and view.numel > ONE_THREAD
            view.kept[key] = [] if serial else runs
        found: Sequence[Rectangle] = view.kept[key]
        return found

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        if scalars.ok is not True and not bool(scalars.ok_of(views[0])):
            return  # another device has the gradient that is not finite
        own = [g if g.is_contiguous() else g.contiguous() for g in grads]
        addresses = array("q", [g.data_ptr() for g in own])
        for table in self._tables_of(views, own, scalars, found):
            table.launch(addresses, scalars, found)

    def sums(
        self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found
    ) -> dict[int, Tensor]:
        """Of the views that are moved here the sums of a control over their rows, as these would move without it:
        fp64 [3, rows] by id of the view, until the next call."""
        pairs = [(view, g) for view, g in zip(views, grads, strict=True) if ("cpp", g.dtype) in view.kept]
        if not pairs:
            return {}
        views, own = [view for view, _ in pairs], [g if g.is_contiguous() else g.contiguous() for _, g in pairs]
        addresses = array("q", [g.data_ptr() for g in own])
        tables = self._tables_of(views, own, scalars, found, True)
        for table in tables:
            table.launch(addresses, scalars, found)
        return {key: value for table in tables for key, value in table.sums.items()}

    def _tables_of(
        self,
        views: Sequence[ParamView],
        grads: Sequence[Tensor],
        scalars: StepScalars,
        found: Found,
        sums: bool = False,
    ) -> list[LaunchTable]:
        """The argument tables of some views, the same ones as long as the same views share their scalars."""
        kinds = None
        if sums or found.told is not None:  # there is a control
            kinds = [(g.dtype, id(view) in found.lines) for view, g in zip(views, grads, strict=True)]
        stamp = scalars.partition(views), torch.get_num_threads(), kinds
        kept = views[0].kept.get(("cpp tables", sums))
        # A list of the plan is of gradients of one kind; sums are asked of a list that is made anew.
        if kept and (kept[0] is views or (sums and kept[0] == views)) and kept[1] == stamp:
            return cast(list[LaunchTable], kept[2])
        together: dict[Any, list[tuple[int, ParamView]]] = {}
        runs: dict[int, Sequence[Rectangle]] = {}
        for i, (view, g) in enumerate(zip(views, grads, strict=True)):
            spec: Spec = view.kept["cpp", g.dtype]
            if view.rule.has_blocks and id(view) not in found.rates:
                runs[id(view)] = self._one_pass(spec)
            together.setdefault(self._kernel_of(spec), []).append((i, view))
        tables = [LaunchTable(kernel, own, runs, found, scalars, sums) for kernel, own in together.items()]
        views[0].kept["cpp tables", sums] = views, stamp, tables
        return tables

    def _kernel_of(self, spec: Spec) -> Any:
        """The kernel of a view: one that bounds rows and small units, under a control; why there is none, if so."""
        form, control = _form(spec), spec.options.control
        form = replace(form, aims=control is not None and form.rule.stage != "input")
        if form.aims and not (control.scales_only and form.rule.has_blocks):  # type: ignore[union-attr]
            bounding = self._kernel(replace(form, control=control))
            if not isinstance(bounding, str):
                return bounding
        return self._kernel(form)

    @property
    def of_squares(self) -> loops.Squares | None:
        """The kernel of sums of squares; None where there is none."""
        kernel = self._kernel(loops.Squares)
        return kernel if isinstance(kernel, loops.Squares) else None

    @property
    def products(self) -> Products:
        """What works out products with thin matrices: by torch where there is no kernel."""
        kernel = self._kernel(OwnProducts)
        return kernel if isinstance(kernel, OwnProducts) else Products()

    def _kernel(self, form: Form | type) -> Any:
        """The kernel of a form, or one of its own class; why it cannot be built, if so. See `loops`."""
        if form not in self._kernels:
            build = form if isinstance(form, type) else partial(loops.Kernel, form)
            self._kernels[form] = built(build) if compiler_present() else ABSENT
        return self._kernels[form]


def _form(spec: Spec) -> Form:
    view, options = spec.view, spec.options
    fits = all(map(loops.Squares.takes, view.blocks.values()))
    state = [(name, held.format) for name, held in zip(view.elements, view.stored(), strict=True)]
    state += [(name, Dense.of(t.dtype)) for name, t in view.blocks.items()] if fits else []
    return Form(
        view.rule,
        view.param.dtype,
        spec.grad,
        tuple(state),
        coupled=not options.decoupled,
        cautious=options.cautious,
        stochastic=options.stochastic_rounding,
    )


def _whole(view: ParamView) -> Sequence[Rectangle]:
    """The rectangles of a view whose blocks are whole rows that lie together, or columns; none if they are others."""
    if len(view.shape) != 2 or view.summed_apart or view.layout.counts is None:
        return ()
    return view.rectangles if view.dim == 0 or all(own.whole for own in view.rectangles) else ()
