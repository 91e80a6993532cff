"""aux_lr: a learning rate of its own for what is no hidden matrix, with every rule; and AdamH, which has one."""

import pytest
import torch
from engine.test_control import MATRICES, model_of, segments

import sharpwise
from sharpwise.blocks import BlockMap
from sharpwise.optim import OPTIMIZERS
from sharpwise.testing import fill_gradients

HIDDEN = [name for name in MATRICES if name != "narrow"]
OWN = {
    "adapm": {"momentum": "full", "clip": None},
    "sgd": {"momentum": 0.9},
    "sgd-sai": {"weight_decay": 0.0},  # of it all blocks decay alike, at lr
}


def trained(name, lr, steps=3, **options):
    """Weights after steps under a schedule that halves lr."""
    model = model_of()
    optimizer = sharpwise.create_optimizer(model, name, lr=lr, blocks=BlockMap(segments()), **options)
    for t in range(steps):
        fill_gradients(model, t)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / 2
    return {key: p.detach() for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_rest_moves_as_at_its_own_rate(name):
    """Each half is that of an optimizer of one rate. Powers of 2, so that no rounding differs."""
    lr, own = 2**-7, OWN.get(name, {}) | {"compile": False}
    both = trained(name, lr, aux_lr=lr / 8, **own)
    at = {rate: trained(name, rate, **own) for rate in (lr, lr / 8)}
    for key, value in both.items():
        assert torch.equal(value, at[lr if key in HIDDEN else lr / 8][key]), key
        assert not torch.equal(at[lr][key], at[lr / 8][key])


def test_adamh_is_two_halves():
    lr, aux = 2**-7, 2**-10
    found = trained("adamh", lr, aux_lr=aux, weight_decay=0.1)
    sphere = trained("adamw", lr, control="hyperball", weight_decay=0.1)
    plain = trained("adamw", aux, weight_decay=0.1)
    for key, value in found.items():
        assert torch.equal(value, (sphere if key in HIDDEN else plain)[key]), key


def test_one_rate_is_no_option():
    lr = 2**-7
    one, other = trained("adamw", lr, aux_lr=lr), trained("adamw", lr)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_it_comes_on_top_of_a_block_lr():
    model = model_of()
    optimizer = sharpwise.AdamW(
        model, 1e-2, aux_lr=1e-3, block_lr="blockwise(ffn=4)", blocks=BlockMap(segments()), max_grad_norm=1.0
    )
    rates = {row["name"]: row["multiplier"] for row in optimizer.lr_multipliers()}
    assert rates["rows"] == 4.0 and rates["norm"] == pytest.approx(0.1)
    assert optimizer.param_groups[0]["block_lr"] == "aux_lr(ratio=0.1)*blockwise(ffn=4)"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"aux_lr": "1e-3"}, TypeError, "AdamW: lr and aux_lr must be numbers"),
        ({"aux_lr": -1.0}, ValueError, "aux_lr must be a finite number >= 0, got -1.0"),
        ({"aux_lr": 1e-3, "lr": 0.0}, ValueError, "got lr=0.0; build it with the lr of the peak"),
    ],
    ids=str,
)
def test_bad_rates(options, error, says):
    with pytest.raises(error, match=says):
        sharpwise.AdamW(model_of(), blocks=BlockMap(segments()), **options)


def test_a_rotation_has_one_rate():
    with pytest.raises(ValueError, match="leave aux_lr out"):
        sharpwise.Rotated(torch.nn.Linear(4, 4), "adamw", aux_lr=1e-3)
