"""State of a parameter that is frozen for a while: kept, saved and loaded, and used again once it trains."""

import copy

import pytest
import torch
from reference.rig import through_disk
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import sharpwise
from sharpwise.combinations import APART
from sharpwise.testing import fill_gradients, same, tiny_model

FROZEN = "transformer.h.0."
RULES = [name for name in sharpwise.list_optimizers() if name not in ("sgd", *APART)]


def freeze(model, frozen):
    for name, p in model.named_parameters():
        if name.startswith(FROZEN):
            p.requires_grad_(not frozen)


def run(model, optimizer, steps):
    """Steps with the gradients of these numbers; a frozen parameter has none."""
    for step in steps:
        fill_gradients(model, step, [n for n, p in model.named_parameters() if not p.requires_grad])
        optimizer.step()


def start(name, seed=0, frozen=False, **options):
    """An optimizer of all parameters, some of which are frozen."""
    model = tiny_model(seed=seed)
    freeze(model, frozen)
    return model, sharpwise.create_optimizer(list(model.parameters()), name, lr=1e-2, model=model, **options)


@pytest.mark.parametrize("block_lr", [None, "blockwise", "layer_decay(rate=0.9)"])
@pytest.mark.parametrize("name", RULES)
def test_state_frozen_when_it_is_loaded_is_kept_saved_and_used(name, block_lr):
    whole, steady = start(name, block_lr=block_lr)
    run(whole, steady, range(3))
    freeze(whole, True)
    run(whole, steady, range(3, 5))
    saved = through_disk({"model": whole.state_dict(), "optimizer": steady.state_dict()})
    for _ in range(2):  # resumed, saved and resumed again, while frozen
        model, optimizer = start(name, seed=1, frozen=True, block_lr=block_lr)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        again = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        now, then = again["optimizer"]["state"], saved["optimizer"]["state"]
        assert now.keys() == then.keys()
        for i, own in then.items():
            assert now[i].keys() == own.keys()
            assert all(torch.equal(now[i][key], value) for key, value in own.items())
        saved = again
    for one, other in ((whole, steady), (model, optimizer)):
        freeze(one, False)
        run(one, other, range(5, 8))
    assert same(whole, model)


def test_freezing_by_turns_with_a_save_at_every_turn():
    whole, steady = start("adamw")
    model, optimizer = start("adamw")
    for turn in range(4):
        for one, other in ((whole, steady), (model, optimizer)):
            freeze(one, turn % 2 == 1)
            run(one, other, range(2 * turn, 2 * turn + 2))
        saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        model, optimizer = start("adamw", seed=1, frozen=turn % 2 == 1)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    assert same(whole, model)
    counts = {n: int(optimizer.state[p]["step"]) for n, p in model.named_parameters()}
    assert counts[FROZEN + "ln_1.weight"] == 4
    assert counts["transformer.wte.weight"] == 8


@pytest.mark.parametrize("block_lr", ["sharpness(start=1, every=2, power=2)", "llr(every=2, stop=9, least=4)"])
def test_what_is_measured_goes_by_what_is_frozen_now(block_lr):
    """And not by what was frozen when the optimizer was built."""
    ends = []
    for frozen in (False, True):
        model, optimizer = start("adamw", frozen=frozen, block_lr=block_lr, total_steps=20)
        freeze(model, False)
        run(model, optimizer, range(5))
        ends.append(model)
    assert same(*ends)


def test_parameters_unfrozen_one_after_the_other_begin_with_their_first_step():
    whole, steady = start("adam-mini", frozen=True)
    run(whole, steady, range(2))
    held = [n for n, p in whole.named_parameters() if p in steady.state]
    assert held
    assert not any(n.startswith(FROZEN) for n in held), "what never trained holds no state"
    saved = through_disk({"model": whole.state_dict(), "optimizer": steady.state_dict()})
    model, optimizer = start("adam-mini", seed=1)  # unfrozen before it is loaded
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    freeze(whole, False)
    for one, other in ((whole, steady), (model, optimizer)):
        run(one, other, range(2, 5))
    assert same(whole, model)
    assert int(optimizer.state[model.get_parameter(FROZEN + "ln_1.weight")]["step"]) == 3


def test_the_state_dict_of_torch_distributed_has_frozen_state():
    """`get_optimizer_state_dict` names parameters; what it gives loads as it is."""
    whole, steady = start("adamw")
    run(whole, steady, range(3))
    freeze(whole, True)
    run(whole, steady, range(3, 5))
    saved = copy.deepcopy(get_optimizer_state_dict(whole, steady))
    assert any(name.startswith(FROZEN) for name in saved["state"])
    model, optimizer = start("adamw", seed=1, frozen=True)
    model.load_state_dict(whole.state_dict())
    optimizer.load_state_dict(saved)
    for one, other in ((whole, steady), (model, optimizer)):
        freeze(one, False)
        run(one, other, range(5, 7))
    assert same(whole, model)


def test_a_state_dict_refused_leaves_frozen_parameters_without_state():
    whole, steady = start("adamw")
    run(whole, steady, range(2))
    bad = copy.deepcopy(steady.state_dict())
    last = max(bad["state"])
    bad["state"][last]["exp_avg"] = torch.zeros(1, 2, 3)
    model, optimizer = start("adamw", frozen=True)
    run(model, optimizer, range(1))
    before = {
        n: {k: v.clone() for k, v in optimizer.state[p].items()}
        for n, p in model.named_parameters()
        if p in optimizer.state
    }
    lr = optimizer.param_groups[0]["lr"]
    bad["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(bad)
    assert optimizer.param_groups[0]["lr"] == lr
    after = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n][k], v) for n, own in before.items() for k, v in own.items())


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.strided], ids=str)
def test_frozen_parameters_may_be_of_any_kind(layout):
    """torch's guards end the process where a tensor has no strides."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.trained = nn.Parameter(torch.ones(3, 4))
            frozen = torch.eye(4).to_sparse_csr() if layout is torch.sparse_csr else torch.eye(4)
            self.frozen = nn.Parameter(frozen, requires_grad=False)

    model = Model()
    optimizer = sharpwise.AdamW([("trained", model.trained), ("frozen", model.frozen)], model=model, lr=1e-2)
    for _ in range(2):
        model.trained.grad = torch.ones(3, 4)
        optimizer.step()
    assert (model.trained < 1).all()
    assert list(optimizer.state) == [model.trained]
