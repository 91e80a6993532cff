"""Times what probes cost: against a forward-backward on the same tokens, and against the training that they watch.

    python benchmarks/probes.py                  four layers of GPT-2, on the CPU; benchmarks/results/probes.json
    python benchmarks/probes.py --device cuda --layers 12 --width 768 --context 1024
    python benchmarks/probes.py --quick          small shapes, to see that it runs; saves nothing

All arms of a vocabulary take turns, in an order that rotates; ratios are taken within a round, so that slower moments
of the machine fall on both sides. The gradient is what a training step computes: forward, cross-entropy in fp32,
backward, with attention's fused kernel. Products, and the peers that have them (`curvlinops-for-pytorch`, `pyhessian`,
where they are installed), are timed at the first vocabulary; peers get the math kernel of attention, without which they
fail. A product is timed alone, and as one of several, for which the graph of the gradient is kept: PyHessian does so
for a single batch and makes it anew for each of several, curvlinops always makes it anew. Memory is the peak beyond
what the model takes, each arm in a process of its own.

What a run notes in training is timed within training steps with AdamW, and told as part of them at its cadence.

At the end stands every figure that has a bound, with the bound.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from environment import environment, version
from first_step import status_kib
from intervals import bootstrap, within_rounds
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

from sharpwise import AdamW, probes
from sharpwise.blocks import BlockMap
from sharpwise.probes.callbacks import Probes

HERE = Path(__file__).parent
EVERY = 50  # steps from one note of a run to the next
BASE = "gradient"
MULTINOMIAL = "gradient, labels by torch.multinomial"
PEERS = ("PyHessian", "curvlinops")


def model_and_tokens(vocabulary: int, args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """GPT-2 with a tied head, and a batch [sequences, context + 1]."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=args.layers,
        n_embd=args.width,
        n_head=max(1, args.width // 64),
        n_positions=args.context,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).to(args.device).eval()
    return model, torch.randint(vocabulary, (args.sequences, args.context + 1), device=args.device)


def build_arms(model: nn.Module, batch: Tensor, stack: ExitStack) -> dict[str, Callable[[], Any]]:
    """Sharpness, and what it is compared with, by name; then products. Kept graphs are kept as long as the stack."""
    x, y = batch[:, :-1], batch[:, 1:].flatten()
    blocks = BlockMap.of(model)

    def gradient(sampled: bool = False) -> None:
        logits = model(x).logits.flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten() if sampled else y
        F.cross_entropy(logits.float(), labels).backward()
        model.zero_grad(set_to_none=True)

    arms: dict[str, Callable[[], Any]] = {
        BASE: gradient,
        "sharpness": lambda: probes.sharpness(model, batch, blocks=blocks),
        MULTINOMIAL: lambda: gradient(sampled=True),
    }
    for name, kind in (("Hessian product", "hessian"), ("Gauss-Newton product", "gauss-newton")):
        alone, kept = (probes.Curvature(model, batch, kind, blocks=blocks) for _ in range(2))  # type: ignore[arg-type]
        v = torch.randn(alone.dim, device=batch.device)
        arms[name] = lambda alone=alone, v=v: alone.matvec(v)
        stack.enter_context(kept.kept())
        arms[f"{name}, kept graph"] = lambda kept=kept, v=v: kept.matvec(v)
    return arms


def build_peers(model: nn.Module, batch: Tensor) -> dict[str, Callable[[], Any]]:
    """Products of other packages, by name."""
    x, y = batch[:, :-1], batch[:, 1:].flatten()
    parameters = list(model.parameters())
    return _pyhessian(model, x, y, parameters) | _curvlinops(model, x, y, parameters)


