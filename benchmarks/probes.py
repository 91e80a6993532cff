"""Times sharpness against a forward-backward on the same tokens, and products with the Hessian against a gradient.

    python benchmarks/probes.py                  four layers of GPT-2, on the CPU; benchmarks/results/probes.json
    python benchmarks/probes.py --device cuda --layers 12 --width 768 --context 1024
    python benchmarks/probes.py --quick          small shapes, to see that it runs; saves nothing

All arms of a vocabulary take turns, in an order that rotates; ratios are taken within a round, so that slower moments
of the machine fall on both sides. The gradient is what a training step computes: forward, cross-entropy in fp32,
backward, with attention's fused kernel. Peers are timed where they are installed (`curvlinops-for-pytorch`,
`pyhessian`); they get the math kernel of attention, without which they fail. PyHessian keeps the graph of a single
batch between products, and makes it anew for each of several; both are timed. Memory is the peak beyond what the model
takes, each arm in a process of its own.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment, version
from first_step import status_kib
from step_time import bootstrap, within_rounds
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

from sharpwise import probes
from sharpwise.blocks import BlockMap

HERE = Path(__file__).parent
BASE = "gradient"
MULTINOMIAL = "gradient, labels by torch.multinomial"


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


def build_arms(model: nn.Module, batch: Tensor, *, alone: bool = False) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; `alone` without peers."""
    x, y = batch[:, :-1], batch[:, 1:].flatten()
    blocks = BlockMap.of(model)
    parameters = list(model.parameters())
    hessian = probes.Curvature(model, batch, blocks=blocks)
    newton = probes.Curvature(model, batch, "gauss-newton", blocks=blocks)
    v = torch.randn(hessian.dim, device=batch.device)

    def gradient(sampled: bool = False) -> None:
        logits = model(x).logits.flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten() if sampled else y
        F.cross_entropy(logits.float(), labels).backward()
        model.zero_grad(set_to_none=True)

    arms: dict[str, Callable[[], Any]] = {
        BASE: gradient,
        "sharpness": lambda: probes.sharpness(model, batch, blocks=blocks),
        "sharpness, true labels": lambda: probes.sharpness(model, batch, blocks=blocks, labels="true"),
        MULTINOMIAL: lambda: gradient(sampled=True),
        "Hessian product": lambda: hessian.matvec(v),
        "Gauss-Newton product": lambda: newton.matvec(v),
    }
    return arms if alone else arms | _pyhessian(model, x, y, parameters) | _curvlinops(model, x, y, parameters)


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
        "PyHessian product, several batches": lambda: anew.dataloader_hv_product(vectors),
        "PyHessian product, kept graph": lambda: hessian_vector_product(kept.gradsH, kept.params, vectors),
    }


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor, parameters: list[nn.Parameter]) -> dict[str, Callable[[], Any]]:
    if importlib.util.find_spec("curvlinops") is None:
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
            "ratio_95": bootstrap(ratios),
        }
    return rows


def memory(vocabulary: int, arm: str, args: argparse.Namespace) -> int:
    """Bytes beyond the model at the peak of one arm, in this process."""
    model, batch = model_and_tokens(vocabulary, args)
    run = build_arms(model, batch, alone=True)[arm]
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the highest resident size
    before = status_kib("VmRSS")
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
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[1024, 8192, 50304])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
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
    result: dict[str, Any] = {"environment": environment(), "settings": vars(args), "vocabularies": {}}
    result["environment"]["versions"] |= {name: version(name) for name in ("curvlinops-for-pytorch", "pyhessian")}
    for vocabulary in args.vocabularies:
        rows = summary(time_arms(build_arms(*model_and_tokens(vocabulary, args)), args.rounds, args.device))
        for arm in (BASE, "sharpness", "Hessian product", "Gauss-Newton product"):
            rows[arm]["memory_bytes"] = memory_in_own_process(vocabulary, arm, args)
        result["vocabularies"][vocabulary] = rows
        show(vocabulary, rows)
    if args.quick:
        print("\nNothing saved: this was not a full run.")
        return
    path = HERE / "results" / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nSaved {path.relative_to(HERE.parent)}")


def show(vocabulary: int, rows: dict[str, Any]) -> None:
    print(f"\nVocabulary {vocabulary:,}\n{'':40}{'ms':>10}{'ratio':>8}{'95%':>16}{'memory MiB':>12}")
    for name, row in rows.items():
        low, high = row["ratio_95"]
        own = f"{row['memory_bytes'] / 2**20:12.1f}" if "memory_bytes" in row else ""
        print(f"{name:40}{row['median_ms']:10.1f}{row['ratio']:8.2f}{low:8.2f} to {high:.2f}{own}", flush=True)


if __name__ == "__main__":
    main()
