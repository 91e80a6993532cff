"""What probes share: which segments of which parameters, what they are called, and groups of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from sharpwise.blocks import BlockMap, Segment, canonical_name
from sharpwise.blocks.roles import meant
from sharpwise.hints import kind_of
from sharpwise.probes.estimate import By, Estimate
from sharpwise.shards import is_dtensor

CHUNK = 2**22
"""Elements that are taken to fp64 at a time, so that a probe of a large matrix needs little memory beside it."""


def named_parameters(model: nn.Module, blocks: BlockMap) -> dict[str, nn.Parameter]:
    """The parameters that the map knows, by canonical name, in the model's order.

    Raises:
        TypeError: this is no model.
        ValueError: the map knows parameters that the model has not, or they are on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"got {kind_of(model)}, expected a torch.nn.Module")
    named = ((canonical_name(name), parameter) for name, parameter in model.named_parameters())
    found = {name: parameter for name, parameter in named if name in blocks}
    if missing := [name for name in blocks.names() if name not in found]:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(
            f"the block map is not of this model, which has no {missing[0]!r}{others}; make it with BlockMap.of(model)"
        )
    if meta := [name for name, parameter in found.items() if parameter.is_meta]:
        raise ValueError(f"{meta[0]} is on the meta device and has no values; build the model on a real one")
    return found


def trained_now(model: nn.Module, blocks: BlockMap) -> BlockMap:
    """The part of a map that requires a gradient now, whatever did when it was made."""
    now = {name for name, parameter in named_parameters(model, blocks).items() if parameter.requires_grad}
    return BlockMap(tuple(replace(s, frozen=False) for s in blocks.segments if s.name in now))


def by_name(found: Iterable[Estimate], blocks: BlockMap) -> dict[str, list[float]]:
    """Values of segments by name of the parameter, one per segment of the map."""
    values = {estimate.of: estimate.value for estimate in found if estimate.by == "segment"}
    result: dict[str, list[float]] = {}
    for segment, label in labels(blocks).items():
        result.setdefault(segment.name, []).append(values[label])
    return result


def choose(blocks: BlockMap, select: str | Iterable[str] | None) -> tuple[Segment, ...]:
    """The segments that one of these names: a role, a block type, or a glob on names of parameters; None takes all.

    Raises:
        ValueError: one of them names nothing.
    """
    if select is None:
        return blocks.segments
    wanted = (select,) if isinstance(select, str) else tuple(select)
    for pattern in wanted:
        if not any(_is_named(segment, pattern) for segment in blocks):
            roles = ", ".join(dict.fromkeys(str(s.role) for s in blocks))
            types = ", ".join(dict.fromkeys(str(s.block_type) for s in blocks))
            names = ", ".join(blocks.names()[:3])
            known = [*types.split(", "), *roles.split(", ")]
            raise ValueError(
                f"select={pattern!r} matches nothing{meant(pattern, known)}; this model has the roles {roles}, the "
                f"block types {types}, and parameters such as {names} (globs work: '*.0.*')"
            )
    return tuple(s for s in blocks if any(_is_named(s, pattern) for pattern in wanted))


def _is_named(segment: Segment, pattern: str) -> bool:
    return pattern in (segment.role, segment.block_type) or fnmatchcase(segment.name, pattern)


def labels(segments: Iterable[Segment]) -> dict[Segment, str]:
    """What each segment is called: its parameter, and where that has several segments, which of them.

    >>> q, k = (Segment("qk.weight", (8, 4), role=r, start=i, length=4) for i, r in ((0, "q"), (4, "k")))
    >>> list(labels([q, k, Segment("o.weight", (4, 4))]).values())
    ['qk.weight[q]', 'qk.weight[k]', 'o.weight']
    """
    result = {}
    parts: dict[str, list[Segment]] = {}
    for segment in segments:
        parts.setdefault(segment.name, []).append(segment)
    for name, members in parts.items():
        roles = [segment.role for segment in members]
        for segment in members:
            own = f"{segment.role}" if roles.count(segment.role) == 1 else f"{segment.role} {segment.describe_rows()}"
            result[segment] = name if segment.whole and len(members) == 1 else f"{name}[{own}]"
    return result


def whole(tensor: Tensor) -> Tensor:
    """The tensor without its graph, gathered from all processes where they hold parts of it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Group:
    """Segments whose values are put together: `members` are their numbers."""

    by: By
    of: str
    layer: int | None
    members: tuple[int, ...]
    elements: int


def groups(segments: Sequence[Segment], by: Iterable[By]) -> list[Group]:
    """Groups of segments; `by` layer puts together what has one block type within a layer, and what has one role."""
    names = labels(segments)
    found: dict[tuple[By, str, int | None], list[int]] = {}
    for kind in by:
        for i, s in enumerate(segments):
            for of in _called(s, kind, names[s]):
                found.setdefault((kind, of, s.layer if kind in ("segment", "layer") else None), []).append(i)
    return [Group(*key, tuple(ids), sum(segments[i].numel for i in ids)) for key, ids in found.items()]


def _called(segment: Segment, by: By, label: str) -> tuple[str, ...]:
    """The groups that a segment is in."""
    role, kind = str(segment.role), str(segment.block_type)
    if by == "layer":
        return () if segment.layer is None else (kind, role)
    return ({"segment": label, "role": role, "type": kind, "model": "model"}[by],)


def about(segment: Segment) -> Mapping[str, str]:
    """Role and block type, for the notes of an estimate of a segment."""
    return {"role": str(segment.role), "type": str(segment.block_type)}
