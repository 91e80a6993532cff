"""A rule in a rotated basis: what stays as it is, what does not; and the equations with the rotation written out."""

import copy

import numpy as np
import pytest
import torch
from reference import driver, models, rig

import sharpwise
from sharpwise import rotated, testing

KINDS = pytest.mark.parametrize("by", ["matrix", "model"])
SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
ADAM = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def small():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()


def matrix_of(optimizer, n):
    """The whole of a rotation by="model", as it turns unit vectors."""
    unit = torch.eye(n, dtype=torch.float64)
    return rotated.turned(unit, optimizer._rounds_of("", n, unit)).numpy()


@pytest.mark.parametrize("n", [1, 2, 17, 1024, 1025, 1500])
def test_a_turning_is_orthogonal_and_mixes_all(n):
    unit = torch.eye(n, dtype=torch.float64)
    rounds = rotated.turning(n, "some", unit)
    turn = rotated.turned(unit, rounds)
    assert (turn @ turn.mT - unit).abs().max() <= 1e-12
    assert (rotated.turned(turn, rounds, back=True) - unit).abs().max() <= 1e-12
    if n > 16:
        assert turn.abs().max() < 0.9  # nothing is left as it was
    again, other = (rotated.turned(unit, rotated.turning(n, seed, unit)) for seed in ("some", "other"))
    assert torch.equal(turn, again) and (n == 1 or not torch.equal(turn, other))


def test_a_long_turning_is_an_array_of_three():
    one = torch.zeros(1_100_000, 1)
    one[7] = 1
    rounds = rotated.turning(len(one), "", one)
    assert [len(own.turns) for own in rounds] == [3, 3]
    turned = rotated.turned(one, rounds)
    assert abs(turned.norm().item() - 1) <= 1e-4 and (turned != 0).float().mean() > 0.9
    assert (rotated.turned(turned, rounds, back=True) - one).abs().max() <= 1e-5


@KINDS
@pytest.mark.parametrize("rule", ["adamw", "adasgd", "sgd"])
def test_the_function_at_step_0_is_that_of_the_model(rule, by):
    """Before the first step to the bit; and after one that moves nothing, which turns there and back."""
    model = models.build("nanogpt")
    before = copy.deepcopy(model)
    tokens = torch.arange(6)[None]
    optimizer = sharpwise.Rotated(model, rule, lr=0.0, by=by)
    optimizer.init_state()
    testing.fill_gradients(model, 0)
    optimizer.step()
    assert optimizer.state[next(model.parameters())]["step"] == 1
    rig.bit_equal(model, before)
    assert torch.equal(logits(model, tokens), logits(before, tokens))


def logits(model, tokens):
    found = model(tokens)
    return found[0] if isinstance(found, tuple) else getattr(found, "logits", found)


def both(make_first, make_second, n):
    """Two models after the same gradients."""
    first, second = small(), small()
    grads = driver.gradients(rig.named(first), n, missing=())
    for model, make in ((first, make_first), (second, make_second)):
        rig.steps(make(model), rig.named(model), grads, lambda t: driver.schedule(2e-3, t))
    return first, second


@KINDS
def test_sgd_does_not_know_the_basis(by):
    first, second = both(
        lambda m: sharpwise.Rotated(m, "sgd", by=by, **SGD),
        lambda m: sharpwise.SGD(m, decoupled_weight_decay=True, **SGD),
        20,
    )
    rig.near(first, second, 1e-12)


@KINDS
@pytest.mark.parametrize("rule", ["adamw", "adasgd"])
def test_adam_does_and_adasgd_does_not(rule, by):
    """AdaSGD's second moment is a norm, which no rotation changes."""
    plain = {"adamw": sharpwise.AdamW, "adasgd": sharpwise.AdaSGD}[rule]
    first, second = both(lambda m: sharpwise.Rotated(m, rule, by=by, **ADAM), lambda m: plain(m, **ADAM), 10)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    apart = max(driver.error(p, driver.as_array(q)) for p, q in pairs)
    assert (apart <= 1e-10) if rule == "adasgd" else (apart > 1e-2)


