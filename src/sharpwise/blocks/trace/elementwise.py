"""Everything between the products: activations, norms, choices, and parameters that scale or shift.

Gradients pass activations whatever their slope, and norms without their denominators, which would make everything
depend on everything.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sharpwise.blocks.trace.calls import Call, Use
from sharpwise.blocks.trace.graph import Normed, Through
from sharpwise.blocks.trace.matrices import add_bias
from sharpwise.blocks.trace.recorder import NEW, Recorder
from sharpwise.blocks.trace.weights import Weight, map_tensors, tensors_in, words

ACTIVATIONS = words(
    "relu relu_ relu6 gelu silu silu_ sigmoid sigmoid_ tanh tanh_ softplus erf mish hardswish hardsigmoid hardtanh elu "
    "celu selu leaky_relu prelu rrelu logsigmoid softsign threshold exp expm1 square pow __pow__ abs sin cos acos "
    "arccos log log1p expit"
)
LIMITS = words("clamp clamp_ clamp_min clamp_max clip maximum minimum")  # no activation unless at 0
COMPARISONS = words("gt ge lt le __gt__ __ge__ __lt__ __le__ greater less")
_KINDS = COMPARISONS | words("eq ne __eq__ __ne__ not_equal isin")
NORMS = words("layer_norm rms_norm group_norm batch_norm instance_norm normalize")
STATISTICS = words("mean var std var_mean std_mean norm vector_norm linalg_vector_norm sum logsumexp")
CHOICES = words("topk argmax sort argsort max")
SCALES = words("mul __mul__ __rmul__ mul_ __imul__ multiply")
SHIFTS = words("add __add__ __radd__ add_ __iadd__ sub __sub__ sub_ __isub__")
QUOTIENTS = words("div __truediv__ true_divide div_ __itruediv__")
# Of numbers that were given these make others that are not those any more: masks, counts, places.
_COUNTS = words("cumsum argsort sort argmax argmin nonzero bincount searchsorted bucketize unique cumprod cummax")
JOINS = words("cat concat concatenate stack where masked_fill lerp")
CONVS = words("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
# Products of data with weights that are read in no other way: what they make, nothing is known of.
CLOSED = CONVS | words(
    "bilinear lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell tensordot inner outer kron "
    "einsum chain_matmul multi_dot linalg_multi_dot dot vdot embedding_bag"
)
_HOW = {
    name: how
    for how, names in {"scale": SCALES, "shift": SHIFTS, "join": JOINS, "conv": CONVS}.items()
    for name in names
}
_BENT = ACTIVATIONS | LIMITS
_MULTIPLIES = SCALES | QUOTIENTS
# All others are run as they are.
_SPECIAL = _BENT | _MULTIPLIES | CHOICES | STATISTICS | COMPARISONS | CONVS | {"glu", "where"}


def handle(record: Recorder, call: Call, weights: list[Weight]) -> Any:
    """The result of any call on data."""
    if call.name in NORMS and (normed := _norm(record, call)) is not None:
        return normed
    if weights:
        _note_uses(record, call, weights)
        if call.name in CLOSED and not _by_channel(call, weights[0]):
            return _closed(record, call, weights)
    call = record.on_data(call)
    given = call.tensors
    x = call.argument(0, "input", "condition")
    if not isinstance(x, Tensor) or not any(t.requires_grad for t in given):
        result = call.run()
        _copied(record, call, result)
        if call.name == "one_hot" and id(x) in record.copies:
            record.mark("one_hot", result)
        for what in ("statistic", "choice", "input", "held", "one_hot", "kind"):
            if record.is_marked(what, *given):
                record.mark(what, result)
        return result
    if call.name not in _SPECIAL:
        return _run(call)
    if call.name in CHOICES:
        return _choice(record, call, x)
    if call.name == "glu":
        left, right = x.chunk(2, call.argument(1, "dim") or -1)
        return left * _through(right, right.sigmoid(), record.graph.factor, "sigmoid")
    if call.name in STATISTICS and _over_last(call, x):
        result = record.mark("statistic", map_tensors(Tensor.detach, call.run()))
        if call.name == "logsumexp" and record.graph.nearest(x, record.graph.scores) is not None:
            record.mark("of_scores", result)
        return result
    if call.name in _BENT and x.requires_grad:
        return _activation(record, call, x)
    if call.name in COMPARISONS:
        return record.mark("comparison", call.run())
    result = _run(call)
    if call.name in CONVS and isinstance(result, Tensor) and weights and _by_channel(call, weights[0]):
        record.graph.by_channel.add(result.grad_fn)
    if call.name in SCALES and isinstance(result, Tensor) and len(given) == 2:
        left, right = given
        if left.requires_grad and right.requires_grad and left.grad_fn is not result.grad_fn:
            record.graph.factors[result.grad_fn] = left, right
    if call.name == "where" and record.is_marked("comparison", x):  # a function in pieces
        return _through(result, result, record.graph.factor, "where")
    if call.name in _MULTIPLIES and record.is_marked("statistic", *given) and _is_data(record, result):
        return _normed(result)
    return result


def _is_data(record: Recorder, result: Any) -> bool:
    """Whether anything but parameters made it; a gain of a statistic normalizes nothing."""
    return isinstance(result, Tensor) and any(leaf.kind != "weight" for leaf in record.graph.behind(result))


def _copied(record: Recorder, call: Call, result: Any) -> None:
    """Integers made of integers that the model was given, and of nothing that it counts, are those of a token too."""
    if call.name in _COUNTS or record.is_marked("count", *call.tensors):
        record.mark("count", result)
        return
    given = [record.copies[id(t)] for t in call.tensors if id(t) in record.copies]
    if call.name in _KINDS and given:
        record.mark("kind", result)
    if call.name == "__setitem__" and given:
        result = call.args[0]
    if not isinstance(result, Tensor) or not given or call.name in NEW or id(result) in record.copies:
        return
    whole = result.dtype not in (torch.bool, torch.uint8) and not result.is_floating_point()
    if whole and not (call.name == "__getitem__" and _picks(*call.args)):
        record.copies[id(result)] = given[0]
        record.keep(result)


def _picks(given: Tensor, index: Any) -> bool:
    """Whether an index picks one of several numbers of each token."""
    last = isinstance(index, tuple) and isinstance(index[-1], int) and given.ndim > 2
    return last and (len(index) == given.ndim or Ellipsis in index)


def _run(call: Call) -> Any:
    """Its result; a view of what lies otherwise in memory here than in the model is a copy."""
    if call.name != "view":
        return call.run()
    try:
        return call.run()
    except RuntimeError:
        return Tensor.reshape(*call.args, **call.kwargs)


def _through(x: Tensor, value: Tensor, factor: list[float] | None, name: str) -> Tensor:
    out: Tensor = Through.apply(x, value, factor, name)
    return out


def _normed(x: Tensor) -> Tensor:
    out: Tensor = Normed.apply(x, x, None)
    return out


def _activation(record: Recorder, call: Call, x: Tensor) -> Any:
    values = [*call.args[1:], *call.kwargs.values()]
    if any(t.requires_grad for t in tensors_in(values)):  # a power that is data, the slope of a prelu
        return call.run()
    # A copy: it may work in place.
    result = call.mapped(lambda t: t.detach().clone()).run()
    if not isinstance(result, Tensor) or result.shape != x.shape or not result.is_floating_point():
        return call.run()
    if call.name in LIMITS and not any(type(v) in (int, float) and v == 0 for v in values):
        return _through(x, result, None, call.name)
    # Never zero: what it multiplies is to be seen.
    return _through(x, torch.where(result == 0, 0.5, result), record.graph.factor, call.name.strip("_"))


def _norm(record: Recorder, call: Call) -> Tensor | None:
    try:
        given = inspect.signature(getattr(functional, call.name)).bind(*call.args, **call.kwargs).arguments
    except (TypeError, ValueError):
        return None
    x = record.real(given["input"])
    if not x.requires_grad:
        return None
    out = _normed(x)
    channels = call.name in ("group_norm", "batch_norm", "instance_norm") and x.ndim > 2
    for name, how in (("weight", "scale"), ("bias", "shift")):
        tensor = given.get(name)
        if tensor is None:
            continue
        if (weight := record.weight(tensor)) is not None:
            record.uses.append(Use(weight, how, record.graph.tick(), out))
        tensor = record.real(tensor)
        tensor = tensor.view(-1, *[1] * (x.ndim - 2)) if channels else tensor
        out = out * tensor if how == "scale" else out + tensor
    return out


def _note_uses(record: Recorder, call: Call, weights: list[Weight]) -> None:
    how = _HOW.get(call.name, "other")
    beside = next((t for t in call.tensors if record.weight(t) is None), None)
    for weight in weights:
        record.uses.append(Use(weight, how, record.graph.tick(), beside))
        leaf = record.graph.only_leaf(beside, straight=True) if how == "shift" and beside is not None else None
        if leaf is not None and beside is not None and leaf.kind == "matrix" and leaf.tensor.shape == beside.shape:
            add_bias(record, leaf, weight)


def _by_channel(call: Call, kernel: Weight) -> bool:
    """Whether a convolution moves every channel on its own: it mixes tokens, and no features."""
    return call.name in CONVS and not call.name.startswith("conv_t") and kernel.value.shape[1] == 1


def _closed(record: Recorder, call: Call, weights: list[Weight]) -> Any:
    """Fresh leaves in place of what a product makes that cannot be read."""
    for weight in weights:
        record.touch(weight)
    result = call.mapped(lambda x: record.real(x).detach()).run()
    return map_tensors(lambda t: record.closed(t, call.tensors), result)


def _choice(record: Recorder, call: Call, x: Tensor) -> Any:
    """The largest, of numbers that are ours: spread so that every expert gets its tokens."""
    result = call.run()
    if call.name == "max" and not isinstance(result, tuple):
        return result
    record.choices.append((x, call.name))
    record.mark("choice", result)
    if call.name != "topk" or x.ndim == 0 or call.argument(2, "dim") not in (None, -1, x.ndim - 1):
        return result
    _, indices = result
    n = x.shape[-1]
    if indices.numel() == 0 or indices.shape[-1] >= n:
        return result
    record.missed = max(record.missed, n / indices.numel())
    spread = (torch.arange(indices.numel(), device=indices.device) % n).view(indices.shape)
    values = x.gather(-1, record.mark("choice", spread))
    return type(result)((torch.where(values.isfinite(), values, torch.ones_like(values)), spread))


def _over_last(call: Call, x: Tensor) -> bool:
    """Whether a statistic is taken over the last axis alone; a sum counts if it keeps the axis, for a division."""
    place = 2 if call.name in ("norm", "vector_norm", "linalg_vector_norm") else 1
    dim = call.argument(place, "dim", "axis")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if type(dim) is not int or dim not in (-1, x.ndim - 1):
        return False
    node = x.grad_fn
    sides = {n for n, _ in node.next_functions} if node is not None and node.name().startswith("Mul") else ()
    if call.name == "sum" and len(sides) > 1:
        return False  # of products: something is weighed
    return call.name != "sum" or bool(call.argument(place + 1, "keepdim", "keepdims"))
