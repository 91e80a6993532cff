"""What a back end is: it moves views by a step, or refuses them and says why."""

import logging
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from sharpwise.engine.options import Options
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.shards import Shard, local
from sharpwise.storage import Dense

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Spec(NamedTuple):
    """What a back end is asked to take: a view whose gradient is of this type."""

    view: ParamView
    grad: torch.dtype
    options: Options

    @property
    def controlled(self) -> bool:
        """Whether a control bounds its updates: its sums come first, and rows have rates and decays of their own."""
        return self.view.unit is not None and self.view.rule.stage != "input"


class Lines(NamedTuple):
    """What a view moves by, one number per row, shaped to broadcast: step sizes and factors of decay."""

    rate: Tensor
    decay: Tensor


class Told(NamedTuple):
    """What a control is told of rows that a back end bounds as it moves them.

    Attributes:
        settings: `program.SETTINGS` of each segment, fp64 [segments, settings]; setting_of: the segment of each row,
            int64 [rows], None for the first.
        held: norms that are held, fp32 [units], to be moved on; None without. snr_factors: fp64 [units]; None without.
        unit_of: the unit of each row, int64 [rows]; None where each is one.
    """

    settings: Tensor
    setting_of: Tensor | None
    held: Tensor | None
    snr_factors: Tensor | None
    unit_of: Tensor | None


def unbounded(views: Sequence[ParamView], updates: Sequence[Tensor]) -> dict[int, Lines]:
    """What moves rows where there is no control."""
    return {}


class Found(NamedTuple):
    """What sums over more than an element gave, by id of the view.

    Attributes:
        rates: step sizes of its blocks [n_blocks], for those whose back end does not sum them up by itself.
        rules: of those whose rule has reductions, the rule that holds what these found (`reductions.Informed`).
        lines: of those with a control, in place of `rates` and of the rates and decays among the scalars.
        bound: what gives the lines of views whose updates are known only in the step; every process calls it alike.
        rates_of: what bounds the rates per block of a view of which its back end alone has the numerators of all
            elements: (view, numerators, sums of their squares per row or None, rates) -> rates. None where there is no
            such bound.
        told: what a control is told of views that have no `lines`; None without a control.
        snr_factors: of each unit of such a view the factor of its gradient SNR, fp64; None for 1.
    """

    rates: Mapping[int, Tensor]
    rules: Mapping[int, Any]
    lines: Mapping[int, Lines] = {}
    bound: Callable[[Sequence[ParamView], Sequence[Tensor]], Mapping[int, Lines]] = unbounded
    rates_of: Callable[[ParamView, Tensor, Tensor | None, Tensor], Tensor] | None = None
    told: Callable[[ParamView], Told] | None = None
    snr_factors: Callable[[ParamView], Tensor | None] | None = None


class Prepared(NamedTuple):
    """What a back end has done for views by itself, before anything moves.

    Attributes:
        totals: vectors, fp64, that add up to the sum of g*g over all views in `summed`, of parameters that are cut as a
            shard is; summed: ids of these.
        scalars: ids of views whose scalars it works out itself, as only a device knows the number of the step.
    """

    totals: Sequence[tuple[Shard, Tensor]] = ()
    summed: Collection[int] = ()
    scalars: Collection[int] = ()


class Backend:
    """Base of all back ends. One of each lives as long as its optimizer and keeps what it compiles."""

    name: ClassVar[str]

    def refuses(self, spec: Spec) -> str:
        """Why it does not take a view; "" if it does. What it compiles is built here, before anything is written."""
        raise NotImplementedError

    def sums_blocks(self, spec: Spec) -> bool:
        """Whether it works out block sums and block state of a view that it takes by itself, as it moves it."""
        return False

    def bounds(self, spec: Spec) -> bool:
        """Whether it works out the sums of a control over the units of a view that it takes by itself, and what the
        control makes of them."""
        return False

    def one_pass(self, spec: Spec) -> bool:
        """Whether it does so, for sums over blocks and of a control, as it moves the elements."""
        return (spec.view.rule.has_blocks and self.sums_blocks(spec)) or self.bounds(spec)

    def prepare(
        self, views: Sequence[ParamView], grads: Sequence[Tensor], total: Sequence[bool], scalars: StepScalars
    ) -> Prepared:
        """Called once in every step, with the arguments of `step`; nothing is written to the views.

        Args:
            total: of which views the squares enter the sum over everything, where it takes that.
        """
        return Prepared()

    def guard(self, device: torch.device, max_norm: float | None, skips: bool) -> Any:
        """What decides about a step in one launch on a device; None if it has no such kernel."""
        return None

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        """Move views of which it refused none.

        Args:
            grads: local ones, of the parameters.
            scalars: of this step.
            found: what sums over more than an element gave.
        """
        raise NotImplementedError

    def slower(self, spec: Spec) -> Sequence[tuple[str, str]]:
        """Of a view that it takes and hands on: back ends that refused that, and why."""
        return ()

    @property
    def built(self) -> int:
        """How many kernels it has built."""
        return 0


