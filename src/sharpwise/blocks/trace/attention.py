"""Attentions: torch's functions for it, and softmax written out between two products of data."""

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from sharpwise.blocks.trace.calls import Attention, Call
from sharpwise.blocks.trace.graph import Leaf, Through
from sharpwise.blocks.trace.products import Axes, Product
from sharpwise.blocks.trace.recorder import Recorder


@contextlib.contextmanager
def flex_attention_seen() -> Iterator[None]:
    """Inside, torch's flex_attention is an attention like any other: it has no gradient on the CPU."""
    try:
        from torch.nn.attention import flex_attention as module
    except ImportError:
        yield
        return

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return out, query.new_zeros(query.shape[:-1]), query.new_zeros(query.shape[:-1])

    with contextlib.ExitStack() as stack:
        for name, replacement in (("flex_attention_hop", attend), ("_validate_device", lambda *_: None)):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def handle(record: Recorder, call: Call, product: Product | None) -> Any:
    """The result of what belongs to an attention, None for any other call."""
    if call.name == "scaled_dot_product_attention":
        return _in_one_call(record, call)
    if call.name == "multi_head_attention_forward":
        return _multi_head(record, call)
    if call.name in ("softmax", "log_softmax", "_softmax"):
        return _softmax(record, call)
    if product is not None and record.weight(product.left) is None and record.weight(product.right) is None:
        return _product_of_data(record, call, product)
    return None


def _in_one_call(record: Recorder, call: Call) -> Tensor:
    q, k, v = (record.real(call.argument(i, name)) for i, name in enumerate(("query", "key", "value")))
    mask = record.real(call.argument(3, "attn_mask"))
    bias = mask if isinstance(mask, Tensor) and mask.requires_grad else None
    by_head = [t.flatten(-2).flatten(0, -2) if t.ndim > 2 else t[None] for t in (q, k, v)]
    mean = v.mean(-2, keepdim=True)
    if mean.ndim > 3 and mean.shape[-3] != q.shape[-3]:  # fewer heads of values than of queries
        mean = mean.mean(-3, keepdim=True)
    return _attended(
        record, Attention(by_head[0], by_head[1], by_head[2], bias), mean.expand(*q.shape[:-1], v.shape[-1])
    )


def _attended(record: Recorder, attention: Attention, computed: Tensor) -> Tensor:
    """A fresh leaf. If no matrix makes the keys, or they are the stream and no matrix makes the queries, this is a
    weighted mean and no attention: what was computed.
    """
    behind = record.graph.behind(attention.k)
    learned = all(leaf.kind in ("matrix", "weight") for leaf in behind)  # queries may be, if the keys are made for them
    if not any(leaf.kind == "matrix" for leaf in behind):
        return computed
    if not (learned or record.graph.matrices_behind(attention.q)):
        return computed
    record.attentions.append(attention)
    out = record.graph.positive(computed.shape, computed.dtype, computed.device)
    return record.graph.add(Leaf(out, "attention", record.graph.tick())).tensor.clone()


