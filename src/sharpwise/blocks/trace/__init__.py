"""Blocks by dataflow: what the parameters of a model are, from what its forward computes. Not one name is read."""

import contextlib
import gc
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sharpwise.blocks.names import canonical_name
from sharpwise.blocks.segment import Segment
from sharpwise.blocks.trace import attention, elementwise, matrices
from sharpwise.blocks.trace.evidence import weigh
from sharpwise.blocks.trace.example import TOKENS, Example, make_example, untouched, unwrapped
from sharpwise.blocks.trace.functions import opened_functions
from sharpwise.blocks.trace.graph import Leaf
from sharpwise.blocks.trace.infer import Inference
from sharpwise.blocks.trace.kinds import one_of_each_kind
from sharpwise.blocks.trace.layers import find_layers
from sharpwise.blocks.trace.recorder import Handlers, Recorder
from sharpwise.blocks.trace.weights import tensors_in

__all__ = ["Example", "Traced", "one_of_each_kind", "trace"]

logger = logging.getLogger("sharpwise.blocks")
_HANDLERS = Handlers(attention.handle, matrices.handle, elementwise.handle)

# Of the function that takes an example: others, as the constructors of optimizers, take the map that it makes.
_GIVE = (
    "sharpwise.BlockMap.of(model, example=batch), where batch is a tensor, a tuple of arguments or a dict of keyword "
    "arguments"
)


class NotTraced(ValueError):
    """A model that cannot be run. Args: `problem`, and what to `do` about it where its example is given."""

    def __init__(self, problem: str, do: str) -> None:
        super().__init__(problem, do)
        self.problem, self.do = problem, do

    def __str__(self) -> str:
        return f"{self.problem}; {self.do}"


@dataclass(frozen=True)
class Traced:
    """What a trace found.

    Attributes:
        segments: by canonical name of the parameter; source `trace`, or `""` with role `other` for what is unused.
        unused: parameters that the forward did not touch.
        why: one sentence per parameter.
        attentions: how many attentions were computed.
    """

    segments: dict[str, list[Segment]]
    unused: tuple[str, ...]
    why: dict[str, str]
    attentions: int


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Python looks for no garbage inside: a trace keeps what it makes, and to search it over and over takes a sixth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def trace(model: nn.Module, example: Example | None = None) -> Traced:
    """Run the model on a tiny batch and see what every parameter does.

    Args:
        model: any module, on any device, meta included; it is left as it was, and no weight is read.
        example: what its forward takes: a tensor, a tuple of arguments or a mapping of keyword arguments. Made up from
            the config where there is one, or from the embedding.

    Raises:
        ValueError: no example can be made up, it lies on another device, or the forward fails.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"trace: got {type(model).__name__}, expected a torch.nn.Module")
    model = unwrapped(model)
    _check_whole(model)
    tokens = TOKENS
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(3):
            record, output = _run(model, example, tokens)
            if example is not None or record.missed <= 1:
                break
            tokens = int(tokens * record.missed + 1)
        if record.branches:
            logger.warning(
                "trace: the forward of %s reads values that it computes, and no matrix is multiplied here: roles are "
                "those of the branch that was taken",
                type(model).__name__,
            )
        try:
            found = Inference(record, output)
            weigh(found)
            find_layers(model, found)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            raise ValueError(
                f"trace: what {type(model).__name__} computes cannot be read: {type(error).__name__}: {error}"
            ) from error
    return _result(model, record, found)


def _run(model: nn.Module, example: Example | None, tokens: int) -> tuple[Recorder, Any]:
    args, kwargs = _arguments(model, example, tokens)
    record = Recorder(model, _HANDLERS)
    for tensor in tensors_in((args, kwargs)):
        if tensor.device != record.device:
            raise ValueError(
                f"trace: the example lies on {tensor.device}, the model on {record.device}; move it: "
                f"example.to({str(record.device)!r})"
            )
    args, kwargs = tree_map(_leaf_input, (args, kwargs))
    record.mark("input", (args, kwargs))
    for i, tensor in enumerate(tensors_in((args, kwargs))):
        if tensor.requires_grad:
            record.graph.add(Leaf(tensor, "input", 0))
        elif not tensor.is_floating_point():
            record.copies[id(tensor)] = i
    with untouched(model) as held, torch.compiler.set_stance("force_eager"):
        record.mark("held", held)
        try:
            with attention.flex_attention_seen(), opened_functions(record), record:
                output = model(*args, **kwargs)
        except Exception as error:
            made = "the example" if example is not None else f"a made-up example ({_describe(kwargs or args)})"
            raise NotTraced(
                f"trace: the forward of {type(model).__name__} raises with {made}: {type(error).__name__}: {error}"
                f"{_hint(model, error)}",
                f"give what it takes, {_GIVE}",
            ) from error
    return record, output


def _hint(model: nn.Module, error: Exception) -> str:
    """What a trace does otherwise than a forward, where that may be why."""
    devices = dict.fromkeys(str(p.device) for p in model.parameters())
    if len(devices) > 1:
        return f". The model lies on several devices, {', '.join(devices)}: make the map before it is spread over them"
    return ""


def _arguments(model: nn.Module, example: Example | None, tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        try:
            return (), make_example(model, tokens)
        except ValueError as error:
            what = f"trace: no example can be made up for {type(model).__name__}: {error}"
            raise NotTraced(what, f"give one, {_GIVE}") from None
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Mapping):
        return (), dict(example.items())
    raise TypeError(f"trace: example is a {type(example).__name__}, expected a tensor, a tuple or a mapping")


def _leaf_input(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone()
    return copy.requires_grad_() if copy.is_floating_point() else copy


def _describe(values: Any) -> str:
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return ", ".join(
        f"{key}: {list(value.shape)}" if isinstance(value, Tensor) else f"{key}={value!r}" for key, value in items
    )


def _check_whole(model: nn.Module) -> None:
    from sharpwise.shards import is_dtensor

    for name, parameter in model.named_parameters():
        if is_dtensor(parameter) or type(parameter).__name__ == "FlatParameter":
            raise ValueError(
                f"trace: {name} is sharded; build the map before sharding, or load a saved one: "
                "BlockMap.of(model).save(path), then BlockMap.load(path)"
            )


def _result(model: nn.Module, record: Recorder, found: Inference) -> Traced:
    segments: dict[str, list[Segment]] = {}
    why: dict[str, str] = {}
    unused = []
    for name, parameter in model.named_parameters():
        number, canonical = record.weights[id(parameter)].number, canonical_name(name)
        ledger = found.ledgers[number]
        if number not in record.touched:
            unused.append(canonical)
            segments[canonical] = [Segment(name=canonical, shape=tuple(parameter.shape))]
            why[canonical] = "the forward does not use it"
            continue
        segments[canonical] = ledger.segments(canonical)
        why[canonical] = ledger.why or "neither attention nor MLP, norm or embedding"
    return Traced(segments, tuple(unused), why, len(record.attentions))
