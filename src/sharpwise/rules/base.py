"""What a rule is: where to go, as a short list of pure functions that know no mesh, dtype, storage, lr or decay.

A rule works in three phases; a rule without block state has only the last.

1. between the blocks: the engine takes the mean of g*g over every block (the sums of law 6, one collective for all);
2. `block_phase`, once per block: block state and that mean -> new block state and the block's denominator;
3. `direction`, once per element: gradient and element state -> new element state, numerator, denominator.

A rule that has to know more of a whole matrix says so in `reductions`: sums and maxima over all of its elements. It is
written for the part that one process holds, and the engine completes what it finds. One that needs the matrix itself is
a `MatrixRule`.

The engine then moves p by -lr * multiplier * numerator / (bias_correction * denominator). A fraction is returned in
two parts because torch divides last, and bit-equality with torch's own loop is worth more than one symbol.

Scalars arrive as Python floats in the reference, and as 0-d tensors where arithmetic is traced for kernels or only a
device knows them. The helpers below call torch's own scalar kernels in the first case, whose roundings several
operations do not repeat: the reference is to be equal with torch's own loop to the bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sharpwise.blocks import Cut, Segment
from sharpwise.shards import Part

Scalars = Mapping[str, Any]
"""Named scalars of one step: floats, or 0-d tensors."""
Kind = Literal["element", "block", "whole"]
State = Mapping[str, Tensor]
"""State tensors by name, in fp32 (fp64 for fp64 parameters)."""


@dataclass(frozen=True)
class Reduction:
    """What a rule has to know of a whole matrix before its elements move.

    Args:
        name: under which later reductions, `finish`, `local_slice` and `direction` find it in their state.
        local_term: (gradient, state, hyperparameters, part) -> the term of the part at hand. The gradient is [copies,
            rows, columns], rows are outputs, and the part a region of the whole; element state is as it lies. Whole
            state and earlier reductions are complete.
        op: all terms are of one shape, and are added up, or the maximum is taken.
        degree: of a sum in the first round: scaling the gradient by c scales it by c ** degree. It is taken before the
            clipping factor is known, with whose norm it shares a collective.
        then: (state, hyperparameters) -> what follows from it when it is complete, by name: later ones find it too.
    """

    name: str
    local_term: Callable[[Tensor, State, Mapping[str, Any], Part], Tensor]
    op: Literal["sum", "max"] = "sum"
    degree: int = 1
    then: Callable[[State, Mapping[str, Any]], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Product:
    """A reduction that is a product of the gradient g [copies, rows, columns] with a thin matrix F.

    Args:
        name, then: as of a `Reduction`.
        side: "right": g F, F [copies, columns, r]; "left": F^T g, F [copies, rows, r].
        factor: state -> F of the whole, where g may be a part; any type.
    """

    name: str
    side: Literal["right", "left"]
    factor: Callable[[State], Tensor]
    then: Callable[[State, Mapping[str, Any]], dict[str, Tensor]] | None = None

    op: ClassVar[Literal["sum"]] = "sum"
    degree: ClassVar[int] = 1


class Rule:
    """Base of all rules. Concrete rules are frozen dataclasses; nothing concrete is overridden twice.

    `state` says of each state tensor whether it has one number per element of the parameter, one per block of it, or
    (`whole`) a shape of its own, `shape_of`; the latter is the same in every process.
    Hyperparameters are fields of the rule; they live in the optimizer's param_groups and are read there at every step.
    `scalars` hands numbers to the arithmetic. One that `direction` or `block_phase` read off the rule itself becomes a
    part of what is compiled: with every new value the engine builds the rule anew, which is slow under a schedule.
    """

    name: ClassVar[str]
    hyperparameters: ClassVar[tuple[str, ...]]
    second_moment: ClassVar[str | None] = None
    """The state that averages squares of gradients, v <- b2 v + (1-b2) g^2 from v = 0; None where none does."""
    first_moment: ClassVar[str | None] = None
    """The state that averages gradients, m <- b m + (1-b) g from m = 0 with b of `momentum_of`, by element; None where
    none does."""
    stage: ClassVar[Literal["", "input", "move"]] = ""
    """Which part of a step it is, if not all: "input" ends with the direction, and writes the numerator in place of the
    parameter; "move" begins after it, by a gradient that is neither clipped nor decayed."""
    plain: ClassVar[bool] = False
    """Whether its numerator is the gradient."""
    hint: ClassVar[str] = ""
    """Said to a user whose model has parameters that no source explains."""
    turn: ClassVar[float] = 1.0
    """In the long run its rows turn by sqrt(2 lr wd mean_square) times this in a step."""

    @property
    def state(self) -> dict[str, Kind]:
        """Names of the state tensors, torch's where torch has one."""
        raise NotImplementedError

    @property
    def momentum_state(self) -> str | None:
        """The state that is a weighted sum of gradients by element, linear in itself and the gradient; None without."""
        return self.first_moment

    @property
    def all_state(self) -> dict[str, Kind]:
        """`state` under any hyperparameters: what may be held of other times, and a file may bring."""
        return self.state

    def second_moment_decay(self, group: Mapping[str, Any]) -> float:
        """b2 of the second moment, under the hyperparameters of a group."""
        raise NotImplementedError(f"{self.name} has no second moment")

    def momentum_of(self, group: Mapping[str, Any]) -> Any:
        """b: how much of its momentum a step keeps, 0 without."""
        if "betas" in self.hyperparameters:
            return group["betas"][0]
        return group["momentum"] if "momentum" in self.hyperparameters else 0.0

    def mean_square(self, group: Mapping[str, Any]) -> Any:
        """Of its momentum, in the long run, for independent gradients whose mean square is 1: (1-b) / (1+b)."""
        b = self.momentum_of(group)
        return (1 - b) / (1 + b)

    def variant(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """What decides which tensors and operations it takes: the flags among its hyperparameters, and which are 0.

        When a schedule changes that, the engine builds the rule anew; other numbers it reads as they are.
        """
        values = (group[name] for name in self.hyperparameters)
        return tuple(v if v is None or isinstance(v, (bool, str)) else isinstance(v, Tensor) or bool(v) for v in values)

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters with their default values, as they appear in param_groups."""
        return {name: getattr(self, name) for name in self.hyperparameters}

    def validate(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for hyperparameters outside their range: betas in [0, 1), numbers finite and >= 0."""
        for name in self.hyperparameters:
            if name == "betas":
                check_betas(self.name, group[name])
            else:
                check_nonnegative(self.name, **{name: group[name]})

    def assign(self, segment: Segment) -> tuple["Rule", Cut]:
        """Which rule a segment gets, and how it is cut into blocks."""
        return self, "element"

    def place(self, segments: Sequence[Segment]) -> list[tuple["Rule", Cut]]:
        """The same of all segments of a parameter, for a rule that takes whole parameters."""
        return [self.assign(segment) for segment in segments]

    def settings(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """What it reads its hyperparameters, `lr` and `weight_decay` from: the group, as it is at any time."""
        return group

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        """The scalars of step t (from 1; a float or a tensor of steps), `bias_correction` among them if not 1.

        The engine's own are called step, decay, clip, ok and weight_decay: other names are free.
        """
        raise NotImplementedError

    def block_phase(self, blocks: State, mean_square: Tensor, s: Scalars) -> tuple[dict[str, Tensor], Tensor]:
        """New block state and denominator, both [n_blocks], from the old state and the mean of g*g per block.

        The mean is in fp64, as squares of large gradients are beyond fp32. So may be what comes out: the engine rounds.
        """
        raise NotImplementedError(f"{self.name} has no block state")

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """New element state, numerator, and denominator (None: 1, or the block's)."""
        raise NotImplementedError

    @property
    def reductions(self) -> tuple[Reduction | Product, ...]:
        """What has to be known of the whole matrix, in order. Such a rule moves matrices only, those of one role of a
        parameter."""
        return ()

    def shape_of(self, name: str, segments: Sequence[Segment]) -> tuple[int, ...]:
        """Of whole state, for these segments of a parameter."""
        raise NotImplementedError(f"{self.name} has no whole state")

    def initial(self, name: str, segments: Sequence[Segment], device: torch.device) -> Tensor:
        """Whole state before the first step, fp32."""
        return torch.zeros(self.shape_of(name, segments), dtype=torch.float32, device=device)

    def finish(self, state: State, s: Scalars) -> dict[str, Tensor]:
        """New whole state, from the old and what the reductions found; `direction` finds the latter in its state."""
        return {}

    @property
    def has_blocks(self) -> bool:
        """Whether any state is kept per block."""
        return "block" in self.state.values()


class MatrixRule(Rule):
    """A rule that moves whole matrices, each worked on once, at its owner.

    `input` is asked per element: momentum, and what the matrix is made of. `owner` is asked for a batch of whole
    matrices of one shape. What a matrix is says the cut: a segment ("tensor", one for each stacked copy) or the rows of
    a head; its rows are outputs, however the parameter lies. `direction` is never asked. Element state is the
    parameter's; whole state has one number per output row of its segments, in their order, copy by copy.
    """

    wire: ClassVar[torch.dtype | None] = None
    """The type in which matrices travel to their owner and back; None for that of the arithmetic."""

    def input(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor]:
        """New element state, and the elements of the matrix."""
        raise NotImplementedError

    def owner(self, m: Tensor, small: State, s: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
        """The update u of matrices [n, rows, columns], which then moves p by -lr u; new whole state, each [n, rows].

        It may be written to m.
        """
        raise NotImplementedError


class ThinRule(Rule):
    """A rule whose reductions are products with thin matrices, from which it has a number x of every element.

    x = a b + c g, and `direction` finds that of its own element in its state.
    """

    def thin(self, found: State, s: Scalars) -> tuple[Tensor, Tensor, Any]:
        """a [copies, rows, n], b [copies, n, columns], both of the whole, and c.

        Args:
            found: whole state as it was before the step, and what the reductions found.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Stage(Rule):
    """A part of the step of another rule: with its hyperparameters and scalars, and its state of one kind."""

    rule: Any

    kind: ClassVar[Kind] = "element"

    @property
    def hyperparameters(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.rule.hyperparameters)

    @property
    def defaults(self) -> dict[str, Any]:
        return dict(self.rule.defaults)

    @property
    def state(self) -> dict[str, Kind]:
        return {name: kind for name, kind in self.rule.state.items() if kind == self.kind}

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self.rule.scalars(t, group))


def lr_ratio(who: str, lr: Any, aux_lr: Any) -> float:
    """A second learning rate in units of lr, so that a schedule of lr moves both; 1 for None.

    Raises:
        TypeError, ValueError: unless both are numbers, this one >= 0, and lr is above 0.
    """
    if not isinstance(lr, (Real, Tensor)) or not isinstance(aux_lr, Real | None):
        raise TypeError(f"{who}: lr and aux_lr must be numbers, aux_lr may be None, got {lr!r} and {aux_lr!r}")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{who}: lr must be a number or a 0-d tensor, got {tuple(lr.shape)}")
    if aux_lr is None:
        return 1.0
    check_nonnegative(who, aux_lr=aux_lr)
    if float(lr) <= 0:
        raise ValueError(
            f"{who}: aux_lr is kept as a ratio to lr, got lr={float(lr)}; build it with the lr of the peak"
        )
    return float(aux_lr) / float(lr)


def lerp(old: Tensor, new: Tensor, weight: Any) -> Tensor:
    """old + weight * (new - old)."""
    return torch.lerp(old, new, weight) if isinstance(weight, float) else old + weight * (new - old)


def add(x: Tensor, y: Tensor, alpha: Any) -> Tensor:
    """x + alpha * y."""
    return torch.add(x, y, alpha=alpha) if isinstance(alpha, float) else x + alpha * y


def add_square(x: Tensor, y: Tensor, weight: Any) -> Tensor:
    """x + weight * y * y."""
    return torch.addcmul(x, y, y, value=weight) if isinstance(weight, float) else x + (weight * y) * y


def divide(x: Tensor, s: Any) -> Tensor:
    """x / s for a scalar s. In a kernel, where no compiler may do so by itself, x times one reciprocal."""
    return x / s if isinstance(s, float) else x * s.reciprocal()


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1, and NaN of NaN, as in NumPy and JAX. torch's is 0 there: an element would stand still unnoticed."""
    return torch.where(x != x, x, x.sign())


def check_betas(name: str, betas: Any) -> None:
    """Raise TypeError unless betas is a pair of numbers, ValueError unless they are in [0, 1).

    Tensors on an accelerator are not read.
    """
    if type(betas) is tuple and len(betas) == 2 and all(type(b) is float and 0.0 <= b < 1.0 for b in betas):
        return  # asked at every step
    pair = isinstance(betas, Sequence) and len(betas) == 2 and all(isinstance(b, (Real, Tensor)) for b in betas)
    if not pair:
        raise TypeError(f"{name}: betas must be two numbers in [0, 1), such as (0.9, 0.999), got {betas!r}")
    here = [b for b in betas if not isinstance(b, Tensor) or b.device.type == "cpu"]
    if not all(0.0 <= float(b) < 1.0 for b in here):
        raise ValueError(f"{name}: betas must be two numbers in [0, 1), got {betas!r}")


def check_nonnegative(name: str, **values: Any) -> None:
    """Raise TypeError for what is no number, ValueError for one below 0, NaN or infinite.

    A tensor on an accelerator is not read.
    """
    for key, value in values.items():
        if type(value) is float and 0.0 <= value < float("inf"):
            continue
        if not isinstance(value, (Real, Tensor)):
            raise TypeError(f"{name}: {key} must be a finite number >= 0, got {value!r}")
        if isinstance(value, Tensor) and value.device.type != "cpu":
            continue
        if not 0.0 <= float(value) < float("inf"):
            raise ValueError(f"{name}: {key} must be a finite number >= 0, got {value!r}")
