"""Parameter groups by block type: which parameters get which settings, what cannot be meant, and what a step does."""

import numpy as np
import pytest
import torch
from blocks.models import gpt2_config
from torch import nn
from train.kill_rig import Tiny

import sharpwise
from sharpwise.blocks import BlockMap
from sharpwise.train.config import OptimizerConfig
from sharpwise.train.config_file import as_given, make_config
from sharpwise.train.optimizer import as_code, build_optimizer


def by_name(groups):
    return {
        name: {key: value for key, value in group.items() if key != "params"}
        for group in groups
        for name, _ in group["params"]
    }


def test_the_last_key_that_matches_holds_for_each_setting():
    model = Tiny(11)
    kinds = {segment.name: str(segment.block_type) for segment in BlockMap.of(model).segments}
    down = next(name for name, kind in kinds.items() if kind == "FFN" and "down" in name)
    found = by_name(
        sharpwise.param_groups(model, {"FFN": {"weight_decay": 0.3, "betas": (0.8, 0.9)}, down: {"weight_decay": 0.7}})
    )
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    for name, kind in kinds.items():
        own = {"weight_decay": 0.7 if name == down else 0.3, "betas": (0.8, 0.9)} if kind == "FFN" else {}
        assert found[name] == own, name
    other = {down: {"weight_decay": 0.7}, "FFN": {"weight_decay": 0.3}}
    assert by_name(sharpwise.param_groups(model, other))[down] == {"weight_decay": 0.3}


def test_biases_and_what_is_frozen():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].requires_grad_(False)
    groups = sharpwise.param_groups(model, {"bias": {"weight_decay": 0.0}})
    assert by_name(groups) == {"0.weight": {}, "0.bias": {"weight_decay": 0.0}}
    assert groups[0].keys() == {"params"}  # what has no settings comes first


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"FNN": {"eps": 0.1}}, ValueError, r"param_groups: 'FNN' is no block of this model \(did you mean 'FFN'\?\)"),
        ({"*.fc.*": {"eps": 0.1}}, ValueError, r"'\*\.fc\.\*' is no block of this model"),
        ({}, TypeError, "expected settings by block type, such as .*, got nothing"),
        (["Emb"], TypeError, "expected settings by block type, such as .*, got list"),
        ({"Emb": 0.1}, TypeError, r"such as .*, got \{'Emb': 0\.1\}"),
        ({"Emb": {"params": []}}, ValueError, "'Emb' has 'params', which is no setting of a group"),
    ],
)
def test_what_cannot_be_meant(settings, error, message):
    with pytest.raises(error, match=message):
        sharpwise.param_groups(Tiny(11), settings)


def test_a_part_of_a_parameter_has_no_settings_of_its_own():
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(gpt2_config())
    with pytest.raises(
        ValueError, match=r"'QK' takes a part of .*c_attn.weight, which holds q, k and v, .* give QK and"
    ):
        sharpwise.param_groups(model, {"QK": {"weight_decay": 0.0}})
    with pytest.raises(ValueError, match=r"'q' takes a part of .*c_attn.weight"):
        sharpwise.param_groups(model, {"q": {"weight_decay": 0.0}})
    alike = {"QK": {"weight_decay": 0.0}, "VO": {"weight_decay": 0.0}}
    named = {"VO": {"weight_decay": 0.0}, "*.c_attn.*": {"weight_decay": 0.0}}
    for settings in (alike, named):
        found = by_name(sharpwise.param_groups(model, settings))
        assert {name for name, own in found.items() if own} == {name for name in found if ".attn." in name}


def test_roles_that_nothing_explains_are_not_guessed():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises((TypeError, ValueError), match="'Other' distinguishes roles, and nothing explains"):
        sharpwise.param_groups(model, {"Other": {"weight_decay": 0.0}})


def test_a_model_without_biases():
    with pytest.raises(ValueError, match="'bias' matches nothing"):
        sharpwise.param_groups(nn.Linear(2, 2, bias=False), {"bias": {"weight_decay": 0.0}})


