"""A rule, a format, a control and a back end of a user's: each a class, and the engine takes it.

The classes stand in docs/guides/own_rule.md as they stand here, which a test holds.
"""

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import sharpwise
from sharpwise.controls import Control
from sharpwise.engine import BlockOptimizer, backends
from sharpwise.engine.backends.base import Backend, compiler_present
from sharpwise.engine.options import Options
from sharpwise.optim import OPTIMIZERS
from sharpwise.rules import SGD, AdamW, Rule
from sharpwise.rules.base import sign
from sharpwise.storage import BF16, Format
from sharpwise.testing import fill_gradients, run, same, tiny_model

needs_compiler = pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")


@dataclass(frozen=True)
class Signum(Rule):
    """m <- mu m + g;   p <- p - lr sign(m)"""

    mu: float = 0.9
    name: ClassVar[str] = "signum"
    hyperparameters: ClassVar[tuple[str, ...]] = ("mu",)

    @property
    def state(self):
        return {"m": "element"}

    def scalars(self, t, group):
        return {"mu": group["mu"]}

    def direction(self, g, state, s):
        m = s["mu"] * state["m"] + g
        return {"m": m}, sign(m), None


class Log8(Format):
    """A byte per number: its sign, and the logarithm of its size in steps of a twelfth, from 2**-9 to 2."""

    name = "log8"

    def dtype_for(self, compute):
        return torch.int8

    def decode(self, codes, absmax=None, compute=torch.float32):
        codes = codes.to(compute)
        return codes.sign() * torch.exp2((codes.abs() - 115) / 12)

    def encode(self, x, absmax=None, noise=None):
        size = (12 * x.abs().log2() + 115).round().clamp(0, 127)
        return (x.sign() * size).to(torch.int8)


@dataclass(frozen=True)
class Relative(Control):
    """The update of a row has lr times the norm of the row: it turns by the same angle, whatever the rule."""

    name: ClassVar[str] = "relative"
    over: ClassVar[str] = "row"

    def factors(self, sums, s):
        some = torch.where(sums.uu > 0, sums.uu, 1.0)
        return (sums.pp / some).sqrt(), torch.ones_like(some)


class PlainSGD(Backend):
    """SGD without momentum or any option, in two calls per tensor."""

    name = "plain"

    def refuses(self, spec):
        plain = type(spec.view.rule) is SGD and not spec.view.rule.state and spec.options == Options()
        return "" if plain and spec.view.uniform and not spec.view.copied else "plain SGD alone"

    def step(self, views, grads, scalars, found):
        for view, g in zip(views, grads, strict=True):
            s = scalars.named(view)
            view.parameter().mul_(s.get("decay", 1.0)).sub_(s["step"] * view.rows_of(g))


@pytest.mark.parametrize("kind", [Signum, Log8, Relative, PlainSGD])
def test_it_stands_in_the_guide_as_it_is_here(kind):
    text = (Path(__file__).parents[2] / "docs" / "guides" / "own_rule.md").read_text(encoding="utf-8")
    assert inspect.getsource(kind) in text


def built(model, rule, compile=None, **options):
    options = Options(compile=compile, **options)
    return BlockOptimizer(model, rule, lr=1e-2, weight_decay=0.1, options=options)


def moved(rule, compile=None, steps=4, **options):
    model = tiny_model()
    optimizer = built(model, rule, compile, **options)
    run(model, optimizer, range(steps))
    assert not same(model, tiny_model())
    return model, optimizer


def far(some, other):
    pairs = zip(some.parameters(), other.parameters(), strict=True)
    return max(float((p - q).detach().norm() / q.detach().norm()) for p, q in pairs)


# A rule


@needs_compiler
def test_a_rule_is_printed_and_is_the_reference():
    model, optimizer = moved(Signum())
    assert {row["backend"] for row in optimizer.explain()} == {"cpp"}
    assert far(model, moved(Signum(), compile=False)[0]) <= 1e-6


def test_a_rule_is_its_equations():
    model, p, m = tiny_model(), {}, {}
    optimizer = built(model, Signum())
    for t in range(3):
        fill_gradients(model, t)
        for name, own in model.named_parameters():
            m[name] = 0.9 * m.get(name, 0.0) + own.grad.double()
            p[name] = p.get(name, own.detach().double()) * (1 - 1e-3) - 1e-2 * m[name].sign()
        optimizer.step()
    for name, own in model.named_parameters():
        assert (own.double() - p[name]).norm() <= 1e-6 * p[name].norm()


@dataclass(frozen=True)
class Bent(Signum):
    """With an operation that no printer has."""

    name: ClassVar[str] = "bent"

    def direction(self, g, state, s):
        new, m, _ = super().direction(g, state, s)
        return new, torch.special.airy_ai(m), None


@needs_compiler
def test_where_a_printer_lacks_an_operation_the_reference_runs_and_the_reason_is_told(caplog):
    model, optimizer = moved(Bent())
    rows = optimizer.explain()
    assert {row["backend"] for row in rows} == {"reference"}
    assert all("cpp: no words in C++ for aten.special_airy_ai" in row["why"] for row in rows)
    assert same(model, moved(Bent(), compile=False)[0]) and not caplog.records


