"""One of two gloo processes: update sizes, noise and spectra of a sharded model. Rank 0 writes what it found.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m probes.shared_worker OUTPUT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from first_contact.fsdp_worker import MODELS, set_gradients, shard
from torch import nn

import sharpwise
from sharpwise.blocks import BlockMap
from sharpwise.probes import UpdateSize, spectrum
from sharpwise.probes.callbacks import Probes

STEPS = 3


def run(model: nn.Module, blocks: BlockMap) -> dict[str, Any]:
    optimizer = sharpwise.AdamW(model, lr=1e-2, blocks=blocks)
    probes = Probes(model, optimizer, blocks, sequences=4, tokens=64, updates_every=1, noise_every=1, sharpness_every=1)
    sizes, found = UpdateSize(model, blocks), {}
    for step in range(1, STEPS + 1):
        set_gradients(model, step)
        sizes.before()
        probes.before_step(step)
        optimizer.step()
        found[f"step {step}"] = probes.after_step(step)
        found[f"sizes {step}"] = [e.value for e in sizes.after()]
    found["spectrum"] = [e.value for e in spectrum(model, blocks=blocks, least=10)]
    return found


def main() -> None:
    dist.init_process_group("gloo")
    blocks = BlockMap.of(MODELS["linear"]())
    models = {"whole": MODELS["linear"](), "sharded": shard(MODELS["linear"]())}
    found = {name: run(model, blocks) for name, model in models.items()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
