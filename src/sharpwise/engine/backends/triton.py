"""Our own kernels in Triton, for CUDA: all tensors of a kind move in one launch.

Kernels are printed from the arithmetic of a rule (`triton_print`) and find their tensors in tables (`triton_jobs`),
which are kept between steps: a step uploads the scalars, and the addresses of gradients where these changed.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from sharpwise.engine.backends import triton_bounds, triton_launch, triton_print
from sharpwise.engine.backends.base import Backend, Found, Prepared, Spec, built, say_once, tensors_refused
from sharpwise.engine.backends.triton_bounds import TILE, cells_of, is_bounded
from sharpwise.engine.backends.triton_jobs import (
    BLOCK,
    SHORT_TILE,
    TALL,
    WIDE,
    Place,
    coded_lines,
    in_pieces,
    pieces_of,
)
from sharpwise.engine.backends.triton_print import DeviceScalars, Formats, Printed
from sharpwise.engine.backends.triton_tables import Family, Tables
from sharpwise.engine.capture import cannot, capturing
from sharpwise.engine.layout import Layouts
from sharpwise.engine.rehearsal import live
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import HELD, ParamView
from sharpwise.shards import Shard
from sharpwise.storage import Dense

logger = logging.getLogger(__name__)


class Triton(Backend):
    """Kernels for lists of tensors."""

    name: ClassVar[str] = "triton"

    def __init__(self) -> None:
        self._printed: dict[Any, Printed | str] = {}
        self._scalars: dict[Any, DeviceScalars | None] = {}
        self._built: dict[Any, str] = {}
        self._captured: list[Tables] = []
        self._layouts = Layouts()
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def built(self) -> int:
        return sum(not reason for reason in self._built.values())

    # -- what it takes ---------------------------------------------------------------------------------------------

    def refuses(self, spec: Spec) -> str:
        view = spec.view
        if reason := triton_launch.refused(view.device):
            if view.device.type == "cuda":
                say_once(f"{reason}: steps on a GPU are slower without Triton")
            return reason
        if view.rule.reductions:
            return "the rule looks at whole matrices"
        if reason := tensors_refused(view, spec.grad, view.blocks.values()):
            return reason
        if reason := coded_lines(view).refused(view):
            return reason
        control = spec.options.control if is_bounded(spec) else None
        if control is not None and coded_lines(view).block:
            return "a control of state that is coded in blocks"
        if control is not None and view.unit and view.holds and view.origin.own[HELD].dtype != torch.float32:
            return "norms that are held are in fp32 alone"
        if not view.by_row and any(view.state_key(name) != name for name in view.elements):
            return "columns with state of their own"
        if spec.options.stochastic_rounding and any(view.shard.offset[1:]):
            return "stochastic rounding of a part that is cut within rows"
        key = view.rule, _formats(spec), not spec.options.decoupled, spec.options.cautious, control
        if key not in self._printed:
            self._printed[key] = built(partial(triton_print.kernels, *key))
        printed = self._printed[key]
        if isinstance(printed, str):
            return printed
        if control is not None:
            view.kept["cells"] = cells_of(view, self._layouts)
        if reason := self._build(spec, printed):
            return reason
        view.kept["triton", spec.grad], view.kept["printed", spec.grad] = spec, printed
        return ""

    def sums_blocks(self, spec: Spec) -> bool:
        return not spec.view.summed_apart

    def bounds(self, spec: Spec) -> bool:
        return spec.view.unit is not None and is_bounded(spec) and not spec.view.kept["cells"].given

    def one_pass(self, spec: Spec) -> bool:
        return super().one_pass(spec) and not is_bounded(spec)

    def _build(self, spec: Spec, printed: Printed) -> str:
        """Build what moves a view, aligned or not; why that failed, or ""."""
        view = spec.view
        wanted: set[tuple[str, Any]] = set()
        for aligned in (True, False):
            if is_bounded(spec):
                by_block = view.rule.has_blocks
                wanted |= {(printed.text, (*key, aligned)) for key in (("tiles", True), ("aim", by_block))}
                wanted.add((printed.text, ("bound", by_block)))
            else:
                pieces = pieces_of(view, Place(0, (), 0), view.rule.has_blocks and view.summed_apart)
                wanted |= {(printed.text, (*piece.kernel, aligned)) for piece in pieces}
            if spec.options.guarded or in_pieces(view):
                wanted.add((triton_print.squares(spec.grad, len(triton_print.FIELDS)), (spec.grad, aligned)))
        if in_pieces(view):
            wanted.add((printed.text, "phase"))
        for text, key in sorted(wanted, key=str):
            if (text, key) not in self._built:
                self._built[text, key] = built(partial(_compiled, text, key, printed.formats.granule, view.device))
            if self._built[text, key]:
                return self._built[text, key]
        return ""

    # -- the step --------------------------------------------------------------------------------------------------

    def prepare(
        self, views: Sequence[ParamView], grads: Sequence[Tensor], total: Sequence[bool], scalars: StepScalars
    ) -> Prepared:
        ready = views[0].kept["ready"] = self._tables_of(views, grads, total)
        totals: list[tuple[Shard, Tensor]] = []
        summed: set[int] = set()
        late: set[int] = set()
        for tables in ready:
            tables.addresses.write(tables.wanted)
            for (dtype, aligned), (chunks, n) in tables.sum_chunks.items():
                kernel = triton_print.module(triton_print.squares(dtype, len(triton_print.FIELDS))).squares
                _, constants = kernel_and_constants((dtype, aligned), 16 // dtype.itemsize)
                args = (tables.sum_jobs, chunks, tables.addresses.tensor, tables.partial)
                triton_launch.launch(kernel, n, args, constants, tables.device)
            totals.extend((shard, tables.partial[where]) for shard, where in tables.totals)
            summed.update(id(v) for v, own in zip(tables.views, tables.summed, strict=True) if own)
            for family in tables.families:
                own = [tables.views[i] for i in family.places]
                on_device = any(map(scalars.on_device, own))
                family.scalars = self._scalars_of(own[0], scalars, family.printed) if on_device else None
                if family.scalars is None and capturing():
                    raise cannot(f"the scalars of {own[0].rule.name!r} are worked out by torch")
                if family.scalars is not None:  # parts of blocks are moved on elsewhere, which takes their scalars
                    late.update(id(view) for view in own if not (view.rule.has_blocks and view.summed_apart))
        return Prepared(totals, summed, late)

    def guard(self, device: torch.device, max_norm: float | None, skips: bool) -> Any:
        return None if triton_launch.refused(device) else DeviceGuard(device, max_norm, skips)

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        for tables in views[0].kept.pop("ready"):
            tables.take(found)
            tables.write_scalars(scalars)
            clip, ok = self._control(tables.device, scalars, tables.views[0])
            for family in tables.families:
                module = triton_print.module(family.printed.text)
                common = tables.scalars, clip, ok
                for key, (chunks, n) in sorted(family.chunks.items(), key=lambda item: _place_of(item[0])):
                    name, constants = kernel_and_constants(key, family.printed.formats.granule)
                    read = {"phase": [tables.partial, tables.starts], "bound": [family.sums]}
                    args = [family.jobs, chunks, *read.get(name, [tables.addresses.tensor]), *common]
                    of_tiles = [tables.cells if family.printed.control else tables.rates]
                    more = {"aim": [tables.rates, family.sums], "bound": [tables.rates, tables.cells, tables.snr]}
                    more |= {"tiles": of_tiles, "lines": of_tiles, "phase": [tables.rates]}
                    triton_launch.launch(
                        getattr(module, name), n, [*args, *more.get(name, [])], constants, tables.device
                    )
            tables.release()

    def _tables_of(self, views: Sequence[ParamView], grads: Sequence[Tensor], summed: Sequence[bool]) -> list[Tables]:
        """Tables of views by device, kept by the first of them for the last alignments of their gradients."""
        places: dict[torch.device, list[int]] = {}
        for i, view in enumerate(views):
            places.setdefault(view.device, []).append(i)
        found = []
        for device, own in places.items():
            mine = [views[i] for i in own]
            given = [grads[i] if grads[i].is_contiguous() else grads[i].contiguous() for i in own]
            addresses = [g.data_ptr() for g in given]
            total = [summed[i] for i in own]
            kept: list[Tables] = mine[0].kept.setdefault("tables", [])
            tables = next((t for t in kept if t.serve(mine, given, addresses, total)), None)
            if tables is None:
                families: dict[Any, Family] = {}
                for i, (view, g) in enumerate(zip(mine, given, strict=True)):
                    printed = view.kept["printed", g.dtype]
                    key = printed.text, kind_of_scalars(view)
                    families.setdefault(key, Family(printed)).places.append(i)
                tables = Tables(mine, given, addresses, list(families.values()), total, device)
                kept[:] = [*kept[-3:], tables]
            tables.use(given, addresses)
            if capturing():  # a graph has its tables for itself: other steps would write other addresses to them
                if tables.inputs is None:
                    raise cannot("take a step with the same hyperparameters before the capture")
                kept.remove(tables)
                self._captured.append(tables)
            found.append(tables)
        return found

    def _scalars_of(self, view: ParamView, scalars: StepScalars, printed: Printed) -> DeviceScalars | None:
        """The kernel that works out a view's scalars on the device; None if these are worked out by torch."""
        key = kind_of_scalars(view), printed.scalars, printed.coupled
        if view.own["step"].dtype != torch.float32:
            return None
        if key not in self._scalars:
            try:
                names, hyper = printed.scalars, scalars.hyper(view)
                found = triton_print.scalars(view.rule, hyper, names, printed.coupled, view.origin.rule)
                kernel, types = triton_print.module(found.text).scalars_of_step, ARGUMENTS["scalars_of_step"]
                triton_launch.build(kernel, types, {}, view.device)
                self._scalars[key] = found
            except Exception as error:
                logger.debug("scalars of %s are worked out by torch: %s", view.rule.name, error)
                self._scalars[key] = None
        return self._scalars[key]

    def _control(self, device: torch.device, scalars: StepScalars, view: ParamView) -> tuple[Tensor, Tensor]:
        """The factor on gradients, fp64, and whether the step is taken, uint8: on the device."""
        if device not in self._constants:
            one = torch.ones(1, dtype=torch.float64, device=device)
            self._constants[device] = one, one.to(torch.uint8)
        one, yes = self._constants[device]
        clip, ok = scalars.clip_of(view), scalars.ok_of(view)
        clip = one if clip is None else clip if isinstance(clip, Tensor) else torch.full_like(one, clip)
        return clip.double(), yes if ok is True else ok.view(torch.uint8)


