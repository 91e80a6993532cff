"""Times the optimizer step on GPT-2 124M shapes, beside torch's AdamW and two other Adam-minis, in one run.

    python benchmarks/step_time.py              everything, result in benchmarks/results/step_time.json
    python benchmarks/step_time.py --quick      a small shape, to see that it runs; saves nothing
    python benchmarks/step_time.py --further    other rules, and controls, in step_time_further.json
    python benchmarks/step_time.py --again      medians and intervals anew from the saved rounds; times nothing
    python benchmarks/step_time.py --device cuda     on a GPU: see on_device.py; `make bench-gpu` runs its tests first

The arms take turns, in an order that rotates from round to round, on the same parameters and gradients (each arm has
its state). Each is timed between two steps of torch's fused AdamW, and its ratio is to the mean of these two, so that
a slower moment of the machine falls on both sides of it. Slow arms take part in every third round. Where state lies in
memory differs from process to process and moves ratios, so that rounds of one process are alike and those of another
are not: the rounds are those of six processes, a ratio is the median over processes of the median of their rounds, and
its interval draws processes, then rounds of each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import on_device
import torch
from arms import ARMS, BASE, BY_NAME, CLIPPED_BASE, COLD, FURTHER, LR, PAIRS, TINY_ARMS, WEIGHT_DECAY, state_bytes
from environment import environment
from intervals import over_processes, within_rounds
from shapes import FULL, LAYOUTS, QUICK, Shape, model_with_gradients

import sharpwise

HERE = Path(__file__).parent
TINY = ((2, 128), (4, 144), (4, 256), (6, 384))  # layers and widths, vocabulary 4096
PROCESSES = 6
AXPY = "in-place axpy"
AXPY_BYTES = 12  # reads p and g, writes p


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape and few rounds; saves nothing")
    parser.add_argument("--name", default="step_time", help="saves benchmarks/results/NAME.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help=f"in each of {PROCESSES} processes")
    parser.add_argument("--only", action="append", help="substring of the arms to time (with the base); saves nothing")
    parser.add_argument("--further", action="store_true", help="steps of other arms, and nothing else")
    parser.add_argument("--skip-cold", action="store_true", help="no fresh processes; saves nothing")
    parser.add_argument("--again", action="store_true", help="summarize the saved rounds anew; times nothing")
    parser.add_argument("--device", choices=("cpu", "cuda", "fake"), default="cpu", help="see on_device.py")
    parser.add_argument("--check", action="store_true", help="only whether there is such a device")
    args = parser.parse_args()
    if reason := on_device.refusal(args.device):
        parser.exit(1, f"{parser.prog}: {reason}\n")
    if args.check:
        return
    if args.device != "cpu":
        run_on_device(args)
        return
    path = HERE / "results" / f"{args.name}{'_further' * args.further}.json"
    if args.again:
        save(path, again(json.loads(path.read_text())))
        return
    torch.set_num_threads(args.threads)
    shape, processes = (QUICK, 1) if args.quick else (FULL, PROCESSES)

    result: dict[str, Any] = {"environment": environment(), "shape": vars(shape)}
    result |= {"processes": processes, "rounds": args.rounds, "layouts": {}}
    for layout in LAYOUTS:
        times, sizes = time_processes(processes, layout, shape, args.rounds, args.only, args.threads, args.further)
        result["layouts"][layout] = summary(times, sizes, shape, layout, args.rounds)
        show_steps(layout, result["layouts"][layout])
    if args.further and not args.quick and not args.only:
        save(path, result)
    if args.further:
        return
    if not args.skip_cold:
        result["fresh_process"] = fresh_processes(args.quick, args.threads, args.only)
    result["small_tensors"] = small_tensors(20 if args.quick else 200)
    show("150 small tensors, ms", result["small_tensors"])
    result["tiny_models"] = tiny_models(20 if args.quick else 100)
    result["llama_3_8b_on_meta"] = on_meta()
    show("Llama-3-8B on the meta device, seconds", result["llama_3_8b_on_meta"])
    result["import_after_torch_s"] = import_seconds()
    print(f"\nimport sharpwise after import torch: {result['import_after_torch_s']:.3f} s")

    if args.quick or args.only or args.skip_cold:
        print("\nNothing saved: this was not a full run.")
        return
    save(path, result)


def run_on_device(args: argparse.Namespace) -> None:
    settings = on_device.quick() if args.quick else {"shape": FULL, "rounds": 15, "repeats": 20}
    result = on_device.measured(args.device, only=args.only, **settings)
    if args.device == "fake" or args.quick or args.only:
        print("\nNothing saved: this was not a full run on a device.")
        return
    save(HERE / "results" / f"{args.name}_cuda.json", result)


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nSaved {path.relative_to(HERE.parent)}")


def again(result: dict[str, Any]) -> dict[str, Any]:
    """The same rounds, their medians and intervals as this version of the script tells them."""
    shape, here = Shape(**result["shape"]), environment()
    for layout, old in result["layouts"].items():
        times = {name: Timed(**taken) for name, taken in old["taken"].items()}
        sizes = {name: row["state_bytes"] for name, row in old["arms"].items() if row["state_bytes"] is not None}
        result["layouts"][layout] = summary(times, sizes, shape, layout, result["rounds"])
        show_steps(layout, result["layouts"][layout])
    return {**result, "summarized_again": {key: here[key] for key in ("date", "commit")}}


class Timed(NamedTuple):
    """Seconds of one arm: its own, and the mean of the base before and after, in the rounds in which it took part.

    Rounds are counted through: round r of process p is p * (rounds of a process) + r.
    """

    rounds: list[int]
    seconds: list[float]
    beside: list[float]

    def ratios(self) -> dict[int, float]:
        """To the base, by round."""
        return dict(zip(self.rounds, within_rounds(self.seconds, self.beside), strict=True))


def time_processes(
    processes: int, layout: str, shape: Shape, rounds: int, *others: Any
) -> tuple[dict[str, Timed], dict[str, int]]:
    """What was timed in so many fresh processes, one after the other, and bytes of state, by arm."""
    found: dict[str, Timed] = {}
    for number in range(processes):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            times, sizes = process.submit(time_layout, layout, shape, rounds, *others).result()
        for name, own in times.items():
            known = found.setdefault(name, Timed([], [], []))
            known.rounds.extend(number * rounds + own_round for own_round in own.rounds)
            known.seconds.extend(own.seconds)
            known.beside.extend(own.beside)
    return found, sizes


def time_layout(
    layout: str, shape: Shape, rounds: int, only: list[str] | None, threads: int, further: bool
) -> tuple[dict[str, Timed], dict[str, int]]:
    """The same in this process; three untimed rounds come first (allocation, compilation)."""
    torch.set_num_threads(threads)
    model = model_with_gradients(layout, shape)
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters]
    steps: dict[str, Callable[[], float]] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    arms = FURTHER if further else ARMS
    for arm in arms:
        if only and arm.name != BASE and not any(part in arm.name for part in only):
            continue
        optimizers[arm.name] = optimizer = arm.build(model)
        steps[arm.name] = clipped(optimizer, parameters, arm.clip) if arm.clip else timed(optimizer.step)

    def axpy() -> None:
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=1e-12)

    steps[AXPY] = timed(axpy)
    base = steps[BASE]
    names = list(steps)
    slow = {arm.name for arm in arms if arm.slow}
    found = {name: Timed([], [], []) for name in names}
    for number in range(-3, rounds):
        turn = number % len(names)
        before = base()
        for name in names[turn:] + names[:turn]:
            if name in slow and number % 3:
                continue
            seconds, after = steps[name](), base()
            if number >= 0:
                found[name].rounds.append(number)
                found[name].seconds.append(seconds)
                found[name].beside.append((before + after) / 2)
            before = after
    return found, {name: state_bytes(optimizer) for name, optimizer in optimizers.items()}


def timed(step: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    return run


def clipped(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], norm: float) -> Callable[[], float]:
    """Clipping and step; the gradients, which torch clips in place, get their size back outside the time."""

    def run() -> float:
        began = time.perf_counter()
        total = torch.nn.utils.clip_grad_norm_(parameters, norm)
        optimizer.step()
        seconds = time.perf_counter() - began
        torch._foreach_mul_([p.grad for p in parameters], total.item() / norm)
        return seconds

    return run


def summary(times: dict[str, Timed], sizes: dict[str, int], shape: Shape, layout: str, rounds: int) -> dict[str, Any]:
    """Medians, ratios with a bootstrap interval, and time over the time that the bytes alone need."""
    with torch.device("meta"):
        elements = sum(p.numel() for p in LAYOUTS[layout](shape).parameters())
    bandwidth = AXPY_BYTES * elements / statistics.median(times[AXPY].seconds)
    traffic = {name: arm.bytes_per_element for name, arm in BY_NAME.items()}
    rows: dict[str, Any] = {}
    for name, taken in times.items():
        rows[name] = {
            "median_ms": 1e3 * statistics.median(taken.seconds),
            "min_ms": 1e3 * min(taken.seconds),
            "max_ms": 1e3 * max(taken.seconds),
            **over_processes(taken.ratios(), rounds),
            "state_bytes": sizes.get(name),
        }
        if name in traffic:
            rows[name]["bytes_moved"] = traffic[name] * elements
            rows[name]["over_floor"] = statistics.median(taken.seconds) * bandwidth / (traffic[name] * elements)
    pairs = {
        f"{arm} / {other}": pair(times[arm], times[other], rounds) for arm, other in PAIRS if {arm, other} <= set(times)
    }
    taken_by_arm = {name: taken._asdict() for name, taken in times.items()}
    return {"parameters": elements, "axpy_bytes_per_s": bandwidth, "arms": rows, "pairs": pairs, "taken": taken_by_arm}


def pair(arm: Timed, other: Timed, rounds: int) -> dict[str, Any]:
    """The ratio of two arms in the rounds that both took part in, each by the base beside it."""
    theirs = other.ratios()
    ratios = {number: ratio / theirs[number] for number, ratio in arm.ratios().items() if number in theirs}
    return over_processes(ratios, rounds)


def fresh_processes(quick: bool, threads: int, only: list[str] | None) -> dict[str, Any]:
    """First step where nothing was ever compiled, then with all kernels in the cache; memory beyond state."""
    found: dict[str, Any] = {}
    print("\nIn a fresh process: first step where nothing was ever compiled, and where all was; memory beyond state")
    print(f"{'':42}{'cold s':>8}{'warm s':>8}{'scratch MiB':>13}{'temporary MiB':>15}")
    for layout in LAYOUTS:
        for name in COLD:
            if only and not any(part in name for part in only):
                continue
            command = [sys.executable, str(HERE / "first_step.py"), layout, name, "--threads", str(threads)]
            with tempfile.TemporaryDirectory() as fresh:
                empty = {"TMPDIR": fresh, "XDG_CACHE_HOME": f"{fresh}/cache", "TRITON_CACHE_DIR": f"{fresh}/triton"}
                cold, warm = (run_json(command + ["--quick"] * quick, **empty) for _ in range(2))
            found[f"{layout}, {name}"] = {"cold": cold, "warm": warm}
            scratch, temporary = (warm[key] for key in ("scratch_bytes", "temporary_bytes"))
            print(
                f"{layout + ', ' + name:42}{cold['first_step_s']:8.2f}{warm['first_step_s']:8.2f}"
                f"{scratch / 2**20:13.1f}"
                f"{float('nan') if temporary is None else temporary / 2**20:15.1f}"
            )
    return found


def run_json(command: list[str], **extra: str) -> dict[str, Any]:
    done = subprocess.run(command, env=os.environ | extra, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def small_tensors(rounds: int) -> dict[str, float]:
    """Median ms of a step over 150 vectors of 768 and 3072 elements, the biases and norms of GPT-2."""
    named = [(f"vector_{i}", torch.nn.Parameter(torch.randn(768 if i % 4 else 3072))) for i in range(150)]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    tensors = [parameter for _, parameter in named]
    steps = {
        "torch AdamW fused": timed(torch.optim.AdamW(tensors, lr=LR, weight_decay=WEIGHT_DECAY, fused=True).step),
        "torch AdamW foreach": timed(torch.optim.AdamW(tensors, lr=LR, weight_decay=WEIGHT_DECAY, foreach=True).step),
        "sharpwise AdamW": timed(sharpwise.AdamW(named, lr=LR, weight_decay=WEIGHT_DECAY).step),
    }
    times = in_turns(steps, rounds)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def in_turns(steps: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds per round of each; three untimed rounds come first."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-3, rounds):
        for name, step in steps.items():
            seconds = step()
            if number >= 0:
                times[name].append(seconds)
    return times


def tiny_models(rounds: int) -> dict[str, dict[str, Any]]:
    """Steps of small models, against torch's clipping and fused step: median ms, ratio, difference."""
    found: dict[str, dict[str, Any]] = {}
    for layers, width in TINY:
        shape = Shape(n_layer=layers, n_head=4, n_embd=width, vocab_size=4096, block_size=256)
        model = model_with_gradients("linear", shape)
        parameters = list(model.parameters())
        steps = {}
        for arm in TINY_ARMS:
            optimizer = arm.build(model)
            steps[arm.name] = clipped(optimizer, parameters, arm.clip) if arm.clip else timed(optimizer.step)
        times = in_turns(steps, rounds)
        base = times[CLIPPED_BASE]
        title = f"{sum(p.numel() for p in parameters) / 1e6:.1f}M"
        found[title] = {
            name: {
                "median_ms": 1e3 * statistics.median(values),
                "ratio": statistics.median(within_rounds(values, base)),
                "more_ms": 1e3 * statistics.median([a - b for a, b in zip(values, base, strict=True)]),
            }
            for name, values in times.items()
        }
        print(f"\n{title} parameters, {len(parameters)} tensors: median ms, ratio to clipping and fused step")
        for name, row in found[title].items():
            print(f"  {name:36}{row['median_ms']:8.2f}{row['ratio']:8.2f}")
    return found


