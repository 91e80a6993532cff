"""One of two gloo processes: parameters cut by a mesh, moved by interpreted Triton kernels, against the whole ones.

Run by test_triton.py; rank 0 writes what it found.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine.interpreted import SEGMENTS, model_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import sharpwise.engine.step as steps
from sharpwise.blocks import BlockMap
from sharpwise.engine import backends
from sharpwise.optim import create_optimizer
from sharpwise.testing import fill_gradients

BF16 = {"storage": "bf16", "stochastic_rounding": True}
CASES = [
    ("adamw", {"block_lr": "blockwise", "max_grad_norm": 0.5}),
    ("lion", {"on_nonfinite": "skip"}),
    ("adam-mini", {}),
    ("adam-mini", {"block_lr": "blockwise", "max_grad_norm": 0.5, "on_nonfinite": "skip"}),
    ("adamw", BF16),
    ("adam-mini", BF16),
    ("adam-mini", {"on_nonfinite": "skip", "on_device": True}),
    ("lion", {"control": "angular"}),
    ("adam-mini", {"control": "l2"}),
]


def placed(model: nn.Module, mesh, by_rows: bool) -> nn.Module:
    """Its parameters cut along one dimension or another, or kept whole."""
    for i, (name, p) in enumerate(list(model.named_parameters())):
        dim = 0 if by_rows else i % max(p.dim(), 1)
        own = Replicate() if p.dim() == 0 or i % 4 == 3 else Shard(dim)
        model.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [own])))
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def worst(name: str, options: dict, mesh) -> list:
    blocks, on_device = BlockMap(tuple(SEGMENTS)), options.get("on_device", False)
    steps.decided_by_host = lambda views: not on_device  # as where a device alone knows the number of the step
    options = {key: value for key, value in options.items() if key != "on_device"}
    alone, cut = model_of(), placed(model_of(), mesh, "storage" in options)
    backends.ORDER["cpu"] = ("triton",)
    one, two = (
        create_optimizer(m, name, lr=1e-2, weight_decay=0.1, blocks=blocks, **options, **more)
        for m, more in ((alone, {"compile": False}), (cut, {}))
    )
    for step in range(2):
        fill_gradients(alone, step)
        for p, q in zip(alone.parameters(), cut.parameters(), strict=True):
            q.grad = distribute_tensor(p.grad, mesh, q.placements)
        one.step()
        two.step()
    off, turned = {}, 0
    for (n, p), q in zip(alone.named_parameters(), cut.parameters(), strict=True):
        for key, value in {"p": p.detach(), **one.state[p]}.items():
            mine = whole(q.detach() if key == "p" else two.state[q][key])
            if value.dtype == torch.bfloat16:
                turned += int((mine != value).sum())
            elif value.numel():
                off[f"{n} {key}"] = float((mine - value).norm() / value.norm().clamp(min=1e-30))
    return [max(off.values()), max(off, key=off.__getitem__), turned, sorted({r["backend"] for r in two.explain()})]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = [worst(*case, mesh) for case in CASES]
    if dist.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(found))
    dist.destroy_process_group()
