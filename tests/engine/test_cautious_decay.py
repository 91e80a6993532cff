"""Cautious decay: one place in every back end, in the groups, in what is loaded. The equations: tests/reference."""

import copy

import pytest
import torch

import sharpwise
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.engine.backends.base import compiler_present
from sharpwise.optim import OPTIMIZERS
from sharpwise.testing import fill_gradients, run, same, tiny_model

DECOUPLED = {name: {"decoupled_weight_decay": True} if name == "sgd" else {} for name in OPTIMIZERS}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def of(model, name, **options):
    return sharpwise.create_optimizer(model, name, **{"lr": 1e-2, **DECOUPLED[name], **options})


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@every_optimizer
def test_without_decay_it_changes_no_bit(name, compiled):
    models = [tiny_model(), tiny_model(), tiny_model()]
    for model, decay, cautious in zip(models, (0.0, 0.0, 0.1), (False, True, True), strict=True):
        run(model, of(model, name, weight_decay=decay, cautious_decay=cautious, compile=compiled), range(4))
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def two_kinds_of_rows(transposed, dtype):
    """Of which q does not decay, and up does: every row has a factor of its own."""
    shape = (259, 66) if transposed else (66, 259)
    parts = [(Role.Q, {"heads": 6, "length": 30}), (Role.UP, {"start": 30, "length": 36})]
    segments = tuple(Segment("w", shape, role=r, dim=int(transposed), source="said", layer=0, **p) for r, p in parts)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.linspace(-1, 1, 66 * 259).view(shape).to(dtype))
    return model, BlockMap(segments)


@pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_optimizer
def test_the_kernels_are_the_reference(name, dtype, transposed):
    """In bf16 to the unit in the last place, of a step: where it rounds the other way, signs go their own ways."""
    found = []
    for compiled in (True, False):
        model, blocks = two_kinds_of_rows(transposed, dtype)
        lr = {} if name == "sgd-sai" else {"block_lr": "blockwise"}
        options = {"weight_decay": 0.5, "no_decay": ("q",), "max_grad_norm": 0.5, "cautious_decay": True, **lr}
        optimizer = of(model, name, blocks=blocks, compile=compiled, **options)
        for t in range(4 if dtype == torch.float32 else 1):
            fill_gradients(model, t)
            optimizer.step()
        found.append((model.w.detach(), optimizer))
    moved_by = {"adapm": "thin", "muon": "matrices"}.get(name, "cpp")
    assert {row["backend"].split()[0] for row in found[0][1].explain()} == {moved_by}
    mine, theirs = (p.double() for p, _ in found)
    if dtype == torch.bfloat16:
        assert ((mine - theirs).abs() <= 2.0**-7 * theirs.abs()).all()
    else:
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_coupled_decay_says_what_to_do():
    with pytest.raises(ValueError, match=r"^SGD: cautious_decay=True .*give decoupled_weight_decay=True as well"):
        sharpwise.SGD(tiny_model(), cautious_decay=True)
    with pytest.raises(TypeError, match=r"^AdamW: cautious_decay must be True or False, got 1"):
        sharpwise.AdamW(tiny_model(), cautious_decay=1)


def test_the_explanation_tells():
    rows = of(tiny_model(), "adamw", weight_decay=0.1, cautious_decay=True, no_decay=("norm",)).explain()
    assert {row["decay"] for row in rows} == {"0.1 (cautious)", 0.0}
    assert {row["decay"] for row in rows if row["role"] == "norm"} == {0.0}


def test_it_stands_in_the_groups_and_is_not_changed_there():
    optimizer = of(tiny_model(), "lion", cautious_decay=True)
    assert optimizer.param_groups[0]["cautious_decay"] is True
    assert "cautious_decay" not in of(tiny_model(), "lion").param_groups[0]
    for cautious in (True, False):
        model = tiny_model()
        optimizer = of(model, "lion", cautious_decay=cautious)
        optimizer.param_groups[0]["cautious_decay"] = not cautious
        fill_gradients(model, 0)
        with pytest.raises(ValueError, match=f"cautious_decay is fixed .*as {cautious}; a group has {not cautious}"):
            optimizer.step()


def test_a_run_is_resumed_as_it_decayed():
    model, twin = tiny_model(), tiny_model()
    optimizer = of(model, "adamw", weight_decay=0.1, cautious_decay=True)
    run(model, optimizer, range(3))
    twin.load_state_dict(model.state_dict())
    again = of(twin, "adamw", weight_decay=0.1, cautious_decay=True)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in ((model, optimizer), (twin, again)):
        run(one, other, range(3, 6))
    assert same(model, twin)


@pytest.mark.parametrize("cautious", [True, False], ids=["to plain", "to cautious"])
def test_state_that_decayed_in_another_way_is_refused(cautious):
    model, twin = tiny_model(), tiny_model()
    optimizer = of(model, "adamw", weight_decay=0.1, cautious_decay=cautious)
    run(model, optimizer, range(2))
    again = of(twin, "adamw", weight_decay=0.1, cautious_decay=not cautious)
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"saved with weight_decay=0.1 .*shrinks the parameter.* Build an optim"):
        again.load_state_dict(saved)
    saved["param_groups"][0]["weight_decay"] = 0.0
    again.load_state_dict(saved)
    assert again.param_groups[0].get("cautious_decay", False) is not cautious
