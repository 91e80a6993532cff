"""Products with weights, and lookups in them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sharpwise.blocks.trace.calls import Call
from sharpwise.blocks.trace.graph import Leaf
from sharpwise.blocks.trace.products import Product
from sharpwise.blocks.trace.recorder import Recorder
from sharpwise.blocks.trace.weights import Units, Weight, units_of


def handle(record: Recorder, call: Call, product: Product | None) -> Tensor | None:
    """A fresh leaf for a product of data with a weight or for a lookup, None for any other call."""
    if product is None:
        return _lookup(record, call)
    left, right = record.weight(product.left), record.weight(product.right)
    if (left is None) == (right is None):
        return None
    weight = right if left is None else left
    assert weight is not None
    data, theirs, own = product.left, product.left_axes, product.right_axes
    if left is not None:
        data, theirs, own = product.right, product.right_axes, product.left_axes
    if not (data.requires_grad or (data.is_floating_point() and record.is_marked("input", data))):
        return None
    sizes = weight.value.shape
    axes = [a for a, label in enumerate(own) if label in product.out_axes and sizes[a] > 1]
    record.graph.tick()
    record.touch(weight)
    leaf = Leaf(
        record.graph.positive(_shape(product, call), data.dtype, record.real_device(data)),
        "matrix",
        record.graph.time,
        weight,
        data,
        tuple(product.out_axes.index(own[a]) for a in axes),
        units_of(weight, axes, product.stacked, record.units),
        kernel=tuple(n for n, label in zip(sizes, own, strict=True) if label[:1] == ("kernel",)),
        summed=tuple(axis for axis, label in enumerate(theirs) if label not in product.out_axes),
    )
    if (bias := record.weight(product.bias)) is not None:
        add_bias(record, leaf, bias, trailing=sum(label[:1] == ("space",) for label in product.out_axes))
    return record.graph.add(leaf).tensor.clone()


def add_bias(record: Recorder, leaf: Leaf, bias: Weight, trailing: int = 0) -> None:
    """Note that numbers of a weight are added to the units of a product, which lie before so many trailing axes."""
    record.touch(bias)
    shape = leaf.tensor.shape
    if 0 in shape or 0 in bias.value.shape:
        return
    rest = [axis for axis in range(len(shape)) if axis not in leaf.axes]
    experts = leaf.weight is not None and leaf.weight.value.ndim > 2  # each token gets that of its expert
    key = ("bias", bias.value.shape, shape, leaf.axes, trailing, experts)
    if bias.number >= 0 and key in record.units:
        leaf.biases.append(record.units[key].of_twin(bias.number))
        return
    try:
        sides = [side[(..., *[None] * trailing)].expand(shape) for side in bias.labels or ()]
    except RuntimeError:
        return  # of a shape of its own: no bias
    if sides:
        moved = [side.permute(*rest, *leaf.axes) for side in sides]
        flat, last = ([side[tuple(at for _ in rest)].reshape(-1).numpy() for side in moved] for at in (0, -1))
        differ = [i for i, (a, b) in enumerate(zip(flat, last, strict=True)) if not np.array_equal(a, b)]
        if not differ or (differ == [1] and experts):  # else it differs from place to place
            units = Units(flat[0], (None, *flat[2:]) if differ else tuple(flat[1:]), bool(differ))
            leaf.biases.append(units)
            if bias.number >= 0:
                record.units[key] = units


def _shape(product: Product, call: Call) -> tuple[int, ...]:
    """The shape of a result, worked out without computing it."""
    if any(label[:1] == ("space",) for label in product.out_axes):
        meta = call.mapped(lambda x: x.detach().to("meta"))
        return tuple(meta.run().shape)
    sizes: dict[Any, int] = {}
    for tensor, axes in ((product.left, product.left_axes), (product.right, product.right_axes)):
        for label, n in zip(axes, tensor.shape, strict=True):
            sizes[label] = n if sizes.get(label, 1) == 1 else sizes[label]
    return tuple(sizes[label] for label in product.out_axes)


def _lookup(record: Recorder, call: Call) -> Tensor | None:
    """Rows of a table taken by numbers."""
    if call.name == "embedding":
        ids, table = call.argument(0, "input"), call.argument(1, "weight")
    elif call.name == "__getitem__":
        table, ids = call.args
    elif call.name == "index_select" and call.argument(1, "dim") == 0:
        table, ids = call.args[0], call.argument(2, "index")
    else:
        return None
    weight = record.weight(table)
    if weight is None or not isinstance(ids, Tensor) or ids.dtype == torch.bool or ids.ndim == 0 or table.ndim > 2:
        return None
    if record.is_marked("choice", ids):
        return None  # each token takes the row of its expert, a bias say
    if call.name != "embedding" and ids.ndim == 1 and not record.is_marked("input", ids):
        return None  # rows in another order
    record.graph.tick()
    record.touch(weight)
    out = record.graph.positive((*ids.shape, *table.shape[1:]), table.dtype, record.real_device(table))
    ids = tree_map(record.real, ids)
    return record.graph.add(Leaf(out, "lookup", record.graph.time, weight, ids)).tensor.clone()
