"""What a recorder keeps of a forward: calls of torch, attentions, and uses of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map

from sharpwise.blocks.trace.weights import Weight, tensors_in


class Call(NamedTuple):
    """A call of torch."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """Its result."""
        return self.func(*self.args, **self.kwargs)

    def mapped(self, change: Callable[[Any], Any]) -> "Call":
        """The same call on other values."""
        args, kwargs = tree_map(change, (self.args, self.kwargs))
        return Call(self.func, self.name, tuple(args), kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among its arguments."""
        return tensors_in((self.args, self.kwargs))

    def argument(self, place: int, *names: str) -> Any:
        """An argument by its place or one of its names, None if it is not given."""
        if place < len(self.args):
            return self.args[place]
        return next((self.kwargs[name] for name in names if name in self.kwargs), None)


@dataclass(eq=False)
class Attention:
    """One attention: queries, keys and values, [heads, all the rest]; what is added to its scores; their softmax."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    weights: Tensor | None = None


@dataclass(eq=False)
class Use:
    """A parameter used other than by a product: how (`scale`, `shift`, `join`, `other`), when, and with which data."""

    weight: Weight
    how: str
    time: int
    beside: Tensor | None = None
