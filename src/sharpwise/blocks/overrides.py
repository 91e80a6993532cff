"""Overrides: the user says by glob what parameters are."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from sharpwise.blocks.names import canonical_name, collapse
from sharpwise.blocks.roles import Role, meant
from sharpwise.blocks.segment import Segment
from sharpwise.hints import nearest

Override = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]

_LIKE = 0.3
"""From this likeness on a name is shown as one that may have been meant."""
_HEADED = frozenset({Role.Q, Role.K, Role.V})
_FIELDS: dict[str, tuple[type, ...]] = {
    "role": (str,),
    "layer": (int, type(None)),
    "dim": (int,),
    "start": (int,),
    "length": (int,),
    "stride": (int,),
    "count": (int,),
    "heads": (int, type(None)),
    "stacked": (bool,),
    "merged": (bool,),
    "bias": (bool,),
}


def as_role(value: object, what: str) -> Role:
    """The role of this name. Raises ValueError naming `what` and the roles there are."""
    try:
        return Role(value)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(f"{what}: unknown role {value!r}{meant(value, Role)}; roles are {', '.join(Role)}") from None


def apply(segments: Mapping[str, list[Segment]], overrides: Mapping[str, Override], frozen: Iterable[str] = ()) -> None:
    """Replace the segments of all parameters that a glob matches; of several globs the last one counts.

    Args:
        segments: segments by canonical name of the parameter; its lists are changed in place.
        overrides: by glob on canonical names (case counts) a role, or the fields of a segment, or a list of these that
            together cover the parameter. A role alone keeps the dimension, layer and heads that the family found.
        frozen: names of frozen parameters, for the message when a glob matches these only.

    Raises:
        ValueError: a glob matches nothing, or a value is not an override.
    """
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides: got {type(overrides).__name__}, expected a mapping from glob to role")
    frozen = tuple(frozen)
    for glob, value in overrides.items():
        if not isinstance(glob, str):
            raise TypeError(f"overrides: got the glob {glob!r}, expected a string")
        hits = [name for name, old in segments.items() if any(fnmatchcase(n, glob) for n in (name, *old[0].tied))]
        if not hits:
            raise ValueError(_no_match(glob, segments, frozen))
        for name in hits:
            segments[name][:] = _overridden(segments[name], value, f"override {glob!r}")


def _overridden(old: list[Segment], value: Override, what: str) -> list[Segment]:
    first = old[0]
    whole = Segment(
        name=first.name,
        shape=first.shape,
        layer=first.layer,
        dim=first.dim,
        merged=first.merged,
        bias=first.bias,
        tied=first.tied,
    )
    if isinstance(value, str):
        role = as_role(value, what)
        heads = first.heads if len(old) == 1 and role in _HEADED else None
        return [replace(whole, role=role, heads=heads, stacked=first.stacked, source="override")]
    if isinstance(value, Mapping):
        return [_from_fields(whole, value, what)]
    if isinstance(value, Sequence):
        parts = [part for part in value if isinstance(part, Mapping)]
        if parts and len(parts) == len(value):
            return [_from_fields(whole, part, what) for part in parts]
    raise ValueError(
        f"{what}: got {value!r}, expected a role such as 'up', a mapping such as {{'role': 'q', 'heads': 12}}, "
        "or a list of such mappings that together cover the parameter"
    )


def _from_fields(whole: Segment, fields: Mapping[str, Any], what: str) -> Segment:
    if "role" not in fields:
        raise ValueError(f"{what}: got {dict(fields)!r} without a role; roles are {', '.join(Role)}")
    check_fields(fields, what)
    role = as_role(fields["role"], what)
    given = {field: value for field, value in fields.items() if field != "role"}
    try:
        # Anew, not `replace`: length and stride of the whole parameter must not stay where they are not given.
        return Segment(
            **{
                "name": whole.name,
                "shape": whole.shape,
                "layer": whole.layer,
                "dim": whole.dim,
                "merged": whole.merged and not {"dim", "stacked"} & given.keys(),
                "bias": whole.bias,
                "tied": whole.tied,
                **given,
                "role": role,
                "source": "override",
            }
        )
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def check_fields(fields: Mapping[str, Any], what: str) -> None:
    """Raise ValueError unless these are fields of a segment with values of the right type."""
    for field, value in fields.items():
        if field not in _FIELDS:
            hint = nearest(str(field), _FIELDS)
            raise ValueError(f"{what}: unknown field {field!r}{hint}; fields are {', '.join(_FIELDS)}")
        allowed = _FIELDS[field]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ValueError(f"{what}: {field}={value!r} is not {' or '.join(_type_name(t) for t in allowed)}")


def _type_name(kind: type) -> str:
    return {"int": "a whole number", "NoneType": "None", "str": "a string", "bool": "True or False"}[kind.__name__]


def _no_match(glob: str, segments: Mapping[str, list[Segment]], frozen: Sequence[str]) -> str:
    if any(fnmatchcase(name, glob) for name in frozen):
        return (
            f"override {glob!r} matches frozen parameters only, which have no blocks here; leave it out, or set "
            "requires_grad=True. BlockMap.of(model, include_frozen=True) has them too"
        )
    names = [*segments, *(tied for old in segments.values() for tied in old[0].tied)]
    return (
        f"override {glob!r} matches none of {len(segments)} parameters; {_near(glob, names)}. "
        "Globs match whole names without wrapper prefixes: '*.mlp.fc.weight', or '*' in place of the layer number"
    )


def _near(glob: str, names: Sequence[str]) -> str:
    """What was meant by a glob that matches nothing: a wider one that does, else the names nearest to it."""
    bare = glob.strip("*.")
    for wider in (canonical_name(glob), f"*.{bare}", f"{bare}.*", f"*.{bare}.*", f"*{bare}*"):
        hits = [name for name in names if fnmatchcase(name, wider)]
        if bare and hits:
            return f"did you mean {wider!r}, which matches {_some(collapse(hits), 3)}"
    scores = {name: _likeness(bare.lower().split("."), name.lower().split(".")) for name in names}
    close = collapse(sorted((name for name in names if scores[name] >= _LIKE), key=lambda name: -scores[name]))
    return f"closest: {', '.join(close[:3])}" if close else f"names are {_some(collapse(names))}"


def _likeness(glob: Sequence[str], name: Sequence[str]) -> float:
    """How well each part of a glob is met by the part of a name that it is most like; `weight` and `bias` count little.

    Part by part, as a `*` may stand for anything between them.
    """
    leaves = ("weight", "bias")
    wanted = [(part, 0.1 if part in leaves else 1.0) for part in glob if part.strip("*")]
    pairs = ((weight, part, [own for own in name if own == part or own not in leaves]) for part, weight in wanted)
    best = sum(w * max(difflib.SequenceMatcher(None, part, own).ratio() for own in own_) for w, part, own_ in pairs)
    return best / sum(weight for _, weight in wanted) if wanted else 0.0


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
