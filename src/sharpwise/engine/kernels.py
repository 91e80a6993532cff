"""The step of one tensor, written once: called as it is (the reference), or compiled (the fast path).

Every tensor is seen as a view whose *rows* (output rows, law 6) run along one dimension. Vectors of one number per
row (`row_step`, `row_decay`) come shaped to broadcast against the view.
"""

import logging
import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.rules.base import Rule, add
from sharpwise.storage.dense import mix, round_to

logger = logging.getLogger(__name__)

Graph = Callable[[list[Tensor]], Sequence[Tensor]]
"""A compiled kernel: takes its arguments in a list, which it empties."""
Call = tuple[Graph, list[Tensor]]
"""A kernel and what to call it with."""

CHUNK = 1 << 22
"""Elements per eager call: temporaries stay below 16 MiB, and tensors up to this size round exactly as torch's do."""
PIECE = 1 << 17
"""As CHUNK, on a CPU where speed counts: temporaries that stay in the cache. Larger ones also go back to the system
with every call, and getting them anew costs more than the step itself."""
RUN = 1 << 10
"""Elements whose squares are added in fp32."""
COMPILE_TOTAL = 10_000_000
"""Below this many parameters compiling costs more than it brings."""
COMPILE_EACH = 1 << 16
"""Matrices below this size are never compiled one by one."""


class Noise(NamedTuple):
    """Global element numbers (their sum broadcasts to the view) and the key of this step, for stochastic rounding."""

    row: Tensor
    column: Tensor
    key: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is fp32 whatever the parameter's type; only fp64 parameters are moved in fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def update(
    rule: Rule,
    s: Mapping[str, Any],
    p: Tensor,
    g: Tensor,
    stored: Sequence[Tensor],
    row_step: Tensor | None = None,
    row_decay: Tensor | None = None,
    noise: Noise | None = None,
) -> None:
    """Move p and its element state by one step, in place.

    Scalars besides the rule's own: `step` (lr * multiplier / bias correction), `decay` (1 - lr wd), and, where asked
    for, `clip` (factor on the gradient), `ok` (0: keep everything as it was), `weight_decay` (coupled).
    """
    names = [name for name, kind in rule.state.items() if kind == "element"]
    dtype = compute_dtype(p.dtype)
    x, g = p.to(dtype), g.to(dtype)
    if "clip" in s:
        g = g * s["clip"]
    if "weight_decay" in s:
        g = add(g, x, s["weight_decay"])
    new, numerator, denominator = rule.direction(g, {n: t.to(dtype) for n, t in zip(names, stored, strict=True)}, s)
    if row_decay is not None:
        x = x * row_decay
    elif "decay" in s:
        x = x * s["decay"]
    step = s["step"] if row_step is None else row_step
    if denominator is None:
        x = add(x, numerator, -step)
    elif isinstance(step, float):
        x = torch.addcdiv(x, numerator, denominator, value=-step)
    else:
        x = x - (step * numerator) / denominator
    _write(p, x, s, noise, 0)
    for slot, (name, tensor) in enumerate(zip(names, stored, strict=True), start=1):
        _write(tensor, new[name], s, noise, slot)


