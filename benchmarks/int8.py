"""Times a step with 8-bit state beside fp32 and other libraries', and measures how far 20 steps end from fp32.

    python benchmarks/int8.py            result in benchmarks/results/int8.json
    python benchmarks/int8.py --quick    tiny shapes, one process, few rounds; saves nothing
    python benchmarks/int8.py --only small "matrices of small"    these subjects alone, in two minutes; saved too
    python benchmarks/int8.py --again    medians and intervals anew from the saved rounds; times nothing

Arms take turns, in an order that rotates, on the same parameters and gradients; a ratio is of steps of the same round.
As in `step_time.py` it is the median over processes of the median of their rounds, and its 95% interval draws
processes, then rounds of each. `gpt2` and `small` are whole models under AdamW, all matrices of which are quantized;
`matrices` are those of attention and MLP alone, moved by what Muon does element by element: a step without
Newton-Schulz. Peers, which quantize whatever has 4096 elements, are left out with a word where they are not installed;
README.md says how to install them.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from eight_bit import ARMS, DYNAMIC, FP32, MATRIX_ARMS, MUON_FP32, MUON_LINEAR, PEERS, Arm, distance, elements_alone
from environment import environment
from intervals import over_processes, within_rounds
from muon import Layer
from shapes import FULL, Shape, model_with_gradients
from torch import nn

HERE = Path(__file__).parent
PROCESSES, ROUNDS = 4, 7
LR = 1e-6


class Subject(NamedTuple):
    """What is timed: a GPT-2, or layers and width of matrices alone; and the arms, by whether these are Muon's."""

    shape: Shape | tuple[int, int]

    @property
    def arms(self) -> list[Arm]:
        return ARMS if isinstance(self.shape, Shape) else MATRIX_ARMS

    @property
    def ours(self) -> tuple[Arm, Arm]:
        """Ours in fp32 and in 8 bits."""
        return (FP32, DYNAMIC) if isinstance(self.shape, Shape) else (MUON_FP32, MUON_LINEAR)

    def build(self) -> nn.Module:
        if isinstance(self.shape, Shape):
            return model_with_gradients("linear", self.shape)
        torch.manual_seed(0)
        layers, width = self.shape
        model = nn.ModuleList(Layer(width) for _ in range(layers))
        for p in model.parameters():
            p.grad = 1e-3 * torch.randn_like(p)
        return model


SMALL = Shape(n_layer=4, n_head=4, n_embd=256, vocab_size=4096, block_size=256)
TINY = Shape(n_layer=1, n_head=2, n_embd=64, vocab_size=256, block_size=64)
SUBJECTS = {
    "gpt2": Subject(FULL),
    "small": Subject(SMALL),
    "matrices of gpt2": Subject((FULL.n_layer, FULL.n_embd)),
    "matrices of small": Subject((SMALL.n_layer, SMALL.n_embd)),
}
QUICK = {"tiny": Subject(TINY), "matrices of tiny": Subject((1, 64))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one process, few rounds; saves nothing")
    parser.add_argument("--again", action="store_true", help="summarize the saved rounds anew; times nothing")
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), help="of these subjects alone", default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"in each of {PROCESSES} processes")
    args = parser.parse_args()
    path = HERE / "results" / "int8.json"
    if args.again:
        result = json.loads(path.read_text())
        here = environment()
        result["summarized_again"] = {key: here[key] for key in ("date", "commit")}
    else:
        torch.set_num_threads(args.threads)
        names = list(QUICK) if args.quick else args.only or list(SUBJECTS)
        result = measured(names, args.quick, args.threads, 2 if args.quick else args.rounds)
    for name, subject in (QUICK | SUBJECTS).items():
        if name not in result["subjects"]:
            continue
        result["subjects"][name] |= summary(subject, result["subjects"][name], result["rounds"])
        show(name, subject, result["subjects"][name])
    show_distances(result["distance"])
    if args.quick:
        print("\nNothing saved: this was not a full run.")
        return
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nSaved {path.relative_to(HERE.parent)}")


def measured(names: Sequence[str], quick: bool, threads: int, rounds: int) -> dict[str, Any]:
    """Seconds of every arm in every round on these subjects, and distances; no ratios yet."""
    missing = {arm.name: arm.missing for arm in (*ARMS, *MATRIX_ARMS) if arm.missing}
    for name, why in missing.items():
        print(f"{name} is left out: {why}")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # bitsandbytes brings a runtime of its own, which asks for this alone
    result: dict[str, Any] = {"environment": environment(), "left_out": missing, "rounds": rounds, "subjects": {}}
    for name in names:
        subject = (QUICK | SUBJECTS)[name]
        found: dict[str, Any] = {}
        for _ in range(1 if quick else PROCESSES):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                found = joined(found, process.submit(timed, subject, threads, rounds).result())
        result["subjects"][name] = found
    result["distance"] = {arm.name: distance(arm) for arm in ARMS if not arm.missing}
    return result