def on_meta() -> dict[str, float]:
    """Seconds for the block map and for the state of Adam-mini, without any memory for either."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    began = time.perf_counter()
    blocks = sharpwise.BlockMap.of(model)
    mapped = time.perf_counter()
    optimizer = sharpwise.AdamMini(model, blocks=blocks)
    optimizer.init_state()
    return {"block map": mapped - began, "optimizer and init_state": time.perf_counter() - mapped}


def import_seconds() -> float:
    """Median of five processes: what `import sharpwise` adds to a process that has imported torch."""
    code = "import time, torch; t = time.perf_counter(); import sharpwise; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


def show_steps(layout: str, found: dict[str, Any]) -> None:
    print(f"\n{layout}: {found['parameters']:,} parameters, in-place axpy {found['axpy_bytes_per_s'] / 1e9:.1f} GB/s")
    print(f"{'':30}{'median ms':>10}{'min':>8}{'max':>8}{'ratio':>8}{'95%':>14}{'/ floor':>9}{'state MiB':>11}")
    for name, row in found["arms"].items():
        low, high = row["ratio_95"]
        print(
            f"{name:30}{row['median_ms']:10.1f}{row['min_ms']:8.1f}{row['max_ms']:8.1f}{row['ratio']:8.3f}"
            f"{f'{low:.2f} to {high:.2f}':>14}"
            + (f"{row['over_floor']:9.2f}{row['state_bytes'] / 2**20:11.1f}" if "over_floor" in row else "")
        )
    for name, row in found["pairs"].items():
        low, high = row["ratio_95"]
        print(f"{name:58}{row['ratio']:8.3f}{f'{low:.2f} to {high:.2f}':>16}")


def show(title: str, values: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, value in values.items():
        print(f"  {name:28}{value:10.3f}")


if __name__ == "__main__":
    main()
