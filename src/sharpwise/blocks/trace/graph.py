"""The graph of a forward: leaves, what lies behind a tensor, and gradients that say who made it.

Autograd keeps the graph. It ends at *leaves*, which the recorder puts in the place of the result of every product with
a weight, every lookup and every attention. Their gradients are not zero exactly where a number went through.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sharpwise.blocks.trace.products import Product
from sharpwise.blocks.trace.weights import Array, Units, Weight

T = TypeVar("T")
TOGETHER = 24
"""Queries, keys and values of eight attentions go back through the graph together; more would be kept for long."""


@dataclass(eq=False)
class Leaf:
    """Numbers whose history ends here.

    Attributes:
        tensor: the differentiable tensor.
        kind: `matrix`, `lookup`, `attention`, `input` of the model, or `weight`, a stand-in for a parameter.
        time: order of execution.
        weight: what made it; None for an attention, an input, and a product with a matrix that is no parameter.
        source: the data that entered the product, or the numbers looked up.
        axes: axes of `tensor` along the units, the output rows of the weight.
        units: where each of them comes from, None if that cannot be told.
        biases: where the numbers added to the units come from.
        kernel: sizes of the window of a convolution.
        summed: axes of `source` that the product sums over.
        index: place among all leaves; bit of a mask.
    """

    tensor: Tensor
    kind: str
    time: int
    weight: Weight | None = None
    source: Tensor | None = None
    axes: tuple[int, ...] = ()
    units: Units | None = None
    biases: list[Units] = field(default_factory=list)
    kernel: tuple[int, ...] = ()
    summed: tuple[int, ...] = ()
    index: int = -1

    @property
    def pointwise(self) -> bool:
        """Whether one token of the output is made of one token of the input: no convolution with a window."""
        return all(n == 1 for n in self.kernel)

    def over_units(self, hit: Tensor) -> Tensor:
        """A tensor of the leaf's shape as [all the rest, units]."""
        rest = [axis for axis in range(hit.ndim) if axis not in self.axes]
        return hit.permute(*rest, *self.axes).reshape(-1, math.prod(hit.shape[axis] for axis in self.axes))


