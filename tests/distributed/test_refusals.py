"""What no optimizer of blocks can run on is refused with what was found, why, and what to do. One process suffices.

FSDP1, and ranks that differ, need two: test_hosts.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from first_contact.fsdp_worker import set_gradients, shard, train
from first_contact.tiny import gpt2, nanogpt
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import sharpwise

NAMES = ("adamw", "adam-mini")
WHY = r"cannot be found in flattened or partitioned.*fully_shard\(model\).*DeepSpeed ZeRO-1, 2 and 3 are not supported"


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def build(name: str, first: Any, **options: Any) -> Any:
    return sharpwise.create_optimizer(first, name, lr=1e-3, **options)


def partition(params: list[Tensor]) -> Tensor:
    """What DeepSpeedZeroOptimizer (stage_1_and_2.py) makes of a group: one flat fp32 partition, here of two processes.

    `single_partition_of_fp32_groups[i].requires_grad = True`, then
    `param_group['params'] = [single_partition_of_fp32_groups[i]]`.
    """
    flat = torch.cat([p.detach().reshape(-1) for p in params])
    return flat[: (len(flat) + 1) // 2].clone().float().requires_grad_()


def partition_each(model: nn.Module) -> None:
    """What `deepspeed.zero.Init` leaves of parameters (partition_parameters.py): `free_param` empties their data."""
    for number, param in enumerate(model.parameters()):
        param.ds_id, param.ds_shape, param.ds_numel = number, param.shape, param.numel()
        param.ds_tensor = partition([param]).detach()
        param.data = torch.empty(0, dtype=param.dtype)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, as most scripts have them."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_zero_1_and_2_exchange_a_group_for_a_flat_partition(name: str, stepped: bool) -> None:
    model = gpt2()
    optimizer = build(name, groups_of(model), model=model)
    if stepped:
        train(model, optimizer, range(1))
    for own in optimizer.param_groups:
        own["params"] = [partition(own["params"])]
        own["params"][0].grad = torch.ones_like(own["params"][0])
    before = [own["params"][0].detach().clone() for own in optimizer.param_groups]
    for call in (optimizer.step, optimizer.state_dict, optimizer.explain):
        with pytest.raises(ValueError, match=rf"group of 10 parameters .*wte.weight now.*1 tensors.*{WHY}"):
            call()
    assert all(torch.equal(a, own["params"][0]) for a, own in zip(before, optimizer.param_groups, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_flat_partition_of_a_group_of_one(name: str) -> None:
    model = gpt2()
    optimizer = build(name, [{"params": [model.transformer.wte.weight]}], model=model)
    optimizer.param_groups[0]["params"] = [partition([model.transformer.wte.weight])]
    with pytest.raises(ValueError, match=rf"wte.weight now has shape \(1073,\), it had \(65, 33\) when.*{WHY}"):
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_flat_partition_given_to_the_constructor(name: str) -> None:
    model = gpt2()
    with pytest.raises(ValueError, match=rf"of shape \(14867,\) does not belong to the model GPT2LMHeadModel.*{WHY}"):
        build(name, [{"params": [partition(list(model.parameters()))]}], model=model)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_zero_3_partitioned(name: str) -> None:
    """Before the optimizer is built, and after; between its steps ZeRO-3 leaves groups of no parameters at all."""
    later, model = gpt2(), gpt2()
    before = sharpwise.BlockMap.of(model)
    optimizer = build(name, later)
    optimizer.init_state()
    for each in (later, model):
        partition_each(each)
    message = rf"wte.weight, now of shape \(0,\), was flattened by DeepSpeed ZeRO-3.*{WHY}"
    for first in (model, list(model.named_parameters())):
        with pytest.raises(ValueError, match=message):
            build(name, first)
    with pytest.raises(ValueError, match=message):
        build(name, groups_of(model), model=model)
    with pytest.raises(ValueError, match=rf"{message}|shape \(0,\), the block map says"):
        build(name, list(model.named_parameters()), blocks=before)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    optimizer.param_groups[0]["params"] = []
    with pytest.raises(ValueError, match=rf"group of 28 parameters .*wte.weight now holds 0 tensors.*{WHY}"):
        optimizer.step()


def test_a_sharded_model_without_a_process_group(group: None) -> None:
    model = shard(nanogpt())
    optimizer = build("adam-mini", model)
    set_gradients(model, 0)
    dist.destroy_process_group()
    message = "wte.weight is a DTensor, and there is no process group.*init_process_group"
    for first in (model, list(model.named_parameters())):
        with pytest.raises(RuntimeError, match=message):
            build("adamw", first)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_state_of_shards_without_a_process_group(group: None) -> None:
    model = shard(nanogpt())
    optimizer = build("adam-mini", model)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    dist.destroy_process_group()
    alone = nanogpt()
    fresh = build("adam-mini", alone)
    with pytest.raises(RuntimeError, match=r"exp_avg of .*wte.weight is a shard .a DTensor.*full_state_dict=True"):
        fresh.load_state_dict(saved)
    assert all(float(own["step"]) == 0 for own in fresh.state.values())


def test_a_probe_of_a_sharded_model(group: None) -> None:
    """Before a step as well as at construction: a model may be sharded in between."""
    probing = {"block_lr": "sharpness(source=probe, start=0)", "probe_batches": [torch.zeros(1, 4, dtype=torch.long)]}
    message = r"sharpness.* probes the model, and transformer.wte.weight is sharded; source='second_moment' works"
    model = nanogpt()
    early = build("adamw", model, **probing)
    shard(model)
    set_gradients(model, 0)
    with pytest.raises(ValueError, match=message):
        build("adamw", model, **probing).step()
    early.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(ValueError, match=message):
        early.step()


@pytest.mark.parametrize("way", ["state_dict", "load_state_dict", "init_state"])
def test_parameters_exchanged_after_state_was_made_but_before_a_step(group: None, way: str) -> None:
    """Accelerate asks for the state dict, loads it back, and then exchanges the parameters for sharded ones."""
    model, plain = nanogpt(), nanogpt()
    optimizer, twin = build("adam-mini", model, compile=False), build("adam-mini", plain, compile=False)
    if way == "init_state":
        optimizer.init_state()
    else:
        saved = optimizer.state_dict()
        if way == "load_state_dict":
            optimizer.load_state_dict(saved)
    names = optimizer.param_groups[0]["param_names"]
    shard(model)
    live = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [live[name] for name in names]
    assert len(optimizer.state_dict()["state"]) == len(optimizer.state) == len(names)
    for each, own in ((model, optimizer), (plain, twin)):
        train(each, own, range(2))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q)
    assert set(optimizer.state) == set(model.parameters())


@pytest.mark.parametrize("way", ["stepped", "stepped, and loaded", "loaded"])
def test_parameters_exchanged_after_the_first_step_are_refused(group: None, way: str) -> None:
    """A checkpoint that is loaded before sharding counts: its moments would silently be lost."""
    model = nanogpt()
    optimizer = build("adam-mini", model)
    train(model, optimizer, range(1))
    if way != "stepped":
        saved = optimizer.state_dict()
        optimizer = optimizer if "stepped" in way else build("adam-mini", model)
        optimizer.load_state_dict(saved)
    names = optimizer.param_groups[0]["param_names"]
    shard(model)
    live = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [live[name] for name in names]
    with pytest.raises(RuntimeError, match=r"'transformer.wte.weight' was exchanged after the first step; shard"):
        optimizer.step()


def test_groups_added_after_sharding_are_matched_to_the_model_as_it_is_now(group: None) -> None:
    model = nanogpt()
    head = model.lm_head.weight
    optimizer = build("adamw", [{"params": [p for p in model.parameters() if p is not head]}], model=model)
    names = optimizer.param_groups[0]["param_names"]
    shard(model)
    live = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [live[name] for name in names]
    optimizer.add_param_group({"params": [model.lm_head.weight], "lr": 1e-4})
    assert optimizer.param_groups[1]["param_names"] == ["lm_head.weight"]
    with pytest.raises(ValueError, match="is unknown to the model"):
        optimizer.add_param_group({"params": [head]})
    train(model, optimizer, range(1))


@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoints_of_another_model(group: None, sharded: bool) -> None:
    """By name and by shape, whole or in shards, before anything is changed."""
    place = shard if sharded else lambda model: model
    model = place(nanogpt())
    optimizer = build("adam-mini", model)
    train(model, optimizer, range(1))
    before = [own["exp_avg"].clone() for own in optimizer.state.values()]
    deeper, wider = place(nanogpt(layers=3)), place(nanogpt(width=36))
    for other, message in (
        (deeper, r"has 'transformer.h.2.*, which is not here. It is of another model; or"),
        (wider, r"exp_avg of transformer.wte.weight has shape \(65, 36\), here it is \(65, 33\)"),
    ):
        theirs = build("adam-mini", other)
        train(other, theirs, range(1))
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(theirs.state_dict())
    for old, own in zip(before, optimizer.state.values(), strict=True):
        assert torch.equal(local(old), local(own["exp_avg"]))


def local(tensor: Any) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def test_a_batch_shows_nothing_of_a_sharded_model(group: None) -> None:
    """The map has to be made before."""
    model = nn.Sequential(nn.Linear(8, 8))
    blocks = sharpwise.BlockMap.of(model, overrides={"*": "up"})
    fully_shard(model)
    with pytest.raises(ValueError, match=r"example=batch\), made before the model is sharded; or"):
        build("adam-mini", model)
    build("adam-mini", model, blocks=blocks)
    build("adam-mini", model, blocks={"*": "up"})
