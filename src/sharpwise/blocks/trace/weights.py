"""Where in which parameter a number comes from.

A forward slices, transposes, reshapes, stacks and casts its parameters before it uses them. Every tensor that is made
of parameters alone is a `Weight`. It remembers the call that made it, and replays that call on demand

- on *labels*, integer tensors of its shape that say from which parameter and which index along each of its dimensions
  every element comes (expanded views: a label of a matrix of any size takes a few bytes), and
- on *stand-ins*, small differentiable copies filled with positive numbers, where the forward uses a weight in other
  ways than by a matrix product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Array = np.ndarray[Any, Any]
DIMS = 5
"""Parameters have at most so many dimensions."""


Replay = Callable[[Callable[["Weight"], Tensor], Callable[[Any], Any]], Tensor]
"""Makes a tensor again, given what to put in place of weights and of all else."""


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# Calls that only move elements: their labels are moved alike.
MOVES = words(
    "T mT H mH t transpose swapaxes swapdims permute movedim view view_as reshape reshape_as flatten unflatten ravel "
    "squeeze unsqueeze chunk split split_with_sizes tensor_split hsplit vsplit narrow select unbind expand expand_as "
    "broadcast_to repeat repeat_interleave tile roll flip __getitem__ index_select cat concat concatenate stack hstack "
    "vstack contiguous clone detach data as_strided real index gather take_along_dim tril triu block_diag"
)
_JOINS = words("cat concat concatenate stack hstack vstack block_diag")
_PRODUCTS = words("linear matmul mm bmm mv __matmul__ __rmatmul__ addmm baddbmm addmv einsum")


class Weight:
    """A tensor made of parameters alone.

    Args:
        value: the tensor itself (on any device, meta included).
        replay: makes the same of the labels or stand-ins of its sources: takes a function on weights.
        moves: whether the call only moved elements; mixes: whether it was a product, which keeps no element apart.
        sources: the weights that it is made of; an elementwise call of one keeps its labels.
    """

    def __init__(
        self,
        value: Tensor,
        replay: "Replay | None" = None,
        moves: bool = True,
        sources: Sequence["Weight"] = (),
        number: int = -1,
        mixes: bool = False,
    ) -> None:
        self.value = value
        self.number = number  # of the parameter; -1: derived
        self._replay, self._moves, self._sources, self._mixes = replay, moves, tuple(sources), mixes
        self._labels: list[Tensor] | None = None
        self._stand_in: Tensor | None = None

    @property
    def labels(self) -> list[Tensor] | None:
        """Number of the parameter, then the index along each dimension (-1 beyond its dimensions); None: mixed up."""
        if self._labels is None:
            self._labels = self._labelled()
        return self._labels or None

    @property
    def mixes(self) -> bool:
        """Whether a product made it, or something that it is made of."""
        return self._mixes or any(source.mixes for source in self._sources)

    @property
    def moved(self) -> bool:
        """Whether it is numbers of parameters as they are, moved and joined and nothing else."""
        return self._replay is None or (self._moves and all(source.moved for source in self._sources))

    @property
    def owners(self) -> list[int]:
        """The numbers of the parameters that it is made of."""
        if self.number >= 0:
            return [self.number]
        return sorted({n for source in self._sources for n in source.owners})

    def _labelled(self) -> list[Tensor]:
        shape = self.value.shape
        if self._replay is None:
            sides = [torch.tensor(self.number, dtype=torch.int64, device="cpu").expand(shape)]
            for dim in range(DIMS):
                index = torch.tensor(-1, dtype=torch.int64, device="cpu")
                if dim < len(shape):
                    index = torch.arange(shape[dim], device="cpu").view(
                        [-1 if d == dim else 1 for d in range(len(shape))]
                    )
                sides.append(index.expand(shape))
            return sides
        if not self._moves:
            if self._mixes:
                return []
            # One of its sources may have been a matrix, what scales or shifts it another.
            same = [source.labels for source in self._sources if source.value.shape == shape and source.labels]
            return same[0] if len(same) == 1 and same[0] else []
        replay = self._replay
        try:
            return [replay(partial(_side, side=side), _on_cpu) for side in range(DIMS + 1)]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return []

    def stand_in(self, make: Callable[["Weight"], Tensor], plain: Callable[[Any], Any]) -> Tensor:
        """A differentiable tensor in its place; `make` makes that of a parameter, `plain` what stands beside it."""
        if self._stand_in is None:
            if self._replay is None:
                self._stand_in = make(self)
            else:
                self._stand_in = self._replay(lambda w: w.stand_in(make, plain), plain)
        return self._stand_in


def _on_cpu(value: Any) -> Any:
    """Labels lie on the CPU, and so must what indexes them."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.detach().cpu() if isinstance(value, Tensor) and value.device.type != "meta" else value


def _nobody(value: Any) -> Any:
    """The label of constants beside parameters: of no parameter."""
    return torch.full(value.shape, -1, device="cpu") if isinstance(value, Tensor) else _on_cpu(value)


