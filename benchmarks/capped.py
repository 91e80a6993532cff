"""What less optimizer state is worth: the largest micro-batch, and tokens per second, where memory has a cap.

    python benchmarks/capped.py                  gpt2-10m under 700 MiB on the CPU; result in results/capped.json
    python benchmarks/capped.py --sizes          the same without times, on a machine that has other work to do
    python benchmarks/capped.py --quick          a tiny model under a small cap; saves nothing
    python benchmarks/capped.py --device cuda    layers of the shape of Llama-2-7B under 40 GB; results/capped_cuda.json

Parameters, gradients, state and activations share the memory; what the optimizer does not take, activations can. Every
try is a process of its own: it builds model and optimizer, takes two steps of one micro-batch each, and fails where
memory ends. The cap is the kernel's limit on private memory above what an idle process has (CPU; allocators round, so
that it is a little less than it seems), or the part of the device that torch may use (CUDA). The largest micro-batch is
found by doubling, then by halving the gap. Then all arms take turns at theirs: tokens per second of whole steps, the
ratio to AdamW's of the same round. Step sizes are the same everywhere: nothing is said about losses.
"""

import argparse
import json
import resource
import statistics
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from environment import environment
from intervals import bootstrap, within_rounds
from torch import nn

import sharpwise
from sharpwise.train.models import load_model

HERE = Path(__file__).parent
ARMS: dict[str, dict[str, Any]] = {
    "AdamW": {"name": "adamw"},
    "Adam-mini": {"name": "adam-mini"},
    "AdaPM": {"name": "adapm"},
    "AdaPM, block v": {"name": "adapm", "second_moment": "block"},
    "Muon8bit": {"name": "muon-8bit"},
}
BASE = "AdamW"
SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {"model": "gpt2-10m", "settings": {"context": 256}, "context": 256, "cap": 700 << 20, "dtype": "float32"},
    "cuda": {
        "model": "llama-2-7b", "settings": {"num_hidden_layers": 8}, "context": 1024, "cap": 40 << 30,
        "dtype": "bfloat16",
    },
    "quick": {"model": "gpt2-tiny", "settings": {"context": 64}, "context": 64, "cap": 64 << 20, "dtype": "float32"},
}  # fmt: skip
FORK = get_context("fork")  # what is imported is there; this process itself computes nothing
ROUNDS, STEPS = 7, 3
"""Rounds of turns; steps of one turn, after one that does not count."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", action="store_true", help="largest micro-batches alone, no times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="to see that it runs; saves nothing")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog}: no CUDA device; without --device it runs on the CPU\n")
    own = SETTINGS["quick" if args.quick else args.device] | {"device": args.device, "threads": args.threads}
    rounds = 0 if args.sizes else 2 if args.quick else ROUNDS
    result = {"environment": environment(), **own, "arms": measured(own, rounds)}
    show(result)
    if args.quick:
        print("\nNothing saved: this was not a full run.")
        return
    path = HERE / "results" / ("capped.json" if args.device == "cpu" else "capped_cuda.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nSaved {path.relative_to(HERE.parent)}")


def measured(own: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Per arm: the largest micro-batch, its state, and the tokens per second of all rounds, if there are any."""
    load_model(own["model"], device="meta", settings=own["settings"])  # for the imports, which forks share
    largest = {name: largest_of(name, own) for name in ARMS}
    fits = [name for name, (micro, _) in largest.items() if micro]
    speeds: dict[str, list[float]] = {name: [] for name in fits}
    for number in range(rounds):
        turn = number % len(fits) if fits else 0
        for name in fits[turn:] + fits[:turn]:
            micro, state = largest[name]
            while micro and not (found := tried(name, own, micro, STEPS)):
                micro -= 1  # at the edge it fits now and then
            largest[name] = micro, state
            speeds[name].append(micro * own["context"] / statistics.median(found["seconds"]) if found else 0.0)
    arms: dict[str, Any] = {}
    for name, (micro, state) in largest.items():
        arms[name] = {"micro_batch": micro, "state_bytes": state}
        if rounds and name in speeds and BASE in speeds:
            ratios = within_rounds(speeds[name], speeds[BASE])
            arms[name] |= {"tokens_per_s": statistics.median(speeds[name]), "ratio": statistics.median(ratios)}
            arms[name] |= {"ratio_95": bootstrap([ratios]), "rounds": speeds[name]}
    return arms


def largest_of(name: str, own: dict[str, Any]) -> tuple[int, int]:
    """Sequences in the largest micro-batch that fits, 0 if none does; bytes of state."""
    fits, state, step = 0, 0, 1
    while found := tried(name, own, fits + step, 1):
        fits, state, step = fits + step, found["state_bytes"], max(step, fits + step)
    while step > 1:
        step //= 2
        if found := tried(name, own, fits + step, 1):
            fits += step
    return fits, state


def tried(name: str, own: dict[str, Any], micro: int, steps: int) -> dict[str, Any] | None:
    """What a process of its own says; None where memory ended."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=report, args=(there, {"arm": ARMS[name], "micro": micro, "steps": steps, **own}))
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:  # a library that cannot say that memory ended aborts
        found = None
    process.join()
    if isinstance(found, str):
        raise RuntimeError(f"{name} with {micro} sequences failed, and not for memory: {found}")
    return found


def report(there: Any, given: dict[str, Any]) -> None:
    """Send what an attempt found: None where memory ended, text where something else went wrong."""
    try:
        there.send(attempt(**given))
    except (RuntimeError, MemoryError) as error:
        there.send(None if any(word in str(error).lower() for word in ("memory", "allocate")) else str(error))
    except Exception as error:
        there.send(f"{type(error).__name__}: {error}")


def attempt(
    arm: dict[str, Any], micro: int, steps: int, model: str, settings: dict[str, Any], context: int, cap: int,
    dtype: str, device: str, threads: int,
) -> dict[str, Any]:  # fmt: skip
    """One step that allocates, and some that are timed.

    Raises:
        RuntimeError: memory ended.
    """
    torch.set_num_threads(threads)
    idle(device)
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    else:
        limit = private() + cap
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.manual_seed(0)
    net = load_model(model, device=device, settings=settings).to(getattr(torch, dtype))
    tokens = torch.randint(0, 256, (micro, context), device=device)
    optimizer = sharpwise.create_optimizer(net, lr=1e-4, **arm)
    seconds = []
    for _ in range(1 + steps):
        began = time.perf_counter()
        step(net, optimizer, tokens)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "state_bytes": optimizer.state_bytes()}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    net(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # gradients stay, as under accumulation


def idle(device: str) -> None:
    """Start what an idle process has: threads, kernels, libraries of matrix products."""
    small = nn.Linear(256, 256, device=device)
    optimizer = sharpwise.AdamW(small, blocks={"weight": "other", "bias": "other"})
    small(torch.randn(256, 256, device=device)).relu().sum().backward()
    optimizer.step()


def private() -> int:
    """Bytes of private memory of this process, as the limit counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmData:")))


def show(result: dict[str, Any]) -> None:
    print(f"{result['model']} under {result['cap'] / 2**20:,.0f} MiB, sequences of {result['context']}")
    for name, row in result["arms"].items():
        speed = "does not fit" if not row["micro_batch"] else ""
        if "ratio" in row:
            low, high = row["ratio_95"]
            speed = f"{row['tokens_per_s']:9,.0f} tokens/s   {row['ratio']:.3f} ({low:.3f} to {high:.3f})"
        print(f"  {name:16s} {row['state_bytes'] / 2**20:8.1f} MiB   {row['micro_batch']:4d} sequences   {speed}")


if __name__ == "__main__":
    main()