class Choice(NamedTuple):
    """The back end of a view, and for each that would be faster why it does not take it."""

    backend: Backend
    refusals: tuple[tuple[str, str], ...]

    @staticmethod
    def of(backends: Iterable[Backend], spec: Spec) -> "Choice":
        """The first that does not refuse a view; the last refuses none."""
        refusals: list[tuple[str, str]] = []
        for backend in backends:
            reason = backend.refuses(spec)
            if not reason:
                return Choice(backend, (*refusals, *backend.slower(spec)))
            refusals.append((backend.name, reason))
        raise AssertionError(refusals)

    @property
    def why(self) -> str:
        """The refusals in words."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.refusals)


class Work(NamedTuple):
    """What a back end moves: views, by their places in a list of views."""

    backend: Backend
    places: list[int]
    views: list[ParamView]

    @staticmethod
    def of(views: Sequence[ParamView], backends: Sequence[Backend]) -> "list[Work]":
        """Views by the back ends that they have."""
        found: dict[int, Work] = {}
        for i, (view, backend) in enumerate(zip(views, backends, strict=True)):
            own = found.setdefault(id(backend), Work(backend, [], []))
            own.places.append(i)
            own.views.append(view)
        return list(found.values())


def check_own(folder: Path, others: int, what: str) -> None:
    """Raise PermissionError unless a folder that code is loaded from is this user's own.

    Args:
        others: permissions that nobody else may have; what: is loaded.
    """
    about = folder.lstat()
    if os.name == "posix" and (about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & others):
        owner = "somebody else's" if about.st_uid != os.geteuid() else "open to others"
        raise PermissionError(f"{what} are loaded from {folder} only if it is yours alone, and it is {owner}")


def row_step(view: ParamView, scalars: StepScalars, found: Found) -> Tensor | None:
    """Step sizes of the rows of a view, shaped to broadcast; None where they are all the same."""
    if id(view) in found.lines:
        return found.lines[id(view)].rate
    return view.spread(found.rates[id(view)]) if id(view) in found.rates else scalars.row_rate(view)


def row_decay(view: ParamView, scalars: StepScalars, found: Found) -> Tensor | None:
    """Their factors of decay, likewise."""
    return found.lines[id(view)].decay if id(view) in found.lines else scalars.row_decay(view)


TYPES = (torch.float32, torch.bfloat16)
"""What kernels read and write; the arithmetic is fp32."""


def tensors_refused(view: ParamView, grad: torch.dtype, blocks: Iterable[Tensor] = ()) -> str:
    """Why kernels do not take a view for how its gradient, itself or its state are stored, or ""."""
    if view.cut_blocks:
        return "a mesh cuts lines whose blocks are coded together"
    stored = view.stored()
    dense = [view.param, *(held.codes for held in stored if isinstance(held.format, Dense)), *blocks]
    wrong = next((dtype for dtype in (grad, *(t.dtype for t in dense)) if dtype not in TYPES), None)
    if wrong is not None:
        return f"fp32 and bf16 alone, not {str(wrong)[6:]}"
    if len({held.format.block for held in stored} - {0}) > 1:
        return "blocks of several sizes"
    return "" if all(local(t).is_contiguous() for t in (view.param, *view.elements.values())) else "not contiguous"


def compiler_present() -> bool:
    """Whether there is a C++ compiler."""
    return any(map(shutil.which, ("g++", "clang++", "c++")))


def built(build: Callable[[], T]) -> T | str:
    """What `build` makes; where that fails, why, for `refuses`: the next back end serves.

    A failure is logged once; an operation that a printer has no words for (NotImplementedError) is none.
    """
    try:
        return build()
    except NotImplementedError as error:
        return first_line(error)
    except Exception as error:  # whatever a compiler and its driver raise
        reason = f"building a kernel failed: {first_line(error)}"
        say_once(f"{reason}; going on without")
        return reason


def first_line(error: Exception) -> str:
    """The begin of its message."""
    return str(error).split("\n")[0] or type(error).__name__


def say_once(message: str) -> None:
    """Log a warning, once in a process: what holds for the machine, whichever optimizer finds it."""
    if message not in _SAID:
        _SAID.add(message)
        logger.warning(message)


_SAID: set[str] = set()
