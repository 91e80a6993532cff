"""A step is taken whole or not at all: whatever is wrong is found before the first write."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import sharpwise
from sharpwise.blocks import BlockMap
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.options import Options
from sharpwise.rules import AdamW
from sharpwise.testing import fill_gradients, tiny_model

LAST = "transformer.ln_f.bias"


def of_group(**changed):
    return lambda model, optimizer: optimizer.param_groups[-1].update(changed)


def without(key):
    return lambda model, optimizer: optimizer.param_groups[-1].pop(key)


def of_state(key, make):
    def break_it(model, optimizer):
        own = optimizer.state[model.get_parameter(LAST)]
        own[key] = make(own[key])

    return break_it


def gradient(make):
    def break_it(model, optimizer):
        parameter = model.get_parameter(LAST)
        parameter.grad.data = make(parameter.grad)

    return break_it


def sparse(model, optimizer):
    model.get_parameter("transformer.wpe.weight").grad = torch.zeros(8, 16).to_sparse()


FAULTS = {
    "a learning rate that is no number": of_group(lr=float("nan")),
    "a negative decay": of_group(weight_decay=-1.0),
    "betas out of range": of_group(betas=(0.9, 1.5)),
    "three betas": of_group(betas=(0.9, 0.99, 0.999)),
    "no betas": without("betas"),
    "an eps in words": of_group(eps="small"),
    "no decay": without("weight_decay"),
    "another rule": of_group(rule="lion"),
    "another way to decay": of_group(decoupled_weight_decay=False),
    "a seed that is none": of_group(seed=None),
    "no seed": without("seed"),
    "state of another shape": of_state("exp_avg", lambda t: t.new_zeros(3)),
    "state of whole numbers": of_state("exp_avg", lambda t: t.long()),
    "state that is no tensor": of_state("exp_avg", lambda t: 0.0),
    "state elsewhere": of_state("exp_avg", lambda t: t.to("meta")),
    "a gradient of another shape": gradient(lambda g: g.new_zeros(3)),
    "a sparse gradient": sparse,
}


def everything(model, optimizer):
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "state": {
            (n, k): v.clone()
            for n, p in model.named_parameters()
            for k, v in optimizer.state[p].items()
            if isinstance(v, torch.Tensor) and v.device.type != "meta"
        },
        "numbers": [
            {k: v for k, v in g.items() if k in ("skipped_steps", "peak_lr", "block_lr_step", "multiplier_ramp")}
            for g in optimizer.param_groups
        ],
    }


def nothing_changed(before, model, optimizer):
    after = everything(model, optimizer)
    assert before["numbers"] == after["numbers"]
    for what in ("parameters", "state"):
        assert before[what].keys() == after[what].keys()
        for key, value in before[what].items():
            assert torch.equal(value, after[what][key]), f"{what}: {key} was written"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {}),
        ("adamw", {"compile": False}),
        ("adam-mini", {}),
        ("adam-mini", {"max_grad_norm": 1.0, "on_nonfinite": "skip", "block_lr": "blockwise"}),
    ],
    ids=["adamw", "adamw, reference", "adam-mini", "adam-mini, guarded"],
)
def test_what_is_wrong_with_the_last_parameter_moves_none(name, options, fault):
    model = tiny_model()
    last = [model.get_parameter(LAST)]
    first = [p for n, p in model.named_parameters() if n != LAST]
    groups = [{"params": first}, {"params": last}]
    optimizer = sharpwise.create_optimizer(
        groups, name, lr=1e-2, model=model, storage="bf16", stochastic_rounding=True, **options
    )
    fill_gradients(model, 0)
    optimizer.step()
    fill_gradients(model, 1)
    FAULTS[fault](model, optimizer)
    before = everything(model, optimizer)
    with pytest.raises((ValueError, TypeError)):
        optimizer.step()
    nothing_changed(before, model, optimizer)


@dataclass(frozen=True)
class Failing(AdamW):
    """AdamW whose arithmetic fails: at once, or in its scalars from the second step on."""

    where: str = "direction"
    name: ClassVar[str] = "failing"

    def scalars(self, t, group):
        if self.where == "scalars" and t > 1:
            raise ValueError("no scalars")
        return super().scalars(t, group)

    def direction(self, g, state, s):
        if self.where == "direction":
            return super().direction(g, state, {**s, "b2": s["b3"]})
        new, numerator, denominator = super().direction(g, state, s)
        return (new if self.where != "names" else {"exp_avg": new["exp_avg"]}), numerator, denominator


@pytest.mark.parametrize("where", ["direction", "names", "scalars"])
@pytest.mark.parametrize("compiled", [None, False])
def test_a_rule_that_fails_moves_nothing(where, compiled):
    model = nn.Module()
    model.a, model.b = (nn.Parameter(torch.ones(300, 300)) for _ in range(2))
    options = Options(compile=compiled)
    rule = Failing(where=where)
    blocks = BlockMap.unknown(list(model.named_parameters()))
    optimizer = BlockOptimizer(model, rule, lr=0.1, weight_decay=0.1, options=options, blocks=blocks)
    gradients = torch.ones(300, 300)
    with pytest.raises(ValueError, match=r"fails|arithmetic|no scalars"):
        for _ in range(3):
            before = everything(model, optimizer) if where == "scalars" else None
            model.a.grad, model.b.grad = gradients, gradients
            optimizer.step()
    if before is None:
        assert torch.equal(model.a, torch.ones(300, 300))
    else:
        nothing_changed(before, model, optimizer)


def test_a_probe_that_fails_changes_nothing():
    model = tiny_model()
    optimizer = sharpwise.AdamW(
        model,
        lr=1e-2,
        block_lr="sharpness(source=probe, start=0, every=1)*blockwise(floor=1e-3)",
        total_steps=10,
        probe_batches=[{"no": torch.zeros(1)}],
    )
    optimizer.init_state()
    before = everything(model, optimizer)
    fill_gradients(model, 0)
    with pytest.raises(Exception):  # noqa: B017 - whatever the model raises
        optimizer.step()
    nothing_changed(before, model, optimizer)


@pytest.mark.parametrize("options", [{}, {"compile": False}, {"compile": True}], ids=str)
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("lion", {}),
        ("sgd", {"momentum": 0.9, "decoupled_weight_decay": True}),
        ("adamw", {"storage": "bf16"}),
        ("adam-mini", {}),
        ("adamw", {}),
    ],
    ids=["lion", "sgd", "adamw in bf16", "adam-mini", "adamw"],
)
def test_no_decay_of_a_part_of_small_fused_matrices(name, more, options):
    """q and k rows of every fused QKV keep their size; all else decays."""
    model = tiny_model()
    optimizer = sharpwise.create_optimizer(
        model, name, lr=0.1, weight_decay=0.5, no_decay=("q", "k"), **more, **options
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for layer in range(2):
        fused = f"transformer.h.{layer}.attn.c_attn.weight"
        now, then = model.get_parameter(fused), before[fused]
        assert torch.equal(now[:32], then[:32])
        torch.testing.assert_close(now[32:], then[32:] * 0.95)
    torch.testing.assert_close(model.get_parameter("transformer.ln_f.weight"), before["transformer.ln_f.weight"] * 0.95)
