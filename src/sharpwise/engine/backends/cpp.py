"""Our own kernels in C++, for the CPU: argument tables of the matrices of a step.

Where nothing has to be known of all gradients before the first element moves (no collective, clipping or guard), a
block is summed up and moved in one pass: a row while it is in the cache, and the gradient comes from memory once.
Elsewhere the sums come first, and the elements are moved by steps per row.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpwise.engine.backends import loops
from sharpwise.engine.backends.base import LEAST, Backend, Found, Spec, pays, row_step
from sharpwise.engine.backends.loops import TYPES, Arguments, Kernel
from sharpwise.engine.layout import Run
from sharpwise.engine.options import Options
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.shards import local

logger = logging.getLogger(__name__)

ONE_THREAD = 1 << 20
"""Elements up to which one thread may do it all: a position embedding, one block."""


class LaunchTable:
    """Arguments of kernels, which are called together. Tensors whose addresses it holds are kept until then."""

    def __init__(self) -> None:
        self._rows: dict[Kernel, list[Arguments]] = {}
        self._kept: list[Tensor] = []

    def launch(self) -> None:
        """Call them."""
        for kernel, rows in self._rows.items():
            kernel(rows)

    def add_blocks(self, view: ParamView, kernel: Kernel, runs: Sequence[Run], g: Tensor, scalars: StepScalars) -> None:
        """A view with its block state."""
        by_row, width, layout = view.dim == 1, view.shape[1], view.layout
        rates = scalars.block_rate(view) if scalars.by_row(view) else None
        factors = [rates, scalars.block_decay(view)]
        for rows, blocks, size in runs:
            start = rows.start * width if by_row else 0
            n = blocks.stop - blocks.start
            own = [None if f is None else f[blocks] for f in factors]
            if not by_row and layout.block_of_row is not None:
                own = [None if f is None else f[layout.block_of_row] for f in factors]  # per column
            self._rows.setdefault(kernel, []).append(
                [
                    *(self._address(t, start) for t in (view.parameter(), g, *view.stored())),
                    *(self._address(t, blocks.start) for t in view.blocks.values()),
                    *([n, size * width, 1, n] if by_row else [*view.shape, 0, n]),
                    self._address(layout.counts, blocks.start),
                    self._address(None if by_row else layout.block_of_row),
                    *(self._address(None if f is None else f.contiguous()) for f in own),
                    self._address(scalars.numbers(view, kernel.scalars)),
                ]
            )

    def add_elements(
        self, view: ParamView, kernel: Kernel, g: Tensor, scalars: StepScalars, step: Tensor | None
    ) -> None:
        """The elements of a view."""
        decay = scalars.row_decay(view)
        self._rows.setdefault(kernel, []).append(
            [
                *(self._address(t) for t in (view.parameter(), g, *view.stored())),
                *(*view.shape, view.dim, 0, 0, 0),
                *(self._address(None if t is None else t.contiguous()) for t in (step, decay)),
                self._address(scalars.numbers(view, kernel.scalars)),
            ]
        )

    def _address(self, tensor: Tensor | None, start: int = 0) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor)
        return tensor.data_ptr() + start * tensor.element_size()


class Cpp(Backend):
    """Loops written around the arithmetic of a rule, which is traced, and not written twice."""

    name: ClassVar[str] = "cpp"

    def __init__(self) -> None:
        self._kernels: dict[Any, Any] = {}
        self._failures: dict[Any, str] = {}

    @property
    def built(self) -> int:
        return len({kernel.source for kernel in self._kernels.values() if kernel is not None})

    def refuses(self, spec: Spec) -> str:
        view = spec.view
        if view.device.type != "cpu":
            return f"not for {view.device.type}"
        if reason := pays(spec):
            return reason
        if not spec.options.decoupled or spec.options.stochastic_rounding:
            return "no stochastic rounding" if spec.options.decoupled else "no coupled decay"
        if view.rule.reductions:
            return "the rule looks at whole matrices"
        if spec.grad != view.param.dtype:
            return f"gradient in {str(spec.grad)[6:]}, parameter in {str(view.param.dtype)[6:]}"
        if reason := _shape_refused(view):
            return reason
        if self.sums_blocks(view, spec.options) or self._kernel(view, with_blocks=False) is not None:
            return ""
        return self._failures[_key(view, False)]

    def sums_blocks(self, view: ParamView, options: Options) -> bool:
        return not options.guarded and bool(self._one_pass(view))

    def _one_pass(self, view: ParamView) -> Sequence[Run]:
        """The runs of a view that moves in one pass; none if it does not, or has too little for all threads."""
        if not view.rule.has_blocks:
            return ()
        threads = torch.get_num_threads()
        key = "one pass", threads
        if key not in view.kept:
            runs = runs_of(view) if not _types_refused(list(view.blocks.values())) else []
            # Threads share blocks of rows, or rows of columns by the eight.
            blocks = min((run.blocks.stop - run.blocks.start for run in runs), default=0)
            shared = blocks if view.dim == 1 else view.shape[0] // 8
            serial = shared < 2 * threads and view.numel > ONE_THREAD
            # Built here, as the number of threads may change between two steps.
            serial = serial and self._kernel(view, with_blocks=False) is not None
            view.kept[key] = [] if serial or not runs or self._kernel(view, with_blocks=True) is None else runs
        found: Sequence[Run] = view.kept[key]
        return found

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        if scalars.ok is not True and not bool(scalars.ok):  # of gradients on a device, beside these on the CPU
            return
        table = LaunchTable()
        for view, g in zip(views, grads, strict=True):
            if view.rule.has_blocks and id(view) not in found.rates:
                kernel, runs = self._kernel(view, with_blocks=True), self._one_pass(view)
                table.add_blocks(view, kernel, runs, view.rows_of(g), scalars)
            else:
                kernel = self._kernel(view, with_blocks=False)
                table.add_elements(view, kernel, view.rows_of(g), scalars, row_step(view, scalars, found))
        table.launch()

    def row_squares(self, matrices: Sequence[Tensor], dims: Sequence[int], exact: bool) -> list[Tensor | None]:
        """Sums of g*g over a dimension of matrices, fp64; None of those that it does not take."""
        own = [i for i, g in enumerate(matrices) if not _matrix_refused(g) and g.numel() >= LEAST]
        kernel = self._build("squares", loops.Squares) if own else None
        found: list[Tensor | None] = [None] * len(matrices)
        if kernel is not None:
            sums = kernel([matrices[i] for i in own], [dims[i] for i in own], exact)
            for i, values in zip(own, sums, strict=True):
                found[i] = values
        return found

    def _kernel(self, view: ParamView, with_blocks: bool) -> Any:
        """The kernel of a view, None if it cannot be built; see `loops.Kernel`."""
        key, rule = _key(view, with_blocks), view.rule
        if key not in self._kernels:
            names = [name for name in rule.scalars(1, rule.defaults) if name != "bias_correction"]
            self._build(
                key, lambda: loops.Kernel(rule, view.param.dtype, _types(view, with_blocks), names, with_blocks)
            )
        return self._kernels[key]

    def _build(self, key: Any, build: Callable[[], Any]) -> Any:
        if key not in self._kernels:
            try:
                self._kernels[key] = build()
            except Exception as error:  # whatever the compiler's driver raises: there is another back end
                self._kernels[key] = None
                reason = str(error).split("\n")[0]
                known = f"building a kernel failed: {reason}"
                level = logging.DEBUG if known in self._failures.values() else logging.WARNING
                logger.log(level, "building a loop of the step failed, going on without: %s", reason)
                self._failures[key] = known
        return self._kernels[key]


def _key(view: ParamView, with_blocks: bool) -> Any:
    return view.rule, view.param.dtype, tuple(_types(view, with_blocks).items()), with_blocks


def _types(view: ParamView, with_blocks: bool) -> dict[str, torch.dtype]:
    kinds = ("element", "block") if with_blocks else ("element",)
    return {name: view.own[name].dtype for k in kinds for name, kind in view.rule.state.items() if kind == k}


def runs_of(view: ParamView) -> list[Run]:
    """The blocks of a view as runs of its rows, in their order; of columns as one. Empty if they are none."""
    layout = view.layout
    if len(view.shape) != 2 or view.shard.cut or layout.counts is None:
        return []
    if view.dim == 0:
        return [Run(slice(0, view.shape[1]), slice(0, len(layout.counts)), 1)]
    runs = [where for where in layout.gathers if isinstance(where, Run)]
    return runs if len(runs) == len(layout.gathers) else []


def _shape_refused(view: ParamView) -> str:
    if not view.contiguous:
        return "not contiguous"
    if len(view.shape) != 2 or min(view.shape) < 2 or view.numel < LEAST:
        return f"a vector, or fewer than {LEAST:,} elements"
    if view.copied:
        return "state is not contiguous"
    return _types_refused([local(view.param), *view.stored()])


def _types_refused(tensors: Sequence[Tensor]) -> str:
    wrong = [t for t in tensors if t.dtype not in TYPES]
    if wrong:
        return f"fp32 and bf16 alone, not {str(wrong[0].dtype)[6:]}"
    return "" if all(t.is_contiguous() for t in tensors) else "state is not contiguous"


def _matrix_refused(g: Tensor) -> bool:
    return g.dim() != 2 or g.device.type != "cpu" or g.dtype not in TYPES or not g.is_contiguous()