def test_adam_over_the_model_against_the_equations():
    model = small()
    named = list(model.named_parameters())
    grads = [{name: g * 0.1 for name, g in own.items()} for own in driver.gradients(named, 6, missing=())]
    optimizer = sharpwise.Rotated(model, "adamw", by="model", **ADAM)
    w = np.concatenate([driver.as_array(p).ravel() for _, p in named])
    turn = matrix_of(optimizer, w.size)
    w, m, v = turn @ w, np.zeros_like(w), np.zeros_like(w)
    (b1, b2), lr = ADAM["betas"], ADAM["lr"]
    for t, recorded in enumerate(grads, start=1):
        rig.steps(optimizer, named, [recorded])
        g = turn @ np.concatenate([driver.as_array(recorded[name]).ravel() for name, _ in named])
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w * (1 - lr * ADAM["weight_decay"]) - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + ADAM["eps"])
        got = np.concatenate([driver.as_array(p).ravel() for _, p in named])
        assert np.abs(got - turn.T @ w).max() <= 1e-12, t


def test_a_matrix_is_turned_on_both_sides():
    model = small()
    optimizer = sharpwise.Rotated(model, "adamw", **ADAM)
    w = model[0].weight.detach()
    got = optimizer._matrix("0.weight", w, False)
    u, v = (
        rotated.turned(torch.eye(n, dtype=torch.float64), optimizer._rounds_of(f"0.weight {side}", n, w))
        for side, n in (("rows", 7), ("columns", 5))
    )
    assert torch.allclose(got, u @ w @ v.mT, atol=1e-13)


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("rule", ["adamw", "adasgd", "sgd"])
def test_battery(rule, check):
    def make(first, **more):
        return sharpwise.Rotated(first, rule, lr=1e-3, **({"momentum": 0.9} if rule == "sgd" else {}), **more)

    try:
        check(make)
    except ValueError as error:  # of the types that checks try, bf16 is refused
        assert "is in bfloat16" in str(error)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "lion"}, "no rule is called 'lion'; there are adasgd, adamw, sgd"),
        ({"by": "layer"}, "by must be one of matrix, model, got 'layer'"),
        ({"block_lr": "blockwise"}, "leave block_lr out"),
        ({"control": "angular"}, "leave control out"),
        ({"by": "model", "no_decay": ("norm",)}, "leave no_decay out"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        sharpwise.Rotated(models.build("nanogpt"), **options)


def test_types_gradients_and_groups():
    with pytest.raises(ValueError, match=r"0\.weight is in bfloat16, which rounds"):
        sharpwise.Rotated(small().bfloat16())
    model = small()
    optimizer = sharpwise.Rotated(model, by="model")
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"0\.bias has no gradient"):
        optimizer.step()
    rig.bit_equal(model, before)
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    with pytest.raises(ValueError, match="settings are those of one group"):
        sharpwise.Rotated(groups, model=model, by="model")


@KINDS
def test_state_is_of_one_rotation(by):
    model, twin = small(), small()
    grads = driver.gradients(rig.named(model), 6, missing=())
    optimizer = sharpwise.Rotated(model, by=by)
    rig.steps(optimizer, rig.named(model), grads[:3])
    twin.load_state_dict(model.state_dict())
    resumed = sharpwise.Rotated(twin, by=by)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, its in ((optimizer, model), (resumed, twin)):
        rig.steps(own, rig.named(its), grads[3:])
    rig.bit_equal(model, twin)
    plain = sharpwise.AdamW(small())
    for other in (sharpwise.Rotated(small(), by=by, rotation_seed=1), plain):
        with pytest.raises(ValueError, match=f"saved with rotation '{by}, seed 0'"):
            other.load_state_dict(optimizer.state_dict())
    plain.init_state()
    with pytest.raises(ValueError, match="saved with rotation None"):
        sharpwise.Rotated(small(), by=by).load_state_dict(plain.state_dict())


def test_a_mesh_is_refused():
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, mesh = small(), init_device_mesh("cpu", (1,))
        model[0].weight = torch.nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh))
        with pytest.raises(ValueError, match=r"0\.weight is sharded over a mesh, and a rotation takes"):
            sharpwise.Rotated(model)
    finally:
        dist.destroy_process_group()