def _compiled(text: str, key: Any, granule: int, device: torch.device) -> str:
    """Build a kernel; "" as there is no reason against it."""
    name, constants = kernel_and_constants(key, granule)
    triton_launch.build(getattr(triton_print.module(text), name), ARGUMENTS[name], constants, device)
    return ""


@dataclass
class DeviceGuard:
    """What the norm means for a step, in one launch.

    Attributes:
        clip: the factor on the gradients, fp64; ok: whether the step is taken, bool; taken: that in fp32.
        skipped: how many were not, int64.
    """

    device: torch.device
    max_norm: float | None
    skips: bool

    def __post_init__(self) -> None:
        norm = 0.0 if self.max_norm is None else self.max_norm
        self.most = torch.tensor([norm], dtype=torch.float64, device="cpu").to(self.device)
        self.clip = torch.ones((), dtype=torch.float64, device=self.device)
        self.ok = torch.ones((), dtype=torch.bool, device=self.device)
        self.taken = torch.ones((), dtype=torch.float32, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self._constants = {"CLIPS": self.max_norm is not None, "SKIPS": self.skips}
        kernel = triton_print.module(triton_print.guard()).guard
        triton_launch.build(kernel, ARGUMENTS["guard"], self._constants, self.device)

    def __call__(self, total: Tensor) -> tuple[Any, Any]:
        """(whether to step, factor): of the sum of all squares."""
        kernel = triton_print.module(triton_print.guard()).guard
        args = (total, self.most, self.clip, self.ok.view(torch.uint8), self.taken, self.skipped)
        triton_launch.launch(kernel, 1, args, self._constants, self.device)
        clip = None if self.max_norm is None else self.clip
        return (self.ok if self.skips else True), clip


_I64, _I32, _F32, _F64, _U8 = torch.int64, torch.int32, torch.float32, torch.float64, torch.uint8
ARGUMENTS: dict[str, tuple[torch.dtype, ...]] = {
    "tiles": (_I64, _I32, _I64, _F32, _F64, _U8, _F32),
    "lines": (_I64, _I32, _I64, _F32, _F64, _U8, _F32),
    "rows": (_I64, _I32, _I64, _F32, _F64, _U8),
    "columns": (_I64, _I32, _I64, _F32, _F64, _U8),
    "phase": (_I64, _I32, _F64, _I32, _F32, _F64, _U8, _F32),
    "aim": (_I64, _I32, _I64, _F32, _F64, _U8, _F32, _F64),
    "bound": (_I64, _I32, _F64, _F32, _F64, _U8, _F32, _F32, _F64),
    "squares": (_I64, _I32, _I64, _F64),
    "scalars_of_step": (_F64, _I64, _F32),
    "guard": (_F64, _F64, _F64, _U8, _F32, _I64),
}
"""Types of what kernels are called with."""


REGISTERS = {(True, True): 72, (True, False): 160, (False, True): 64, (False, False): 96}
"""Of `rows`, by whether they are short and aligned. Left alone, ptxas spills 8 bytes of some to get by with fewer."""


def kernel_and_constants(key: Any, granule: int) -> tuple[str, dict[str, Any]]:
    """The name of a kernel, and its constants (and options), from what it is found by in `triton_jobs`."""
    if key == "phase":
        return "phase", {"BLOCK": BLOCK}
    if key[0] == "bound":
        return "bound", {"BY": key[1], **dict(zip("UW", triton_bounds.UNITS, strict=True))}
    name, *how, aligned = key if isinstance(key[0], str) else ("squares", key[1])
    own: dict[str, Any] = {"ALIGN": 16 if aligned else 1, "G": granule if aligned else 1}
    if name == "rows":
        per, block = SHORT_TILE if how[0] else (1, BLOCK)
        return name, {"PER": per, "BLOCK": block, **own, "maxnreg": REGISTERS[how[0], aligned]}
    if name == "columns":  # fewer rows, so fewer registers, where loads are many
        return name, {"BR": TALL, "BC": WIDE, **own, "maxnreg": 96} if aligned else {"BR": TALL // 2, "BC": WIDE, **own}
    if name == "lines":
        tile = max(BLOCK, how[1])
        warps = {"num_warps": triton_launch.WARPS * tile // BLOCK}  # so that threads keep as many elements
        return name, {"BY": how[0], "Q": how[1], "BLOCK": tile, **own, **warps}
    if name == "aim":
        return name, {"BY": how[0], "BR": TILE[0], "BC": TILE[1], **own}
    if name == "tiles":  # with fewer ptxas puts some of AdamW's on the stack, under a control and with bf16 weights
        own |= {"BY": how[0], "maxnreg": 120 if aligned else 160}
    return name, {"BLOCK": BLOCK, **own}


STAGES = ("phase", "aim", "bound")
"""Of the kernels of a family those that come before all others, in their order."""


def _place_of(key: Any) -> int:
    name = key if isinstance(key, str) else key[0]
    return STAGES.index(name) if name in STAGES else len(STAGES)


def kind_of_scalars(view: ParamView) -> Any:
    """Equal for views whose scalars are worked out alike, from other numbers."""
    rule = view.rule
    hyper = [live(view.group[name]) for name in rule.defaults if name in view.group]
    flags = tuple(len(v) if isinstance(v, tuple) else 0.0 if isinstance(v, (float, Tensor)) else v for v in hyper)
    own = tuple(getattr(rule, f.name) for f in fields(cast(Any, rule)) if f.name not in rule.hyperparameters)
    return type(rule), flags, own, view.own["step"].dtype, view.origin.rule if view.origin is not view else None


def _formats(spec: Spec) -> Formats:
    """How the tensors of a view rest in memory."""
    view = spec.view
    elements, blocks = tuple(t.format for t in view.stored()), tuple(Dense.of(t.dtype) for t in view.blocks.values())
    param, grad = Dense.of(view.param.dtype), Dense.of(spec.grad)
    return Formats(param, grad, elements, blocks, spec.options.stochastic_rounding)
