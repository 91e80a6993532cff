"""Matrix products, however they are written, as sets of axes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

Axes = list[tuple[Any, ...]]


_K, _M, _N, _B, _GROUP = ("k",), ("m",), ("n",), ("b",), ("group",)


class Product(NamedTuple):
    """out = left x right (+ bias). Axes with the same label are the same index; what is not in `out` is summed over."""

    left: Tensor
    right: Tensor
    left_axes: Axes
    right_axes: Axes
    out_axes: Axes
    bias: Tensor | None = None
    stacked: bool = False


def _lead(tensor: Tensor, own: int) -> Axes:
    """Labels of the leading axes, aligned from the right as broadcasting does."""
    n = tensor.ndim - own
    return [("lead", i - n) for i in range(n)]


def _matmul(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Product | None:
    if left.ndim == 0 or right.ndim == 0:
        return None
    a: Axes = [_K] if left.ndim == 1 else [*_lead(left, 2), _M, _K]
    b: Axes = [_K] if right.ndim == 1 else [*_lead(right, 2), _K, _N]
    lead = max((_lead(left, min(2, left.ndim)), _lead(right, min(2, right.ndim))), key=len)
    out = [*lead, *([_M] if left.ndim > 1 else []), *([_N] if right.ndim > 1 else [])]
    return Product(left, right, a, b, out, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product:
    lead = _lead(x, 1)
    return Product(x, weight, [*lead, _K], [_N, _K][2 - weight.ndim :], [*lead, *([_N] * (weight.ndim > 1))], bias)


def _added(bias: Tensor, left: Tensor, right: Tensor, **_: Any) -> Product | None:
    return _matmul(left, right, bias)


def _swapped(right: Tensor, left: Tensor) -> Product | None:
    return _matmul(left, right)


def _einsum(equation: Any, *operands: Any) -> Product | None:
    if not isinstance(equation, str):
        return None
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    if len(tensors) != 2:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    dots = [t.ndim - len(term.replace("...", "")) for term, t in zip(terms, tensors, strict=True)]
    axes = [_letters(term, n) for term, n in zip(terms, dots, strict=True)]
    if not arrow:  # implicit: letters that occur once, in alphabetical order
        seen = "".join(terms).replace("...", "")
        output = ("..." if "..." in inputs else "") + "".join(sorted(c for c in set(seen) if seen.count(c) == 1))
    return Product(tensors[0], tensors[1], axes[0], axes[1], _letters(output, max(dots)))


def _letters(term: str, dots: int) -> Axes:
    before, dotted, after = term.partition("...")
    lead: Axes = [("lead", i - dots) for i in range(dots)] if dotted else []
    return [*((c,) for c in before), *lead, *((c,) for c in after)]


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any) -> Product | None:
    groups = options.get("groups", rest[3] if len(rest) > 3 else 1)
    if groups != 1:
        return None  # channel by channel: no matrix
    spatial: Axes = [("space", i) for i in range(weight.ndim - 2)]
    kernel: Axes = [("kernel", i) for i in range(weight.ndim - 2)]
    batch: Axes = [_B] if x.ndim == weight.ndim else []
    return Product(x, weight, [*batch, _K, *spatial], [_N, _K, *kernel], [*batch, _N, *spatial], bias)


def _grouped(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Product | None:
    if x.ndim != 2 or weight.ndim != 3:
        return None
    return Product(x, weight, [_M, _K], [_GROUP, _K, _N], [_M, _N], stacked=True)


_PRODUCTS: dict[str, Any] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "__matmul__"), _matmul),
    "__rmatmul__": _swapped,
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _added),
    "einsum": _einsum,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("_grouped_mm", "grouped_mm"), _grouped),
}


def as_product(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Product | None:
    """The product that this call of torch computes, None if it is none."""
    read = _PRODUCTS.get(name)
    if read is None:
        return None
    product: Product | None
    if not kwargs:
        product = read(*args)
        return product
    names = {"input": 0, "self": 0, "mat1": 1, "batch1": 1, "mat2": 2, "batch2": 2, "other": 1, "tensor2": 1}
    if read in (_matmul, _swapped):
        names |= {"mat2": 1, "vec": 1}
    given = dict(kwargs)
    given.pop("out", None)
    if read in (_matmul, _swapped, _added):
        ordered = list(args) + [None] * 3
        for key in [k for k in given if k in names]:
            ordered[names[key]] = given.pop(key)
        args = [a for a in ordered if a is not None]
        given = {}
    elif read in (_linear, _conv) and "input" in given:
        given["x"] = given.pop("input")
    product = read(*args, **given)
    return product