class Logits(nn.Module):
    """The model as peers want it: logits [tokens, vocabulary], by the math kernel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            logits: Tensor = self.model(x).logits.flatten(0, 1)
        return logits


def _pyhessian(model: nn.Module, x: Tensor, y: Tensor, parameters: list[nn.Parameter]) -> dict[str, Callable[[], Any]]:
    if importlib.util.find_spec("pyhessian") is None:
        print("PyHessian is not installed, and left out", file=sys.stderr)
        return {}
    import warnings

    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    cuda = x.device.type == "cuda"
    vectors = [torch.randn_like(p) for p in parameters]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a leak, which is real
        kept = hessian(Logits(model), F.cross_entropy, data=(x, y), cuda=cuda)
        anew = hessian(Logits(model), F.cross_entropy, dataloader=[(x, y)], cuda=cuda)
    return {
        "PyHessian Hessian product, several batches": lambda: anew.dataloader_hv_product(vectors),
        "PyHessian Hessian product, kept graph": lambda: hessian_vector_product(kept.gradsH, kept.params, vectors),
    }


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor, parameters: list[nn.Parameter]) -> dict[str, Callable[[], Any]]:
    if importlib.util.find_spec("curvlinops") is None:
        print("curvlinops is not installed, and left out", file=sys.stderr)
        return {}
    import curvlinops

    wrapped, data = Logits(model), [(x, y)]
    # `params` is a list up to one release and a dict by name from the next.
    named: Any = {f"model.{name}": p for name, p in model.named_parameters()}
    found: dict[str, Callable[[], Any]] = {}
    for label, kind in (("Hessian", "HessianLinearOperator"), ("Gauss-Newton", "GGNLinearOperator")):
        for params in (parameters, named):
            try:
                operator = getattr(curvlinops, kind)(
                    wrapped, nn.CrossEntropyLoss(), params, data, check_deterministic=False, num_data=len(y)
                )
                v = torch.randn(operator.shape[1], device=x.device)
                operator @ v
            except Exception as error:  # a release that wants it otherwise, or cannot do this model
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            found[f"curvlinops {label} product"] = lambda operator=operator, v=v: operator @ v
            break
        else:
            print(f"curvlinops {label}: left out ({problem})", file=sys.stderr)
    return found


def time_arms(arms: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds by arm and round; one untimed round comes first."""
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = now(device)
            arms[name]()
            if number >= 0:
                times[name].append(now(device) - began)
    return times


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and ratios to the gradient of the same round with a bootstrap interval."""
    rows = {}
    for name, seconds in times.items():
        ratios = within_rounds(seconds, times[BASE])
        rows[name] = {
            "median_ms": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "ratio_95": bootstrap([ratios]),
            "seconds": seconds,
        }
    return rows


def time_notes(model: nn.Module, batch: Tensor, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """What one note of each kind costs, in training steps (median over rounds), and its part of training at EVERY."""
    x, y = batch[:, :-1], batch[:, 1:].flatten()
    blocks = BlockMap.of(model)
    optimizer = AdamW(model.train(), lr=1e-4, blocks=blocks)
    off = {"updates_every": 0, "noise_every": 0, "sharpness_every": 0}
    watched = {
        kind: Probes(model, optimizer, blocks, sequences=len(batch), tokens=y.numel(), **{**off, f"{kind}_every": 1})
        for kind in ("sharpness", "updates", "noise")
    }
    shares: dict[str, list[float]] = {kind: [] for kind in watched}
    for number in range(-2, rounds):
        for kind, own in watched.items():
            began = now(device)
            F.cross_entropy(model(x).logits.flatten(0, 1).float(), y).backward()
            before = now(device)
            own.before_step(number + 3)
            stepping = now(device)
            optimizer.step()
            after = now(device)
            own.after_step(number + 3)
            ended = now(device)
            model.zero_grad(set_to_none=True)
            if number >= 0:
                shares[kind].append((stepping - before + ended - after) / (before - began + after - stepping))
    model.eval()
    return {
        kind: {"steps": (steps := statistics.median(own)), "share_of_training": steps / (EVERY + steps)}
        for kind, own in shares.items()
    }


def memory(vocabulary: int, arm: str, args: argparse.Namespace) -> int:
    """Bytes beyond the model at the peak of one arm, in this process."""
    model, batch = model_and_tokens(vocabulary, args)
    with ExitStack() as stack:
        run = build_arms(model, batch, stack)[arm]
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            run()
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the highest resident size
        before = status_kib("VmRSS")
        run()
        run()
        return max(status_kib("VmHWM") - before, 0) * 1024


def memory_in_own_process(vocabulary: int, arm: str, args: argparse.Namespace) -> int:
    sizes = [
        f"--{key}={getattr(args, key)}" for key in ("layers", "width", "context", "sequences", "threads", "device")
    ]
    command = [sys.executable, str(Path(__file__)), *sizes, "--memory", arm, "--vocabularies", str(vocabulary)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 50304])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="probes", help="saves benchmarks/results/NAME.json")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds; saves nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(memory(args.vocabularies[0], args.memory, args))
        return
    if args.quick:
        args.vocabularies, args.layers, args.width, args.context, args.rounds = [256, 2048], 2, 64, 32, 3
    result: dict[str, Any] = {"environment": environment(), "settings": vars(args), "vocabularies": {}, "notes": {}}
    result["environment"]["versions"] |= {name: version(name) for name in ("curvlinops-for-pytorch", "pyhessian")}
    for number, vocabulary in enumerate(args.vocabularies):
        result["vocabularies"][vocabulary] = rows = measure(vocabulary, args, products=number == 0)
        show(vocabulary, rows)
        result["notes"][vocabulary] = notes = time_notes(*model_and_tokens(vocabulary, args), args.rounds, args.device)
        for kind, note in notes.items():
            print(f"{f'{kind} noted, in training steps':44}{note['steps']:18.2f}")
    result["figures"] = bounded(result)
    print(f"\n{'':72}{'is':>8}{'95%':>18}{'at most':>9}")
    for name, (value, (low, high), bound) in result["figures"].items():
        over = "  over" if low > bound else ""
        print(f"{name:72}{value:8.3f}{f'{low:.3f} to {high:.3f}':>18}{bound:9.3f}{over}")
    if args.quick:
        print("\nNothing saved: this was not a full run. The bounds are for the shapes of one.")
        return
    path = HERE / "results" / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nSaved {path.relative_to(HERE.parent)}")


def measure(vocabulary: int, args: argparse.Namespace, *, products: bool) -> dict[str, Any]:
    """All arms of a vocabulary."""
    model, batch = model_and_tokens(vocabulary, args)
    with ExitStack() as stack:
        arms = build_arms(model, batch, stack)
        arms = arms | build_peers(model, batch) if products else {name: arms[name] for name in list(arms)[:3]}
        rows = summary(time_arms(arms, args.rounds, args.device))
    for arm in rows:
        if arm != MULTINOMIAL and not arm.startswith(PEERS):
            rows[arm]["memory_bytes"] = memory_in_own_process(vocabulary, arm, args)
    return rows


Figure = tuple[float, list[float], float]


def bounded(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures that have a bound: value, 95% interval over rounds where there is one, bound."""
    found: dict[str, Figure] = {}
    for vocabulary, rows in result["vocabularies"].items():
        bound = 1.2 if vocabulary <= 8192 else 1.4
        found[f"sharpness / gradient, vocabulary {vocabulary}"] = _ratio(rows, "sharpness", BASE, bound)
        share = rows["sharpness"]["memory_bytes"] / max(rows[BASE]["memory_bytes"], 1)
        found[f"its memory / that of the gradient, vocabulary {vocabulary}"] = (share, [share, share], bound)
        for kind in ("Hessian", "Gauss-Newton"):
            own, kept = f"{kind} product", f"{kind} product, kept graph"
            for arm in (own, kept):
                if arm in rows:
                    found[f"{arm} / gradient"] = _ratio(rows, arm, BASE, 3.5)
            peers = [name for name in rows if name.startswith(PEERS) and kind in name]
            if peers:
                best = min(peers, key=lambda name: rows[name]["median_ms"])
                found[f"{kept} / {best}"] = _ratio(rows, kept, best, 1.0)
    for vocabulary, notes in result["notes"].items():
        for kind, most in (("sharpness", 0.5), ("updates", 1.0), ("noise", 1.0)):
            percent = 100 * notes[kind]["share_of_training"]
            name = f"{kind} noted every {EVERY} steps, % of training, vocabulary {vocabulary}"
            found[name] = (percent, [percent, percent], most)
    return found


def _ratio(rows: Mapping[str, Any], arm: str, base: str, bound: float) -> Figure:
    ratios = within_rounds(rows[arm]["seconds"], rows[base]["seconds"])
    return statistics.median(ratios), bootstrap([ratios]), bound


def show(vocabulary: int, rows: dict[str, Any]) -> None:
    print(f"\nVocabulary {vocabulary:,}\n{'':44}{'ms':>10}{'ratio':>8}{'95%':>16}{'memory MiB':>12}")
    for name, row in rows.items():
        low, high = row["ratio_95"]
        own = f"{row['memory_bytes'] / 2**20:12.1f}" if "memory_bytes" in row else ""
        print(f"{name:44}{row['median_ms']:10.1f}{row['ratio']:8.2f}{low:8.2f} to {high:.2f}{own}", flush=True)


if __name__ == "__main__":
    main()