@pytest.mark.parametrize("kind", [sharpwise.AdamW, torch.optim.AdamW])
def test_steps_are_those_of_adamw_with_settings_of_each_parameter(kind):
    torch.manual_seed(3)
    model = Tiny(11).double()
    settings = {"Emb": {"weight_decay": 0.0}, "FFN": {"betas": (0.8, 0.9)}, "Norm": {"eps": 1e-3, "weight_decay": 0.5}}
    groups = sharpwise.param_groups(model, settings)
    more = {"model": model} if kind is sharpwise.AdamW else {}
    lr, usual = 1e-2, {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    own = {name: {**usual, **mine} for name, mine in by_name(groups).items()}  # before torch takes the names out
    optimizer = kind(groups, lr=lr, **usual, **more)
    assert len({str(mine) for mine in own.values()}) == 4
    wanted = {name: (p.detach().numpy().copy(), 0.0, 0.0) for name, p in model.named_parameters()}
    for t in (1, 2, 3):
        for name, param in model.named_parameters():
            param.grad = torch.randn_like(param)
            (p, m, v), g = wanted[name], param.grad.numpy()
            (b1, b2), eps, decay = own[name]["betas"], own[name]["eps"], own[name]["weight_decay"]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            p = p * (1 - lr * decay) - lr * m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
            wanted[name] = p, m, v
        optimizer.step()
        for name, param in model.named_parameters():
            np.testing.assert_allclose(param.detach().numpy(), wanted[name][0], rtol=1e-12, atol=1e-14, err_msg=name)


# --- in a configuration ----------------------------------------------------------------------------------------------


def optimizer_of(**table) -> OptimizerConfig:
    return make_config({"optimizer": {"name": "adamw", **table}}).optimizer


def test_a_configuration_has_settings_by_type():
    own = optimizer_of(settings_of={"Emb": {"weight_decay": 0.0}, "FFN": {"betas": [0.8, 0.9]}}, no_decay=["norm"])
    assert make_config({"optimizer": as_given(own)}).optimizer == own
    model = Tiny(11)
    found = build_optimizer(own, model)
    kinds = {segment.name: str(segment.block_type) for segment in found.blocks.segments}
    for group in found.param_groups:
        for name in group["param_names"]:
            assert group["weight_decay"] == (0.0 if kinds[name] == "Emb" else 0.01)
            assert group["betas"] == ((0.8, 0.9) if kinds[name] == "FFN" else (0.9, 0.999))
    said = as_code(own)
    assert said.startswith(
        "sharpwise.create_optimizer(sharpwise.param_groups(model, {'Emb': {'weight_decay': 0.0}, 'FFN': {'betas': ("
        "0.8, 0.9)}}), 'adamw', model=model, lr=0.001, "
    )
    again = eval(said, {"sharpwise": sharpwise, "model": model})
    assert [g["betas"] for g in again.param_groups] == [g["betas"] for g in found.param_groups]


def test_another_library_takes_them_too():
    own = optimizer_of(name="torch.optim:RAdam", lr=0.1, settings_of={"Emb": {"weight_decay": 0.5}}, no_decay=["norm"])
    model = Tiny(11)
    kinds = {segment.name: str(segment.block_type) for segment in BlockMap.of(model).segments}
    decays = {
        id(p): group["weight_decay"] for group in build_optimizer(own, model).param_groups for p in group["params"]
    }
    for name, param in model.named_parameters():
        assert decays[id(param)] == (0.5 if kinds[name] == "Emb" else 0.0)
    assert as_code(own).startswith(
        "torch.optim.RAdam(sharpwise.param_groups(model, {'Emb': {'weight_decay': 0.5}}), lr="
    )
    with pytest.raises(
        ValueError, match=r"'Emb' has 'betaz' \(did you mean 'betas'\?\); the groups of torch.optim:RAdam"
    ):
        build_optimizer(optimizer_of(name="torch.optim:RAdam", lr=0.1, settings_of={"Emb": {"betaz": 0.5}}), model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"Emb": 0.1}, "optimizer.settings_of: expected settings by block type"),
        ({"Emb": {"lr": 0.1}}, "optimizer.settings_of: 'Emb' has an lr, and the schedule sets that of all .*block_lr"),
        (
            {"Emb": {"weight_decy": 0.1}},
            "AdamW: a group has 'weight_decy', which nothing reads; did you mean 'weight_decay'",
        ),
        ({"Emb": {"decay": 0.1}}, "'Emb' has 'decay'; the groups of adamw may differ in"),
        (
            {"Emb": {"storage": "bf16"}},
            "AdamW: storage is fixed when the optimizer is built",
        ),
        ({"Emb": {"betas": [0.9]}}, "betas must be two numbers"),
        ({"Emb": {"weight_decay": -1.0}}, "weight_decay must be a finite number >= 0"),
        ({"emb": {"weight_decay": 0.1}}, "'emb' is no block of this model"),
    ],
)
def test_a_configuration_that_cannot_be_meant(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build_optimizer(optimizer_of(settings_of=settings), Tiny(11))
