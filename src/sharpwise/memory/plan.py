"""Plans the memory of a training: parameters by role, and the state of every supported combination, to the byte.

State is no formula here: the code that allocates it runs on the meta device, with what one process of several holds of
every parameter. What is moved is parameters and state, read and written, and gradients, read.
Activations are an estimate (`memory.activations`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sharpwise.blocks import BLOCK_TYPE, BlockMap
from sharpwise.blocks.map import Blocks, blocks_for
from sharpwise.combinations import COMBINES
from sharpwise.controls import Control
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.layout import Layouts
from sharpwise.engine.multipliers import factor_maps
from sharpwise.engine.view import ParamView
from sharpwise.engine.views import views_of
from sharpwise.hints import kind_of, nearest
from sharpwise.memory.activations import PRECISIONS, activations_of, passes_of
from sharpwise.memory.pieces import SHARDS, How, Piece, cut_dimensions, pieces_of
from sharpwise.model_facts import max_context
from sharpwise.optim import create_optimizer
from sharpwise.rules.base import MatrixRule

LONGEST = 4096
"""Tokens of context, where nobody says and the model has more."""
_WHO = "memory.plan"


@dataclass(frozen=True)
class Planned:
    """An optimizer with a storage, on one process.

    Attributes:
        optimizer, storage: their names.
        state, by_role: bytes, exact, of all and by role of the parameters.
        moved, sent: bytes that a step reads and writes, and that it sends to others.
        refused: why the model cannot have it; then there is nothing else.
    """

    optimizer: str
    storage: str
    state: int = 0
    by_role: Mapping[str, int] = field(default_factory=dict)
    moved: int = 0
    sent: int = 0
    refused: str = ""

    @property
    def name(self) -> str:
        return self.optimizer if self.storage == "fp32" else f"{self.optimizer} {self.storage}"


@dataclass(frozen=True)
class Fit:
    """Whether a combination fits: `needs` bytes without activations; micro_batch: the largest, None if not known."""

    planned: Planned
    needs: int
    fits: bool
    micro_batch: int | None


@dataclass(frozen=True)
class MemoryPlan:
    """What one process of a training holds and moves. Bytes; what is estimated says so.

    Attributes:
        parameters: trainable elements of the whole model, by role.
        weights, gradients: of this process; casts, gathered: see `memory.activations`, estimates.
        activations: of one sequence, an estimate; None of what is no transformer.
        sent: by the passes of one micro-batch, estimated for tensor parallelism.
        combinations: all that the tables support.
    """

    model: str
    processes: int
    shard: str
    precision: str
    context: int
    micro_batch: int
    parameters: Mapping[str, int]
    weights: int
    gradients: int
    casts: int
    gathered: int
    activations: int | None
    sent: int
    combinations: tuple[Planned, ...]

    def fixed(self, planned: Planned) -> int:
        """What it needs whatever the batch."""
        return self.weights + self.gradients + self.casts + self.gathered + planned.state

    def total(self, planned: Planned) -> int:
        """What it needs for micro-batches of this size."""
        return self.fixed(planned) + self.micro_batch * (self.activations or 0)

    def fits(self, size: int) -> list[Fit]:
        """What of this fits into so many bytes, and the largest micro-batch that does; what is refused is not in it."""
        found = []
        for planned in self.combinations:
            if planned.refused:
                continue
            needs = self.fixed(planned)
            most = None if self.activations is None else max(0, size - needs) // self.activations
            found.append(Fit(planned, needs, needs <= size if most is None else most > 0, most))
        return found

    def only(self, wanted: Callable[[Planned], bool]) -> "MemoryPlan":
        """The plan of some of its combinations."""
        return replace(self, combinations=tuple(filter(wanted, self.combinations)))

    @property
    def distinct(self) -> list[Planned]:
        """What the model can have, without storages that change nothing: of an optimizer without state."""
        of_fp32 = {one.optimizer: one.state for one in self.combinations if one.storage == "fp32"}
        known = [one for one in self.combinations if not one.refused]
        return [one for one in known if one.storage == "fp32" or one.state != of_fp32.get(one.optimizer)]

    def to_json(self, size: int | None = None) -> str:
        """All of it as JSON; with `size` also what fits into so many bytes."""
        content: dict[str, Any] = asdict(self)
        content["types"] = {role: str(BLOCK_TYPE[role]) for role in self.parameters}  # type: ignore[index]
        if size is not None:
            fits = {id(fit.planned): fit for fit in self.fits(size)}
            content["fits_into"] = size
            for own, planned in zip(content["combinations"], self.combinations, strict=True):
                fit = fits.get(id(planned))
                own |= {} if fit is None else {"needs": fit.needs, "fits": fit.fits, "micro_batch": fit.micro_batch}
        return json.dumps(content, indent=1) + "\n"


def plan(
    model: nn.Module,
    *,
    name: str = "",
    processes: int = 1,
    shard: str = "replicate",
    rank: int = 0,
    precision: str | None = None,
    context: int | None = None,
    micro_batch: int = 1,
    attention: str = "sdpa",
    blocks: Blocks = None,
    optimizers: Mapping[str, Mapping[str, Any]] | None = None,
) -> MemoryPlan:
    """What a training of a model holds and moves under every optimizer and storage that the tables combine.

    Args:
        model: on any device, `meta` too; it is left as it was, and nothing of its size is allocated.
        name: for the title.
        processes: how many train it together; shard: one of `SHARDS`, how they share it; rank: which one is meant;
            the first holds the most.
        precision: one of `PRECISIONS`; None: parameters as they are, and the arithmetic in their type.
        context: tokens of a sequence; None for the model's maximum, at most 4096. micro_batch: sequences of a pass.
        attention: "sdpa", which does not keep the weights of attention, or "eager", which does.
        blocks: as constructors take them.
        optimizers: options by name of the optimizer, `{"sgd": {"momentum": 0.9}}`; of all others the defaults.

    Raises:
        TypeError, ValueError: for arguments out of range; a model without parameters; one that has no plan for tensor
            parallelism.

    Example:
        >>> from sharpwise.train.models import load_model
        >>> found = plan(load_model("gpt2-10m", device="meta"), processes=8, shard="fsdp")
        >>> sizes = {one.name: one.state for one in found.combinations}
        >>> sizes["adam-mini int8-linear"] < sizes["adamw int8-dynamic"] < sizes["adamw"]
        True
    """
    _check(model, processes, shard, rank, precision, context, micro_batch, attention, optimizers or {})
    how: How = shard  # type: ignore[assignment]
    parts = blocks_for(model, blocks, _WHO, include_frozen=True)
    cut = cut_dimensions(model, processes, how)
    first = next(model.parameters())
    kind, size = PRECISIONS[precision] if precision else (None, first.element_size())
    pieces = pieces_of(model, parts, processes, cut, rank, getattr(torch, kind) if kind else None)
    trained = [piece for piece in pieces if piece.held.requires_grad]
    tokens = context or min(max_context(model) or LONGEST, LONGEST)
    kept = activations_of(
        model, parts.segments, tokens, size, autocast=precision == "bf16-autocast", eager=attention == "eager",
        cut=cut if how == "tp" else {}, processes=processes,
    )  # fmt: skip
    passes = passes_of(pieces, processes, how)
    parameters: dict[str, int] = {}
    for segment in (s for piece in trained for s in piece.segments):
        parameters[str(segment.role)] = parameters.get(str(segment.role), 0) + segment.numel
    weights, gradients = (sum(piece.bytes for piece in own) for own in (pieces, trained))
    moved = 2 * sum(piece.bytes for piece in trained) + gradients
    return MemoryPlan(
        name or type(model).__name__, processes, shard, precision or str(first.dtype).removeprefix("torch."), tokens,
        micro_batch, parameters, weights, gradients, kept.casts if kept else 0, passes.gathered,
        kept.sequence if kept else None, passes.sent + (micro_batch * kept.sent if kept else 0),
        tuple(_planned(model, parts, pieces, processes, moved, optimizers or {})),
    )  # fmt: skip


def _planned(
    model: nn.Module,
    blocks: BlockMap,
    pieces: Sequence[Piece],
    processes: int,
    moved: int,
    options: Mapping[str, Mapping[str, Any]],
) -> Iterator[Planned]:
    for name, (_, storages) in COMBINES.items():
        for storage in sorted(storages, key=lambda storage: storage != "fp32"):
            try:
                optimizer = create_optimizer(
                    model, name, **{"storage": storage, "blocks": blocks, **options.get(name, {})}
                )
                yield _of(optimizer, name, storage, pieces, processes, moved)
            except (TypeError, ValueError) as error:
                yield Planned(name, storage, refused=str(error))


def _of(
    optimizer: BlockOptimizer, name: str, storage: str, pieces: Sequence[Piece], processes: int, moved: int
) -> Planned:
    by_role: dict[str, int] = {}
    sent = 0.0
    groups = {name: id(group) for group in optimizer.param_groups for name in group["param_names"]}
    alike: dict[Any, list[Piece]] = {}
    for piece in (piece for piece in pieces if piece.name in groups):
        placed = tuple(optimizer.rule.place(piece.segments))
        alike.setdefault((piece.kind, placed, groups[piece.name]), []).append(piece)
    for same in alike.values():
        for view, state in state_of(optimizer, same[:1]):
            for key, tensor in state.items():
                for role, count in _by_role(view, key, tensor):
                    by_role[role] = by_role.get(role, 0) + count * len(same)
            sent += _sent(view, state, optimizer.options.control, processes) * len(same)
    total = sum(by_role.values())
    return Planned(name, storage, total, by_role, moved + 2 * total, round(sent))


def state_of(optimizer: BlockOptimizer, pieces: Sequence[Piece]) -> Iterator[tuple[ParamView, dict[str, Tensor]]]:
    """The state of every view of the parameters of an optimizer, as it is allocated, for these parts of them."""
    block_lr, layouts = optimizer.options.block_lr, Layouts()
    factors = [] if block_lr is None else factor_maps(block_lr, optimizer._known.segments)
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    for piece in pieces:
        own: dict[str, Any] = {}
        segments, group = optimizer.blocks[piece.name], groups[piece.name]
        views = views_of(piece.name, piece.held, group, segments, optimizer.rule, layouts, piece.shard)
        for view in views:
            before = set(own)
            optimizer._allocate(view, own, factors)
            yield view, {key: own[key] for key in own if key not in before}


def _by_role(view: ParamView, key: str, tensor: Tensor) -> Iterator[tuple[str, int]]:
    """Bytes of a tensor of state by the roles of its segments: of blocks as many as each has, else by elements."""
    total, kinds = tensor.numel() * tensor.element_size(), view.kinds(variants=True)
    kind = next((kind for name, kind in kinds.items() if view.state_key(name) == key), "")
    pairs = zip(view.segments, view.cuts, strict=True)
    shares = [s.blocks(cut) if kind == "block" else s.numel for s, cut in pairs]
    before, given = 0, 0
    for segment, share in zip(view.segments, shares, strict=True):
        before += share
        until = total * before // (sum(shares) or 1) if segment is not view.segments[-1] else total
        yield str(segment.role), until - given
        given = until


def _sent(view: ParamView, state: Mapping[str, Tensor], control: Control | None, processes: int) -> float:
    """Bytes that the step of a view sends: whole matrices to their owners and back, or sums in fp64.

    Those are over its blocks, of thin products, in the shapes of the factors that they move, and for a bound on whole
    matrices, which knows those of gradients over blocks already.
    """
    if not view.shard.cut:
        return 0.0
    ring = (processes - 1) / processes
    if isinstance(view.rule, MatrixRule):
        return 2 * ring * view.numel * (view.rule.wire or view.dtype).itemsize
    kinds = view.kinds(variants=True)
    sums = view.n_blocks + sum(state[view.state_key(name)].numel() for name, kind in kinds.items() if kind == "whole")
    if control is not None and view.unit == "matrix" and not (view.rule.plain and view.rule.has_blocks):
        sums += (1 if control.scales_only else 3) * sum(view.units_of(segment) for segment in view.segments)
    return 2 * ring * 8 * sums


def _check(
    model: Any,
    processes: Any,
    shard: str,
    rank: Any,
    precision: str | None,
    context: Any,
    micro_batch: Any,
    attention: str,
    options: Mapping[str, Any],
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_WHO}: got {kind_of(model)}, expected a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{_WHO}: {type(model).__name__} has no trainable parameters")
    for what, value in (("processes", processes), ("micro_batch", micro_batch), ("context", context)):
        if (type(value) is not int or value < 1) and not (what == "context" and value is None):
            raise ValueError(f"{_WHO}: {what} must be a whole number >= 1, got {value!r}")
    if context and (most := max_context(model)) and context > most:
        raise ValueError(
            f"{_WHO}: context={context}, and the model has {most} positions: give no more, or another config"
        )
    if type(rank) is not int or not 0 <= rank < processes:
        raise ValueError(f"{_WHO}: rank must be a whole number from 0 to {processes - 1}, got {rank!r}")
    for what, word, known in (
        ("shard", shard, SHARDS),
        ("precision", precision or "fp32", PRECISIONS),
        ("attention", attention, ("sdpa", "eager")),
    ):
        if word not in known:
            raise ValueError(f"{_WHO}: {what} must be one of {', '.join(known)}, got {word!r}{nearest(word, known)}")
    if unknown := sorted(set(options) - set(COMBINES)):
        raise ValueError(f"{_WHO}: no optimizer is called {unknown[0]!r}{nearest(unknown[0], COMBINES)}")
