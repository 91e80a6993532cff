"""One of three gloo processes: state as planned for this rank, and as it is allocated. Rank 0 writes what differs.

RANK=0 WORLD_SIZE=3 MASTER_ADDR=... MASTER_PORT=... python -m memory.worker OUTPUT.json
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from blocks.models import llama_config
from first_contact.tiny import gpt2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from sharpwise.blocks import BlockMap
from sharpwise.memory import plan
from sharpwise.optim import create_optimizer
from sharpwise.shards import local
from sharpwise.train.parallel import shard_model

MIDDLE = {"sgd": {"momentum": 0.9}}


def llama() -> nn.Module:
    torch.manual_seed(1)
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 72, "intermediate_size": 99}
    return transformers.AutoModelForCausalLM.from_config(llama_config(vocab_size=67, **sizes))


def compared(build, how: str, world: int) -> list[str]:
    """Combinations whose bytes are others than planned."""
    whole, model = build(), build()
    blocks = BlockMap.of(model, include_frozen=True)
    shard_model(model, init_device_mesh("cpu", (world,), mesh_dim_names=("shard" if how == "fsdp" else "tp",)))
    found = plan(whole, processes=world, shard=how, rank=dist.get_rank(), optimizers=MIDDLE)
    held = sum(local(p).numel() * p.element_size() for p in model.parameters())
    wrong = [] if held == found.weights else [f"{how}: weights {held}, planned {found.weights}"]
    for own in found.combinations:
        options = {"storage": own.storage, "blocks": blocks, "compile": False, **MIDDLE.get(own.optimizer, {})}
        optimizer = create_optimizer(model, own.optimizer, lr=1e-3, **options)
        bytes_ = optimizer.state_bytes()
        if bytes_ != own.state or own.refused:
            wrong.append(f"{how}: {own.name} {bytes_}, planned {own.state} {own.refused}")
        if own.storage == "fp32" and own.optimizer != "muon":  # whose exchange of matrices is none of sums
            sent = round(2 * (world - 1) / world * summed(model, optimizer))
            wrong += [f"{how}: {own.name} sends {sent}, planned {own.sent}"] if sent != own.sent else []
    return wrong


def summed(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what a step adds up over the processes."""
    plain, found = dist.all_reduce, []
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()  # the first one also compares what the processes were built with

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(tensor.numel() * tensor.element_size())
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        optimizer.step()
    finally:
        dist.all_reduce = plain
    return sum(found)


def main(output: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    wrong = compared(gpt2, "fsdp", world) + compared(llama, "tp", world) + compared(llama, "fsdp", world)
    everyone: list[list[str]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, wrong)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps([f"rank {r}: {line}" for r, own in enumerate(everyone) for line in own]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
