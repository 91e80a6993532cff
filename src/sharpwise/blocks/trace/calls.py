"""What a recorder keeps of a forward: calls of torch, attentions, and uses of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sharpwise.blocks.trace.weights import Weight, map_tensors, tensors_in


class Call:
    """A call of torch."""

    __slots__ = ("_tensors", "args", "func", "kwargs", "name")

    def __init__(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> None:
        self.func, self.name, self.args, self.kwargs = func, name, args, {} if kwargs is None else kwargs
        self._tensors: list[Tensor] | None = None

    def run(self) -> Any:
        """Its result."""
        return self.func(*self.args, **self.kwargs)

    def on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """The same call on other arguments."""
        return Call(self.func, self.name, args, kwargs)

    def mapped(self, change: Callable[[Tensor], Any]) -> "Call":
        """The same call with every tensor changed."""
        return self.on(*map_tensors(change, (self.args, self.kwargs)))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among its arguments."""
        if self._tensors is None:
            self._tensors = tensors_in(self.args)
            if self.kwargs:
                self._tensors += tensors_in(self.kwargs)
        return self._tensors

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
