"""Times `sharpwise train` against a minimal loop of the same model and batch, in turns within one process.

    python benchmarks/train_throughput.py                                   three sizes on the CPU
    python benchmarks/train_throughput.py --device cuda --models gpt2 --sequences 32 --context 1024 --compile
    python benchmarks/train_throughput.py --quick                           to see that it runs; saves nothing

The minimal loop is what one writes on a page after nanoGPT: sample windows, forward under bf16 autocast, backward,
`clip_grad_norm_`, torch's fused AdamW. The harness runs as it does for a user, metrics written and the terminal's
progress included, but no validation and no checkpoint, which the other loop does not have. After every few of its steps
the other loop takes as many; ratios are taken within such a round, so that slower moments fall on both.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from intervals import bootstrap, within_rounds
from rich.console import Console
from torch.nn import functional as F

from sharpwise.cli.malloc import keep_large_blocks
from sharpwise.cli.train import View
from sharpwise.model_facts import count_parameters, flops_per_token
from sharpwise.train.build import cpu_multiplies_bf16
from sharpwise.train.data import prepare_tokens
from sharpwise.train.models import load_model
from sharpwise.train.run import Start, run
from sharpwise.train.steps import Step

HERE = Path(__file__).parent
LR, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by the makers' data sheets


class MinimalLoop:
    """The same model, batch and update, as short as it can be written."""

    def __init__(self, name: str, tokens: np.ndarray, args: argparse.Namespace) -> None:
        self.tokens, self.args = tokens, args
        torch.manual_seed(0)
        attention = "eager" if args.device == "cpu" else "sdpa"
        self.model = load_model(name, settings={"vocab_size": args.vocabulary, "attn_implementation": attention})
        self.model.config.use_cache = False
        self.model.to(args.device).train()
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.random = np.random.default_rng(0)

    def step(self) -> float:
        """One optimizer step; returns its loss."""
        args = self.args
        starts = self.random.integers(0, len(self.tokens) - args.context, args.sequences)
        windows = np.stack([self.tokens[i : i + args.context + 1] for i in starts]).astype(np.int64)
        batch = torch.from_numpy(windows)
        batch = batch.pin_memory().to(args.device, non_blocking=True) if args.device == "cuda" else batch
        x, y = batch[:, :-1], batch[:, 1:]
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            logits = self.forward(x).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def time_model(name: str, data: Path, optimizer: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of both loops, round by round."""
    tokens = np.concatenate([np.memmap(p, np.uint16) for p in sorted(data.glob("train-*.bin"))])
    other = MinimalLoop(name, tokens, args)
    per_round, rounds = args.steps_per_round, args.rounds + args.warm_up
    mine: list[float] = []
    theirs: list[float] = []
    started = 0.0
    view = View(Console(stderr=True))

    def now() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_start(start: Start) -> None:
        nonlocal started
        view.start(start)
        started = now()

    def on_step(step: Step) -> None:
        nonlocal started
        view.step(step)
        if step.step % per_round:
            return
        middle = now()
        mine.append((middle - started) / per_round)
        for _ in range(per_round):
            other.step()
        started = now()
        theirs.append((started - middle) / per_round)

    given = {
        "model": {"name": name, "compile": args.compile},
        "data": {"path": str(data), "context": args.context},
        "batch": {"sequences": args.sequences},
        "optimizer": {"lr": LR, "betas": list(BETAS), "weight_decay": WEIGHT_DECAY, "max_grad_norm": CLIP, **optimizer},
        "schedule": {"kind": "constant", "steps": per_round * rounds, "warmup": 0},
        "compute": {"device": args.device, "precision": "bf16-autocast" if args.bf16 else "fp32"},
        "validation": {"every": 0, "sequences": args.sequences},
        "checkpoint": {"every": 0},
        "log": {"tensorboard": False},
    }
    with tempfile.TemporaryDirectory() as folder, view:
        run(given, Path(folder) / "run", on_start=on_start, on_step=on_step)
    mine, theirs = mine[args.warm_up :], theirs[args.warm_up :]
    ratios = within_rounds(theirs, mine)
    per_step = args.sequences * args.context
    result = {
        "model": name,
        "parameters": count_parameters(other.model)[0],
        "tokens_per_step": per_step,
        "rounds": args.rounds,
        "steps_per_round": per_round,
        "tokens_per_second": per_step / statistics.median(mine),
        "minimal_tokens_per_second": per_step / statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "interval": bootstrap([ratios]),
    }
    if args.device == "cuda":
        peak = next((v for k, v in PEAK_FLOPS.items() if k in torch.cuda.get_device_name()), None)
        flops = flops_per_token(other.model, args.context) * result["tokens_per_second"]
        result |= {"peak_flops": peak, "model_flop_utilization": peak and flops / peak}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["gpt2-0.4m", "gpt2-3m", "gpt2-10m"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="autocast; default: where it is native")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--seconds", type=float, default=90.0, help="about so much per model decides steps per round")
    parser.add_argument("--name", default="train_throughput", help="saves benchmarks/results/NAME.json")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    keep_large_blocks()
    torch.set_num_threads(args.threads)
    if args.bf16 is None:
        args.bf16 = args.device == "cuda" or cpu_multiplies_bf16()
    if args.quick:
        args.models, args.rounds, args.seconds = args.models[:1], 3, 5.0
    result: dict[str, Any] = {"environment": environment(), "settings": vars(args) | {}, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        args.vocabulary = prepare_tokens(["stdlib"], data, vocabulary=4096).vocabulary
        for name in args.models:
            for optimizer in ({"name": "adamw"}, {"name": "adamw", "block_lr": "blockwise"}):
                args.steps_per_round = steps_per_round(name, data, args)
                found = time_model(name, data, optimizer, args) | {"optimizer": optimizer}
                result["runs"].append(found)
                low, high = found["interval"]
                speeds = (
                    f"{found['tokens_per_second']:,.0f} tokens/s, minimal {found['minimal_tokens_per_second']:,.0f}"
                )
                print(
                    f"{name}, {' + '.join(optimizer.values())}: {speeds}, ratio {found['ratio']:.3f} "
                    f"({low:.3f} to {high:.3f})",
                    flush=True,
                )
    if args.quick:
        print("Nothing saved: this was not a full run.")
        return
    path = HERE / "results" / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Saved {path.relative_to(HERE.parent)}")


def steps_per_round(name: str, data: Path, args: argparse.Namespace) -> int:
    """So many that both loops together take about `args.seconds`."""
    tokens = np.memmap(next(data.glob("train-*.bin")), np.uint16)
    loop = MinimalLoop(name, tokens, args)
    loop.step()
    before = time.perf_counter()
    for _ in range(3):
        loop.step()
    seconds = (time.perf_counter() - before) / 3
    return max(2, round(args.seconds / 2 / seconds / (args.rounds + args.warm_up)))


if __name__ == "__main__":
    main()
