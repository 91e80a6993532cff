"""Sharpness from an optimizer's second moment is that of the gradients it has seen."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import sharpwise
from probes.exact import CONTEXT, exact, gpt2, tokens
from sharpwise import probes

SHARPNESS = {"quantity": "sharpness"}


def train(optimizer, model, steps):
    """Squares of all gradients by parameter, step by step."""
    model.eval()  # dropout off
    seen = []
    for step in range(steps):
        batch = tokens(seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        seen.append({n: p.grad.square() for n, p in model.named_parameters()})
        optimizer.step()
    return seen


@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_after_one_step_it_is_the_sharpness_with_true_labels(name):
    model = gpt2()
    expected = probes.sharpness(model, tokens(), labels="true")
    optimizer = sharpwise.create_optimizer(model, name, lr=1e-3)
    train(optimizer, model, 1)
    found = probes.sharpness_from_optimizer(optimizer, tokens=3 * CONTEXT)
    assert [(e.by, e.of, e.layer, e.elements) for e in found] == [
        (e.by, e.of, e.layer, e.elements) for e in expected.select(**SHARPNESS)
    ]
    for one, other in zip(found, expected, strict=False):
        assert one.value == pytest.approx(other.value, rel=1e-9, abs=1e-20)
        assert (one.error, one.samples, one.unit) == (None, 1, "per token")
    assert found.settings["labels"] == "true" and found.cost.gradients == 0


@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_later_it_is_the_average_of_past_gradients(name):
    model = gpt2()
    optimizer = sharpwise.create_optimizer(model, name, lr=1e-2, betas=(0.9, 0.8))
    seen = train(optimizer, model, 3)
    found = probes.sharpness_from_optimizer(optimizer)
    weights = 0.2 * 0.8 ** np.arange(2, -1, -1) / (1 - 0.8**3)
    fused = "transformer.h.1.attn.c_attn.weight"
    expected = sum(w * float(one[fused][:, 4:8].mean()) for w, one in zip(weights, seen, strict=True))
    assert found.value(by="segment", of=f"{fused}[k]") == pytest.approx(expected, rel=1e-9)
    everything = [float(sum(g.sum() for g in one.values())) / exact().selection.dim for one in seen]
    assert found.value(by="model") == pytest.approx(np.dot(weights, everything), rel=1e-9)
    assert found[0].samples == round(1 / np.sum(weights**2))
    assert found[0].unit == "per token, over the tokens of a step"


def test_what_was_never_stepped_is_left_out():
    model = gpt2()
    optimizer = sharpwise.AdamW(model, lr=1e-3)
    train(optimizer, model, 1)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        probes.sharpness_from_optimizer(optimizer, tokens=0)
    model.transformer.wpe.weight.requires_grad_(False)
    other = sharpwise.AdamW(model, lr=1e-3)
    model.transformer.wte.weight.requires_grad_(True)
    train_only_wte(other, model)
    assert {e.of for e in probes.sharpness_from_optimizer(other).select(by="role")} == {"tok_emb"}


def train_only_wte(optimizer, model):
    optimizer.zero_grad()
    model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
    optimizer.step()


@pytest.mark.parametrize("name", ["lion", "sgd"])
def test_rules_without_second_moment_say_which_have_one(name):
    optimizer = sharpwise.create_optimizer(gpt2(), name, lr=1e-3)
    with pytest.raises(TypeError, match=f"rule '{name}' keeps no second moment.*AdamW keeps one per element, AdamMini"):
        probes.sharpness_from_optimizer(optimizer)


def test_bad_input():
    model = gpt2()
    with pytest.raises(TypeError, match="got AdamW, expected sharpwise"):
        probes.sharpness_from_optimizer(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="has not taken a step yet"):
        probes.sharpness_from_optimizer(sharpwise.AdamW(model, lr=1e-3))


def test_sharded_state_gives_the_same(tmp_path):
    """FSDP2 cuts rows in one layout and along them in the other; a model that is sharded itself is refused."""
    from distributed.launch import launch

    found = launch("probes.sharded_worker", 2, tmp_path)
    assert len(found["values"]) == 4
    for sharded, plain in found["values"].values():
        assert sharded == pytest.approx(plain, rel=1e-5)
    assert "is sharded (a DTensor); measure a copy" in found["refusal"]
