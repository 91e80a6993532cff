"""How users name blocks: by role ("q"), block type ("FFN"), or glob on names of parameters ("*.mlp.*")."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from sharpwise.blocks.roles import BlockType, Role, meant
from sharpwise.blocks.segment import Segment


def matches(segment: Segment, name: str) -> bool:
    """Whether a segment is of that role or type, or its parameter of that name."""
    return name in (segment.role, segment.block_type) or fnmatchcase(segment.name, name)


def by_role(names: Iterable[str]) -> bool:
    """Whether one of the names is a role or a block type."""
    return any(name in (*BlockType, *Role) for name in names)


def check_named(who: str, names: Iterable[str], segments: Sequence[Segment]) -> None:
    """Raise ValueError for a name that is no block of a model; `segments` are all of it."""
    for name in names:
        if segments and not any(matches(segment, name) for segment in segments):
            types = ", ".join(dict.fromkeys(str(s.block_type) for s in segments))
            roles = ", ".join(dict.fromkeys(str(s.role) for s in segments))
            hint = meant(name, [*types.split(", "), *roles.split(", ")])
            raise ValueError(
                f"{who}: {name!r} is no block of this model{hint}; it has the types {types}, the roles "
                f"{roles}, and parameters such as {segments[0].name} (globs match whole names: '*.mlp.*')"
            )
