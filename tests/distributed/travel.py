"""Optimizers stopped in the middle of a run, the ways in which their state travels, and the run that nobody stopped."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from first_contact.fsdp_worker import difference, set_gradients, state_difference
from first_contact.tiny import gpt2, nanogpt
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import sharpwise

STOPS, STEPS = (6, 8), 13
"""A run stops at 6, goes on elsewhere to 8, and ends at 13."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nanogpt(layers=1),
    "conv1d": lambda: gpt2(n_layer=1),
    "wide": lambda: gpt2(n_layer=1, n_embd=99),
}

KINDS: dict[str, tuple[str, torch.dtype, str, dict[str, Any]]] = {
    "adamw, blockwise": ("linear", torch.float32, "adamw", {"block_lr": sharpwise.BlockwiseLR(floor=0.02)}),
    "adam-mini, blockwise": ("linear", torch.float32, "adam-mini", {"block_lr": "blockwise"}),
    "adam-mini, rows cut": ("conv1d", torch.float32, "adam-mini", {"block_lr": "blockwise"}),
    "adamw, stochastic": ("linear", torch.float32, "adamw", {"storage": "bf16", "stochastic_rounding": True}),
    "adam-mini, stochastic": ("linear", torch.bfloat16, "adam-mini", {"storage": "bf16", "stochastic_rounding": True}),
    "adamw, clip and skip": ("linear", torch.float32, "adamw", {"max_grad_norm": 1.0, "on_nonfinite": "skip"}),
    "adamw, int8": ("wide", torch.float32, "adamw", {"storage": "int8-dynamic", "keep_fp32": ()}),
    "muon, int8": ("wide", torch.float32, "muon", {"storage": "int8-linear", "aux_storage": "int8-dynamic"}),
    "adapm, rows cut": ("conv1d", torch.float32, "adapm", {"rank": 2, "second_moment": "block"}),
    "muon, heads": ("conv1d", torch.float32, "muon", {"normalize_rows": True, "per_head": True, "aux_lr": 0.01}),
}
WAYS = ("full", "offloaded", "shards", "flat")
WAYS_BACK = ("full", "shards")


def start(kind: str, place: Callable[[nn.Module], nn.Module] = lambda model: model) -> tuple[nn.Module, Any]:
    """The model, placed, and its optimizer, on the eager path: it promises bits."""
    layout, dtype, name, options = KINDS[kind]
    model = place(MODELS[layout]().to(dtype))
    seed = {"seed": 5} if "stochastic_rounding" in options else {}
    return model, sharpwise.create_optimizer(model, name, lr=0.02, weight_decay=0.1, compile=False, **options, **seed)


def arrive(kind: str, place: Callable[[nn.Module], nn.Module] = lambda model: model) -> tuple[nn.Module, Any]:
    """The same with other weights, other settings and groups in another order: all has to come from what is loaded."""
    layout, dtype, name, options = KINDS[kind]
    model = MODELS[layout]().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    model = place(model)
    backwards = list(model.named_parameters())[::-1]
    other = {"momentum": 0.5, "aux_betas": (0.5, 0.6)} if name == "muon" else {"betas": (0.5, 0.6)}
    return model, sharpwise.create_optimizer(
        backwards, name, model=model, lr=1.0, weight_decay=0.7, compile=False, **other, **options
    )


def run(kind: str, model: nn.Module, optimizer: Any, steps: range) -> None:
    """Recorded gradients, a learning rate that falls, and in step 3 a gradient that is not finite where one may be."""
    for step in steps:
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 20)
        set_gradients(model, step)
        if step == 3 and "skip" in kind:
            for p in model.parameters():
                p.grad.mul_(float("nan"))
        optimizer.step()
        optimizer.zero_grad()


def save(way: str, model: nn.Module, optimizer: Any, place: Path, group: Any = None) -> None:
    """Weights and state, as `way` says, into a folder."""
    options = options_of(way)
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
    state = {"model": get_model_state_dict(model, options=options), "optimizer": optimizer_state}
    if way in ("shards", "flat"):
        dcp.save(state, checkpoint_id=place / way, process_group=group, no_dist=group is None)
    elif group is None or dist.get_rank() == 0:
        place.mkdir(exist_ok=True)
        torch.save(state, place / way)


def load(way: str, model: nn.Module, optimizer: Any, place: Path, group: Any = None) -> None:
    """What `save` wrote, from however many processes."""
    options = options_of(way, loads=group is not None and group.size() == dist.get_world_size())
    if way in ("shards", "flat"):
        optimizer_state = get_optimizer_state_dict(model, optimizer, options=options)
        state = {"model": get_model_state_dict(model, options=options), "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=place / way, process_group=group, no_dist=group is None)
    elif options.broadcast_from_rank0 and dist.get_rank() != 0:
        state = {"model": {}, "optimizer": {}}
    else:
        state = torch.load(place / way, weights_only=True)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def options_of(way: str, loads: bool = False) -> StateDictOptions:
    """`flat` is torchtitan's; what was gathered into one process is sent out from there, if that process has all."""
    return StateDictOptions(
        full_state_dict=way in ("full", "offloaded"),
        cpu_offload=way == "offloaded" and not loads,
        broadcast_from_rank0=way == "offloaded" and loads,
        flatten_optimizer_state_dict=way == "flat",
    )


@lru_cache(maxsize=4)
def unstopped(kind: str, stop: int) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The run that nobody stopped, at its end, and its settings at a stop."""
    model, optimizer = start(kind)
    run(kind, model, optimizer, range(stop))
    settings = settings_of(optimizer)
    run(kind, model, optimizer, range(stop, STEPS))
    return model, optimizer, settings


def settings_of(optimizer: Any) -> dict[str, Any]:
    group = optimizer.state_dict()["param_groups"][0]
    read = ("lr", "betas", "weight_decay", "seed", "skipped_steps", "peak_lr", "momentum", "aux_betas", "aux_lr_ratio")
    return {key: group.get(key) for key in read}


def arrived(kind: str, model: nn.Module, optimizer: Any, stop: int) -> dict[str, Any]:
    """How a run that was stopped there, and is taken to its end, differs from the one that nobody stopped."""
    alone, reference, expected = unstopped(kind, stop)
    settings = settings_of(optimizer)
    run(kind, model, optimizer, range(stop, STEPS))
    return {
        "parameters": difference(model, alone),
        "state": state_difference(optimizer, reference, (model, alone)),
        "settings": {key: (settings[key], expected[key]) for key in expected if settings[key] != expected[key]},
    }
