"""RRC, how far a step changes what each matrix gives (Kosson et al., arXiv 2410.23922).

    RRC = |dW X|_F / |W X|_F,    dW = W' - W

on a matrix's own inputs, which are held fixed: they are those before the step. So it is the layer's own update alone,
not how far the network as a whole has moved.

| symbol | name |
|---|---|
| W, W' | before, after |
| X | inputs |

Departs: the paper's norm and choice of inputs are not known from its published pieces; these are Frobenius norms over
some tokens of one batch.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sharpwise.blocks import BlockMap, Segment, canonical_name
from sharpwise.blocks.map import Blocks, blocks_for
from sharpwise.blocks.names import canonical_path
from sharpwise.probes.estimate import Cost, Estimate, Measurement, t_quantile
from sharpwise.probes.parts import CHUNK, about, labels, named_parameters
from sharpwise.shards import is_dtensor


@torch.no_grad()
def rrc(
    model: nn.Module,
    before_state: Mapping[str, Tensor],
    batch: Any,
    *,
    blocks: Blocks = None,
    tokens: int = 1024,
) -> Measurement:
    """RRC of each matrix: how much its own update changes what it gives for its own inputs, these held fixed.

    The inputs are those of a forward pass with the weights before the step. Of an embedding they are the rows that are
    looked up; where a tied one is the head too, there is a value for either use. The error is a jackknife's over the
    sequences of the batch (where a module sees no sequences, as an expert, over its tokens, which are not quite
    independent). Matrices that no module of one input and one output applies are named in the warnings.

    Args:
        model: after the step; it is left as it was.
        before_state: its parameters before, by name (`UpdateSize.before_state`, or a copy of a state dict).
        batch: for the forward: a tensor, a tuple or a mapping.
        blocks: the map of its segments, or overrides for the one that is made.
        tokens: at most so many inputs of each module are used, evenly spaced in each sequence.

    Raises:
        ValueError: a parameter is missing in `before_state` or has another shape there; sharded parameters; the model
            applies none of its matrices to this batch.
    """
    began = time.perf_counter()
    known = blocks_for(model, blocks, "rrc")
    now = named_parameters(model, known)
    before = _matching({canonical_name(name): t.detach() for name, t in before_state.items()}, now)
    uses = _uses(model, known, before, now, tokens)
    handles = [module.register_forward_hook(use, with_kwargs=True) for use, module in uses]
    names = {name: canonical_name(name) for name, _ in model.named_parameters()}
    swapped = {name: before[own] for name, own in names.items() if own in before}
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        torch.func.functional_call(model, swapped, *_arguments(batch))
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    estimates: list[Estimate] = []
    warnings: list[str] = []
    for use, _ in uses:
        use.conclude(estimates, warnings)
    if not estimates and not warnings:
        raise ValueError("the model applied none of its matrices to this batch as a module of one input and one output")
    seen = {use.name for use, _ in uses if use.parts[0][1]}
    unseen = [name for name in known.names() if known[name][0].is_matrix and name not in seen and name in before]
    warnings += [f"{name}: no module was seen to apply it to rows of inputs" for name in unseen]
    cost = Cost(time.perf_counter() - began, gradients=1 / 3)
    return Measurement("RRC", estimates, settings={"tokens": tokens}, cost=cost, warnings=warnings)


def _matching(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, parameter in now.items():
        if name not in before:
            raise ValueError(
                f"rrc: before_state has no {name!r}; it is {len(before)} tensors of a copied state dict, or of "
                "UpdateSize.before_state without `select`"
            )
        if before[name].shape != parameter.shape:
            raise ValueError(
                f"rrc: {name} has shape {tuple(parameter.shape)}, and {tuple(before[name].shape)} in before_state"
            )
        if is_dtensor(parameter):
            raise ValueError(f"rrc: {name} is sharded; it needs a model with whole parameters")
    return {name: before[name] for name in now}


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {}


def _uses(
    model: nn.Module, blocks: BlockMap, before: Mapping[str, Tensor], now: Mapping[str, Tensor], tokens: int
) -> list[tuple["_Use", nn.Module]]:
    """Every module that holds one matrix, tied ones included."""
    name_of = {id(parameter): name for name, parameter in now.items()}
    uses = []
    for path, module in model.named_modules():
        own = [(key, name_of[id(p)]) for key, p in module.named_parameters(recurse=False) if id(p) in name_of]
        matrices = [(key, name) for key, name in own if len(now[name].shape) == 2]
        if len(matrices) == 1:
            key, name = matrices[0]
            called = canonical_name(f"{canonical_path(path)}.{key}" if path else key)
            uses.append((_Use(called, name, blocks[name], before[name], now[name].detach(), tokens), module))
    return uses


@dataclass
class _Use:
    """A module that applies a matrix: a forward hook that sums up what its outputs were and how they change.

    `parts` are the squares of dW X and W X per sequence, for each segment; no inputs are kept.
    """

    called: str
    name: str
    segments: Sequence[Segment]
    before: Tensor
    after: Tensor
    tokens: int
    unit: str = "per sequence"
    parts: list[tuple[list[Tensor], list[Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = [([], []) for _ in self.segments]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        first = self.segments[0]
        both = (first.as_rows(t).movedim(first.first_dim, 0) for t in (self.before, self.after))
        W, V = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in both)
        if not given or not isinstance(output, Tensor) or not given[0].numel():
            return
        X = given[0]
        if not X.is_floating_point():
            self._add(*self._looked_up(X, W, V - W))
        elif X.dim() >= 2 and X.shape[-1] == W.shape[1] and output.shape[-1] == W.shape[0]:
            X = self._some(X).to(W.dtype)
            for x in X.split(max(4 * CHUNK // (X.shape[1] * W.shape[0]), 1)):
                self._add((x @ (V - W).T).square(), (x @ W.T).square())

    def _some(self, X: Tensor) -> Tensor:
        """Inputs [sequences, tokens, ...]; where there are no sequences each token is one."""
        X = X.flatten(1, -2) if X.dim() > 3 else X
        if X.dim() == 2:
            self.unit, X = "per token", X[:, None]
        return X[:, _spaced(X.shape[1], self.tokens // len(X))][_spaced(len(X), self.tokens)]

    def _looked_up(self, X: Tensor, W: Tensor, dW: Tensor) -> tuple[Tensor, Tensor]:
        """Squares as [sequences, tokens, 1]: an embedding is one block, its rows are its inputs."""
        X = X if X.dim() > 1 else X[None]
        X = X.flatten(1)[:, _spaced(X.flatten(1).shape[1], self.tokens // len(X))][_spaced(len(X), self.tokens)]
        return dW[X].square(), W[X].square()

    def _add(self, moved: Tensor, had: Tensor) -> None:
        for segment, (tops, bottoms) in zip(self.segments, self.parts, strict=True):
            for squares, kept in ((moved, tops), (had, bottoms)):
                if not (segment.whole and segment.count == 1) and squares.shape[-1] == segment.output_size:
                    squares = squares.index_select(-1, segment.row_index(squares.device))
                kept.append(squares.sum((1, 2), dtype=torch.float64).cpu())

    def conclude(self, estimates: list[Estimate], warnings: list[str]) -> None:
        """Add an estimate for each segment that has seen inputs, or a warning where there is no ratio."""
        names = labels(self.segments)
        for segment, (tops, bottoms) in zip(self.segments, self.parts, strict=True):
            if not bottoms:
                continue
            label = self.called + names[segment].removeprefix(self.name)
            top, bottom = torch.cat(tops).tolist(), torch.cat(bottoms).tolist()
            if not (sum(bottom) > 0 and math.isfinite(sum(top) + sum(bottom))):
                warnings.append(f"{label}: what it gave was {'zero' if sum(bottom) == 0 else 'not finite'}")
                continue
            value, error = jackknife(top, bottom, lambda a, b: math.sqrt(a / b))
            notes = dict(about(segment)) if self.called == self.name else {"tied to": self.name}
            estimates.append(
                Estimate(
                    "RRC", "segment", label, value, error, "t-interval", segment.layer, len(top), segment.numel,
                    self.unit, notes,
                )
            )  # fmt: skip


def _spaced(n: int, most: int) -> Tensor:
    """At most so many (and at least one) of n indices, evenly spaced."""
    m = min(n, max(most, 1))
    return torch.arange(m, device="cpu") * n // m


def jackknife(
    top: Sequence[float], bottom: Sequence[float], of: Callable[[float, float], float]
) -> tuple[float, float | None]:
    """A function of two sums over independent draws, and half of its 95% interval (None from fewer than two)."""
    n, a, b = len(top), math.fsum(top), math.fsum(bottom)
    if n < 2 or any(b - y <= 0 for y in bottom):
        return of(a, b), None
    left_out = [of(a - x, b - y) for x, y in zip(top, bottom, strict=True)]
    mean = math.fsum(left_out) / n
    variance = (n - 1) / n * math.fsum((x - mean) ** 2 for x in left_out)
    return of(a, b), t_quantile(n - 1) * math.sqrt(variance)


__all__ = ["jackknife", "rrc"]