def _side(weight: Weight, side: int) -> Tensor:
    labels = weight.labels
    if labels is None:
        raise ValueError("mixed up")
    return labels[side]


def derived(
    func: Callable[..., Any], name: str, args: Any, kwargs: Any, known: dict[int, Weight], result: Any
) -> list[Weight]:
    """The weights that a call on weights made: one for a tensor, or one for each of several."""
    sources = [known[id(t)] for t in tensors_in((args, kwargs)) if id(t) in known]
    # The arguments as they are now: lists that a caller changes later do not matter.
    frozen = tree_map(lambda x: known.get(id(x), x) if isinstance(x, Tensor) else x, (args, kwargs))

    joins = name in _JOINS

    def replaying(pick: Callable[[Any], Any]) -> Replay:
        def replay(of: Callable[[Weight], Tensor], plain: Callable[[Any], Any]) -> Tensor:
            beside = _nobody if joins and plain is _on_cpu else plain
            args, kwargs = tree_map(lambda x: of(x) if isinstance(x, Weight) else beside(x), frozen)
            picked: Tensor = pick(func(*args, **kwargs))
            return picked

        return replay

    moves = name in MOVES
    if isinstance(result, Tensor):
        return [Weight(result, replaying(lambda r: r), moves, sources, mixes=name in _PRODUCTS)]
    parts = enumerate(result) if isinstance(result, (tuple, list)) else ()
    return [Weight(part, replaying(itemgetter(i)), moves, sources) for i, part in parts if isinstance(part, Tensor)]


_PLAIN = frozenset((int, float, bool, str, type(None), type(...), slice, torch.dtype, torch.device, torch.Size))


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested containers and dataclass-like objects, each once per place."""
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    if type(tree) in _PLAIN:
        return
    if isinstance(tree, Tensor):
        found.append(tree)
        return
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        known = hasattr(tree, "__dict__") and not isinstance(tree, (nn.Module, type))
        if not known or type(tree).__module__ == "builtins":
            return
        tree = [value for value in vars(tree).values() if not callable(value)]
    for value in tree:
        _collect(value, found)


def map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """Nested containers with every tensor changed."""
    kind = type(tree)
    if kind in _PLAIN:
        return tree
    if isinstance(tree, Tensor):
        return change(tree)
    if kind is tuple:
        return tuple([map_tensors(change, value) for value in tree])
    if kind is list:
        return [map_tensors(change, value) for value in tree]
    if kind is dict:
        return {key: map_tensors(change, value) for key, value in tree.items()}
    return tree_map(lambda value: change(value) if isinstance(value, Tensor) else value, tree)


@dataclass(frozen=True, eq=False)
class Units:
    """Where the numbers along the output of a product come from, one entry per number.

    Attributes:
        numbers: of the parameters; coords: index along each dimension of the parameter, None where that is summed over.
        stacked: dimension 0 counts copies, of which each datum meets one.
    """

    numbers: Array
    coords: tuple[Array | None, ...]
    stacked: bool = False

    def of(self, number: int, chosen: Array) -> tuple[Array | None, ...] | None:
        """The coordinates of chosen units in one parameter, None if none of them lies there."""
        here = chosen & (self.numbers == number) if self._mixed else chosen
        return tuple(None if c is None else c[here] for c in self.coords) if here.any() else None

    def of_twin(self, number: int) -> "Units":
        """The same of another parameter."""
        return replace(self, numbers=np.full(len(self.numbers), number))

    @cached_property
    def owners(self) -> list[int]:
        """The numbers of all parameters."""
        found = np.unique(self.numbers) if self._mixed else self.numbers[:1]
        return [n for n in found.tolist() if n >= 0]

    @cached_property
    def _mixed(self) -> bool:
        return bool((self.numbers != self.numbers[:1]).any())


def units_of(
    weight: Weight, unit_axes: Sequence[int], stacked: bool = False, known: dict[Any, Units] | None = None
) -> Units | None:
    """The units of a product, which run along `unit_axes` of the weight. None if its labels are mixed up.

    `known` keeps those of parameters by shape: those of a twin lie at the same coordinates.
    """
    shape, key = weight.value.shape, (weight.value.shape, *unit_axes, stacked)
    if weight.number >= 0 and known is not None and key in known:
        return known[key].of_twin(weight.number)
    labels = weight.labels
    if labels is None or 0 in shape:
        return None
    others = [axis for axis in range(len(shape)) if axis not in unit_axes]

    def along(label: Tensor, end: int) -> Array:
        flat: Array = label.permute(*others, *unit_axes)[tuple(end for _ in others)].reshape(-1).numpy()
        return flat

    # What is the same at both ends of the axes that are summed over does not vary along them.
    first, last = [along(s, 0) for s in labels], [along(s, -1) for s in labels]
    coords = tuple(a if np.array_equal(a, b) else None for a, b in zip(first[1:], last[1:], strict=True))
    if weight.number < 0 or known is None:
        return Units(first[0], coords, stacked)
    return known.setdefault(key, Units(first[0], coords[: len(shape)], stacked))
