"""The step on a CUDA device: time, ratio to torch's fused AdamW, and bytes moved over the bandwidth of a copy.

    python benchmarks/step_time.py --device cuda    GPT-2 124M in both layouts; results/step_time_cuda.json
    python benchmarks/step_time.py --device fake    the same calls on a device that computes nothing; saves nothing

A timing is of several steps in a row, between two events, so that the host runs ahead as it does in training. Each arm
is timed between two timings of torch's fused AdamW, in an order that rotates; its ratio is to the mean of these. What a
step has to move is counted from its tensors: gradients are read, parameters and state read and written. The bandwidth
is that of one copy of as many elements, in the same rounds, which reads and writes each. `host ms` is how long the host
takes to ask for a step: where that is longer, the device waits. On the fake device it is all there is.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from arms import BASE, DEVICE_ARMS, Arm
from environment import environment, version
from fake_device import FakeCuda
from intervals import over_processes, within_rounds
from shapes import LAYOUTS, QUICK, Shape
from torch import Tensor, nn

from sharpwise.table import Table

COPY = "copy"
UNTIMED = 3


def refusal(device: str) -> str:
    """Why nothing can be timed on a device, in one line; "" where it can."""
    if device != "cuda" or torch.cuda.is_available():
        return ""
    return (
        f"no CUDA device: torch {torch.__version__} sees none. Run this on a machine with a GPU and a CUDA build of "
        f"torch (make bench-gpu TORCH='torch==...'), or --device fake to see that it runs"
    )


def measured(device: str, shape: Shape, rounds: int, repeats: int, only: list[str] | None) -> dict[str, Any]:
    """What is saved: environment, and per layout the arms."""
    result: dict[str, Any] = {"environment": environment() | about(device), "shape": vars(shape)}
    result |= {"rounds": rounds, "steps_per_timing": repeats, "layouts": {}}
    for layout in LAYOUTS:
        with ExitStack() as stack:
            fake = stack.enter_context(FakeCuda()) if device == "fake" else None
            result["layouts"][layout] = layout_of(layout, shape, rounds, repeats, only, fake)
        show(layout, result["layouts"][layout])
    return result


def about(device: str) -> dict[str, Any]:
    """The device, and what it is told by."""
    if device == "fake":
        return {"device": "none: fake"}
    properties = torch.cuda.get_device_properties(0)
    known = {"device": properties.name, "capability_of_device": f"{properties.major}.{properties.minor}"}
    return known | {"device_memory": properties.total_memory, "cuda": torch.version.cuda, "triton": version("triton")}


def layout_of(
    layout: str, shape: Shape, rounds: int, repeats: int, only: list[str] | None, fake: FakeCuda | None
) -> dict[str, Any]:
    """Times of all arms on one model and its gradients."""
    model = on_device(layout, shape, fake)
    parameters = list(model.parameters())
    elements = sum(p.numel() for p in parameters)
    steps: dict[str, Callable[[], Any]] = {}
    moved: dict[str, int] = {}
    for arm in DEVICE_ARMS:
        if only and arm.name != BASE and not any(part in arm.name for part in only):
            continue
        optimizer = arm.build(model)
        steps[arm.name] = step_of(arm, optimizer, parameters)
        steps[arm.name]()  # state is allocated, kernels are built
        moved[arm.name] = bytes_moved(optimizer, arm.reads_gradients)
    one, other = (torch.zeros(elements, dtype=torch.float32, device=parameters[0].device) for _ in range(2))
    steps[COPY], moved[COPY] = (lambda: other.copy_(one)), 8 * elements

    def seconds(name: str) -> tuple[float, float]:
        return timed(steps[name], repeats, fake is None)

    names = list(steps)
    taken: dict[str, list[float]] = {name: [] for name in names}
    beside: dict[str, list[float]] = {name: [] for name in names}
    host: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-UNTIMED, rounds):
        turn = number % len(names)
        before = seconds(BASE)[0]
        for name in names[turn:] + names[:turn]:
            (own, asked), after = seconds(name), seconds(BASE)[0]
            if number >= 0:
                taken[name].append(own)
                host[name].append(asked)
                beside[name].append((before + after) / 2)
            before = after
    bandwidth = moved[COPY] / statistics.median(taken[COPY])
    rows = {}
    for name in names:
        ratios = dict(enumerate(within_rounds(taken[name], beside[name])))
        median = statistics.median(taken[name])
        rows[name] = {
            "median_ms": 1e3 * median,
            "host_ms": 1e3 * statistics.median(host[name]),
            **over_processes(ratios, rounds),
            "bytes_moved": moved[name],
            "over_copy": moved[name] / median / bandwidth,
            "taken": taken[name],
            "beside": beside[name],
        }
    return {"parameters": elements, "copy_bytes_per_s": bandwidth, "arms": rows}


def on_device(layout: str, shape: Shape, fake: FakeCuda | None) -> nn.Module:
    """A model on the device, with gradients of norm 2."""
    if fake is not None:
        model = fake.model(lambda: LAYOUTS[layout](shape))[0]
    else:
        torch.manual_seed(0)
        model = LAYOUTS[layout](shape).cuda()
    parameters = list(model.parameters())
    size = 2.0 / sum(p.numel() for p in parameters) ** 0.5
    for p in parameters:
        p.grad = torch.randn_like(p) * size
    return model


def step_of(arm: Arm, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> Callable[[], Any]:
    """A step, after torch's clipping if the arm has some."""
    if arm.clip is None:
        return optimizer.step

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, arm.clip, foreach=True)
        optimizer.step()

    return clipped


def timed(step: Callable[[], Any], repeats: int, on_gpu: bool) -> tuple[float, float]:
    """Seconds of a step on the device, and of asking for it."""
    if not on_gpu:
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        asked = (time.perf_counter() - began) / repeats
        return asked, asked
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began = time.perf_counter()
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    asked = (time.perf_counter() - began) / repeats
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats, asked


def bytes_moved(optimizer: torch.optim.Optimizer, gradients: int = 1) -> int:
    """What a step cannot avoid: gradients are read so many times, parameters and their state read and written once."""
    total = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            own = [p, *(t for t in optimizer.state[p].values() if isinstance(t, Tensor))]
            total += gradients * p.numel() * p.grad.element_size()
            total += sum(2 * t.numel() * t.element_size() for t in own)
    return total


def show(layout: str, found: dict[str, Any]) -> None:
    """A table."""
    print(f"\n{layout}: {found['parameters']:,} parameters, a copy moves {found['copy_bytes_per_s'] / 1e9:.0f} GB/s")
    columns = ("", "median ms", "host ms", "ratio", "95%", "GB moved", "over copy")
    rows = [
        (
            name,
            *(row["median_ms"], row["host_ms"], row["ratio"]),
            f"{row['ratio_95'][0]:.2f} to {row['ratio_95'][1]:.2f}",
            *(row["bytes_moved"] / 1e9, row["over_copy"]),
        )
        for name, row in found["arms"].items()
    ]
    print(Table(columns, rows))


def quick() -> dict[str, Any]:
    """Settings of a run that only shows that it runs."""
    return {"shape": QUICK, "rounds": 2, "repeats": 2}
