"""One optimizer in a fresh process: its first step, and the memory it takes beyond its state. Prints JSON.

    python benchmarks/first_step.py LAYOUT ARM [--quick] [--threads N]

Started by step_time.py with folders of its own for what is compiled: empty (cold), then filled (warm).

Memory beyond state is the sum of two things, both at the fourth step, when everything is compiled and allocated:
tensors that stay alive and are neither parameter, gradient nor state (scratch); and the highest resident size during
the step above the resident size before it (temporaries). torch's own counters see no CPU memory, and the highest
resident size of the whole process would show the compiler instead of the step; so the kernel's high-water mark is reset
before the step (Linux; elsewhere the figure is null).
"""

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from arms import BY_NAME, state_bytes
from shapes import FULL, QUICK, model_with_gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("layout")
    parser.add_argument("arm")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = model_with_gradients(args.layout, QUICK if args.quick else FULL)
    began = time.perf_counter()
    optimizer = BY_NAME[args.arm].build(model)
    constructed = time.perf_counter()
    seconds = []
    for _ in range(3):
        before = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - before)
    temporaries = temporary_bytes(optimizer)
    scratch = scratch_bytes(model, optimizer)
    print(
        json.dumps(
            {
                "construct_s": constructed - began,
                "first_step_s": seconds[0],
                "second_step_s": seconds[1],
                "state_bytes": state_bytes(optimizer),
                "scratch_bytes": scratch,
                "temporary_bytes": temporaries,
                "beyond_state_bytes": None if temporaries is None else scratch + temporaries,
                "largest_matrix_bytes": max(p.numel() * p.element_size() for p in model.parameters()),
            }
        )
    )


def temporary_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """Highest resident bytes during one step, above those before it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return None
    before = status_kib("VmRSS")
    optimizer.step()
    return max(status_kib("VmHWM") - before, 0) * 1024


def status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def scratch_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of live tensors that are neither parameters, buffers, gradients nor state."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    known |= {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    for state in optimizer.state.values():
        known |= {value.untyped_storage().data_ptr() for value in state.values() if isinstance(value, torch.Tensor)}
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            if thing.device.type == "cpu" and storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


if __name__ == "__main__":
    main()
