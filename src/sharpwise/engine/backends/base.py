"""What a back end is: it moves views by a step, or refuses them and says why."""

import shutil
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.options import Options
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import Rule


class Spec(NamedTuple):
    """What a back end is asked to take: a view whose gradient is of this type, in an optimizer of so many elements."""

    view: ParamView
    grad: torch.dtype
    options: Options
    total: int


class Found(NamedTuple):
    """What sums over more than an element gave, by id of the view.

    Attributes:
        rates: step sizes of its blocks [n_blocks], for those whose back end does not sum them up by itself.
        rules: of those whose rule has reductions, the rule that holds what these found for the part at hand.
    """

    rates: Mapping[int, Tensor]
    rules: Mapping[int, Rule]


class Backend:
    """Base of all back ends. One of each lives as long as its optimizer and keeps what it compiles."""

    name: ClassVar[str]

    def refuses(self, spec: Spec) -> str:
        """Why it does not take a view; "" if it does. What it compiles is built here, before anything is written."""
        raise NotImplementedError

    def sums_blocks(self, spec: Spec) -> bool:
        """Whether it works out block sums and block state of a view that it takes by itself, as it moves it."""
        return False

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        """Move views of which it refused none.

        Args:
            grads: local ones, of the parameters.
            scalars: of this step.
            found: what sums over more than an element gave.
        """
        raise NotImplementedError

    @property
    def built(self) -> int:
        """How many kernels it has built."""
        return 0


def row_step(view: ParamView, scalars: StepScalars, found: Found) -> Tensor | None:
    """Step sizes of the rows of a view, shaped to broadcast; None where they are all the same."""
    return view.spread(found.rates[id(view)]) if id(view) in found.rates else scalars.row_rate(view)


LEAST = 1 << 16
"""Elements below which calling a compiled kernel for one tensor costs more than it brings."""
COMPILE_TOTAL = 10_000_000
"""Below this many parameters compiling costs more than it brings."""


def unavailable(spec: Spec) -> str:
    """Why nothing is compiled for this view, or "": it is not asked for, or cannot be."""
    if spec.options.compile is False:
        return "compile=False asks for the reference"
    return "" if compiler_present(spec.view.device) else f"no compiler for {spec.view.device.type}"


def pays(spec: Spec) -> str:
    """Why compiling a graph is not for this view, or "": where it does not pay, or is unavailable."""
    if spec.options.compile is None and spec.total < COMPILE_TOTAL:
        return f"below {COMPILE_TOTAL:,} parameters only by compile=True"
    return unavailable(spec)


def compiler_present(device: torch.device) -> bool:
    """Whether graphs can be compiled for the device."""
    return device.type == "cuda" or (device.type == "cpu" and any(map(shutil.which, ("g++", "clang++", "c++"))))
