"""The arithmetic that kernels are printed from, against the reference."""

import pytest
import torch

from sharpwise.engine.backends.cpp_print import CPP
from sharpwise.engine.backends.reference import update
from sharpwise.engine.program import Arithmetic, Program
from sharpwise.engine.stored import Stored
from sharpwise.rules import SGD, AdamMini, AdamW, Lion

RULES = {
    "adamw": AdamW(),
    "adam-mini": AdamMini(),
    "lion": Lion(),
    "sgd": SGD(),
    "momentum": SGD(momentum=0.9),
    "nesterov": SGD(momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_it_moves_as_the_reference_does(rule, coupled):
    torch.manual_seed(0)
    program = Program.of(rule, coupled=coupled)
    s = rule.scalars(3, rule.defaults)
    s.pop("bias_correction", None)
    p, g = torch.randn(1000), torch.randn(1000)
    state = {name: torch.rand(1000) for name in program.elements}
    ours = {"rate": 0.01, "clip": 0.3, "weight_decay" if coupled else "decay": 0.9}
    numbers = {**ours, **{f"scalar.{name}": s[name] for name in program.scalars}}
    found = program.move(
        p=p, g=g, **{f"state.{n}": t for n, t in state.items()}, **{n: torch.tensor(v) for n, v in numbers.items()}
    )
    own = {**s, "step": 0.01, "clip": 0.3, "weight_decay" if coupled else "decay": 0.9}
    update(rule, own, p, g, [Stored.dense(t) for t in state.values()])
    assert set(found) == {"p", *(f"state.{name}" for name in state)}
    for name, expected in {"p": p, **{f"state.{n}": t for n, t in state.items()}}.items():
        assert (found[name] - expected).norm() <= 1e-6 * expected.norm(), name


def test_the_phase_is_that_of_the_rule():
    rule, torch64 = AdamMini(), torch.float64
    program = Program.of(rule)
    s = {name: torch.tensor(v) for name, v in rule.scalars(3, rule.defaults).items() if name != "bias_correction"}
    mean, v = torch.rand(50, dtype=torch64), torch.rand(50)
    found = program.phase(mean=mean, **{"state.exp_avg_sq": v}, **{f"scalar.{n}": x for n, x in s.items()})
    new, below = rule.block_phase({"exp_avg_sq": v}, mean, s)
    assert torch.equal(found["denominator"], below)
    assert torch.equal(found["state.exp_avg_sq"], new["exp_avg_sq"])
    assert Program.of(AdamW()).phase is None


def test_numbers_of_a_schedule_change_no_text():
    texts = [Program.of(AdamW(betas=betas)).move.printed(CPP, _names(AdamW()))[0] for betas in [(0.9, 0.9), (0.8, 0.5)]]
    assert texts[0] == texts[1]
    inputs = _names(SGD(momentum=0.5))
    one, two = (Program.of(SGD(momentum=0.5, nesterov=n)).move.printed(CPP, inputs)[0] for n in (False, True))
    assert one != two


def test_an_operation_without_words():
    cubed = Arithmetic.of(lambda v: {"y": v["x"] ** 3}, {"x": torch.float32})
    with pytest.raises(NotImplementedError, match=r"no words in C\+\+ for aten.pow.Tensor_Scalar"):
        cubed.printed(CPP, {"x": "x"})


def test_a_number_takes_the_type_of_what_it_meets():
    compared = Arithmetic.of(lambda v: {"y": torch.where(v["x"] != 0.5, v["x"], -v["x"])}, {"x": torch.float32})
    assert "float(0.5)" in compared.printed(CPP, {"x": "x"})[0]


def _names(rule):
    return {name: name for name in Program.of(rule).move.inputs}
