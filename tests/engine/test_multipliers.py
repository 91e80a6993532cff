"""Multipliers that follow a measurement, where they meet the rest: other models and state, compiled steps, owners."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import sharpwise
from sharpwise import testing
from sharpwise.block_lr import PerRole
from sharpwise.engine.backends.base import compiler_present
from sharpwise.engine.mesh import OwnerExchange, ReduceGroup
from sharpwise.testing import run, tiny_model


def multipliers(optimizer: Any) -> list[float]:
    return [row["multiplier"] for row in optimizer.lr_multipliers()]


@pytest.mark.parametrize("block_lr", ["gradient_snr", "mean_matched(gradient_snr)", "per_role(ratios={'0.*': 2})"])
def test_a_model_that_is_no_transformer(block_lr: str) -> None:
    """What tells no roles apart does not ask for them."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    for optimizer in (
        sharpwise.AdamW(model, block_lr=block_lr),
        sharpwise.AdamW(model.named_parameters(), block_lr=block_lr),
    ):
        model(torch.ones(2, 3, 4, 4)).sum().backward()
        optimizer.step()
    assert sharpwise.SGDSaI(model).blocks.unexplained
    for told in ("blockwise", "per_role(ratios={FFN: 2})", "gradient_snr*blockwise", "only(gradient_snr, types=FFN)"):
        with pytest.raises(ValueError, match="distinguishes roles"):
            sharpwise.AdamW(model, block_lr=told)


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        ("llr(least=4, stop=0, soft=0)", "gradient_snr"),
        ("gradient_snr", "blockwise"),
        ("blockwise", "gradient_snr"),
        (None, "sharpness(start=1, every=2)"),
        ("sharpness(start=1, every=2)*layer_decay", "sharpness(start=1, every=2)"),
    ],
)
def test_state_of_another_block_lr_begins_anew(saved: str | None, loading: str, caplog: Any) -> None:
    model = tiny_model()
    before = sharpwise.AdamW(model, lr=1e-3, block_lr=saved)
    run(model, before, range(3))
    optimizer, fresh = (sharpwise.AdamW(model, lr=1e-3, block_lr=loading) for _ in range(2))
    run(model, optimizer, range(2))  # what it has measured itself goes, too
    with caplog.at_level(logging.WARNING, logger="sharpwise"):
        optimizer.load_state_dict(before.state_dict())
    assert "begins anew" in caplog.text
    assert multipliers(optimizer) == multipliers(fresh)
    assert all(own["step"] == 3 for own in optimizer.state.values())
    if fresh.options.varies:
        assert {group["block_lr_step"] for group in optimizer.param_groups} == {3}
        assert all(not own["block_lr_measured"].any() for own in optimizer.state.values())
    optimizer.load_state_dict(optimizer.state_dict())
    run(model, optimizer, range(3, 6))


def test_the_optimizer_moves_no_norm(caplog: Any) -> None:
    """As beside another that moves them: there is nothing to compare with, which is said once."""
    model = tiny_model()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = sharpwise.AdamW([{"params": matrices}], model=model, block_lr="sharpness(start=1, every=1)")
    with caplog.at_level(logging.WARNING, logger="sharpwise"):
        run(model, optimizer, range(4))
    assert set(multipliers(optimizer)) == {1.0}
    assert caplog.text.count("all multipliers are 1: the optimizer moves no Norm") == 1


def test_the_last_of_equal_names_holds() -> None:
    assert PerRole([("FFN", 2), ("*.0.*", 3), ("FFN", 4)]) == PerRole({"*.0.*": 3, "FFN": 4})


@pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["adam-mini", "adamw"])
def test_nothing_is_compiled_when_a_multiplier_leaves_1(name: str) -> None:
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, vocab_size=512
    )
    model = transformers.LlamaForCausalLM(config)
    block_lr = "sharpness(start=3, every=1, soft=2, by=module, power=3)"
    optimizer = sharpwise.create_optimizer(model, name, lr=1e-3, block_lr=block_lr, compile=True)
    seen = []
    for step in range(6):
        testing.fill_gradients(model, step)
        optimizer.step()
        seen.append((set(multipliers(optimizer)) == {1.0}, optimizer.compiled_graphs))
    assert seen[0][0] and not seen[-1][0]
    assert len({graphs for _, graphs in seen}) == 1, seen


def test_all_processes_assign_the_same_owners() -> None:
    """A matrix that is cut along one dimension of a mesh has other holders in other processes."""

    def shard(*holders: int) -> Any:
        return SimpleNamespace(shape=(8, 8), holders=holders, cut=(0,))

    here = OwnerExchange(ReduceGroup(), [shard(0, 2), shard(0, 1, 2, 3), shard(0, 1, 2, 3)]).owners
    there = OwnerExchange(ReduceGroup(), [shard(1, 3), shard(0, 1, 2, 3), shard(0, 1, 2, 3)]).owners
    assert here[1:] == there[1:]
    assert (here[0], there[0]) in {(0, 1), (2, 3)}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen later", "thawed later"])
def test_a_probe_sees_what_is_trained_now(frozen: bool) -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    changed = model.get_parameter("transformer.h.0.mlp.c_fc.weight").requires_grad_(frozen)
    batch = torch.arange(16).view(2, 8)
    options = {"block_lr": "sharpness(source=probe, start=0, every=1, soft=0)", "probe_batches": [batch]}
    optimizer = sharpwise.Lion(model, lr=1e-4, **options)
    changed.requires_grad_(not frozen)
    model(batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.step()
    assert any(m != 1.0 for m in multipliers(optimizer))


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])
@pytest.mark.parametrize("decay", ["scaled", "base"])
def test_a_device_works_out_what_the_host_does(decay: str, decoupled: bool) -> None:
    """Rates and decays from the factors that a device is given, and those of the host."""
    model = tiny_model()
    block_lr = sharpwise.LayerDecay(rate=0.5, decay=decay)
    options = {"weight_decay": 0.1, "block_lr": block_lr, "decoupled_weight_decay": decoupled}
    optimizer = sharpwise.SGD(model, lr=0.3, **options)
    run(model, optimizer, range(1))
    stepper = optimizer._bind()
    stepper.scalars.begin(stepper.views)
    for view in stepper.views:
        pairs = zip(stepper.scalars.factors(view), stepper.scalars.rows(view), strict=True)
        for (lr, of_rate, of_decay, wd, _), row in pairs:
            assert row.rate == lr * of_rate
            if decoupled:
                assert row.decay == pytest.approx(1 - lr * of_decay * wd, rel=1e-15)
            else:
                assert row.weight_decay == wd
