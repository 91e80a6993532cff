"""Our own kernels in Triton, for CUDA: all tensors of a kind move in one launch.

Kernels are printed from the arithmetic of a rule (`triton_print`) and find their tensors in tables (`triton_jobs`),
which are kept between steps: a step uploads the scalars, and the addresses of gradients where these changed.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from sharpwise.engine.backends import triton_launch, triton_print
from sharpwise.engine.backends.base import Backend, Found, Spec, Squares, format_refused
from sharpwise.engine.backends.triton_jobs import BLOCK, SHORT, SHORT_TILE, TALL, WIDE, in_pieces, kernel_of, runs_of
from sharpwise.engine.backends.triton_print import TYPES, DeviceScalars, Formats, Printed
from sharpwise.engine.backends.triton_tables import Family, Tables
from sharpwise.engine.options import Options
from sharpwise.engine.rehearsal import live
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import Rule
from sharpwise.shards import local

logger = logging.getLogger(__name__)


class Triton(Backend):
    """Kernels for lists of tensors."""

    name: ClassVar[str] = "triton"
    by_table: ClassVar[bool] = True

    def __init__(self) -> None:
        self.options = Options()
        self._printed: dict[Any, Printed | str] = {}
        self._scalars: dict[Any, DeviceScalars | None] = {}
        self._built: dict[Any, str] = {}
        self._tables: list[Tables] = []
        self._ready: list[Tables] = []
        self._warned = False
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def built(self) -> int:
        return sum(not reason for reason in self._built.values())

    # -- what it takes ---------------------------------------------------------------------------------------------

    def refuses(self, spec: Spec) -> str:
        view, self.options = spec.view, spec.options
        if reason := triton_launch.refused(view.device):
            if view.device.type == "cuda" and not self._warned:
                self._warned = True
                logger.warning("%s: steps on a GPU are slower without; pip install triton", reason)
            return reason
        if view.rule.reductions:
            return "the rule looks at whole matrices"
        if spec.controlled:
            return "a control: rows have decays of their own"
        if reason := format_refused(view) or _tensors_refused(spec):
            return reason
        printed = self._kernels(view.rule, formats_of(view, spec.grad, spec.options))
        if isinstance(printed, str):
            return printed
        return self._build(view, spec.grad, printed)

    def sums_blocks(self, spec: Spec) -> bool:
        return not spec.view.shard.cut

    def _kernels(self, rule: Rule, formats: Formats) -> Printed | str:
        """The kernels of a rule, or why there are none."""
        key = rule, formats
        if key not in self._printed:
            try:
                self._printed[key] = triton_print.kernels(
                    rule, formats, not self.options.decoupled, self.options.cautious
                )
            except Exception as error:  # arithmetic that cannot be traced, or has no words: there is another back end
                reason = str(error).split("\n")[0]
                self._printed[key] = reason if isinstance(error, NotImplementedError) else f"tracing failed: {reason}"
        return self._printed[key]

    def _build(self, view: ParamView, grad: torch.dtype, printed: Printed) -> str:
        """Build what moves a view, aligned or not; why that failed, or ""."""
        formats = formats_of(view, grad, self.options)
        runs = runs_of(view)
        wanted: set[tuple[str, Any]] = set()
        for aligned in (True, False):
            for run in runs:
                kernel = kernel_of(run, bool(view.rule.has_blocks and view.shard.cut))
                key = {
                    "tiles": ("tiles", False, aligned),
                    "by rate": ("tiles", True, aligned),
                    "rows": ("rows", run.columns <= SHORT, aligned),
                    "columns": ("columns", aligned),
                }[kernel]
                wanted.add((printed.text, key))
            if self.options.guarded or in_pieces(view):
                wanted.add((triton_print.squares(grad, len(triton_print.FIELDS)), (grad, aligned)))
        if in_pieces(view):
            wanted.add((printed.text, "phase"))
        for text, key in sorted(wanted, key=str):
            if (text, key) not in self._built:
                self._built[text, key] = self._compiled(text, key, formats, view.device)
            if self._built[text, key]:
                return self._built[text, key]
        return ""

    def _compiled(self, text: str, key: Any, formats: Formats, device: torch.device) -> str:
        name, constants = kernel_and_constants(key, formats.granule)
        try:
            kernel = getattr(triton_print.module(text), name)
            triton_launch.build(kernel, ARGUMENTS[name], constants, device)
        except Exception as error:  # whatever the compiler raises: there is another back end
            reason = str(error).split("\n")[0]
            known = f"building a kernel failed: {reason}"
            level = logging.DEBUG if known in self._built.values() else logging.WARNING
            logger.log(level, "building a Triton kernel failed, going on without: %s", reason)
            return known
        return ""

    def scalars_of(self, view: ParamView, scalars: StepScalars, names: Sequence[str]) -> DeviceScalars | None:
        """The kernel that works out a view's scalars on the device; None if these are worked out by torch."""
        key = kind_of_scalars(view), tuple(names)
        if view.own["step"].dtype != torch.float32:
            return None
        if key not in self._scalars:
            try:
                found = triton_print.scalars(view.rule, scalars.hyper(view), names, not self.options.decoupled)
                triton_launch.build(
                    triton_print.module(found.text).scalars_of_step,
                    (torch.float64, torch.int64, torch.float32),
                    {},
                    view.device,
                )
                self._scalars[key] = found
            except Exception as error:
                logger.debug("scalars of %s are worked out by torch: %s", view.rule.name, error)
                self._scalars[key] = None
        return self._scalars[key]

    def scalars_on_device(self, view: ParamView, scalars: StepScalars) -> bool:
        printed = self._kernels(view.rule, formats_of(view, view.param.dtype, self.options))
        return isinstance(printed, Printed) and self.scalars_of(view, scalars, printed.scalars) is not None

    # -- the step --------------------------------------------------------------------------------------------------

    def _tables_of(self, views: Sequence[ParamView], grads: Sequence[Tensor], summed: Sequence[bool]) -> list[Tables]:
        """Tables of views by device; kept as long as these, and the alignment of their gradients, are the same."""
        places: dict[torch.device, list[int]] = {}
        for i, view in enumerate(views):
            places.setdefault(view.device, []).append(i)
        found = []
        for device, own in places.items():
            mine = [views[i] for i in own]
            given = [grads[i] if grads[i].is_contiguous() else grads[i].contiguous() for i in own]
            addresses = [g.data_ptr() for g in given]
            total = [summed[i] for i in own]
            tables = next((t for t in self._tables if t.serve(mine, given, addresses, total)), None)
            if tables is None:
                tables = self._arranged(mine, given, addresses, total, device)
                self._tables = [*self._tables[-3:], tables]
            tables.use(given, addresses)
            found.append(tables)
        return found

    def _arranged(
        self,
        views: list[ParamView],
        grads: list[Tensor],
        addresses: list[int],
        summed: list[bool],
        device: torch.device,
    ) -> Tables:
        families: dict[Any, Family] = {}
        for i, (view, g) in enumerate(zip(views, grads, strict=True)):
            formats = formats_of(view, g.dtype, self.options)
            printed = self._kernels(view.rule, formats)
            assert isinstance(printed, Printed)
            key = printed.text, kind_of_scalars(view)
            families.setdefault(key, Family(printed, formats)).places.append(i)
        return Tables(views, grads, addresses, list(families.values()), summed, device)

    def squares(self, views: Sequence[ParamView], grads: Sequence[Tensor], total: Sequence[bool]) -> Squares:
        triton_launch.check_not_captured()
        found = Squares([], set())
        self._ready = self._tables_of(views, grads, total)
        for tables in self._ready:
            tables.upload_addresses()
            for (dtype, aligned), (chunks, n) in tables.sum_chunks.items():
                kernel = triton_print.module(triton_print.squares(dtype, len(triton_print.FIELDS))).squares
                _, constants = kernel_and_constants((dtype, aligned), 16 // dtype.itemsize)
                args = (tables.sum_jobs, chunks, tables.addresses, tables.partial)
                triton_launch.launch(kernel, n, args, constants, tables.device)
            found.totals.extend((shard, tables.partial[where]) for shard, where in tables.totals)
            found.views.update(id(v) for v, summed in zip(tables.views, tables.summed, strict=True) if summed)
        return found

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        for tables in self._ready:
            tables.take_rates(found.rates)
            self._write_scalars(tables, scalars)
            clip, ok = self._control(tables.device, scalars, tables.views[0])
            for family in tables.families:
                module = triton_print.module(family.printed.text)
                for key, (chunks, n) in sorted(family.chunks.items(), key=lambda item: item[0] != "phase"):
                    name, constants = kernel_and_constants(key, family.formats.granule)
                    lists = {
                        "phase": (
                            family.jobs,
                            chunks,
                            tables.partial,
                            tables.starts,
                            tables.scalars,
                            clip,
                            ok,
                            tables.rates,
                        ),
                        "tiles": (family.jobs, chunks, tables.addresses, tables.scalars, clip, ok, tables.rates),
                    }
                    args = lists.get(name, lists["tiles"][:-1])
                    triton_launch.launch(getattr(module, name), n, args, constants, tables.device)
            tables.release()

    def _control(self, device: torch.device, scalars: StepScalars, view: ParamView) -> tuple[Tensor, Tensor]:
        """The factor on gradients, fp64, and whether the step is taken, uint8: on the device."""
        if device not in self._constants:
            self._constants[device] = (
                torch.ones(1, dtype=torch.float64, device=device),
                torch.ones(1, dtype=torch.uint8, device=device),
            )
        one, yes = self._constants[device]
        clip, ok = scalars.clip_of(view), scalars.ok_of(view)
        if clip is None:
            clip = one
        elif not isinstance(clip, Tensor):
            clip = torch.full_like(one, clip)
        return clip.double(), yes if ok is True else ok.view(torch.uint8)

    def _write_scalars(self, tables: Tables, scalars: StepScalars) -> None:
        """The scalars of a step: from the host, or worked out on the device where only that knows the step."""
        by_kernel = []
        for family in tables.families:
            own = [tables.views[i] for i in family.places]
            device = any(map(scalars.on_device, own))
            by_kernel.append(self.scalars_of(own[0], scalars, family.printed.scalars) if device else None)
        tables.write_scalars(scalars, by_kernel, not self.options.decoupled)


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
        types = (torch.float64, torch.float64, torch.float64, torch.uint8, torch.float32, torch.int64)
        triton_launch.build(kernel, types, self._constants, self.device)

    def __call__(self, total: Tensor) -> tuple[Any, Any]:
        """(whether to step, factor): of the sum of all squares."""
        kernel = triton_print.module(triton_print.guard()).guard
        args = (total, self.most, self.clip, self.ok.view(torch.uint8), self.taken, self.skipped)
        triton_launch.launch(kernel, 1, args, self._constants, self.device)
        clip = None if self.max_norm is None else self.clip
        return (self.ok if self.skips else True), clip


ARGUMENTS: dict[str, tuple[torch.dtype, ...]] = {
    "tiles": (torch.int64, torch.int32, torch.int64, torch.float32, torch.float64, torch.uint8, torch.float32),
    "rows": (torch.int64, torch.int32, torch.int64, torch.float32, torch.float64, torch.uint8),
    "columns": (torch.int64, torch.int32, torch.int64, torch.float32, torch.float64, torch.uint8),
    "phase": (
        *(torch.int64, torch.int32, torch.float64, torch.int32, torch.float32, torch.float64, torch.uint8),
        torch.float32,
    ),
    "squares": (torch.int64, torch.int32, torch.int64, torch.float64),
}
"""Types of what kernels are called with."""


def kernel_and_constants(key: Any, granule: int) -> tuple[str, dict[str, Any]]:
    """The name of a kernel, and its constants (and options), from what it is found by in `triton_jobs`."""
    if key == "phase":
        return "phase", {"BLOCK": BLOCK}
    name, *how, aligned = key if isinstance(key[0], str) else ("squares", key[1])
    own: dict[str, Any] = {"ALIGN": 16 if aligned else 1, "G": granule if aligned else 1}
    if name == "rows":
        per, block = SHORT_TILE if how[0] else (1, BLOCK)
        # For sm_80 ptxas spills 8 bytes to get by with few registers, where some more do as well.
        most = {} if how[0] != aligned else {"maxnreg": 72 if aligned else 96}
        return name, {"PER": per, "BLOCK": block, **own, **most}
    if name == "columns":
        return name, {"BR": TALL if aligned else TALL // 2, "BC": WIDE, **own}  # fewer registers where loads are many
    return name, {**({"BY": how[0]} if name == "tiles" else {}), "BLOCK": BLOCK, **own}


def kind_of_scalars(view: ParamView) -> Any:
    """Equal for views whose scalars are worked out alike, from other numbers."""
    rule = view.rule
    hyper = [live(view.group[name]) for name in rule.defaults if name in view.group]
    flags = tuple(len(v) if isinstance(v, tuple) else 0.0 if isinstance(v, (float, Tensor)) else v for v in hyper)
    own = tuple(getattr(rule, f.name) for f in fields(cast(Any, rule)) if f.name not in rule.hyperparameters)
    return type(rule), flags, own, view.own["step"].dtype


def formats_of(view: ParamView, grad: torch.dtype, options: Options) -> Formats:
    """How the tensors of a view rest in memory."""
    types = {
        kind: tuple(view.own[name].dtype for name, k in view.rule.state.items() if k == kind)
        for kind in ("element", "block")
    }
    return Formats(view.param.dtype, grad, types["element"], types["block"], options.stochastic_rounding)


def _tensors_refused(spec: Spec) -> str:
    view = spec.view
    tensors = [local(view.param), *(local(view.own[name]) for name in view.rule.state)]
    wrong = next((t for t in {spec.grad, *(t.dtype for t in tensors)} if t not in TYPES), None)
    if wrong is not None:
        return f"fp32 and bf16 alone, not {str(wrong)[6:]}"
    if not all(t.is_contiguous() for t in tensors):
        return "not contiguous"
    by_column = not (view.dim == 1 and len(view.shape) == 2)
    partial = [name for name, kind in view.rule.state.items() if kind == "element" and view.state_key(name) != name]
    if by_column and partial:
        return "columns with state of their own"
    if spec.options.stochastic_rounding and any(view.shard.offset[1:]):
        return "stochastic rounding of a part that is cut within rows"
    return ""
