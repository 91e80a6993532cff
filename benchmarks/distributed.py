"""Times the optimizer step of GPT-2 124M cut over processes, and counts the bytes that it communicates.

    torchrun --nproc-per-node 2 benchmarks/distributed.py                   gloo on the CPU
    torchrun --nproc-per-node 8 benchmarks/distributed.py --device cuda     NCCL
    torchrun --nproc-per-node 2 benchmarks/distributed.py --quick           to see that it runs; saves nothing

All arms step the same shards of one model in turns; a time is that of the slowest process. Ratios are to sharpwise's
element-wise AdamW in the same round. Bytes are those of all collectives in a step, per process, and beside them the
share of what the gradients of the whole model weigh, which every step of FSDP has to reduce.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from environment import environment
from shapes import FULL, QUICK, NanoGPT
from step_time import bootstrap, within_rounds
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import sharpwise
from sharpwise.engine.mesh import like, local

HERE = Path(__file__).parent
REFERENCE = "AdamW"
SETTINGS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}
ARMS: dict[str, Callable[[nn.Module], Any]] = {
    REFERENCE: lambda model: sharpwise.AdamW(model, **SETTINGS),
    "torch AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True, **SETTINGS),
    "AdamW, blockwise": lambda model: sharpwise.AdamW(model, block_lr="blockwise", **SETTINGS),
    "AdamW, clip and guard": lambda model: sharpwise.AdamW(model, max_grad_norm=1.0, on_nonfinite="skip", **SETTINGS),
    "Adam-mini": lambda model: sharpwise.AdamMini(model, **SETTINGS),
    "Adam-mini, clip and guard": lambda model: sharpwise.AdamMini(
        model, max_grad_norm=1.0, on_nonfinite="skip", **SETTINGS
    ),
}
REFUSES_MIXED = {"torch AdamW, fused"}
"""Torch's list kernels refuse plain tensors (norms) beside sharded ones."""


def fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 over every block and the root."""
    for block in model.transformer["h"]:  # type: ignore[index, union-attr]
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """As Megatron does: what widens cut by rows of output, what narrows by columns, embeddings by rows."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            dim = 1 if name.endswith("c_proj") else 0
            weight = distribute_tensor(module.weight.detach(), mesh, [Shard(dim)])
            module.register_parameter("weight", nn.Parameter(weight))
    if hasattr(model, "lm_head"):
        model.lm_head.register_parameter("weight", model.transformer["wte"].weight)  # type: ignore[index, union-attr]
    return model


MESHES: dict[str, Callable[[nn.Module, DeviceMesh], nn.Module]] = {"fsdp": fsdp, "tensor parallel": tensor_parallel}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Collectives and their bytes, as they are called for."""
    found = {"collectives": 0, "bytes": 0}
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single")}

    def counting(name: str) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found["collectives"] += 1
            found["bytes"] += tensor.numel() * tensor.element_size()
            return plain[name](tensor, *args, **kwargs)

        return call

    for name in plain:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def measure(place: Callable[[nn.Module, DeviceMesh], nn.Module], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All arms on one mesh."""
    mesh = init_device_mesh(args.device, (dist.get_world_size(),), mesh_dim_names=("data",))
    torch.manual_seed(0)
    model = place(NanoGPT(QUICK if args.quick else FULL).to(args.device), mesh)
    for p in model.parameters():
        p.grad = like(p, torch.randn_like(local(p)) * 1e-3)
    mixed = len({isinstance(p, DTensor) for p in model.parameters()}) > 1
    optimizers = {name: make(model) for name, make in ARMS.items() if not (mixed and name in REFUSES_MIXED)}
    traffic = {}
    for name, optimizer in optimizers.items():
        for _ in range(2):
            optimizer.step()
        with counted() as found:
            optimizer.step()
        traffic[name] = found
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(args.rounds):
        for name, optimizer in optimizers.items():
            times[name].append(timed(optimizer.step, args.device))
    gradients = sum(p.numel() * 4 for p in model.parameters())
    results = []
    for name, own in times.items():
        ratios = within_rounds(own, times[REFERENCE])
        results.append(
            {
                "arm": name,
                "milliseconds": 1e3 * statistics.median(own),
                "ratio": statistics.median(ratios),
                "interval": bootstrap(ratios),
                **traffic[name],
                "gradient_bytes": gradients,
                "of_gradient_traffic": traffic[name]["bytes"] / gradients,
            }
        )
    return results


def timed(step: Callable[[], Any], device: str) -> float:
    """Seconds of the slowest process."""
    dist.barrier()
    if device == "cuda":
        torch.cuda.synchronize()
    before = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - before, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--name", default="distributed", help="saves benchmarks/results/NAME.json")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 benchmarks/distributed.py")
    args.rounds = 3 if args.quick else args.rounds
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    result: dict[str, Any] = {
        "environment": environment() | {"processes": dist.get_world_size(), "device": args.device},
        "meshes": {},
    }
    for name, place in MESHES.items():
        found = result["meshes"][name] = measure(place, args)
        if dist.get_rank() == 0:
            print(f"{name} {dist.get_world_size()}: ms, ratio to {REFERENCE}, collectives, bytes, of the gradients'")
            for one in found:
                low, high = one["interval"]
                print(
                    f"  {one['arm']:28}{one['milliseconds']:8.1f}{one['ratio']:8.3f} ({low:.3f} to {high:.3f})"
                    f"{one['collectives']:4}{one['bytes']:12,}{one['of_gradient_traffic']:9.3%}"
                )
    if dist.get_rank() == 0 and not args.quick:
        path = HERE / "results" / f"{args.name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"Saved {path.relative_to(HERE.parent)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
