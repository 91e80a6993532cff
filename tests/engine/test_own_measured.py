"""A block_lr and a rule of the user's own, which the engine asks by what they declare."""

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import sharpwise
from sharpwise import probes
from sharpwise.block_lr import MeasuredLR
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.options import Options
from sharpwise.rules import Rule
from sharpwise.rules.base import add_square
from sharpwise.testing import fill_gradients, run, tiny_model


@dataclass(frozen=True)
class Own(MeasuredLR):
    """Measured before the first step; the values are the multipliers."""

    def due(self, taken, total_steps):
        return taken == 0

    def multipliers(self, segments, measured=None):
        return [1.0 if math.isnan(v) else v for v in (measured or {}).get(self, [math.nan] * len(segments))]


@dataclass(frozen=True)
class Norms(Own):
    name: ClassVar[str] = "norms"
    measures: ClassVar[str] = "matrix"

    def reads(self, segment):
        return segment.is_matrix

    def of_matrices(self, matrices):
        return float(torch.stack([matrix.norm() for matrix in matrices]).mean())

    def remarks(self, segments, values):
        none = {s.name for s, value in zip(segments, values, strict=True) if math.isnan(value)}
        return f"{len(none)} without a norm"


@dataclass(frozen=True)
class Leaning(Own):
    """|sum g| / sqrt(n sum g^2)."""

    name: ClassVar[str] = "leaning"
    measures: ClassVar[str] = "gradient"

    def of_gradient(self, count, total, squares):
        return abs(total) / math.sqrt(count * squares)


@dataclass(frozen=True)
class Nothing(Own):
    name: ClassVar[str] = "nothing"
    measures: ClassVar[str] = "matrix"


def multipliers(optimizer: Any) -> list[float]:
    return [row["multiplier"] for row in optimizer.lr_multipliers()]


def test_by_matrices(caplog: Any) -> None:
    model = tiny_model()
    optimizer = sharpwise.SGD(model, lr=1e-3, block_lr=Norms())
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    want = [float(s.take(named[s.name]).norm()) if s.is_matrix else 1.0 for s in optimizer.blocks]
    with caplog.at_level(logging.WARNING, logger="sharpwise"):
        run(model, optimizer, range(3))
    assert multipliers(optimizer) == pytest.approx(want, rel=1e-6)
    vectors = sum(p.dim() < 2 for p in named.values())
    assert caplog.text.count(f"block_lr norms: {vectors} without a norm") == 1


def test_by_gradients() -> None:
    model = tiny_model()
    fill_gradients(model, 0)
    optimizer = sharpwise.SGD(model, lr=1e-3, block_lr=Leaning())
    named = dict(model.named_parameters())
    parts = [s.take(named[s.name].grad).double() for s in optimizer.blocks]
    want = [float(g.sum().abs() / (g.numel() * g.square().sum()).sqrt()) for g in parts]
    optimizer.step()
    assert multipliers(optimizer) == pytest.approx(want, rel=1e-6)


def test_what_is_not_declared_is_said() -> None:
    model = tiny_model()
    optimizer = sharpwise.SGD(model, lr=1e-3, block_lr=Nothing())
    fill_gradients(model, 0)
    with pytest.raises(NotImplementedError, match="block_lr 'nothing' measures 'matrix', and no matrices"):
        optimizer.step()
    with pytest.raises(NotImplementedError, match="block_lr 'nothing' measures 'matrix', and no gradients"):
        Nothing().of_gradient(1, 1.0, 1.0)
    with pytest.raises(NotImplementedError, match="lion has no second moment"):
        sharpwise.rules.Lion().second_moment_decay({})


@dataclass(frozen=True)
class RMSprop(Rule):
    """Its second moment and the decay have names of their own."""

    alpha: float = 0.9

    name: ClassVar[str] = "rmsprop"
    hyperparameters: ClassVar[tuple[str, ...]] = ("alpha",)
    second_moment: ClassVar[str | None] = "square_avg"

    @property
    def state(self):
        return {"square_avg": "element"}

    def second_moment_decay(self, group):
        return float(group["alpha"])

    def scalars(self, t, group):
        return {"alpha": group["alpha"], "rest": 1 - group["alpha"]}

    def direction(self, g, state, s):
        v = add_square(state["square_avg"] * s["alpha"], g, s["rest"])
        return {"square_avg": v}, g, v.sqrt() + 1e-8


def test_the_second_moment_has_the_name_that_the_rule_says() -> None:
    ours, theirs = tiny_model(), tiny_model()
    block_lr = sharpwise.SharpnessLR(start=1, every=1, by="module")
    own = BlockOptimizer(ours, RMSprop(), lr=0.0, weight_decay=0.0, options=Options(block_lr=block_lr))
    adamw = sharpwise.AdamW(theirs, lr=0.0, betas=(0.9, 0.9), block_lr=block_lr)
    for step in range(4):
        for model, optimizer in ((ours, own), (theirs, adamw)):
            fill_gradients(model, step)
            optimizer.step()
    values = [multipliers(optimizer) for optimizer in (own, adamw)]
    assert values[0] == pytest.approx(values[1], rel=1e-6) and len(set(values[0])) > 1
    found = [[e.value for e in probes.sharpness_from_optimizer(optimizer)] for optimizer in (own, adamw)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
