"""The two independent sources of knowledge about a model, names and dataflow, side by side."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from torch import nn
from torch.nn.parameter import UninitializedParameter

from sharpwise.blocks.families import Families
from sharpwise.blocks.names import canonical_name
from sharpwise.blocks.overrides import Override, apply
from sharpwise.blocks.roles import Role
from sharpwise.blocks.segment import Segment
from sharpwise.blocks.unclear import Unclear

if TYPE_CHECKING:
    from sharpwise.blocks.trace import Example, Traced

logger = logging.getLogger("sharpwise.blocks")

CHEAP = 100
"""Up to this many tensors, ten layers or so, a model that is known by name is traced without being asked, once per
class and config; of a larger one a layer of each kind."""
_verified: set[int] = set()

Standing = Literal["agree", "differ", "names", "dataflow", "neither"]


@dataclass
class Sources:
    """What names and dataflow say about the parameters of a model that have blocks.

    Attributes:
        shapes: by canonical name the shape, in the order of the model; tied: its other names; frozen: all names of
            parameters that are left out because they require no gradient.
        by_name: by canonical name the segments of a family, `None` where no family knows the parameter.
        traced: what a trace saw, None if there was none; problem: why there was none.
        families: what the names were read with.
    """

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, list[str]]
    frozen: list[str]
    by_name: dict[str, list[Segment] | None]
    families: Families
    traced: "Traced | None" = None
    problem: str = ""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: "Example | None" = None,
        ask: bool | None = None,
        include_frozen: bool = False,
    ) -> "Sources":
        """Ask the families about the parameters of a model, and trace if that is asked for, needed or cheap.

        Args:
            ask: trace or not; None: with an example, where names do not suffice, or to check them.

        Raises:
            ValueError: a trace that was asked for cannot be made, or a parameter has no shape or name of its own.
        """
        shapes, tied, frozen = _parameters(model, include_frozen)
        families = Families(model)
        by_name = {name: _named(families, name, tied[name], shape) for name, shape in shapes.items()}
        found = cls(shapes, tied, frozen, by_name, families)
        if ask is False:
            return found
        complete = all(by_name.values())
        key = _built_alike(model, shapes)
        if ask is None and example is None and complete:
            if key in _verified or _hooked(model):
                return found
            if len(shapes) > CHEAP and found._agrees_by_kind(model):
                if key is not None:
                    _verified.add(key)
                return found
        from sharpwise.blocks.trace import trace  # not needed for what names explain

        try:
            found.traced = trace(model, example)
        except Exception as error:  # a model that was not asked to run may fail as it likes
            if ask or example is not None:
                raise
            found.problem = getattr(error, "problem", str(error))
        if found.traced is not None and not found.traced.attentions and (ask or example is not None):
            logger.warning(
                "%s computes no attention with this input (no softmax between two products, none of torch's functions "
                "for it): dataflow finds no q, k, v or o",
                type(model).__name__,
            )
        if complete and key is not None and found.traced is not None and not found.differences():
            _verified.add(key)  # what differs is an error the second time too
        return found

    def _agrees_by_kind(self, model: nn.Module) -> bool:
        """Whether a model with one layer of each kind does what names say; no proof that the whole one does not."""
        from sharpwise.blocks.trace import one_of_each_kind, trace

        names = {id(parameter): canonical_name(name) for name, parameter in model.named_parameters()}
        try:
            small = one_of_each_kind(model)
            if small is None:
                return False
            segments = trace(small).segments
        except Exception:  # a forward that counts its layers
            return False
        return not self.differences(
            {names[id(parameter)]: segments[canonical_name(name)] for name, parameter in small.named_parameters()}
        )

    def resolve(self, overrides: Mapping[str, Override] | None = None) -> dict[str, list[Segment]]:
        """What each parameter is: by name where a family knows it, else by dataflow, else `other` without a source.

        `overrides` stand above all of these. Raises ValueError where one matches nothing or is not one.
        """
        found = {name: self._segments(name, shape) for name, shape in self.shapes.items()}
        if overrides:
            apply(found, overrides, self.frozen)
        return found

    def seen(self, name: str) -> list[Segment] | None:
        """What dataflow says about a parameter; None where it says nothing: no trace, not used, or no role found."""
        return _with_roles(self.traced.segments.get(name) if self.traced is not None else None)

    def differences(
        self, segments: Mapping[str, list[Segment]] | None = None
    ) -> dict[str, tuple[list[Segment], list[Segment]]]:
        """Parameters of which names and dataflow (or these segments) say different things: by name, by dataflow."""
        found = {}
        for name, named in self.by_name.items():
            seen = self.seen(name) if segments is None else _with_roles(segments.get(name))
            if named is not None and seen is not None and not agree(named, seen):
                found[name] = (named, seen)
        return found

    def standing(self) -> dict[Standing, list[str]]:
        """The parameters by who knows them: both (they `agree` or `differ`), `names` or `dataflow` alone, `neither`."""
        differences = self.differences()
        found: dict[Standing, list[str]] = {standing: [] for standing in get_args(Standing)}
        for name, named in self.by_name.items():
            if name in differences:
                found["differ"].append(name)
            elif self.seen(name):
                found["agree" if named else "dataflow"].append(name)
            else:
                found["names" if named else "neither"].append(name)
        return found

    def check(self, except_for: Iterable[str] = ()) -> None:
        """Raise Unclear where names and dataflow disagree, and show both sides."""
        left_out = set(except_for)
        found = {name: pair for name, pair in self.differences().items() if name not in left_out}
        if found:
            shown = "\n".join(
                f"  {name}: by name ({named[0].source}) {describe(named, seen)}; by dataflow {describe(seen, named)}"
                for name, (named, seen) in list(found.items())[:5]
            )
            more = f"\n  and {len(found) - 5} more" if len(found) > 5 else ""
            name, (named, _) = next(iter(found.items()))
            problem = f"names and dataflow disagree about {len(found)} parameters:\n{shown}{more}"
            raise Unclear(problem, name, str(named[0].role), "choose")

    def _segments(self, name: str, shape: tuple[int, ...]) -> list[Segment]:
        parts = self.by_name[name]
        if parts is None and self.traced is not None and name not in self.traced.unused:
            parts = self.traced.segments.get(name)
        if parts is None:
            dim = self.families.output_dim(name, shape)
            bias = len(shape) == 1 and name.rpartition(".")[2] == "bias"
            parts = [Segment(name=name, shape=shape, dim=dim, bias=bias)]
        return [replace(part, tied=tuple(self.tied[name])) for part in parts]


def agree(named: list[Segment], seen: list[Segment]) -> bool:
    """Whether two descriptions of a parameter fit: same role in every row, same heads where both know them.

    `other` means no evidence, and fits everything; so does `conv`, which says what a matrix does and not what for.
    """
    if [_bare(part) for part in named] == [_bare(part) for part in seen]:
        return True  # row by row a large vocabulary takes its time
    seen = [replace(part, role=Role.OTHER) if part.role is Role.CONV else part for part in seen]
    a, b = _by_row(named), _by_row(seen)
    if named[0].bias != seen[0].bias and Role.OTHER not in (named[0].role, seen[0].role):
        return False
    if named[0].geometry != seen[0].geometry:
        # Nothing is cut by rows where all of them are alike.
        return len({*a, *b} - {(Role.OTHER, None)}) <= 1 and named[0].shape == seen[0].shape
    return all(
        Role.OTHER in (x[0], y[0]) or (x[0] == y[0] and (x[1] == y[1] or None in (x[1], y[1])))
        for x, y in zip(a, b, strict=True)
    )


def describe(parts: list[Segment], other: list[Segment] | None = None) -> str:
    """Segments in words: `q 0:768 (12 heads), k 768:1536 (12 heads)`; with `other`, also what else differs from it."""
    return ", ".join(in_words(parts, other))


def in_words(parts: list[Segment], other: list[Segment] | None = None) -> list[str]:
    """The same one by one."""
    first, than = parts[0], parts[0] if other is None else other[0]
    words = [f"{s.role} {s.describe_rows()}{'' if s.heads is None else f' ({s.heads} heads)'}" for s in parts]
    if (first.dim, first.merged) != (than.dim, than.merged):
        words.append(first.describe_dims())
    if first.stacked != than.stacked:
        words.append(f"{first.copies} stacked copies" if first.stacked else "not stacked")
    if first.bias != than.bias:
        words.append("a bias" if first.bias else "not a bias")
    return words


def _with_roles(parts: list[Segment] | None) -> list[Segment] | None:
    return parts if parts and any(part.role is not Role.OTHER for part in parts) else None


def _bare(part: Segment) -> Segment:
    return replace(part, layer=None, source="", tied=())


def _by_row(parts: list[Segment]) -> list[tuple[Role, int | None]]:
    rows: list[tuple[Role, int | None]] = [(Role.OTHER, None)] * parts[0].output_size
    for part in parts:
        for row in part.row_index().tolist():
            rows[row] = (part.role, part.heads)
    return rows


def _parameters(
    model: nn.Module, include_frozen: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[str]], list[str]]:
    """Of the parameters that have blocks the shapes and other names, by canonical name; and all names of the frozen."""
    names: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        _, known = names.setdefault(id(parameter), (parameter, []))
        if (canonical := canonical_name(name)) not in known:
            known.append(canonical)
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, list[str]] = {}
    frozen: list[str] = []
    for parameter, (name, *others) in names.values():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name}: a lazy parameter has no shape yet; run the model once on a batch, before this")
        if not (parameter.requires_grad or include_frozen):
            frozen += [name, *others]
            continue
        if name in shapes:
            raise ValueError(
                f"two parameters are called {name!r} once wrapper prefixes are off; rename one of the modules"
            )
        shapes[name], tied[name] = tuple(parameter.shape), others
    return shapes, tied, frozen


def _built_alike(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """What models share of which one trace speaks for all: classes, config and shapes. None where that is not all."""
    config = getattr(model, "config", None)
    if config is None or any("forward" in vars(module) for module in model.modules()):
        return None
    return hash((tuple(type(module).__qualname__ for module in model.modules()), tuple(shapes.items()), repr(config)))


def _hooked(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _named(families: Families, name: str, tied: list[str], shape: tuple[int, ...]) -> list[Segment] | None:
    """What the families say about a tensor under any of its names; a tied embedding counts as one, not as the head."""
    answers = [parts for n in (name, *tied) if (parts := families.segments(n, shape))]
    if not answers:
        return None
    parts = next((parts for parts in answers if parts[0].role is Role.TOK_EMB), answers[0])
    return [replace(part, name=name) for part in parts]
