"""Functions that a model defines with a gradient of its own.

Autograd sees one node and no inside. Where the inside holds a product, a lookup or an attention, or does no more than
move numbers, the forward is run as it stands, without the gradient that comes with it. Any other such function counts
as an activation (`graph`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from sharpwise.blocks.trace.graph import Through
from sharpwise.blocks.trace.paths import only_moves
from sharpwise.blocks.trace.recorder import Recorder
from sharpwise.blocks.trace.weights import tensors_in

_Function = torch.autograd.Function


class _Context:
    """Takes what a forward says to its backward, which is never run."""

    needs_input_grad: tuple[bool, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@contextlib.contextmanager
def opened_functions(record: Recorder) -> Iterator[None]:
    """Inside, functions of the model are seen from within where that tells something."""
    apply = _Function.apply.__func__  # type: ignore[attr-defined]

    def open_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if issubclass(cls, Through):
            return apply(cls, *args, **kwargs)
        before = _seen(record)
        apart = cls.setup_context is not _Function.setup_context  # a forward without a context
        with contextlib.suppress(Exception), torch.enable_grad():
            result = cls.forward(*args, **kwargs) if apart else cls.forward(_Context(), *args, **kwargs)
            if _seen(record) > before or only_moves(tensors_in(result), tensors_in((args, kwargs))):
                return result
        return apply(cls, *args, **kwargs)

    with mock.patch.object(_Function, "apply", classmethod(open_apply)):
        yield


def _seen(record: Recorder) -> int:
    return sum(leaf.kind != "weight" for leaf in record.graph.leaves.values())
