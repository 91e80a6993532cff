"""The step of one tensor, written once: called as it is (the reference), or compiled (the fast path).

Every tensor is seen as a view whose *rows* (output rows, law 6) run along one dimension. Vectors of one number per
row (`row_step`, `row_decay`) come shaped to broadcast against the view.
"""

import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine import loops
from sharpwise.engine.loops import usual_defaults
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


def _write(target: Tensor, value: Tensor, s: Mapping[str, Any], noise: Noise | None, slot: int) -> None:
    index = None if noise is None or target.dtype != torch.bfloat16 else noise.row + noise.column
    rounded = round_to(value, target.dtype, index, None if noise is None else mix(noise.key + slot))
    target.copy_(torch.where(s["ok"] != 0, rounded, target) if "ok" in s else rounded)


def row_squares(g: Tensor, dim: int) -> Tensor:
    """Sum of g*g over `dim`, in fp64; in pieces, so that the fp64 copy stays small."""
    return row_sums(g, dim, lambda part: part.double() ** 2)


def row_sums(x: Tensor, dim: int, of: Callable[[Tensor], Tensor] = Tensor.double) -> Tensor:
    """As `row_squares`, of what `of` makes of the elements."""
    if x.numel() <= CHUNK:
        return of(x).sum(dim)
    parts = [of(part).sum(dim) for part in x.split(max(1, CHUNK * x.shape[0] // x.numel()))]
    return torch.stack(parts).sum(0) if dim == 0 else torch.cat(parts)


def quick_norms(flat: Tensor) -> list[Tensor]:
    """Norms of runs that together are `flat`, fp32: over more than a run they would lose digits."""
    n = flat.numel()
    whole = n - n % RUN
    parts = [flat[:whole].view(-1, RUN)] if whole else []
    parts += [flat[whole:].view(1, -1)] if whole < n or not n else []
    return [torch.linalg.vector_norm(part, dim=1) for part in parts]


def quick_row_squares(g: Tensor, dim: int) -> Tensor:
    """As `row_squares`, of fp32 sums over runs where that is quicker: fp32 on the CPU. Beyond 1.8e19 they overflow."""
    run = g.shape[-1] if g.shape[-1] <= RUN else math.gcd(g.shape[-1], RUN)
    if g.device.type != "cpu" or g.dtype != torch.float32 or g.dim() != 2 or run < 32:
        return row_squares(g, dim)
    if dim == 1:
        norms = torch.linalg.vector_norm(g.unflatten(1, (g.shape[1] // run, run)), dim=2).double()
        return norms.square_().sum(1)
    parts = [torch.sum(part * part, 0) for part in g.split(max(1, piece(g) // g.shape[1]))]
    return torch.stack(parts).sum(0, dtype=torch.float64)


def piece(tensor: Tensor) -> int:
    """Elements per eager call where speed counts."""
    return PIECE if tensor.device.type == "cpu" else CHUNK


class Compiler:
    """Compiled twins of `update`, one graph for all shapes per rule, layout and set of options.

    A graph is traced on small examples, so that a step never compiles twice and never guards: what it may depend
    on is in its key. It is then found by its text, which numbers that are scalars of a step do not change: other betas
    compile nothing, a flag that `direction` reads does. If one cannot be built (no compiler on the machine, say), that
    is logged once, and the eager twin serves. Besides, whatever of our own loops is asked for.
    """

    def __init__(self) -> None:
        self._graphs: dict[Any, Graph] = {}
        self._traced: dict[Any, Graph | None] = {}
        self._loops: dict[Any, Any] = {}
        self._reasons: set[str] = set()  # why loops could not be built, as far as that was logged
        self.broken = False

    @property
    def graphs(self) -> int:
        """How many graphs and loops have been built."""
        return len(self._graphs) + len({loop.source for loop in self._loops.values() if loop is not None})

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
            key = (rule, *short, form, p.device)

            def body(packed: Tensor, p: Tensor, g: Tensor, *more: Tensor) -> tuple[()]:
                rest = list(more)
                own = [rest.pop(0) for _ in stored]
                step = None if row_step is None else rest.pop(0)
                decay = None if row_decay is None else rest.pop(0)
                scalars = dict(zip(names, packed.unbind(), strict=True))
                update(rule, scalars, p, g, own, step, decay, Noise(*rest) if rest else None)
                return ()

            graph = self._built(key, body, [packed, *(_example(t) for t in args[1:])])
            if graph is None:
                return None
            known[short] = graph
        return graph, args

    def step(
        self, rule: Rule, param: torch.dtype, types: Mapping[str, torch.dtype], with_blocks: bool
    ) -> loops.Step | None:
        """The loop that moves matrices of a rule; None if it cannot be built. See `loops.Step`."""
        own = [name for name in rule.scalars(1, rule.defaults) if name != "bias_correction"]
        key = rule, param, tuple(types.items()), tuple(own), with_blocks
        return self._loop(key, lambda: loops.Step(rule, param, types, own, with_blocks))

    def squares(self) -> loops.Squares | None:
        """Loops that sum up squares; None if they cannot be built."""
        return self._loop("squares", loops.Squares)

    def _loop(self, key: Any, build: Callable[[], Any]) -> Any:
        if key not in self._loops:
            try:
                self._loops[key] = build()
            except Exception as error:  # whatever the compiler's driver raises: there is another way
                self._loops[key] = None
                reason = str(error).split("\n")[0]
                level = logging.DEBUG if reason in self._reasons else logging.WARNING
                logger.log(level, "building a loop of the step failed, going on without: %s", reason)
                self._reasons.add(reason)
        return self._loops[key]

    def _built(self, key: Any, body: Callable[..., Any], examples: list[Tensor]) -> Graph | None:
        if key not in self._traced and not self.broken:
            self._traced[key] = None
            try:
                traced = _trace(body, examples)
                form = tuple((t.dtype, t.device, tuple(n == 1 for n in t.shape)) for t in examples)
                text = traced.code, repr(list(traced.named_buffers())), form, len(examples[0])
                if text not in self._graphs:
                    self._graphs[text] = _compile(traced, examples)
                self._traced[key] = self._graphs[text]
            except Exception as error:  # whatever inductor raises: the eager twin gives the same numbers
                self.broken = True
                logger.warning("compiling the optimizer step failed, going on without: %s", str(error).split("\n")[0])
        return self._traced.get(key)


def compiler_present(device: torch.device) -> bool:
    """Whether graphs can be compiled for the device."""
    return device.type == "cuda" or (device.type == "cpu" and any(map(shutil.which, ("g++", "clang++", "c++"))))


def _example(tensor: Tensor) -> Tensor:
    """A small tensor of the same form: broadcast dimensions stay 1, the others get sizes that are all different."""
    shape = [1 if n == 1 else m for n, m in zip(tensor.shape, (96, 512, 70)[: tensor.dim()], strict=True)]
    return torch.ones(shape, dtype=tensor.dtype, device=tensor.device)


def _precompiles_headers() -> bool:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    asked = os.environ.get("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS") == "1"
    return asked or any(Path(default_cache_dir(), "precompiled_headers").glob("*.?ch"))


def _trace(body: Callable[..., Any], examples: list[Tensor]) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # imported when it is needed: it takes its time

    with usual_defaults():
        graph: torch.fx.GraphModule = make_fx(body, tracing_mode="symbolic")(*examples)
    return graph


def _compile(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Graph:
    # Not torch.compile: its guards and wrappers cost several times what the call itself does, at every call. What they
    # would check is in the key of the graph.
    with warnings.catch_warnings(), usual_defaults():
        warnings.simplefilter("ignore")  # torch's own, of torch
        from torch._functorch import config as functorch
        from torch._inductor import standalone_compile
        from torch._inductor.compile_fx import compile_fx_inner

        inner: list[Any] = []

        def keep(*args: Any, **kwargs: Any) -> Any:
            inner.append(compile_fx_inner(*args, **kwargs))
            return inner[-1]

        inputs: list[Any] = list(examples)
        # Inductor proves each vector instruction set by building and importing a test library, 15 s on a cold machine.
        # The processor's own flags are read all the same. It also precompiles its headers, once per machine and in
        # more time than they save the few graphs of a step: they are used where they are, or are asked for.
        patches = {"cpp.vec_isa_ok": True, "cpp_cache_precompile_headers": _precompiles_headers()}
        options = {"config_patches": patches, "inner_compile": keep}
        with functorch.patch(enable_autograd_cache=False):  # a hit there would leave out `keep`
            compiled = standalone_compile(graph, inputs, dynamic_shapes="from_graph", options=options)
    # What torch puts around it, for autograd, would take as long as the call: it is left out where torch lets us see
    # what is inside. `Stepper.run` tells autograd what was written.
    direct: Graph | None = getattr(inner[0], "current_callable", None) if len(inner) == 1 else None
    return direct or (lambda args: compiled(*args))
