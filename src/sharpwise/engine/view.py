"""A parameter as the engine sees it: as one view or several, each of segments that one rule moves."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharpwise.blocks import Cut, Segment
from sharpwise.controls.base import Over
from sharpwise.engine.layout import Layout, Layouts, Rectangle, rectangles
from sharpwise.engine.stored import ABSMAX, Line, Stored, compute_dtype
from sharpwise.rules.base import Kind, Rule
from sharpwise.shards import Shard, local
from sharpwise.storage import FP32, Dense, Format

T = TypeVar("T")
HELD = "held_norm"
"""The state of a control that holds norms: one number per unit, 0 where there is none yet."""
SNR = "gradient_snr"
"""The state of a control that reads the gradient SNR: of each matrix signal, noise and weight of the momentum, fp64."""
CUT_OF: dict[Over, Cut] = {"row": "row", "matrix": "tensor"}
"""Units are blocks."""


@dataclass(eq=False)
class ParamView:
    """Segments of one parameter that share rule, hyperparameters and formats, seen as rows.

    Attributes:
        numbers: of its segments among those of the parameter.
        part: what it is of the parameter, by roles; "" if it is all of it.
        shape: of the view of what is held here; `dim` is the dimension summed over, so that rows remain.
        row_shape: what a vector with one number per row is shaped to, to broadcast against the view.
        multipliers: of the learning rate, one per segment; decays: whether weight decay applies, likewise.
        varies: whether multipliers change while training, each on its own.
        rowless: whether its output dimension lies in the middle, and its first dimension stands for it.
        unit: what a control bounds of it; None without. holds: whether the norms of these are state. has_snr: whether
            it reads the gradient SNR of its matrices.
        formats: of element state, by name; own: its state by the names of the rule; `step` among it.
        kept: what back ends keep of it.
        origin: the view that it is a stage of, by whose scalars it moves; else itself.
    """

    name: str
    param: Tensor
    group: dict[str, Any]
    segments: tuple[Segment, ...]
    rule: Rule
    cuts: tuple[Cut, ...]
    shard: Shard
    layout: Layout = field(default_factory=Layout)
    numbers: tuple[int, ...] = (0,)
    part: str = ""
    whole_shape: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    dim: int = 1
    row_shape: tuple[int, ...] = ()
    multipliers: tuple[float, ...] = (1.0,)
    varies: bool = False
    decays: tuple[bool, ...] = (True,)
    rowless: bool = False
    unit: Over | None = None
    holds: bool = False
    has_snr: bool = False
    formats: Mapping[str, Format] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)
    siblings: "tuple[ParamView, ...]" = ()
    kept: dict[Any, Any] = field(default_factory=dict)
    origin: "ParamView" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.origin = self

    # -- what it is ------------------------------------------------------------------------------------------------

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Hyperparameters of its rule, lr and weight decay among them, as they are at any time."""
        return self.origin.rule.settings(self.group)

    def stage(self, **changes: Any) -> "ParamView":
        """The same elements with another parameter or rule, which are moved in its step and by its scalars."""
        found = replace(self, **changes, kept={})
        found.origin = self.origin
        return found

    @property
    def full_name(self) -> str:
        """The name of the parameter, with the part if it is one."""
        return f"{self.name}.{self.part}" if self.part else self.name

    def of_segments(self, values: Sequence[T]) -> tuple[T, ...]:
        """Of one value per segment of the parameter, those of its own."""
        return tuple(values[i] for i in self.numbers)

    @cached_property
    def joint(self) -> tuple[Any, ...]:
        """By what its blocks are known that span parameters, one after the other; () where none does."""
        keys = [s.joint(c) for s, c in zip(self.segments, self.cuts, strict=True)] if self.rule.has_blocks else []
        return tuple(k or (self.name, i) for i, k in zip(self.numbers, keys, strict=True)) if any(keys) else ()

    @property
    def summed_apart(self) -> bool:
        """Whether sums over its blocks take those of other processes or views."""
        return bool(self.shard.cut or self.joint)

    @property
    def n_blocks(self) -> int:
        """Blocks of the whole parameter, 0 for an element-wise rule."""
        return sum(s.blocks(c) for s, c in zip(self.segments, self.cuts, strict=True)) if self.rule.has_blocks else 0

    def units_of(self, segment: Segment) -> int:
        """How many units of a control a segment has."""
        return 0 if self.unit is None else segment.blocks(CUT_OF[self.unit])

    @property
    def n_matrices(self) -> int:
        """Of the whole parameter: each expert of a stack is one, and each segment."""
        return sum(segment.copies for segment in self.segments)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of the arithmetic."""
        return compute_dtype(self.param.dtype)

    @cached_property
    def device(self) -> torch.device:
        """Where the parameter is."""
        return local(self.param).device

    @cached_property
    def numel(self) -> int:
        """Elements that are held here."""
        return math.prod(self.shape)

    @property
    def key(self) -> int:
        """A number of the parameter's name, for stochastic rounding."""
        return zlib.crc32(self.name.encode())

    @property
    def uniform(self) -> bool:
        """Whether all rows always have the same multiplier, and decay alike."""
        alike = not self.varies and len(set(zip(self.multipliers, self.decays, strict=True))) == 1
        return len(self.segments) == 1 or alike

    @cached_property
    def is_matrix(self) -> bool:
        """Whether its rows are those of matrices, and no numbers of norms and biases."""
        return all(segment.is_matrix for segment in self.segments)

    @cached_property
    def by_row(self) -> bool:
        """Whether its rows are the rows of a matrix; else they are its columns, or those of stacked matrices."""
        return self.dim == 1 and len(self.shape) == 2

    @cached_property
    def cuts_rows(self) -> bool:
        """Whether a mesh cuts its rows: a row has parts in several processes."""
        first = self.segments[0]
        lines = {*range(first.first_dim, first.dim + 1), *([0] if first.stacked else [])}
        return any(self.shard.placements[d].dim not in lines for d in self.shard.cut)

    @cached_property
    def copied(self) -> bool:
        """Whether its rows are copies, which have to be written back: scattered rows, or those of a parameter or of
        state that is not contiguous."""
        if isinstance(self.layout.rows, Tensor):
            return True
        return not all(local(tensor).is_contiguous() for tensor in (self.param, *self.elements.values()))

    @cached_property
    def contiguous(self) -> bool:
        """Whether its rows lie one after the other in the parameter."""
        rows = self.layout.rows
        if isinstance(rows, Tensor) or not local(self.param).is_contiguous():
            return False
        return rows is None or self.by_row

    @cached_property
    def rectangles(self) -> list[Rectangle]:
        """Its rows as rectangles of memory."""
        if not self.numel:
            return []
        return rectangles(self.layout, self.whole_shape, self.by_row, self.rule.has_blocks, bool(self.shard.cut))

    # -- state -----------------------------------------------------------------------------------------------------

    def state_key(self, name: str) -> str:
        """Under which key of `optimizer.state` the state `name` is: with the part, unless it is of the parameter."""
        of = name.removesuffix(ABSMAX)
        common = all(view.rule.all_state.get(of) == "element" for view in self.siblings or (self,))
        common |= self.rows_cut and self.rule.all_state.get(of) == "element"
        return name if not self.part or name == "step" or common else f"{name}.{self.part}"

    @cached_property
    def rows_cut(self) -> bool:
        """Whether a mesh cuts it so that its rows alone are no tensor cut alike: its element state is then as large as
        the parameter, of which it uses its rows."""
        cut = {self.shard.placements[d].dim for d in self.shard.cut}
        return bool(cut) and (self.by_row or self.param.ndim - 1 in cut)

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Of state that is of the view alone, in all processes together."""
        return (*self.param.shape[:-1], self.shape[-1]) if self.shard.cut else self.shape

    def kinds(self, variants: bool = False) -> dict[str, str]:
        """Names of its state tensors: those of the rule, "absmax" for the blocks of a format, "unit" for norms held,
        "matrix" for gradient SNR.

        Args:
            variants: also of state that the rule keeps under other hyperparameters.
        """
        found: dict[str, str] = dict(self.rule.all_state if variants else self.rule.state)
        blocked = [name for name, format in self.formats.items() if format.block and name in found]
        found |= {HELD: "unit"} if self.unit and self.holds else {}
        found |= {SNR: "matrix"} if self.has_snr else {}
        return found | {name + ABSMAX: "absmax" for name in blocked}

    def line(self, name: str) -> Line:
        """The lines of one of its tensors of element state."""
        if self.state_key(name) != name:
            return Line(len(self.shape) - 1, 0, self.shape[-1], self.shape[-1])
        first = self.segments[0]
        lead = first.dim + 1 if first.merged else min(2 if first.stacked else 1, self.param.ndim)
        whole, here = self.shard.shape[lead:], tuple(local(self.param).shape)[lead:]
        begin = 0
        for size, offset in zip(whole, self.shard.offset[lead:], strict=True):
            begin = begin * size + offset
        return Line(lead, begin, math.prod(here), math.prod(whole))

    @cached_property
    def cut_blocks(self) -> list[str]:
        """Names of its state with blocks that lie in several processes."""
        lines = {name: self.line(name) for name, format in self.formats.items() if format.block}
        return [name for name, line in lines.items() if line.columns < line.length]

    def attach(self, held: Mapping[str, Tensor]) -> None:
        """Take its state from that of the parameter: the rule's, and `step`."""
        self.own = {name: held[self.state_key(name)] for name in ("step", *self.kinds())}
        for kept in ("copied", "elements", "blocks", "_stored"):
            self.__dict__.pop(kept, None)

    def state_of(self, kind: Kind) -> dict[str, Tensor]:
        """Its state of a kind by name."""
        return {name: self.own[name] for name, own in self.rule.state.items() if own == kind}

    @cached_property
    def elements(self) -> dict[str, Tensor]:
        """Codes of element state by name, as they lie in the state of the parameter."""
        return self.state_of("element")

    @cached_property
    def blocks(self) -> dict[str, Tensor]:
        """Block state by name [n_blocks]."""
        return self.state_of("block")

    @cached_property
    def _stored(self) -> list[Stored]:
        return [self.stored_as(name) for name in self.elements]

    def stored_as(self, name: str) -> Stored:
        """One of its tensors of element state, as rows. What is dense is of its own type: users may have put it so."""
        codes, format = self.rows_of(self.own[name], name), self.formats.get(name, FP32)
        if not format.block:
            return Stored.dense(codes) if isinstance(format, Dense) else Stored(format, codes)
        return Stored(format, codes, self.rows_of(self.own[name + ABSMAX], name + ABSMAX), self.line(name).begin)

    def stored(self) -> list[Stored]:
        """Element state as rows; copies where `copied`."""
        if self.copied:
            self.__dict__.pop("_stored", None)
        return self._stored

    # -- rows ------------------------------------------------------------------------------------------------------

    def rows_of(self, tensor: Tensor, name: str = "") -> Tensor:
        """Its part of a tensor of the parameter's shape, or of its own state `name`, as rows."""
        plain = local(tensor)
        plain = plain if plain.is_contiguous() else plain.contiguous()
        alone, rows = bool(name) and self.state_key(name) != name, self.layout.rows
        whole = self._seen(plain, self.shape if alone else self.whole_shape, name)
        return whole if alone or rows is None else whole[rows] if self.by_row else whole[..., rows]

    def _seen(self, plain: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
        """A tensor in the shape of the view, but for its last dimension where it is of blocks."""
        shape = (*shape[:-1], plain.shape[-1]) if name.endswith(ABSMAX) else shape
        return plain if plain.shape == shape else plain.view(shape)

    def parameter(self) -> Tensor:
        """The parameter as rows: a view, or a copy where `copied`."""
        return self.rows_of(self.param)

    def write_back(self, p: Tensor, stored: Sequence[Stored]) -> None:
        """Write copies back; nothing to do where rows are views."""
        if not self.copied:
            return
        pairs = [("", self.param, p)]
        for name, held in zip(self.elements, stored, strict=True):
            names = (name, name + ABSMAX)[: len(held.parts)]
            pairs += [(own, self.own[own], rows) for own, rows in zip(names, held.parts, strict=True)]
        for name, tensor, rows in pairs:
            target = local(tensor)
            if (name and self.state_key(name) != name) or self.layout.rows is None:
                target.copy_(rows.view(target.shape))
            else:
                self.put_rows(target, rows, name)

    def put_rows(self, target: Tensor, rows: Tensor, name: str = "") -> None:
        """Write its rows into a plain tensor that lies as the parameter does, or as its state `name`."""
        whole = self._seen(target.contiguous(), self.whole_shape, name)
        if self.by_row:
            whole[self.layout.rows] = rows
        else:
            whole[..., self.layout.rows] = rows
        if whole.data_ptr() != target.data_ptr():
            target.copy_(whole.view(target.shape))

    def spread(self, blocks: Tensor) -> Tensor:
        """One number per block -> one per row, shaped to broadcast."""
        rows = blocks if self.layout.block_of_row is None else blocks[self.layout.block_of_row]
        return rows.view(self.row_shape)

    def gather(self, rows: Tensor) -> Tensor:
        """Sums per row [rows] -> sums per block [n_blocks], rows elsewhere counted as 0."""
        return self.layout.gather(rows)

    def by_unit(self, over: Over, layouts: Layouts) -> Layout:
        """Its rows by the units of a control, which are as blocks are."""
        if ("units", over) not in self.kept:
            cuts, held = (CUT_OF[over],) * len(self.segments), tuple(local(self.param).shape)
            self.kept["units", over] = layouts.of(self.segments, cuts, not self.part, held, self.shard, self.device)
        found: Layout = self.kept["units", over]
        return found

    def element_index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Global element numbers as the sum of a part per row of the view and a part per column, int64."""
        shape, own = self.shard.shape, tuple(local(self.param).shape)
        leading = min(self.segments[0].dim + 1, len(own)) if self.by_row else len(own) - 1
        rows = torch.zeros(1, dtype=torch.int64, device=device)
        columns = rows
        for d, (size, offset) in enumerate(zip(own, self.shard.offset, strict=True)):
            part = (torch.arange(size, device=device) + offset) * math.prod(shape[d + 1 :])
            if d < leading:
                rows = (rows[:, None] + part).view(-1)
            else:
                columns = (columns[:, None] + part).view(-1)
        if self.layout.rows is not None:
            rows, columns = (rows[self.layout.rows], columns) if self.by_row else (rows, columns[self.layout.rows])
        return rows.view(*self.shape[:-1], 1), columns.view(*(1 for _ in self.shape[:-1]), -1)