def update_blocks(
    rule: Rule,
    s: Mapping[str, Any],
    p: Tensor,
    g: Tensor,
    stored: Sequence[Tensor],
    blocks: Mapping[str, Tensor],
    counts: Tensor,
    row_step: Tensor | None = None,
    row_decay: Tensor | None = None,
) -> Tensor:
    """As `update`, of a matrix whose rows are blocks; their denominators are worked out by the way, from `blocks` as it
    was before the step and stays. Returns the sum of g*g per row, fp64, for the block phase that will change it.

    Compiled, a row is read, summed up and moved while it is in the cache: the gradient comes from memory once. Writing
    the block state here would split the loop in three.
    """
    dtype = compute_dtype(p.dtype)
    groups = g.to(dtype).square().view(g.shape[0], g.shape[1] // 256, 256).sum(2)
    squares = groups.double().sum(1)
    old = {name: t.to(dtype) for name, t in blocks.items()}
    _, denominator = rule.block_phase(old, (squares / counts).to(dtype), s)
    rate = (s["step"] / denominator).view(-1, 1)
    # The largest of equal numbers, of which none is 0: what a loop over the groups of a row yields is worked out once
    # per row, anything else once per element.
    rate = torch.where(groups < 0, torch.zeros_like(rate), rate).amax(1, keepdim=True)
    update(rule, s, p, g, stored, rate if row_step is None else rate * row_step, row_decay)
    return squares


def _write(target: Tensor, value: Tensor, s: Mapping[str, Any], noise: Noise | None, slot: int) -> None:
    index = None if noise is None or target.dtype != torch.bfloat16 else noise.row + noise.column
    rounded = round_to(value, target.dtype, index, None if noise is None else mix(noise.key + slot))
    target.copy_(torch.where(s["ok"] != 0, rounded, target) if "ok" in s else rounded)


def row_squares(g: Tensor, dim: int) -> Tensor:
    """Sum of g*g over `dim`, in fp64; in pieces, so that the fp64 copy stays small."""
    if g.numel() <= CHUNK:
        return (g.double() ** 2).sum(dim)
    parts = [(part.double() ** 2).sum(dim) for part in g.split(max(1, CHUNK * g.shape[0] // g.numel()))]
    return torch.stack(parts).sum(0) if dim == 0 else torch.cat(parts)


def quick_norms(flat: Tensor) -> list[Tensor]:
    """Norms of runs that together are `flat`, fp32: over more than a run they would lose digits."""
    n = flat.numel()
    whole = n - n % RUN
    parts = [flat[:whole].view(-1, RUN)] if whole else []
    parts += [flat[whole:].view(1, -1)] if whole < n or not n else []
    return [torch.linalg.vector_norm(part, dim=1) for part in parts]


def quick_row_squares(g: Tensor, dim: int) -> Tensor:
    """As `row_squares`, of fp32 sums over runs."""
    run = g.shape[-1] if g.shape[-1] <= RUN else math.gcd(g.shape[-1], RUN)
    if g.dim() != 2 or run < 32:
        return row_squares(g, dim)
    if dim == 1:
        norms = torch.linalg.vector_norm(g.view(g.shape[0], -1, run), dim=2).double()
        return norms.square_().sum(1)
    parts = [torch.sum(part * part, 0) for part in g.split(max(1, piece(g) // g.shape[1]))]
    return torch.stack(parts).sum(0, dtype=torch.float64)


def piece(tensor: Tensor) -> int:
    """Elements per eager call where speed counts."""
    return PIECE if tensor.device.type == "cpu" else CHUNK


def _grouped_squares(g: Tensor, dim: int) -> Tensor:
    """As `row_squares`, for compiling: squares are added in fp32 in groups of 16 rows or of 256 columns (16 per vector
    lane), and the groups in fp64. A conversion of each element would cost twice the time of reading it on the CPU
    (0.57 against 0.26 of a fused AdamW step). The size of `dim` divides by the group.
    """
    g = g if g.dtype == torch.float64 else g.float()
    if dim == 1:
        return (g * g).view(g.shape[0], g.shape[1] // 256, 256).sum(2).double().sum(1)
    # The loop of a group reads its rows side by side: of 32 streams the processor loses track (29 ms for GPT-2's
    # matrices, 15 with 16, 18 with 8).
    return (g * g).view(g.shape[0] // 16, 16, g.shape[1]).sum(1).double().sum(0)


class Compiler:
    """Compiled twins of `update` and `row_squares`, one graph for all shapes per rule, layout and set of options.

    A graph is traced on small examples, so that a step never compiles twice and never guards: what it may depend
    on is in its key. If one cannot be built (no compiler on the machine, say), that is logged once, and the eager twin
    serves.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, ...], Graph] = {}
        self._failed: set[Any] = set()
        self.broken = False

    @property
    def graphs(self) -> int:
        """How many graphs have been built."""
        return len(self._graphs)

    def update_call(
        self,
        known: dict[Any, Graph],
        rule: Rule,
        s: Mapping[str, Any],
        packed: Tensor,
        p: Tensor,
        g: Tensor,
        stored: Sequence[Tensor],
        row_step: Tensor | None,
        row_decay: Tensor | None,
        noise: Noise | None,
    ) -> Call | None:
        """The graph of `update` and what to call it with; None if it cannot be built.

        Args:
            known: keeps the graphs of these tensors.
            packed: the values of `s` in one tensor.
        """
        args = [packed, p, g, *stored]
        args += [t for t in (row_step, row_decay, *(noise or ())) if t is not None]
        short = (tuple(s), row_step is None, row_decay is None, noise is None, g.dtype)
        graph = known.get(short)
        if graph is None:
            names = tuple(s)
            form = tuple((t.dtype, tuple(n == 1 for n in t.shape)) for t in args)
            key = (type(rule), *short, form, p.device)

            def body(packed: Tensor, p: Tensor, g: Tensor, *more: Tensor) -> tuple[()]:
                rest = list(more)
                own = [rest.pop(0) for _ in stored]
                step = None if row_step is None else rest.pop(0)
                decay = None if row_decay is None else rest.pop(0)
                scalars = dict(zip(names, packed.unbind(), strict=True))
                update(rule, scalars, p, g, own, step, decay, Noise(*rest) if rest else None)
                return ()

            graph = self._built(key, body, [packed, *(_example(t, (96, 512)) for t in args[1:])])
            if graph is None:
                return None
            known[short] = graph
        return graph, args

    def blocks_call(
        self,
        known: dict[Any, Graph],
        rule: Rule,
        s: Mapping[str, Any],
        packed: Tensor,
        p: Tensor,
        g: Tensor,
        stored: Sequence[Tensor],
        blocks: Mapping[str, Tensor],
        counts: Tensor,
        row_step: Tensor | None,
        row_decay: Tensor | None,
    ) -> Call | None:
        """As `update_call`, of `update_blocks`."""
        args = [packed, p, g, counts, *stored, *blocks.values()]
        args += [t for t in (row_step, row_decay) if t is not None]
        short = ("blocks", tuple(s), row_step is None, row_decay is None, g.dtype)
        graph = known.get(short)
        if graph is None:
            names, kept = tuple(s), tuple(blocks)
            form = tuple((t.dtype, tuple(n == 1 for n in t.shape[1:])) for t in args)

            def body(packed: Tensor, p: Tensor, g: Tensor, counts: Tensor, *more: Tensor) -> tuple[Tensor]:
                rest = list(more)
                own = [rest.pop(0) for _ in stored]
                state = {name: rest.pop(0) for name in kept}
                step = None if row_step is None else rest.pop(0)
                decay = None if row_decay is None else rest.pop(0)
                scalars = dict(zip(names, packed.unbind(), strict=True))
                return (update_blocks(rule, scalars, p, g, own, state, counts, step, decay),)

            examples = [packed, *(_example(t, (96, 512), rows=True) for t in args[1:])]
            # Else what goes into the rate of a row is written out as vectors of all rows, and the loop is split there.
            whole = {"realize_reads_threshold": 64, "realize_acc_reads_threshold": 64}
            graph = self._built((type(rule), *short, form, p.device), body, examples, needed=False, **whole)
            if graph is None:
                return None
            known[short] = graph
        return graph, args

    def row_squares_call(self, g: Tensor, dim: int, exact: bool) -> Call | None:
        """As `update_call`, of `row_squares`; unless exact, groups of squares are added in fp32."""
        fits = not exact and g.shape[dim] % (256 if dim == 1 else 16) == 0
        key = (dim, fits, g.dtype, g.device)
        graph = self._graphs.get(key)
        if graph is None:

            def body(g: Tensor) -> tuple[Tensor]:
                return (_grouped_squares(g, dim) if fits else (g.double() ** 2).sum(dim),)

            graph = self._built(key, body, [_example(g, (96, 512) if fits else (66, 98))])
        return None if graph is None else (graph, [g])

    def _built(
        self, key: Any, body: Callable[..., Any], examples: list[Tensor], needed: bool = True, **patches: Any
    ) -> Graph | None:
        if key in self._graphs or key in self._failed or self.broken:
            return self._graphs.get(key)
        try:
            self._graphs[key] = _compile(body, examples, **patches)
        except Exception as error:  # whatever inductor raises: the eager twin gives the same numbers
            self._failed.add(key)
            self.broken = needed
            logger.warning("compiling the optimizer step failed, going on without: %s", str(error).split("\n")[0])
        return self._graphs.get(key)


def compiler_present(device: torch.device) -> bool:
    """Whether graphs can be compiled for the device."""
    return device.type == "cuda" or (device.type == "cpu" and any(map(shutil.which, ("g++", "clang++", "c++"))))


def _example(tensor: Tensor, sizes: tuple[int, int], rows: bool = False) -> Tensor:
    """A small tensor of the same form: broadcast dimensions stay 1, the others get sizes that are all different.

    With `rows` the first is never one that is broadcast, even if there is but one row.
    """
    kept = [n == 1 and not (rows and d == 0) for d, n in enumerate(tensor.shape)]
    shape = [1 if one else m for one, m in zip(kept, (*sizes, 70)[: tensor.dim()], strict=True)]
    return torch.ones(shape, dtype=tensor.dtype, device=tensor.device)


def _compile(body: Callable[..., Any], examples: list[Tensor], **patches: Any) -> Graph:
    # Not torch.compile: its guards and wrappers cost several times what the call itself does, at every call. What they
    # would check is in the key of the graph.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of torch
        from torch._functorch import config as functorch
        from torch._inductor import standalone_compile
        from torch._inductor.compile_fx import compile_fx_inner
        from torch.fx.experimental.proxy_tensor import make_fx

        inner: list[Any] = []

        def keep(*args: Any, **kwargs: Any) -> Any:
            inner.append(compile_fx_inner(*args, **kwargs))
            return inner[-1]

        inputs: list[Any] = list(examples)
        # Inductor proves each vector instruction set by building and importing a test library, 15 s on a cold machine.
        # The processor's own flags are read all the same.
        options = {"config_patches": {"cpp.vec_isa_ok": True} | patches, "inner_compile": keep}
        graph = make_fx(body, tracing_mode="symbolic")(*inputs)
        with functorch.patch(enable_autograd_cache=False):  # a hit there would leave out `keep`
            compiled = standalone_compile(graph, inputs, dynamic_shapes="from_graph", options=options)
    # What torch puts around it, for autograd, would take as long as the call: it is left out where torch lets us see
    # what is inside. `Stepper.run` tells autograd what was written.
    direct: Graph | None = getattr(inner[0], "current_callable", None) if len(inner) == 1 else None
    return direct or (lambda args: compiled(*args))
