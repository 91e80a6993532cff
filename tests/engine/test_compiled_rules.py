"""What is compiled for a rule: one thing for all numbers that are read at every step, another for each flag."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from sharpwise import create_optimizer
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.backends.base import compiler_present
from sharpwise.engine.options import Options
from sharpwise.rules import Rule
from sharpwise.testing import TinyGPT, run

pytestmark = pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")


@dataclass(frozen=True)
class Flagged(Rule):
    """A rule of a user's: a flag and a number that `direction` reads, and a number that it is handed."""

    ahead: bool = False
    power: float = 1.0
    mu: float = 0.9

    name: ClassVar[str] = "flagged"
    hyperparameters: ClassVar[tuple[str, ...]] = ("ahead", "power", "mu")

    @property
    def state(self):
        return {"m": "element"}

    def scalars(self, t, group):
        return {"mu": group["mu"]}

    def direction(self, g, state, s):
        m = state["m"] * s["mu"] + g
        return {"m": m}, (g + m * s["mu"] if self.ahead else m) * self.power, None


GROUPS = [{}, {"ahead": True}, {"power": 0.25}, {"mu": 0.5}, {"lr": 0.5}]


def flagged(dtype, compile):
    """Steps of a parameter per group; of fp64 they are the reference's."""
    model = nn.ParameterDict({f"w{i}": torch.zeros(300, 300, dtype=dtype) for i in range(len(GROUPS))})
    segments = [Segment(name, (300, 300), role=Role.UP, source="said") for name in model]
    optimizer = BlockOptimizer(
        [{"params": [p], **own} for p, own in zip(model.values(), GROUPS, strict=True)],
        Flagged(),
        lr=1.0,
        weight_decay=0.0,
        options=Options(compile=compile),
        blocks=BlockMap(segments),
        model=model,
    )
    for t in range(3):
        for p in model.values():
            p.grad = torch.full_like(p, t + 1.0)
        optimizer.step()
    return torch.stack([p.detach() for p in model.values()]), optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_groups_whose_rules_differ_do_not_share_what_is_compiled(dtype):
    expected, _ = flagged(dtype, False)
    found, optimizer = flagged(dtype, True)
    assert len(expected[:, 0, 0].unique()) == len(GROUPS)
    assert ((found - expected).abs() <= 1e-6 * expected.abs()).all()
    assert optimizer.compiled_graphs == (3 if dtype is torch.float32 else 0)  # the flag, the power, and all others


def one_step(optimizer, p, **settings):
    """How far a parameter moves per unit of learning rate, on a gradient of ones."""
    optimizer.param_groups[0].update(settings)
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    return (before - p.detach()).mean().item() / optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("compile", [None, False])
def test_a_number_that_direction_reads_off_its_rule_is_read_at_every_step(compile):
    model = nn.Linear(300, 300, bias=False)
    optimizer = BlockOptimizer(model, Flagged(), lr=0.5, weight_decay=0.0, options=Options(compile=compile))
    moved = [one_step(optimizer, model.weight, power=power) for power in (1.0, 2.0, 2.0, 0.5)]
    momenta = [1.0, 1.9, 2.71, 3.439]
    assert moved == pytest.approx([m * power for m, power in zip(momenta, (1.0, 2.0, 2.0, 0.5), strict=True)], rel=1e-5)


@pytest.mark.parametrize("taken", ["step", "decay", "clip", "ok", "weight_decay"])
def test_scalars_that_are_called_as_the_engines_own_are_refused(taken):
    class Taking(Flagged):
        def scalars(self, t, group):
            return {"mu": group["mu"], taken: 1.0}

    model = nn.Linear(3, 3)
    optimizer = BlockOptimizer(model, Taking(), lr=0.5, weight_decay=0.0, options=Options(compile=False))
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=taken):
        one_step(optimizer, model.weight)
    assert torch.equal(before, model.weight)


CHANGES = {
    "adamw": {"betas": (0.7, 0.8), "eps": 1e-3},
    "adam-mini": {"betas": (0.7, 0.8), "eps": 1e-3},
    "lion": {"betas": (0.7, 0.8)},
    "sgd": {"momentum": 0.5},
    "sgd-sai": {"momentum": 0.5},
}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["bare", "clipped"])
@pytest.mark.parametrize("name", CHANGES)
def test_other_numbers_compile_nothing(name, options):
    """Changed in a group, loaded from a file, or of a group that joins."""
    model = TinyGPT(width=256, heads=4, vocabulary=300)
    extra = {"momentum": 0.9} if name == "sgd" else {}
    parameters = list(model.parameters())
    optimizer = create_optimizer(
        [{"params": parameters[:8]}], name, model=model, lr=1e-3, weight_decay=0.1, compile=True, **extra, **options
    )
    run(model, optimizer, range(2))
    built = optimizer.compiled_graphs
    assert built > 0
    for group in optimizer.param_groups:
        group |= {"lr": 2e-3, "weight_decay": 0.2, **CHANGES[name]}
    run(model, optimizer, range(2, 4))
    assert optimizer.compiled_graphs == built
    optimizer.load_state_dict(optimizer.state_dict())
    run(model, optimizer, range(4, 6))
    assert optimizer.compiled_graphs == built
    optimizer.add_param_group({"params": parameters[8:], "lr": 3e-3})
    run(model, optimizer, range(6, 8))
    assert optimizer.compiled_graphs == built
