"""The step of one tensor, written once: called as it is (the reference), or compiled (the fast path).

Every tensor is seen as a view whose *rows* (output rows, law 6) run along one dimension. Vectors of one number per
row (`row_step`, `row_decay`) come shaped to broadcast against the view.
"""

import logging
import shutil
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.rules.base import Rule, add
from sharpwise.storage.dense import mix, round_to

logger = logging.getLogger(__name__)

CHUNK = 1 << 22
"""Elements per eager call: temporaries stay below 16 MiB, and tensors up to this size round exactly as torch's do."""
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
    coupled: bool,
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
    if coupled:
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
    """Sum of g*g over `dim`, in fp64.

    On the CPU, squares are added in fp32 in groups of 32 (16 per vector lane), and the groups in fp64: a conversion
    per element would cost twice the time of reading the gradient (0.57 against 0.26 of a fused AdamW step).
    """
    if g.dtype == torch.float64 or g.device.type != "cpu" or not torch.compiler.is_compiling():
        return (g.double() ** 2).sum(dim)
    g = g.float()
    if dim == 1 and g.shape[1] % 256 == 0:
        return (g * g).view(g.shape[0], g.shape[1] // 256, 256).sum(2).double().sum(1)
    if dim == 0 and g.shape[0] % 32 == 0:
        return (g * g).view(g.shape[0] // 32, 32, g.shape[1]).sum(1).double().sum(0)
    return (g * g).double().sum(dim)


class Compiler:
    """Compiled twins of `update` and `row_squares`, one dynamic-shape graph per rule, layout and set of options.

    A graph that cannot be built (no compiler on the machine, say) is logged once; the eager twin serves from then on.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.broken = False

    def update(
        self, rule: Rule, names: tuple[str, ...], coupled: bool, packed: Tensor, p: Tensor, g: Tensor, *rest: Any
    ) -> None:
        """As `update`, with the scalars packed in one tensor in the order of `names`."""
        layout = tuple(None if not isinstance(r, Tensor) else tuple(n == 1 for n in r.shape) for r in rest[1:3])
        key = (type(rule), tuple(rule.state), names, coupled, layout, p.dtype, rest[3] is None)

        def body(packed: Tensor, p: Tensor, g: Tensor, *rest: Any) -> None:
            update(rule, dict(zip(names, packed.unbind(), strict=True)), coupled, p, g, *rest)

        def eager() -> None:
            values = packed.tolist() if packed.device.type == "cpu" else packed.unbind()
            update(rule, dict(zip(names, values, strict=True)), coupled, p, g, *rest)

        self._call(key, body, eager, packed, p, g, *rest)

    def row_squares(self, g: Tensor, dim: int) -> Tensor:
        """As `row_squares`."""
        fits = g.shape[1] % 256 == 0 if dim == 1 else g.shape[0] % 32 == 0

        def body(g: Tensor) -> Tensor:
            return row_squares(g, dim)

        result: Tensor = self._call((dim, fits, g.dtype), body, lambda: row_squares(g, dim), g)
        return result

    def _call(self, key: tuple[Any, ...], body: Callable[..., Any], eager: Callable[[], Any], *args: Any) -> Any:
        if self.broken:
            return eager()
        graph = self._graphs.get(key)
        if graph is not None:
            return graph(*args)
        try:
            graph = _compile(body, f"sharpwise_{len(self._graphs)}")
            from torch.fx.experimental import _config as shapes

            with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # a square is no special case
                result = graph(*args)
        except Exception as error:  # whatever inductor raises: the eager twin gives the same numbers
            self.broken = True
            logger.warning("compiling the optimizer step failed, going on without: %s", str(error).split("\n")[0])
            return eager()
        self._graphs[key] = graph
        return result


def compiler_present(device: torch.device) -> bool:
    """Whether graphs can be compiled for the device."""
    return device.type == "cuda" or (device.type == "cpu" and any(map(shutil.which, ("g++", "clang++", "c++"))))


def _compile(body: Callable[..., Any], name: str) -> Callable[..., Any]:
    # Dynamo keeps its cache per code object, with a limit: each graph gets a code object of its own.
    own = types.FunctionType(
        body.__code__.replace(co_name=name), body.__globals__, name, body.__defaults__, body.__closure__
    )
    # Inductor proves each vector instruction set by building and importing a test library, 15 s on a cold machine.
    # The processor's own flags are read all the same.
    compiled: Callable[..., Any] = torch.compile(own, dynamic=True, fullgraph=True, options={"cpp.vec_isa_ok": True})
    return compiled
