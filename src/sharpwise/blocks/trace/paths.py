"""Paths through the graph of a forward: what proves that a number arrives as it was made, and where it joins.

A path is *straight* as long as it moves numbers, rotates, scales, normalizes, or adds: then what comes out is still
what the product made. Everything that is not known to do so ends it: an activation, a convolution, a pool, a product of
two things that both depend on data.
"""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from sharpwise.blocks.trace.graph import Graph, Leaf
from sharpwise.blocks.trace.weights import Array, words

_MOVES = words(
    "AccumulateGrad View UnsafeView ReshapeAlias Transpose Permute T Unsqueeze Squeeze Expand Repeat Split UnsafeSplit "
    "SplitWithSizes Unbind Select Slice Narrow Cat Stack Clone ToCopy Copy Alias Index IndexSelect Gather IndexPut "
    "CopySlices AsStrided Roll Flip ConstantPadNd ViewAsComplex ViewAsReal ViewAsRealCopy Complex Real Imag Conj "
    "MaskedFill Where SliceScatter SelectScatter Scatter IndexAdd Normed ScatterAdd PixelShuffle PixelUnshuffle"
)
_SCALES = words("Mul Div Neg")
_ONE_BY_ONE = words("AccumulateGrad Clone ToCopy Mul Div Neg Add Sub Rsub Through Normed")
_SUMS = words("Add Sub Rsub")
_MIXES = ("Convolution", "GridSampler", "Upsample", "Mean", "Sum", "Cumsum", "Fft")


def kind_of_node(node: Any) -> str:
    """`Mul` of MulBackward0."""
    name: str = type(node).__name__
    return name.rstrip("0123456789").removesuffix("Backward")


def _weighs(node: Any) -> bool:
    """Whether what a node makes weighs something."""
    return kind_of_node(node) == "Through" and node.called in ("softmax", "log_softmax")


def only_moves(results: Collection[Tensor], given: Collection[Tensor]) -> bool:
    """Whether the results are numbers of those given, moved and nothing else. None may lose its gradient."""
    made, ends = ([t.grad_fn for t in tensors if t.is_floating_point()] for tensors in (results, given))
    queue = [node for node in made if node is not None]
    if made.count(None) > ends.count(None):
        return False
    seen = {*queue}
    for node in queue:
        if node in ends:
            continue
        following = [n for n, _ in node.next_functions if n is not None]
        if not following or kind_of_node(node) not in _MOVES - {"MaskedFill", "Where"}:
            return False
        queue += [n for n in following if n not in seen]
        seen.update(following)
    return bool(queue)


