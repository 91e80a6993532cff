"""One of two gloo processes: sharpness from the second moment of a sharded optimizer. Rank 0 writes what it found.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m probes.sharded_worker OUTPUT.json
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from first_contact.fsdp_worker import MODELS, set_gradients, shard

import sharpwise
from sharpwise import probes


def values(name: str, layout: str, sharded: bool) -> list[float]:
    model = MODELS[layout]()
    model = shard(model) if sharded else model
    optimizer = sharpwise.create_optimizer(model, name, lr=1e-3)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
    return [e.value for e in probes.sharpness_from_optimizer(optimizer)]


def refusal() -> str:
    try:
        probes.sharpness(shard(MODELS["conv1d"]()), torch.zeros(1, 3, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return "none"


def main() -> None:
    dist.init_process_group("gloo")
    cases = [(name, layout) for name in ("adamw", "adam-mini") for layout in MODELS]
    found = {" ".join(case): [values(*case, sharded) for sharded in (True, False)] for case in cases}
    result = {"values": found, "refusal": refusal()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