def joined(so_far: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """With the rounds of one more process behind those of the others."""
    if not so_far:
        return more
    seconds = {name: [*so_far["seconds"][name], *own] for name, own in more["seconds"].items()}
    return {**more, "seconds": seconds}


def timed(subject: Subject, threads: int, rounds: int) -> dict[str, Any]:
    """Seconds of every arm, in turns, in this process; two untimed rounds come first (allocation, compilation)."""
    torch.set_num_threads(threads)
    model = subject.build()
    with nullcontext() if isinstance(subject.shape, Shape) else elements_alone():
        optimizers = {arm.name: arm.build(model, lr=LR) for arm in subject.arms if not arm.missing}
        seconds: dict[str, list[float]] = {name: [] for name in optimizers}
        names = list(optimizers)
        for number in range(-2, rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                began = time.perf_counter()
                optimizers[name].step()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - began)
    sizes = {name: state_bytes(optimizer) for name, optimizer in optimizers.items()}
    return {"elements": sum(p.numel() for p in model.parameters()), "state_bytes": sizes, "seconds": seconds}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors; a table of codes that all share counts once."""
    parts = [p for own in optimizer.state.values() for value in own.values() for p in plain(value)]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}.values())


def plain(value: Any) -> list[torch.Tensor]:
    """The tensors that a state consists of; torchao's are tensors of tensors."""
    if not isinstance(value, torch.Tensor):
        return []
    names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
    return [getattr(value, name) for name in names] or [value]


# --- ratios ----------------------------------------------------------------------------------------------------------


def summary(subject: Subject, found: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Median times, and ratios: of 8 bits to ours in fp32, of every peer to ours in 8 bits."""
    seconds = found["seconds"]
    ratios = {
        f"{above} / {below}": over_processes(dict(enumerate(within_rounds(seconds[above], seconds[below]))), rounds)
        for above, below, _ in targets(subject)
        if {above, below} <= set(seconds)
    }
    return {"ms": {name: 1e3 * statistics.median(own) for name, own in seconds.items()}, "ratios": ratios}


def targets(subject: Subject) -> Iterator[tuple[str, str, float | None]]:
    """Pairs of arms and what their ratio should be: at least, or if negative at most; None for those without."""
    fp32, eight = subject.ours
    yield eight.name, fp32.name, -1.3
    yield from ((peer.name, eight.name, 3.0) for peer in PEERS)
    yield from ((peer.name, fp32.name, None) for peer in PEERS)
    yield "torch AdamW fused", fp32.name, None


def show(name: str, subject: Subject, found: dict[str, Any]) -> None:
    print(f"\n{name}: {found['elements']:,} elements{'' if isinstance(subject.shape, Shape) else ', no Newton-Schulz'}")
    for arm, ms in found["ms"].items():
        print(f"  {arm:58}{ms:10.2f} ms{found['state_bytes'][arm] / 2**20:10.2f} MiB of state")
    for above, below, target in targets(subject):
        if (row := found["ratios"].get(f"{above} / {below}")) is not None:
            print(f"  {above + ' / ' + below:58}{row['ratio']:10.3f}  {said(row, target)}")


def said(row: dict[str, Any], target: float | None) -> str:
    """The interval, and whether it is where it should be: wholly, in part or not at all."""
    low, high = row["ratio_95"]
    words = f"({low:.3f} to {high:.3f})"
    if target is None:
        return words
    wanted = f"at least {target:g}" if target > 0 else f"at most {-target:g}"
    inside = [end >= target if target > 0 else end <= -target for end in (low, high)]
    return f"{words}  {wanted}: {'holds' if all(inside) else 'undecided' if any(inside) else 'MISSED'}"


def show_distances(distances: dict[str, Any]) -> None:
    print("\nAfter 20 steps on the same gradients, from torch's AdamW in fp32: max|p-q| / max|q|, |p-q| / |q|")
    rows: Sequence[str] = list(next(iter(distances.values())))
    print(f"  {'':28}" + "".join(f"{row:>24}" for row in rows))
    for arm, own in distances.items():
        cells = [f"{own[row]['largest']:.2e}, {own[row]['norm']:.2e}" for row in rows]
        print(f"  {arm:28}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