class Paths:
    """Ways from leaves to what reads them.

    Args:
        graph: of a forward.
        matrices: its products with weights; outputs: what the model returns.
        more: other tensors that end a path.
    """

    def __init__(self, graph: Graph, matrices: Collection[Leaf], outputs: Collection[Tensor], more: Collection[Tensor]):
        self.graph = graph
        self.of_kind = dict.fromkeys(("matrix", "lookup", "attention", "input", "weight"), 0)
        for leaf in graph.order:
            self.of_kind[leaf.kind] |= 1 << leaf.index
        self.made = self.of_kind["matrix"] | self.of_kind["attention"] | self.of_kind["input"]
        self.data = (1 << len(graph.order)) - 1 & ~self.of_kind["weight"]
        self._above: dict[Any, list[Any]] = {}
        self._readers: dict[Any, list[Leaf]] = {}
        self._outputs: set[Any] = set()
        self._node: dict[int, Any] = {}
        for matrix in matrices:
            assert matrix.source is not None
            self._end(matrix.source, matrix)
        for tensor in outputs:
            self._end(tensor, None)
        self._ended = {t.grad_fn for t in more if t.grad_fn is not None}
        for node in self._ended:
            self._add(node)

    def _end(self, tensor: Tensor, reader: Leaf | None) -> None:
        node = tensor.grad_fn
        if node is None:
            return
        self._add(node)
        if reader is None:
            self._outputs.add(node)
        else:
            self._readers.setdefault(node, []).append(reader)

    def _add(self, node: Any) -> None:
        stack = [] if node in self._above else [node]
        self._above.setdefault(node, [])
        while stack:
            node = stack.pop()
            leaf = self.graph.leaf_at(node)
            if leaf is not None:
                self._node[leaf.index] = node
            for following, _ in node.next_functions:
                if following is None:
                    continue
                if following not in self._above:
                    self._above[following] = []
                    stack.append(following)
                self._above[following].append(node)

    # -- back --------------------------------------------------------------------------------------------------------

    def inputs(self, node: Any) -> list[Any]:
        """What a node is made of, parameters and constants left aside."""
        return [n for n, _ in node.next_functions if n is not None and self.graph.mask_at(n) & self.data]

    def straight(
        self,
        tensor: Tensor,
        *,
        called: Collection[str] | None = (),
        products: bool = False,
        channels: bool = False,
        norms: bool = True,
    ) -> tuple[int, list[tuple[int, int]]]:
        """The leaves that reach a tensor by straight paths alone, as a mask, and the masks of both sides of each sum.

        Args:
            called: functions that do not end a path here, None for all.
            products: whether products of two numbers that depend on data, element by element, do not either.
            channels: nor convolutions of every channel on its own.
            norms: nor norms.
        """
        good = bad = 0
        sums: list[tuple[int, int]] = []
        first = tensor.grad_fn
        if first is None:
            return self.graph.mask(tensor) & self.data, sums
        queue, seen = [(first, True)], {(first, True)}
        for node, proven in queue:
            leaf = self.graph.leaf_at(node)
            if leaf is not None:
                if proven:
                    good |= 1 << leaf.index
                else:
                    bad |= 1 << leaf.index
                continue
            below = self.inputs(node)
            name = kind_of_node(node)
            if name in _SUMS and len(below) == 2:
                left, right = (self.graph.mask_at(n) & self.data for n in below)
                sums.append((left, right))
            keeps = name == "Convolution" and node in self.graph.by_channel if channels else False
            ok = proven and (norms or name != "Normed") and (keeps or self._keeps(node, name, below, called, products))
            for n in below:
                if (n, ok) not in seen:
                    seen.add((n, ok))
                    queue.append((n, ok))
        return good & ~bad & self.data, sums

    def by_token(self, tensor: Tensor) -> bool:
        """Whether nothing on the way from the products behind a tensor mixes tokens or channels, or weighs them."""
        queue = [] if tensor.grad_fn is None else [tensor.grad_fn]
        seen = set(queue)
        for node in queue:
            name = kind_of_node(node)
            if name.startswith(_MIXES) or "Pool" in name or _weighs(node) or node in self.graph.scores:
                return False
            following = [n for n in self.inputs(node) if n not in seen]
            seen.update(following)
            queue += following
        return True

    def one_by_one(self, tensor: Tensor) -> bool:
        """Whether every number of a tensor is made of numbers that stood in its place in what it is made of."""
        queue = [] if tensor.grad_fn is None else [tensor.grad_fn]
        for node in queue:
            if kind_of_node(node) not in _ONE_BY_ONE or len(queue) > 32:
                return False
            queue += self.inputs(node)
        return True

    def _keeps(self, node: Any, name: str, inputs: list[Any], called: Collection[str] | None, products: bool) -> bool:
        if node in self.graph.scores:
            return False
        if name == "Through":
            return node.factor is None or called is None or node.called in called
        if name in _SCALES and not products:  # by constants, parameters, positions
            return sum(bool(self.graph.mask_at(n) & self.made) for n in inputs) < 2
        return name in _MOVES or name in _SUMS or name in _SCALES

    # -- forth -------------------------------------------------------------------------------------------------------

    def joins(self, leaf: Leaf, stream: int) -> bool:
        """Whether what a product makes is added to the stream that it was made of, before anything else reads it.

        A second matrix that reads it alone, a low-rank factor, does not count.
        """
        needed = stream & self.of_kind["lookup"] or stream  # of two streams that change each other, one of them
        queue, seen, found = [self._node.get(leaf.index)] if needed else [], set(), False
        for node in queue:
            if node is None or node in seen:
                continue
            seen.add(node)
            mask = self._mask(node)
            if mask & needed == needed:
                if kind_of_node(node) in ("Mul", "Bmm", "Mm"):
                    return False
                found = True
                continue
            if node in self._outputs or node in self._ended or _weighs(node):
                return False
            for reader in self._readers.get(node, ()):
                if mask != 1 << leaf.index and not self._alone(reader, mask):
                    return False
                queue.append(self._node.get(reader.index))
            queue += self._above[node]
        return found

    def _alone(self, reader: Leaf, mask: int) -> bool:
        return reader.pointwise and not mask & ~self.of_kind["matrix"] and mask.bit_count() <= 2

    def meets(self, leaf: Leaf, straight: bool = True) -> Iterator[tuple[Any, str, int, bool]]:
        """The first nodes where what a leaf made meets what others did: node, kind, mask of those, whether normed.

        Where it is read before, or returned, the kind is `read` or `output`. Yields `bent` where an activation lies on
        the way and `straight` is asked for.
        """
        queue, seen = [(self._node.get(leaf.index), False)], set()
        own = 1 << leaf.index
        joined = self.of_kind["matrix"] | self.of_kind["attention"]
        for node, normed in queue:
            if node is None or (node, normed) in seen:
                continue
            seen.add((node, normed))
            rest = self.graph.mask_at(node) & joined & ~own
            name = kind_of_node(node)
            if rest:
                yield node, name, rest, normed
                continue
            if straight and name == "Through" and node.factor is not None:
                yield node, "bent", 0, normed
                continue
            normed = normed or name == "Normed"
            if node in self._readers:
                yield node, "read", 0, normed
            if node in self._outputs:
                yield node, "output", 0, normed
            if node in self._ended:
                yield node, "attended", 0, normed
            queue += [(n, normed) for n in self._above[node]]

    def _mask(self, node: Any) -> int:
        return self.graph.mask_at(node) & self.data


class Reach:
    """Which matrices read which leaves: a table of bits."""

    def __init__(self, masks: list[int], leaves: int) -> None:
        size = max(1, (leaves + 7) // 8)
        flat = b"".join(mask.to_bytes(size, "little") for mask in masks)
        self._table: Array = np.ascontiguousarray(np.frombuffer(flat, dtype=np.uint8).reshape(len(masks), size).T)

    def readers(self, index: int) -> list[int]:
        """The places of the masks that hold a leaf."""
        found: list[int] = np.flatnonzero(self._table[index >> 3] >> (index & 7) & 1).tolist()
        return found
