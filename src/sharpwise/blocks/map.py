"""The block map: every trainable element of a model in exactly one segment."""

import difflib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sharpwise.blocks import overrides as _overrides
from sharpwise.blocks.names import canonical_name, collapse
from sharpwise.blocks.overrides import Override, as_role
from sharpwise.blocks.roles import Role
from sharpwise.blocks.segment import Segment
from sharpwise.blocks.sources import Sources
from sharpwise.blocks.unclear import BLOCKS, Unclear, example_of
from sharpwise.files import parse_json
from sharpwise.hints import kind_of
from sharpwise.table import Table

if TYPE_CHECKING:
    from sharpwise.blocks.trace import Example

logger = logging.getLogger("sharpwise.blocks")

VERSION = 1
_DEFAULTS = {f.name: f.default for f in fields(Segment) if f.default is not MISSING}


class BlockMap:
    """Segments that place every element of every parameter exactly once. Immutable.

    Iterating and `len` go over the segments; `map[name]` are the segments of one parameter in the order of their rows;
    `name in map` asks for a parameter.

    Args:
        segments: all segments of all parameters; parameters stay in the order given.

    Raises:
        ValueError: rows of a parameter belong to no segment or to several, or its segments disagree about its shape.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        >>> print(BlockMap.of(model, overrides={"0.*": "tok_emb", "1.*": "head"}).table())
        name      shape   role     type  layer  rows  heads  source
        0.weight  10 x 4  tok_emb  Emb   -      all   -      override
        1.weight  10 x 4  head     Head  -      all   -      override
        1.bias    10      head     Head  -      all   -      override
    """

    problem: str = ""
    """Why the model was not run to see what its parameters do, where that was tried."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        by_name: dict[str, list[Segment]] = {}
        for segment in segments:
            by_name.setdefault(segment.name, []).append(segment)
        for name, parts in by_name.items():
            parts.sort(key=attrgetter("start"))
            _check_partition(name, parts)
        self._by_name = {name: tuple(parts) for name, parts in by_name.items()}
        self.segments = tuple(segment for parts in self._by_name.values() for segment in parts)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        example: "Example | None" = None,
        trace: bool | None = None,
        overrides: Mapping[str, Override] | None = None,
        strict: bool = False,
        include_frozen: bool = False,
    ) -> "BlockMap":
        """The map of a model: by its family where that is known, by dataflow where it is not, `overrides` above both.

        Where names and dataflow both speak they must agree. What neither explains has the role `other`.

        Args:
            model: any module, on any device, wrapped or not. It is left as it was.
            example: a tiny batch for its forward, a tensor, a tuple or a mapping; made up where that is possible.
            trace: whether to see what the model computes (`sharpwise.blocks.trace`). None: with an `example`, where
                names do not suffice, or to check them (of a large model on one layer of each kind); a model that cannot
                be run is mapped by names alone.
            overrides: by glob on canonical names (case counts, the last match wins): a role such as `"up"`, which keeps
                dimension, layer and heads that the family found; or the fields of a Segment, as
                `{"role": "q", "heads": 12}`; or a list of these that together cover the parameter.
            strict: raise where nothing explains a parameter, instead of listing it in one line of the log.
            include_frozen: also parameters that require no gradient; their segments are marked `frozen`.

        Raises:
            ValueError: names and dataflow disagree; an override matches nothing or is not one; a trace that was asked
                for cannot be made; or with `strict` a parameter has no known role.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"BlockMap.of: got {kind_of(model)}, expected a torch.nn.Module; "
                "for named parameters without a model there is BlockMap.unknown(named)"
            )
        found = cls.of_sources(Sources.of(model, example, trace, include_frozen), overrides=overrides, strict=strict)
        named = model.named_parameters() if include_frozen else ()
        frozen = {canonical_name(name) for name, parameter in named if not parameter.requires_grad}
        if not frozen:
            return found
        result = cls(replace(s, frozen=s.name in frozen) for s in found)
        result.problem = found.problem
        return result

    @classmethod
    def of_sources(
        cls, sources: Sources, *, overrides: Mapping[str, Override] | None = None, strict: bool = False
    ) -> "BlockMap":
        """The map that `of` makes, where what names and dataflow say is there already."""
        found = sources.resolve(overrides)
        sources.check(except_for=[name for name, parts in found.items() if parts[0].source == "override"])
        result = cls(segment for parts in found.values() for segment in parts)
        result.problem = sources.problem
        result._report(strict, sources.families.modules)
        return result

    @classmethod
    def unknown(cls, named: Iterable[tuple[str, Tensor]]) -> "BlockMap":
        """The map of tensors of which only names are known: all `other`."""
        return cls(_unexplained(canonical_name(name), tuple(tensor.shape)) for name, tensor in named)

    @property
    def unexplained(self) -> tuple[str, ...]:
        """Parameters that no source explains."""
        return tuple(name for name, parts in self._by_name.items() if not parts[0].source)

    def names(self) -> tuple[str, ...]:
        """Canonical names of the parameters, in order."""
        return tuple(self._by_name)

    def subset(self, names: Iterable[str]) -> "BlockMap":
        """The map of these parameters alone, in the order of this map. Raises KeyError for a name that is not here."""
        wanted = set(names)
        for name in wanted:
            self[name]
        return BlockMap(segment for segment in self.segments if segment.name in wanted)

    def table(self) -> Table:
        """One row per segment: name, shape, role, type, layer, rows, heads, source."""
        columns = ("name", "shape", "role", "type", "layer", "rows", "heads", "source")
        return Table(
            columns,
            [
                (
                    s.name,
                    s.describe_shape(),
                    str(s.role),
                    str(s.block_type),
                    s.layer,
                    s.describe_rows(),
                    s.heads,
                    s.source or None,
                )
                for s in self.segments
            ],
        )

    def to_json(self) -> str:
        """JSON text, one segment per line; what has its default value is left out."""
        lines = [json.dumps(_plain(segment), separators=(",", ":")) for segment in self.segments]
        return f'{{"version":{VERSION},"segments":[\n' + ",\n".join(lines) + "\n]}\n"

    @classmethod
    def from_json(cls, text: str) -> "BlockMap":
        """The map that `to_json` wrote. Raises ValueError where the text is not such a map."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ValueError(f"block map: not JSON ({error}); expected what BlockMap.to_json() writes") from None
        if not isinstance(data, dict) or "version" not in data:
            raise ValueError("block map: expected an object with 'version' and 'segments', as to_json() writes")
        if data["version"] != VERSION:
            raise ValueError(
                f"block map: version {data['version']!r}, this sharpwise reads version {VERSION}; build the map anew"
            )
        if not isinstance(data.get("segments"), list):
            raise ValueError(f"block map: 'segments' is {data.get('segments')!r}, expected a list")
        return cls(_from_plain(item, i) for i, item in enumerate(data["segments"]))

    def save(self, path: str | Path) -> None:
        """Write `to_json()` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "BlockMap":
        """Read a file that `save` wrote. Raises ValueError naming the file where it is not one."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __getitem__(self, name: str) -> tuple[Segment, ...]:
        try:
            return self._by_name[name]
        except KeyError:
            close = difflib.get_close_matches(str(name), self._by_name, n=3)
            hint = f"; closest: {', '.join(close)}" if close else ""
            raise KeyError(f"no parameter {name!r} in this block map of {len(self._by_name)}{hint}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    def __eq__(self, other: object) -> bool:
        return self.segments == other.segments if isinstance(other, BlockMap) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.segments)

    def __repr__(self) -> str:
        roles = ", ".join(dict.fromkeys(str(segment.role) for segment in self.segments))
        return f"BlockMap({len(self._by_name)} parameters, {len(self.segments)} segments: {roles})"

    def _report(self, strict: bool, modules: Mapping[str, nn.Module]) -> None:
        unexplained = self.unexplained
        if not unexplained:
            return
        listed = ", ".join(collapse(unexplained)) + (f" ({self.problem})" if self.problem else "")
        give = "; BlockMap.of(model, example=batch) takes a batch of yours" if self.problem else ""
        if strict:
            problem = f"{len(unexplained)} parameters have no known role: {listed}"
            raise Unclear(problem, *example_of(self.segments, modules))
        logger.info("%d of %d parameters have no known role: %s%s", len(unexplained), len(self._by_name), listed, give)


Blocks = BlockMap | Mapping[str, Override] | None
"""What functions take as `blocks=`: a map, overrides by name or glob, or nothing."""


def blocks_for(model: nn.Module, blocks: Blocks, who: str, *, include_frozen: bool = False) -> BlockMap:
    """What a function that takes `blocks=` works on: the map given, or that of the model, with these overrides.

    Raises:
        TypeError, ValueError: as `BlockMap.of`, in the words of such a function, beginning with `who`.
    """
    given: object = model
    if not isinstance(given, nn.Module):
        raise TypeError(f"{who}: got {kind_of(given)}, expected a torch.nn.Module")
    if isinstance(blocks, BlockMap):
        return blocks
    if not isinstance(blocks, Mapping | None):
        raise TypeError(
            f"{who}: blocks must be a BlockMap, or roles by name or glob such as {{'*.fc.weight': 'up'}}, got "
            f"{kind_of(blocks)}"
        )
    try:
        return BlockMap.of(model, overrides=blocks, include_frozen=include_frozen)
    except Unclear as error:
        raise error.by(BLOCKS, who) from None
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{who}: {error}") from None


def map_for_elements(model: nn.Module, who: str) -> BlockMap:
    """The map for a rule that moves every element by itself at one rate: there is one for every model.

    Roles are there to be shown. Where they are not clear, and of parameters whose output dimension is neither the first
    nor the last, all is `other`.
    """
    try:
        found = blocks_for(model, None, who, include_frozen=True)
    except Exception as error:  # whatever it is, the roles are not needed
        logger.info("%s: goes without the roles of this model, which are not clear: %s", who, error)
        return BlockMap.unknown(model.named_parameters())
    inner = {s.name for s in found if s.first_dim not in (1 if s.stacked else 0, len(s.shape) - 1)}
    if not inner:
        return found
    plain = {name: Segment(name=name, shape=found[name][0].shape, source="trace") for name in inner}
    result = BlockMap(s for name in found.names() for s in ([plain[name]] if name in inner else found[name]))
    result.problem = found.problem
    return result


def _unexplained(name: str, shape: tuple[int, ...]) -> Segment:
    return Segment(name=name, shape=shape, bias=len(shape) == 1 and name.rpartition(".")[2] == "bias")


def _check_partition(name: str, parts: list[Segment]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.geometry != first.geometry:
            raise ValueError(
                f"{name}: segments disagree: shape {first.shape} dim={first.dim} stacked={first.stacked} "
                f"merged={first.merged}, and shape {part.shape} dim={part.dim} stacked={part.stacked} "
                f"merged={part.merged}"
            )
        if bool(part.source) != bool(first.source):
            raise ValueError(f"{name}: some of its segments have a source and some do not; explain all or none")
    ranges = sorted(r for part in parts for r in _ranges(part))
    end = 0
    for begin, stop in [*ranges, (first.output_size, first.output_size)]:
        if begin > end:
            raise ValueError(f"{name}: rows {end}:{begin} of {first.output_size} belong to no segment; cover every row")
        if begin < end:
            raise ValueError(f"{name}: rows {begin}:{min(end, stop)} belong to two segments; each needs exactly one")
        end = stop


def _ranges(segment: Segment) -> list[tuple[int, int]]:
    if not segment.rows:
        return []
    if segment.stride == segment.length:
        return [(segment.start, segment.start + segment.rows)]
    begins = (segment.start + i * segment.stride for i in range(segment.count))
    return [(begin, begin + segment.length) for begin in begins]


def _plain(segment: Segment) -> dict[str, Any]:
    plain = {"name": segment.name, "shape": list(segment.shape)}
    for field, default in _DEFAULTS.items():
        value = getattr(segment, field)
        implied = {"length": segment.output_size, "stride": segment.length}.get(field, default)
        if value != implied:
            plain[field] = list(value) if isinstance(value, tuple) else value
    return plain


def _from_plain(item: Any, index: int) -> Segment:
    what = f"block map: segment {index}"
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise ValueError(f"{what}: got {item!r}, expected an object with a name")
    what += f" ({item['name']})"
    values = dict(item)
    shape = values.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{what}: shape {shape!r} is not a list of sizes")
    tied = values.setdefault("tied", [])
    if not isinstance(tied, list) or not all(isinstance(n, str) for n in tied):
        raise ValueError(f"{what}: tied {tied!r} is not a list of names")
    if not isinstance(values.setdefault("source", ""), str):
        raise ValueError(f"{what}: source {values['source']!r} is not a string")
    if not isinstance(values.setdefault("frozen", False), bool):
        raise ValueError(f"{what}: frozen {values['frozen']!r} is not true or false")
    known = {key: values.pop(key) for key in ("name", "source", "frozen")}
    known |= {"shape": tuple(values.pop("shape")), "tied": tuple(values.pop("tied"))}
    _overrides.check_fields(values, what)
    role = as_role(values.pop("role", Role.OTHER), what)
    try:
        return Segment(role=role, **known, **values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
