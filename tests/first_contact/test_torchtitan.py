"""torchtitan 0.3: our component in its container, under its schedule, saved and loaded as its checkpoints are."""

import copy
from typing import Any

import pytest
import torch
from first_contact.tiny import assert_same_weights, assert_trained, batches, gpt2, loss_of

import sharpwise

pytest.importorskip("torchtitan.components.optimizer")
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

from sharpwise.integrations.torchtitan import SharpwiseOptimizers, sharpwise_optimizer


def train(model: torch.nn.Module, optimizers: Any, schedulers: Any, data: list[torch.Tensor]) -> None:
    for tokens in data:
        loss_of(model, tokens).backward()
        optimizers.step()
        schedulers.step()
        optimizers.zero_grad()


def build(model: torch.nn.Module, name: str = "adam-mini") -> tuple[Any, Any]:
    config = sharpwise_optimizer(name, lr=1e-2, weight_decay=0.1, block_lr="blockwise")
    optimizers = config.build(model_parts=[model])
    return optimizers, LRSchedulersContainer.Config(warmup_steps=3).build(optimizers=optimizers, training_steps=20)


# torchtitan 0.3 loads its schedule by get_lr(), which torch wants to be called inside of step() alone
@pytest.mark.filterwarnings("ignore:To get the last learning rate computed by the scheduler:UserWarning")
@pytest.mark.parametrize("name", ["adam-mini", "muon"])
def test_the_component_equals_the_plain_loop_and_resumes(name: str) -> None:
    titan, plain = gpt2(), gpt2()
    optimizers, schedulers = build(titan, name)
    own = sharpwise.create_optimizer(plain, name, lr=1e-2, weight_decay=0.1, block_lr="blockwise")
    assert next(iter(optimizers)).blocks == own.blocks
    lambdas = schedulers.schedulers[0].lr_lambdas
    train(plain, own, torch.optim.lr_scheduler.LambdaLR(own, lambdas[0]), batches(8))
    train(titan, optimizers, schedulers, batches(8)[:5])

    resumed = gpt2()
    fresh, later = build(resumed, name)
    resumed.load_state_dict(titan.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    later.load_state_dict(schedulers.state_dict())
    train(resumed, fresh, later, batches(8)[5:])
    assert_same_weights(resumed, plain)
    assert_trained(resumed, gpt2())


def test_groups_by_pattern_and_optimizers_of_torchtitan_stand_beside_ours() -> None:
    model = gpt2()
    config = SharpwiseOptimizers.Config(
        param_groups=[
            ParamGroupConfig(pattern=r"wte|wpe", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3, "fused": False}),
            ParamGroupConfig(pattern=r"bias|ln_", optimizer_name="lion", optimizer_kwargs={"lr": 1e-4}),
            ParamGroupConfig(pattern=r".*", optimizer_name="lion", optimizer_kwargs={"lr": 1e-5, "weight_decay": 0.3}),
        ],
        optimizer_factory_kwargs_by_name={"lion": {"control": "l2"}},
    )
    theirs, ours = config.build(model_parts=[model])
    assert type(theirs) is torch.optim.AdamW and isinstance(ours, sharpwise.Lion)
    assert not {"fused", "foreach"} & set(ours.param_groups[0])
    assert [(g["lr"], g["weight_decay"], g["control"]) for g in ours.param_groups] == [
        (1e-4, 0.0, "l2"),
        (1e-5, 0.3, "l2"),
    ]


def test_parts_of_a_pipeline_have_an_optimizer_each() -> None:
    parts = [gpt2(), gpt2()]
    first, second = sharpwise_optimizer("adam-mini").build(model_parts=parts)
    assert [id(p) for p in first.param_groups[0]["params"]] == [id(p) for p in parts[0].parameters()]
    assert [id(p) for p in second.param_groups[0]["params"]] == [id(p) for p in parts[1].parameters()]


def test_a_name_that_nobody_has_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="adam-mimi"):
        sharpwise_optimizer("adam-mimi").build(model_parts=[gpt2()])
