"""Inductor: the reference's own step of one matrix as a compiled graph, for what our own loops do not take.

One graph serves all shapes per rule, layout and set of options. A graph is traced on small examples, so that a step
never compiles twice and never guards: what it may depend on is in its key. It is then found by its text, which numbers
that are scalars of a step do not change: other betas compile nothing, a flag that `direction` reads does.
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpwise.engine.backends.base import LEAST, Backend, Found, Spec, pays, row_step
from sharpwise.engine.backends.reference import Noise, noise_of, update
from sharpwise.engine.program import usual_defaults
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView

logger = logging.getLogger(__name__)

Graph = Callable[[list[Tensor]], Sequence[Tensor]]
"""A compiled kernel: takes its arguments in a list, which it empties."""


class Inductor(Backend):
    """Compiled twins of `update`. If one cannot be built (no compiler on the machine, say), that is logged once, and
    the reference serves."""

    name: ClassVar[str] = "inductor"

    def __init__(self) -> None:
        self._graphs: dict[Any, Graph] = {}
        self._traced: dict[Any, Graph | None] = {}
        self.broken = ""

    @property
    def built(self) -> int:
        return len(self._graphs)

    def refuses(self, spec: Spec) -> str:
        view = spec.view
        if reason := pays(spec):
            return reason
        if self.broken:
            return f"building a graph failed: {self.broken}"
        if view.rule.reductions:
            return "the rule looks at whole matrices"
        if view.device.type != "cuda":
            return f"not for {view.device.type}"
        if view.numel < LEAST or min(view.shape) < 2:
            return f"a vector, or fewer than {LEAST:,} elements"
        if view.layout.rows is not None and not view.by_row:
            return "columns of a wider parameter"
        return "scattered rows" if isinstance(view.layout.rows, Tensor) else ""

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        # Calls are made ready for all before the first is made: a kernel leaves nothing in the cache, and what is done
        # between two of them takes several times as long. Of copies each moves at once: those of all would be held.
        ready: list[tuple[Graph, list[Tensor]]] = []
        for view, g in zip(views, grads, strict=True):
            p, stored = view.parameter(), view.stored()
            step, decay = row_step(view, scalars, found), scalars.row_decay(view)
            noise = noise_of(view, scalars.t(view)) if scalars.stochastic else None
            g = view.rows_of(g)
            graph, args = self._call(view, scalars, p, g, stored, step, decay, noise)
            if graph is None:
                update(view.rule, scalars.named(view), p, g, stored, step, decay, noise)
            elif view.copied:
                graph(args)
            else:
                ready.append((graph, args))
            view.write_back(p, stored)
        for graph, args in ready:
            graph(args)

    def _call(
        self,
        view: ParamView,
        scalars: StepScalars,
        p: Tensor,
        g: Tensor,
        stored: Sequence[Tensor],
        step: Tensor | None,
        decay: Tensor | None,
        noise: Noise | None,
    ) -> tuple[Graph | None, list[Tensor]]:
        """The graph of `update` and what to call it with; no graph if it cannot be built."""
        names = tuple(scalars.named(view))
        args = [scalars.packed(view), p, g, *stored]
        args += [t for t in (step, decay, *(noise or ())) if t is not None]
        short = "graph", names, step is None, decay is None, noise is None, g.dtype
        graph = view.kept.get(short)
        if graph is None:
            form = tuple((t.dtype, tuple(n == 1 for n in t.shape)) for t in args)
            key = (view.rule, *short[1:], form, p.device)
            rule, count, by_row, decays = view.rule, len(stored), step is not None, decay is not None

            def body(packed: Tensor, p: Tensor, g: Tensor, *more: Tensor) -> tuple[()]:
                rest = list(more)
                own = [rest.pop(0) for _ in range(count)]
                row_step = rest.pop(0) if by_row else None
                row_decay = rest.pop(0) if decays else None
                of_step = dict(zip(names, packed.unbind(), strict=True))
                update(rule, of_step, p, g, own, row_step, row_decay, Noise(*rest) if rest else None)
                return ()

            graph = self._build(key, body, [args[0], *(_example(t) for t in args[1:])])
            if graph is not None:
                view.kept[short] = graph
        return graph, args

    def _build(self, key: Any, body: Callable[..., Any], examples: list[Tensor]) -> Graph | None:
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
                self.broken = str(error).split("\n")[0]
                logger.warning("compiling the optimizer step failed, going on without: %s", self.broken)
        return self._traced.get(key)


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