class Through(torch.autograd.Function):
    """Value of a function of x, called `name`, gradient of the identity, times a factor that can be turned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, factor: list[float] | None, name: str = "") -> Tensor:
        ctx.factor, ctx.dtype, ctx.called = factor, x.dtype, name
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad if ctx.factor is None else grad * ctx.factor[0]).to(ctx.dtype), None, None, None


class Normed(Through):
    """A `Through` that marks a normalization in the graph."""


class Graph:
    """Leaves by the nodes of autograd's graph.

    Attributes:
        factor: what activations multiply gradients by. A gradient that it changes went through one.
        scores: products of data with data by their node, which may become attention scores.
        by_channel: nodes of convolutions that move every channel on its own.
        factors: both sides of products of data with data, element by element, by their node.
    """

    def __init__(self, seed: int = 0) -> None:
        self.leaves: dict[int, Leaf] = {}
        self.order: list[Leaf] = []
        self._masks: dict[Any, int] = {}
        self.factor = [1.0]
        self.scores: dict[Any, Product] = {}
        self.by_channel: set[Any] = set()
        self.factors: dict[Any, tuple[Tensor, Tensor]] = {}
        self.time = 0
        self._random = torch.Generator("cpu").manual_seed(seed)
        self._known: dict[Any, list[Leaf]] = {}
        self._numbers: dict[Any, Tensor] = {}
        self._own: set[Any] = set()

    def tick(self) -> int:
        """The next moment."""
        self.time += 1
        return self.time

    def positive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Random differentiable numbers, 0.5 to 1.5: what they multiply is never hidden by a zero."""
        numbers = torch.empty(tuple(shape), dtype=torch.float32, device="cpu").uniform_(
            0.5, 1.5, generator=self._random
        )
        return numbers.to(device, dtype).requires_grad_()

    def add(self, leaf: Leaf) -> Leaf:
        """Make a leaf known."""
        self.leaves[id(leaf.tensor)] = leaf
        leaf.index = len(self.order)
        self.order.append(leaf)
        return leaf

    def leaf_at(self, node: Any) -> Leaf | None:
        """The leaf that a node stands for."""
        variable = getattr(node, "variable", None)
        return None if variable is None else self.leaves.get(id(variable))

    # -- ways back -------------------------------------------------------------------------------------------------

    def behind(self, tensor: Tensor) -> list[Leaf]:
        """The leaves that a tensor is made of."""
        if tensor.grad_fn is None:
            return [self.leaves[id(tensor)]] if id(tensor) in self.leaves else []
        if tensor.grad_fn not in self._known:
            self._known[tensor.grad_fn] = self.listed(self.mask(tensor))
        return self._known[tensor.grad_fn]

    def listed(self, mask: int) -> list[Leaf]:
        """The leaves of a mask, in order."""
        found = []
        if mask.bit_count() > 32:  # one by one each would take as long as the mask has bits
            held = np.frombuffer(mask.to_bytes(-(-mask.bit_length() // 8), "little"), np.uint8)
            return [self.order[i] for i in np.flatnonzero(np.unpackbits(held, bitorder="little")).tolist()]
        while mask:
            low = mask & -mask
            found.append(self.order[low.bit_length() - 1])
            mask ^= low
        return found

    def mask(self, tensor: Tensor) -> int:
        """The leaves that a tensor is made of, a bit for each."""
        if tensor.grad_fn is None:
            leaf = self.leaves.get(id(tensor))
            return 0 if leaf is None else 1 << leaf.index
        return self.mask_at(tensor.grad_fn)

    def mask_at(self, first: Any) -> int:
        """The same of a node."""
        known, stack = self._masks, []
        if first not in known:
            stack.append(first)
        while stack:
            node = stack[-1]
            if node in known:
                stack.pop()
                continue
            following = [n for n, _ in node.next_functions if n is not None]
            missing = [n for n in following if n not in known]
            if missing:
                stack += missing
                continue
            self._make_turnable(node)
            leaf = self.leaf_at(node)
            mask = 0 if leaf is None else 1 << leaf.index
            for n in following:
                mask |= known[n]
            known[stack.pop()] = mask
        return known[first]

    def matrices_behind(self, tensor: Tensor) -> list[Leaf]:
        """The products with weights that a tensor is made of."""
        return [leaf for leaf in self.behind(tensor) if leaf.kind == "matrix"]

    def nearest(self, tensor: Tensor, marks: Mapping[Any, T]) -> T | None:
        """The mark of the nearest marked node behind a tensor; what lies behind a product of data does not count."""
        return next((marks[node] for node in _nodes(tensor, self.scores.keys() - marks.keys()) if node in marks), None)

    def bent_scores(self, tensor: Tensor) -> Product | None:
        """The product of data behind an activation behind a tensor: what weighs values like a softmax."""
        for node in _nodes(tensor, self.scores):
            if type(node).__name__ == "ThroughBackward":
                found = next((self.scores[n] for n in _behind(node, self.scores) if n in self.scores), None)
                if found is not None:
                    return found
        return None

    def multiplied(self, tensor: Tensor, left: Collection[Leaf], right: Collection[Leaf]) -> bool:
        """Whether, behind a tensor, what one of `left` makes is multiplied by what one of `right` makes."""
        for node in _nodes(tensor):
            if type(node).__name__.startswith("MulBackward") and len(node.next_functions) == 2:
                sides = [{self.leaf_at(n) for n in _behind(following)} for following, _ in node.next_functions]
                for a, b in (sides, sides[::-1]):
                    if not a.isdisjoint(left) and not b.isdisjoint(right):
                        return True
        return False

    def sides(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Both sides of the products of data, element by element, behind a tensor, nearest first."""
        return (self.factors[node] for node in _nodes(tensor) if node in self.factors)

    def chain(self, tensor: Tensor) -> Iterator[Any]:
        """The nodes behind a tensor as long as there is one way back, ways to weights left aside."""
        node = tensor.grad_fn
        while node is not None:
            yield node
            following = [n for n, _ in node.next_functions if n is not None and not self._only_weights(n)]
            node = following[0] if len(following) == 1 else None

    def only_leaf(self, tensor: Tensor, straight: bool = False) -> Leaf | None:
        """The leaf that a tensor is made of if there is one way back; `straight`: without activation or norm."""
        for node in self.chain(tensor):
            if straight and type(node).__name__ in ("NormedBackward", "ThroughBackward"):
                return None
            if (leaf := self.leaf_at(node)) is not None:
                return leaf
        return None

    def normed(self, tensor: Tensor, how: str) -> bool:
        """Whether a tensor has just been normalized and no weight has scaled it, or shifted it in this way, since."""
        for node in self.chain(tensor):
            kind = type(node).__name__
            if kind == "NormedBackward":
                return True
            weighs = any(n is not None and self._only_weights(n) for n, _ in node.next_functions)
            if weighs and (how == "scale" or not kind.startswith("Mul")):
                return False
        return False

    def _only_weights(self, node: Any) -> bool:
        queue = [node]
        for behind in queue:
            leaf = self.leaf_at(behind)
            if (hasattr(behind, "variable") and (leaf is None or leaf.kind != "weight")) or len(queue) > 16:
                return False
            queue += [n for n, _ in behind.next_functions if n is not None]
        return True

    def _make_turnable(self, node: Any) -> None:
        """A function that the model defines with a gradient of its own counts as an activation."""
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        if own and type(node).__name__ not in ("ThroughBackward", "NormedBackward") and node not in self._own:
            self._own.add(node)
            factor = self.factor  # not self: a hook would keep all of this for ever
            node.register_prehook(lambda grads: tuple(None if g is None else g * factor[0] for g in grads))

    # -- gradients -------------------------------------------------------------------------------------------------

    def gradients(self, tensor: Tensor, leaves: Sequence[Leaf], times: Tensor | None = None) -> list[Tensor | None]:
        """Per leaf the gradient of a random sum of a tensor, its elements weighed by `times`; None where it is none."""
        return self._gradients([(tensor, leaves)], [times])[0]

    def _gradients(
        self, of: Sequence[tuple[Tensor, Sequence[Leaf]]], times: Sequence[Tensor | None]
    ) -> list[list[Tensor | None]]:
        """The same of several tensors. Those that share no leaf go back together."""
        groups: list[tuple[int, list[int]]] = []
        for i, (tensor, _) in enumerate(of):
            mask = self.mask(tensor)
            at = next((at for at, (others, _) in enumerate(groups) if not others & mask), len(groups))
            others, group = groups[at] if at < len(groups) else (0, [])
            groups[at : at + 1] = [(others | mask, [*group, i])]
        found: dict[int, list[Tensor | None]] = {}
        for _, group in groups:
            found |= zip(group, self._at_once([of[i] for i in group], [times[i] for i in group]), strict=True)
        return [found[i] for i in range(len(of))]

    def _at_once(
        self, of: Sequence[tuple[Tensor, Sequence[Leaf]]], times: Sequence[Tensor | None]
    ) -> list[list[Tensor | None]]:
        cotangents = []
        for (tensor, _), weighing in zip(of, times, strict=True):
            numbers = self._random_like(tensor)
            cotangents.append(numbers if weighing is None else numbers * weighing)
        inputs = [leaf.tensor for _, leaves in of for leaf in leaves]
        found = iter(torch.autograd.grad([t for t, _ in of], inputs, cotangents, retain_graph=True, allow_unused=True))
        return [[next(found) for _ in leaves] for _, leaves in of]

    def _random_like(self, tensor: Tensor) -> Tensor:
        """Positive numbers of the shape of a tensor, the same for each of this shape."""
        key = tensor.shape, tensor.dtype, tensor.device
        if key not in self._numbers:
            random = torch.Generator("cpu").manual_seed(1)
            numbers = torch.rand(tensor.shape, dtype=torch.float32, device="cpu", generator=random)
            self._numbers[key] = numbers.to(tensor) + 0.5
        return self._numbers[key]

    def units(self, leaf: Leaf, hit: Tensor) -> Array:
        """Per unit of a leaf (of a stand-in: per element) whether any of its numbers is hit."""
        hit = hit.reshape(-1) if leaf.kind == "weight" else leaf.over_units(hit).any(0)
        units: Array = hit.cpu().numpy()
        return units

    def through_activations(self, tensor: Tensor, leaves: Sequence[Leaf]) -> list[tuple[Leaf, Array, Array]]:
        """Per leaf that reaches a tensor its units that do, and those that do through an activation."""
        plain = self.gradients(tensor, leaves)
        self.factor[0] = 3.0
        turned = self.gradients(tensor, leaves)
        self.factor[0] = 1.0
        return [
            (leaf, self.units(leaf, a != 0), self.units(leaf, (b - a).abs() > 1e-2 * a.abs()))
            for leaf, a, b in zip(leaves, plain, turned, strict=True)
            if a is not None and b is not None
        ]

    def per_head(self, of: Sequence[tuple[Tensor, Sequence[Leaf]]]) -> Iterator[list[list[Array]]]:
        """Per tensor [heads, rest], per leaf the units that make each head; heads that it does not make are left out.

        If every unit makes one head only, two gradients tell which: weighing the heads by their numbers multiplies the
        gradient of a unit by the number of its head. Where units make several heads, every head is asked.
        """
        for i in range(0, len(of), TOGETHER):
            some = of[i : i + TOGETHER]
            plain = self._gradients(some, [None] * len(some))
            heads = (torch.arange(1, len(t) + 1, device=t.device).view(-1, *[1] * (t.ndim - 1)) for t, _ in some)
            weighed = self._gradients(some, list(heads))
            yield from (self._by_head(*pair, a, b) for pair, a, b in zip(some, plain, weighed, strict=True))

    def _by_head(
        self, tensor: Tensor, leaves: Sequence[Leaf], plain: Sequence[Tensor | None], weighed: Sequence[Tensor | None]
    ) -> list[list[Array]]:
        found: list[list[Array]] = [[] for _ in leaves]
        shared = []
        for i, (a, b) in enumerate(zip(plain, weighed, strict=True)):
            if a is None or b is None:
                continue
            number = self._head_of_units(leaves[i], a, b)
            if number is None:
                shared.append(i)
            else:
                found[i] = [number == n for n in np.unique(number[number > 0])]
        for head in tensor.unbind(0) if shared else ():
            for i, size in zip(shared, self.gradients(head, [leaves[i] for i in shared]), strict=True):
                if size is not None and (rows := self.units(leaves[i], size != 0)).any():
                    found[i].append(rows)
        return found

    def _head_of_units(self, leaf: Leaf, a: Tensor, b: Tensor) -> Array | None:
        """Per unit the number of the head that it makes, 0 for none, of its gradient and that weighed by the numbers.

        None where a unit makes several. Numbers near zero, of a rotation say, tell only that they do not contradict.
        """
        flat = (x.reshape(1, -1) if leaf.kind == "weight" else leaf.over_units(x) for x in (a, b))
        plain, weighed = (x.float().cpu().numpy() for x in flat)
        if not plain.size:
            return None
        size = np.abs(plain)
        tells = size > 1e-3 * size.max()
        number: Array = np.divide(weighed, plain, out=np.zeros_like(plain), where=tells).round().max(0)
        noise = 1e-6 * number * size.max()  # of float32; in 16 bits every head is asked
        fits = np.abs(weighed - number * plain) <= np.where(tells, 1e-3 * size, noise)
        return number if fits.all() and not ((size > 0).any(0) & (number < 1)).any() else None


def _nodes(tensor: Tensor, end: Any = ()) -> Iterator[Any]:
    """All nodes behind a tensor, nearest first; those in `end` are the last of their way."""
    return _behind(tensor.grad_fn, end)


def _behind(first: Any, end: Any = ()) -> Iterator[Any]:
    queue = [] if first is None else [first]
    seen = set(queue)
    for node in queue:
        yield node
        if node not in end:
            following = [n for n, _ in node.next_functions if n is not None and n not in seen]
            seen.update(following)
            queue += dict.fromkeys(following)
