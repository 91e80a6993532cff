"""Times the optimizer step of GPT-2 124M cut over processes, and counts the bytes that it communicates.

    torchrun --nproc-per-node 2 benchmarks/distributed.py                   gloo on the CPU
    torchrun --nproc-per-node 8 benchmarks/distributed.py --device cuda     NCCL
    torchrun --nproc-per-node 2 benchmarks/distributed.py --quick           to see that it runs; saves nothing

All arms step the same shards of one model in turns, each round beginning with another; a time is that of the slowest
process. Ratios are to sharpwise's element-wise AdamW in the same round. The step is the optimizer's alone: gradients
are drawn once, and what FSDP would send for them is reckoned, not sent.

Bytes are those of all collectives in a step, per process; that none goes past the count is checked. A ring sends every
byte of an all-reduce twice, and in FSDP's reduce-scatter of the gradients once: the share of the gradient traffic is
therefore twice the bytes over what the fp32 gradients of the whole model weigh. Under tensor parallelism, which sends
no gradients of matrices, these are a yardstick only.
"""

import argparse
import gc
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
from intervals import bootstrap, within_rounds
from shapes import FULL, QUICK, NanoGPT
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import sharpwise
from sharpwise.shards import like, local

HERE = Path(__file__).parent
REFERENCE = "AdamW"
LIMIT = 0.02  # of the gradient traffic, for the statistics of blocks
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
    "AdaPM": lambda model: sharpwise.AdaPM(model, **SETTINGS),
    "AdaPM, block v": lambda model: sharpwise.AdaPM(model, second_moment="block", **SETTINGS),
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
        with counted() as found, CommDebugMode() as all_of_them:
            optimizer.step()
        if all_of_them.get_total_counts() != found["collectives"]:
            raise RuntimeError(f"{name}: {all_of_them.get_total_counts()} collectives, and {found} were counted")
        traffic[name] = found
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    names = list(optimizers)
    for number in range(args.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(timed(optimizers[name].step, args.device))
    gradients = sum(p.numel() * 4 for p in model.parameters())
    results = []
    for name, own in times.items():
        ratios = within_rounds(own, times[REFERENCE])
        results.append(
            {
                "arm": name,
                "milliseconds": 1e3 * statistics.median(own),
                "ratio": statistics.median(ratios),
                "interval": bootstrap([ratios]),
                **traffic[name],
                "gradient_bytes": gradients,
                "of_gradient_traffic": 2 * traffic[name]["bytes"] / gradients,
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


def show(mesh: str, found: list[dict[str, Any]]) -> None:
    print(f"{mesh} {dist.get_world_size()}: ms, ratio to {REFERENCE}, collectives, bytes, of the gradient traffic")
    for one in found:
        low, high = one["interval"]
        print(
            f"  {one['arm']:28}{one['milliseconds']:8.1f}{one['ratio']:8.3f} ({low:.3f} to {high:.3f})"
            f"{one['collectives']:4}{one['bytes']:12,}{one['of_gradient_traffic']:9.3%}"
        )
    most = max(one["of_gradient_traffic"] for one in found if "AdaPM" not in one["arm"])  # whose sums are of matrices
    print(f"  at the most {most:.3%} of the gradient traffic, {'under' if most < LIMIT else 'NOT under'} {LIMIT:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=24)
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
        "shape": vars(QUICK if args.quick else FULL),
        "rounds": args.rounds,
        "meshes": {},
    }
    for name, place in MESHES.items():
        result["meshes"][name] = measure(place, args)
        gc.collect()
        if dist.get_rank() == 0:
            show(name, result["meshes"][name])
    if dist.get_rank() == 0 and not args.quick:
        path = HERE / "results" / f"{args.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"Saved {path.relative_to(HERE.parent)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