# A format


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_format_is_taken_by_every_constructor(name):
    model = tiny_model()
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = sharpwise.create_optimizer(model, name, lr=1e-3, storage=Log8(), **momentum)
    run(model, optimizer, range(3))
    rows = optimizer.explain()
    assert {row["storage"] for row in rows} == {"log8"}
    assert {row["backend"] for row in rows} <= {"reference", "matrices"}
    for own in optimizer.state.values():
        names = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # of AdaPM's some have no momentum
        key = next(key for name in names for key in own if key.partition(".")[0] == name)
        assert own[key].dtype == torch.int8
    assert not same(model, tiny_model()) and all(p.isfinite().all() for p in model.parameters())


@needs_compiler
def test_what_is_not_printed_for_it_is_told_and_a_byte_is_a_byte():
    model = tiny_model()
    optimizer = sharpwise.Lion(model, lr=1e-2, storage=Log8())
    assert all(row["why"] == "cpp: no words in C++ for aten.exp2.default" for row in optimizer.explain())
    numbers = sum(p.numel() for p in model.parameters())
    assert optimizer.state_bytes() == numbers + 4 * len(list(model.parameters()))


def test_what_is_stored_is_what_the_format_says():
    """Step by step, by hand: the rule sees what was decoded, and what it returns is encoded."""
    model = tiny_model()
    optimizer = sharpwise.Lion(model, lr=1e-2, betas=(0.9, 0.99), storage=Log8())
    held, p = {}, {name: own.detach().clone() for name, own in model.named_parameters()}
    for t in range(4):
        fill_gradients(model, t)
        for name, own in model.named_parameters():
            m = Log8().decode(held.get(name, torch.zeros_like(own, dtype=torch.int8)))
            p[name] = p[name] - 1e-2 * torch.lerp(m, own.grad, 0.1).sign()
            held[name] = Log8().encode(torch.lerp(own.grad, m, 0.99))
        optimizer.step()
        for name, own in model.named_parameters():
            assert torch.equal(optimizer.state[own]["exp_avg"], held[name]), (name, t)
            assert torch.equal(own, p[name]), (name, t)


def test_state_in_a_format_is_resumed_to_the_bit_and_is_never_cast():
    model, twin = tiny_model(), tiny_model()
    optimizer = sharpwise.Lion(model, lr=1e-2, storage=Log8())
    run(model, optimizer, range(3))
    twin.load_state_dict(model.state_dict())
    again = sharpwise.Lion(twin, lr=1e-2, storage=Log8())
    saved = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(saved)
    for one, other in ((model, optimizer), (twin, again)):
        run(one, other, range(3, 6))
    assert same(model, twin)
    with pytest.raises(ValueError, match=r"is stored as torch.int8, here as torch.float32: build the optim"):
        sharpwise.Lion(tiny_model(), lr=1e-2).load_state_dict(saved)
    plain = sharpwise.Lion(tiny_model(), lr=1e-2)
    with pytest.raises(ValueError, match=r"is stored as torch.float32, here as torch.int8: build the optim"):
        again.load_state_dict(plain.state_dict())


class Shifted(Log8):
    """Zeros are ones."""

    name = "shifted"

    def decode(self, codes, absmax=None, compute=torch.float32):
        return super().decode(codes, absmax, compute) + 1


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        (Shifted(), "^Lion: storage 'shifted' does not decode zeros to zeros"),
        (BF16.dtype, "^Lion: no storage is called torch.bfloat16"),
    ],
)
def test_a_format_that_the_engine_cannot_keep_is_refused(storage, says):
    with pytest.raises(ValueError, match=says):
        sharpwise.Lion(tiny_model(), storage=storage)


# A control


def test_a_control_bounds_what_a_rule_does():
    model = tiny_model()
    optimizer = BlockOptimizer(model, AdamW(), lr=1e-2, weight_decay=0.0, options=Options(control=Relative()))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}
    fill_gradients(model, 0)
    optimizer.step()
    for name, p in before.items():
        turned = (model.get_parameter(name) - p).norm(dim=1)
        assert torch.allclose(turned, 1e-2 * p.norm(dim=1), rtol=1e-4), name
    assert {row["control"] for row in optimizer.explain() if row["name"] in before} == {"relative"}


# A back end


@pytest.fixture
def plain():
    backends.add_backend(PlainSGD, "cpu")
    yield
    backends.remove_backend(PlainSGD)
    assert "plain" not in backends.ORDER["cpu"] and "plain" not in backends.BACKENDS


def test_a_back_end_is_asked_first_and_refused_views_go_on(plain):
    model, optimizer = moved(SGD())
    assert {row["backend"] for row in optimizer.explain()} == {"plain"}
    backend = optimizer._backends.by_name["plain"]
    assert far(model, moved(SGD(), compile=False)[0]) <= 1e-6
    rows = moved(SGD(0.9))[1].explain()
    assert {row["backend"] for row in rows} <= {"cpp", "reference"}
    assert all(row["why"].startswith("plain") for row in rows) and isinstance(backend, PlainSGD)


def test_after_it_is_taken_back_nothing_is_left_of_it(plain):
    backends.remove_backend(PlainSGD)
    assert "plain" not in {row["backend"] for row in moved(SGD())[1].explain()}
    backends.add_backend(PlainSGD, "cpu")
    with pytest.raises(ValueError, match=r"a back end is called 'plain' already: .*cpp"):
        backends.add_backend(PlainSGD, "cuda")
