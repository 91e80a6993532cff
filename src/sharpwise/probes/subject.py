"""The model that a probe looks at: left as it was, whatever is done to it meanwhile."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpwise.blocks import BlockMap, Role, Segment, canonical_name
from sharpwise.blocks.map import Blocks, blocks_for
from sharpwise.hints import kind_of
from sharpwise.model_facts import logits_of, vocabulary_of
from sharpwise.probes.batches import Batch, as_batches
from sharpwise.shards import is_dtensor

Tied = Literal["both", "lookup", "head"]
"""The uses of a tied embedding of which a probe takes the gradient; through the other it is a constant."""


class Subject:
    """A model and its trainable parameters, tied ones once, with the segments that they consist of.

    Attributes:
        trained: the parameters by name; `parts` are the segments of each, in the same order, `segments` those of all.

    Args:
        model: any causal language model that returns logits. Wrappers of `torch.compile` and DDP are taken off.
        blocks: of the model, or overrides for it as `BlockMap.of` takes them.
        who: begins the messages.
        tied: which of the two uses of a tied embedding is looked at.

    Raises:
        TypeError: this is no model.
        ValueError: nothing in it is trainable, it is sharded or on the meta device, `blocks` is of another model, or
            `tied` is no use, or names one of a tied embedding whose uses have no names of their own.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, who: str, tied: Tied = "both") -> None:
        if tied not in ("both", "lookup", "head"):
            raise ValueError(f"{who}: tied must be one of both, lookup, head, got {tied!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"{who}: got {kind_of(model)}, expected a torch.nn.Module")
        self.who, self.model = who, unwrapped(model)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError(
                f"{who}: no parameter requires a gradient; call requires_grad_() on what is to be measured"
            )
        for name, parameter in self.trained.items():
            self._check(name, parameter)
        found = blocks_for(self.model, blocks, who)
        self.parts = [self._segments(found, name, p) for name, p in self.trained.items()]
        self.segments = tuple(segment for parts in self.parts for segment in parts)
        self.device = next(iter(self.trained.values())).device
        self._uses = {} if tied == "both" else self._uses_of_tied(tied)

    def _check(self, name: str, parameter: Tensor) -> None:
        if is_dtensor(parameter):
            raise ValueError(
                f"{self.who}: {name} is sharded (a DTensor); measure a copy that one process holds, or with "
                "sharpness_from_optimizer"
            )
        if parameter.is_meta:
            raise ValueError(
                f"{self.who}: {name} is on the meta device and has no values; build the model on a real one"
            )

    def _segments(self, blocks: BlockMap, name: str, parameter: Tensor) -> tuple[Segment, ...]:
        name = canonical_name(name)
        found = blocks[name] if name in blocks else ()  # noqa: SIM401 - a map has no `get`
        if not found or found[0].shape != tuple(parameter.shape):
            there = f"has the shape {found[0].shape} there" if found else "is not in it"
            raise ValueError(
                f"{self.who}: blocks is the map of another model: {name} {tuple(parameter.shape)} {there}; make it "
                "with BlockMap.of(model)"
            )
        return found

    def batches(self, batches: Any) -> Iterator[Batch]:
        """The batches, checked and on the device of the model."""
        return as_batches(batches, device=self.device, vocabulary=vocabulary_of(self.model), who=self.who)

    def logits(self, model: nn.Module, part: Batch, *, twice: bool = False) -> Tensor:
        """Logits [targets, vocabulary] of a part of a batch, at the targets that count and at the others.

        Args:
            model: as `run` hands it over.
            twice: so that they can be differentiated twice: attention's fused kernels cannot.

        Raises:
            ValueError: the model fails on the batch or returns no such logits, or they are for fewer tokens than the
                batch has.
        """
        try:
            with sdpa_kernel(SDPBackend.MATH) if twice else ExitStack():
                output = model(*part.args, **part.kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
            raise ValueError(
                f"{self.who}: the model fails on {part.name}, inputs {list(part.inputs.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        try:
            logits = logits_of(output, part.inputs).flatten(0, 1)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.who}: no loss per token can be computed from {part.name}: {error}") from error
        highest = int(part.targets.max())
        if highest >= logits.shape[-1]:
            raise ValueError(
                f"{self.who}: {part.name} has the target {highest}, and the model gives logits for "
                f"{logits.shape[-1]} tokens; was the text made with another tokenizer?"
            )
        return logits

    def _uses_of_tied(self, tied: Tied) -> dict[str, dict[str, bool]]:
        """Of parameters with several names, by the first: all of them, and whether a gradient is taken through each."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        found = {own[0]: dict.fromkeys(own, True) for own in names.values() if len(own) > 1}
        for (first, parameter), segments in zip(self.trained.items(), self.parts, strict=True):
            own = names[id(parameter)]
            if not any(s.role in (Role.TOK_EMB, Role.HEAD) and s.tied for s in segments):
                continue
            lookups = [name for name in own if isinstance(self.model.get_submodule(_owner(name)), nn.Embedding)]
            if not 0 < len(lookups) < len(own):
                raise ValueError(
                    f"{self.who}: tied={tied!r} is one use of {first}, and of its names {', '.join(own)} not one is of "
                    "an nn.Embedding and another of the head; tied='both' measures them together"
                )
            found[first] = {name: (name in lookups) == (tied == "lookup") for name in own}
        return found

    def run(self, work: Callable[[nn.Module], Any], tensors: Mapping[str, Tensor]) -> Any:
        """`work(model)` with these tensors, by name, in place of parameters and buffers, backward passes included."""
        given = dict(tensors)
        for first, uses in self._uses.items():
            if (own := given.get(first)) is not None:
                given |= {name: own if taken else own.detach() for name, taken in uses.items()}
        with _at_rest(self.model), torch.enable_grad():
            placed = {f"model.{name}": tensor for name, tensor in given.items()}
            return functional_call(_Host(self.model), placed, (work,), tie_weights=not self._uses)


class _Host(nn.Module):
    """Its forward is any function of the model: what `functional_call` puts in place stays there while that runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.model)


def _owner(name: str) -> str:
    """The module that has a parameter of this name."""
    return name.rpartition(".")[0]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of `torch.compile` and data parallelism."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Without dropout, cache for generation and compiled parts; afterwards everything is as it was."""
    training = [module for module in model.modules() if module.training]
    config: Any = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        if cache:
            config.use_cache = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
            if cache:
                config.use_cache = cache