def _multi_head(record: Recorder, call: Call) -> tuple[Tensor, Tensor | None]:
    """The function inside nn.MultiheadAttention, from its equations: project, attend, project. Tokens come first."""
    bound = inspect.signature(call.func).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    a = bound.arguments
    with record:
        if a["use_separate_proj_weight"]:
            weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
        else:
            weights = list(a["in_proj_weight"].chunk(3))
        biases = [None] * 3 if a["in_proj_bias"] is None else list(a["in_proj_bias"].chunk(3))
        inputs = (a["query"], a["key"], a["value"])
        projected = [functional.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
        q, k, v = projected
        for extra in ("bias_k", "bias_v"):  # one more key and value
            if a[extra] is not None:
                more = a[extra].reshape(1, *[1] * (k.ndim - 2), -1).expand(1, *k.shape[1:])
                k, v = (torch.cat([k, more]), v) if extra == "bias_k" else (k, torch.cat([v, more]))
        # [tokens, (batch,) width] -> [(batch,) heads, tokens, size], and back
        q, k, v = (x.unflatten(-1, (a["num_heads"], -1)).movedim(0, -2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v).movedim(-2, 0)
        out = functional.linear(out.flatten(-2), a["out_proj_weight"], a["out_proj_bias"])
    scores = torch.ones(*q.shape[:-3], q.shape[-2], k.shape[-2], device=record.device) if a["need_weights"] else None
    return out, scores


def _softmax(record: Recorder, call: Call) -> Tensor | None:
    """Weights of an attention if they come from a product of data; the graph behind them stays."""
    x = call.argument(0, "input")
    if not isinstance(x, Tensor) or record.weight(x) is not None or not x.requires_grad:
        return None
    out: Tensor = Through.apply(x, call.run(), record.graph.factor, call.name.strip("_"))
    scores = record.graph.nearest(x, record.graph.scores)
    if scores is not None:
        record.weightings[out.grad_fn] = scores
    return out


def _product_of_data(record: Recorder, call: Call, product: Product) -> Tensor | None:
    if not (product.left.requires_grad or product.right.requires_grad):
        return None
    if record.is_marked("held", product.left, product.right):
        return record.opaque(call, product)
    out: Tensor = record.on_data(call).run()
    for weights, values in ((product.left, product.right), (product.right, product.left)):
        if not values.requires_grad:
            continue
        scores = record.graph.nearest(weights, record.weightings)
        if scores is None:
            scores = record.graph.bent_scores(weights)
            if scores is not None and _made_apart(record, scores):
                continue
        if scores is None:
            continue
        if not _over_keys(scores, product, weights):
            return out  # scores of several heads are weighed and summed: nothing is attended to yet
        attention = _written_out(record, scores, product, values)
        attention.weights = weights
        return _attended(record, attention, out)
    if out.grad_fn is not None:
        record.graph.scores[out.grad_fn] = product
    return out


def _queries_and_keys(scores: Product) -> tuple[tuple[Tensor, Axes], tuple[Tensor, Axes]]:
    """Both with their axes. The last axis of the scores runs along the keys."""
    left, right = (scores.left, scores.left_axes), (scores.right, scores.right_axes)
    return (left, right) if scores.out_axes[-1] in scores.right_axes else (right, left)


def _made_apart(record: Recorder, scores: Product) -> bool:
    """Whether other units make each key: then this is a layer whose weights are computed, and its hidden units."""
    _, (k, k_axes) = _queries_and_keys(scores)
    return _differ_along(record, k, k_axes.index(scores.out_axes[-1]))


def _over_keys(scores: Product, product: Product, weights: Tensor) -> bool:
    """Whether a product sums over the keys of the scores: its first weight and its last are of other keys."""
    _, (k, k_axes) = _queries_and_keys(scores)
    axes = product.left_axes if weights is product.left else product.right_axes
    others = [i for i, label in enumerate(k_axes) if label != scores.out_axes[-1]]
    if not k.requires_grad or 0 in weights.shape:
        return True

    def keys(at: tuple[int, ...]) -> list[bool]:
        (size,) = torch.autograd.grad(weights[at], k, retain_graph=True, allow_unused=True)
        hit = torch.zeros_like(k, dtype=torch.bool) if size is None else size != 0
        seen: list[bool] = hit.sum(others).bool().tolist()
        return seen

    summed = [a for a in axes if a in product.left_axes and a in product.right_axes and a not in product.out_axes]
    for axis in map(axes.index, summed):
        first, last = (keys(tuple(end if i == axis else -1 for i in range(weights.ndim))) for end in (0, -1))
        if first != last or not any(first) or len(first) == 1:
            return True
    return False


def _written_out(record: Recorder, scores: Product, product: Product, values: Tensor) -> Attention:
    """Heads are the axes that queries, keys and scores share. Of the axes of the queries alone one runs along the
    tokens; where there are more, the others are heads that share keys.
    """
    (q, q_axes), (k, k_axes) = _queries_and_keys(scores)
    own = [a for a in scores.out_axes if a in q_axes and a not in k_axes]
    heads_alone = [a for a in own if len(own) > 1 and _differ_along(record, q, q_axes.index(a))]
    v_axes = product.right_axes if values is product.right else product.left_axes
    heads = [a for a in scores.out_axes if a in q_axes and a in k_axes]
    v_heads = [a for a in v_axes if a in product.left_axes and a in product.right_axes and a in product.out_axes]
    return Attention(_led(q, q_axes, [*heads, *heads_alone]), _led(k, k_axes, heads), _led(values, v_axes, v_heads))


def _differ_along(record: Recorder, tensor: Tensor, axis: int) -> bool:
    """Whether other units make the first and the last slice of a tensor."""
    leaves = record.graph.matrices_behind(tensor)
    if not leaves:
        return False
    first, last = (record.graph.gradients(tensor.select(axis, i), leaves) for i in (0, -1))
    return any(
        a is not None and b is not None and (record.graph.units(leaf, a != 0) != record.graph.units(leaf, b != 0)).any()
        for leaf, a, b in zip(leaves, first, last, strict=True)
    )


def _led(tensor: Tensor, axes: Axes, heads: Axes) -> Tensor:
    """The tensor as [heads, all the rest]."""
    front = [axes.index(label) for label in heads if label in axes]
    moved = tensor.permute(*front, *(i for i in range(tensor.ndim) if i not in front))
    return moved.reshape(math.prod(moved.shape[: len(front)]), -1)
