"""One of two gloo processes: sharded against unsharded, on recorded gradients and live. Rank 0 writes what it found.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m first_contact.fsdp_worker OUTPUT.json

One process group serves all cases, because starting two processes costs more than all of them. What is found is judged
by test_fsdp2.py.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from distributed.serving import Case, serve
from first_contact.tiny import STEPS, batches, gpt2, loss_of, nanogpt
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import sharpwise

MODELS: dict[str, Callable[[], nn.Module]] = {"conv1d": gpt2, "linear": nanogpt}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "adamw blockwise": ("adamw", {"block_lr": "blockwise"}),
    "adamw clip": ("adamw", {"max_grad_norm": 1.0, "on_nonfinite": "skip"}),
    "adam-mini": ("adam-mini", {}),
    "adam-mini blockwise": ("adam-mini", {"block_lr": "blockwise"}),
    "lion": ("lion", {}),
}
LR = 1e-2


def build(model: nn.Module, optimizer: str, eager: bool = False) -> Any:
    name, options = OPTIMIZERS[optimizer]
    compiled = {"compile": False} if eager else {}
    return sharpwise.create_optimizer(model, name, lr=LR, weight_decay=0.1, **options, **compiled)


def shard(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    for block in model.transformer["h"] if isinstance(model.transformer, nn.ModuleDict) else model.transformer.h:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def set_gradients(model: nn.Module, step: int) -> None:
    """The recorded gradients: the same for all placements of the same model. Their size differs from step to step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in model.parameters():
        full = (torch.randn(parameter.shape, generator=generator) * (0.1 + step % 3)).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            parameter.grad = distribute_tensor(full, mesh, placements, src_data_rank=None)  # all ranks have all of it
        else:
            parameter.grad = full


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def difference(model: nn.Module, other: nn.Module) -> float:
    """The largest max|dp| / max|p| over the parameters; 0.0 says equal to the bit."""
    pairs = [(full(p), full(q)) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    return max(float((p - q).abs().max() / q.abs().max()) for p, q in pairs)


def state_difference(optimizer: Any, other: Any, models: tuple[nn.Module, nn.Module]) -> float:
    """The same over all state tensors that both hold; inf if they do not hold the same ones."""
    worst = 0.0
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        ours, theirs = optimizer.state[p], other.state[q]
        if ours.keys() != theirs.keys():
            return float("inf")
        for key in ours:
            a, b = full(ours[key]), full(theirs[key])
            if a.shape != b.shape:
                return float("inf")
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


def equals_one_process(layout: str, name: str, eager: bool) -> dict[str, Any]:
    sharded, alone = shard(MODELS[layout]()), MODELS[layout]()
    optimizers = build(sharded, name, eager), build(alone, name, eager)
    train(sharded, optimizers[0], range(STEPS))
    train(alone, optimizers[1], range(STEPS))
    return {
        "moved": difference(alone, MODELS[layout]()),
        "parameters": difference(sharded, alone),
        "state": state_difference(*optimizers, (sharded, alone)),
        "same_map": optimizers[0].blocks == optimizers[1].blocks,
        "uneven": any(2 * p.to_local().numel() != p.numel() for p in sharded.parameters()),
    }


def round_trip(layout: str, name: str, whole: bool) -> dict[str, Any]:
    """Ten steps, `get_optimizer_state_dict`, a fresh model and optimizer, `set_optimizer_state_dict`, ten steps."""
    options = dcp.StateDictOptions(full_state_dict=whole)
    straight = shard(MODELS[layout]())
    optimizer = build(straight, name)
    train(straight, optimizer, range(10))
    weights = copy.deepcopy(dcp.get_model_state_dict(straight, options=options))
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(straight, optimizer, options=options))
    train(straight, optimizer, range(10, STEPS))

    resumed = shard(MODELS[layout]())
    second = build(resumed, name)
    dcp.set_model_state_dict(resumed, weights, options=options)
    dcp.set_optimizer_state_dict(resumed, second, saved, options=options)
    train(resumed, second, range(10, STEPS))
    return {
        "parameters": difference(resumed, straight),
        "state": state_difference(second, optimizer, (resumed, straight)),
        "names": sorted({key.split(".")[-1] for key in next(iter(saved["state"].values()))}),
    }


def dummy_step(layout: str, name: str) -> dict[str, Any]:
    """`get_optimizer_state_dict` before the first step makes a step of its own, which must leave no trace."""
    touched, plain = shard(MODELS[layout]()), shard(MODELS[layout]())
    optimizers = build(touched, name), build(plain, name)
    dcp.get_optimizer_state_dict(touched, optimizers[0])
    steps = {float(full(state["step"])) for state in optimizers[0].state.values() if "step" in state}
    untouched = difference(touched, plain)
    train(touched, optimizers[0], range(5))
    train(plain, optimizers[1], range(5))
    return {
        "steps": sorted(steps),
        "untouched": untouched,
        "parameters": difference(touched, plain),
        "state": state_difference(*optimizers, (touched, plain)),
    }


def lopsided(name: str) -> dict[str, Any]:
    """A first step at lr 0, as of a warm-up, whose gradients are zero on all processes but one: all must take it."""
    sharded, alone = shard(gpt2()), gpt2()
    optimizers = build(sharded, name), build(alone, name)
    for model, optimizer in zip((sharded, alone), optimizers, strict=True):
        for parameter in model.parameters():
            full = torch.zeros(parameter.shape)
            full.view(-1)[0] = 1.0
            whole = not isinstance(parameter, DTensor)
            parameter.grad = full if whole else distribute_tensor(full, parameter.device_mesh, parameter.placements)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.param_groups[0]["lr"] = LR
        train(model, optimizer, range(3))
    return {"parameters": difference(sharded, alone), "state": state_difference(*optimizers, (sharded, alone))}


def live(name: str) -> dict[str, Any]:
    """Real gradients: each process sees half of every batch, one process alone sees all of it."""
    sharded, alone = shard(gpt2()), gpt2()
    optimizers = build(sharded, name), build(alone, name)
    worst, losses = 0.0, []
    for tokens in batches():
        loss = loss_of(sharded, tokens.chunk(2)[dist.get_rank()])
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        reference = loss_of(alone, tokens)
        reference.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(reference.item())
        worst = max(worst, abs(mean.item() / 2 - reference.item()))
    return {"losses": worst, "fell": losses[0] - losses[-1]}


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for layout in MODELS:
        for name in OPTIMIZERS:
            for path in ("eager", "default"):
                key, arguments = f"equal, {layout}, {name}, {path}", (layout, name, path == "eager")
                found[key] = lambda arguments=arguments: equals_one_process(*arguments)
        for name in ("adamw", "adam-mini blockwise"):
            for whole in (False, True):
                key = f"{'full' if whole else 'sharded'} state dict, {layout}, {name}"
                found[key] = lambda layout=layout, name=name, whole=whole: round_trip(layout, name, whole)
            found[f"dummy step, {layout}, {name}"] = lambda layout=layout, name=name: dummy_step(layout, name)
    for name in ("adamw", "adam-mini"):
        found[f"live, {name}"] = lambda name=name: live(name)
        found[f"lopsided, {name}"] = lambda name=name: lopsided(name)
    return found


if __name__ == "__main__":
    serve(cases(), sys.argv[1])
