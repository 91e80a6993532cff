"""Where does Emb << QK begin? The sharpness of block types at several vocabularies. No times: ratios.

    python benchmarks/disparity_vocabulary.py DATA...            folders of `sharpwise prepare`, a vocabulary each
    python benchmarks/disparity_vocabulary.py DATA... --quick    one seed, few steps; saves nothing
    python benchmarks/disparity_vocabulary.py --again            the table anew, from the committed file

Two models of 1M parameters beside their embeddings, a GPT-2 (head tied) and a LLaMA (not tied), are trained on every
text by AdamW, over three seeds. At some steps the Fisher sharpness of every block type is measured, labels drawn from
the model, windows of the validation text; the embedding with all uses that it has, and as a look-up alone. A token
looks up one row, so that a look-up's mean over its rows falls as 1 / rows where nothing else changes.

"Emb << QK" is told as QK over Emb; >> 1 is the paper's order (arXiv 2502.19002). Intervals: Student's t of the
logarithms over the seeds, 95%.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment

from sharpwise.probes import sharpness
from sharpwise.probes.estimate import t_interval
from sharpwise.train.build import build
from sharpwise.train.config_file import make_config
from sharpwise.train.steps import step_starts, train_steps

FILE = Path(__file__).parent.parent / "recipes" / "sharpness_disparity" / "vocabulary.json"
MODELS = ("gpt2-1m", "llama-1m")
CONTEXT, SEQUENCES = 128, 16
PASSES, BATCHES = 4, 8
"""Steps' worth of windows that are measured, and the batches that they make."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="*", help="folders that sharpwise prepare wrote")
    parser.add_argument("--models", nargs="+", default=MODELS, help="presets")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="AdamW's, as in gpt2.toml and llama.toml there")
    parser.add_argument("--steps", type=int, default=244)
    parser.add_argument("--at", type=int, nargs="+", default=[61, 244], help="steps to measure after")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--quick", action="store_true", help="to see that it runs; saves nothing")
    parser.add_argument("--again", action="store_true", help="the table anew, from a file that is there")
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() and not args.quick else {"runs": []}
    if not args.again:
        torch.set_num_threads(1)
        if args.quick:
            args.seeds, args.steps, args.at = args.seeds[:1], 4, [2, 4]
        for model in args.models:
            for data in args.data:
                for seed in args.seeds:
                    run(args, result, model, data, seed)
    show(result)


def run(args: argparse.Namespace, result: dict[str, Any], model: str, data: str, seed: int) -> None:
    """One run, added to `result` and saved; not made again where it is there."""
    built = build(
        make_config(
            {
                "seed": seed,
                "model": {"name": model, "settings": {"context": CONTEXT}},
                "data": {"path": data, "context": CONTEXT},
                "batch": {"sequences": SEQUENCES},
                "optimizer": {"name": "adamw", "lr": args.lr, "betas": [0.9, 0.95], "weight_decay": 0.1},
                "schedule": {"steps": args.steps},
                "compute": {"device": "cpu", "precision": "bf16-autocast", "threads": 1},
                "validation": {"every": 0},
            }
        )
    )
    about = {
        "model": model, "vocabulary": built.data.vocabulary, "seed": seed, "lr": args.lr, "steps": args.steps,
        "tokens": args.steps * built.plan.tokens_per_step,
    }  # fmt: skip
    if any(about.items() <= own.items() for own in result["runs"]):
        return
    validation = built.data.validation
    starts = np.concatenate([step_starts(validation, built.plan, i) for i in range(PASSES)])
    windows = torch.from_numpy(validation.windows(starts, CONTEXT + 1))
    tied = any(s.tied for s in built.optimizer.blocks.segments if s.role == "tok_emb")  # type: ignore[union-attr]
    own: list[dict[str, Any]] = []
    for step in train_steps(
        built.model, built.optimizer, built.data.train, validation, built.plan, forward=built.forward
    ):
        if step.step in args.at:
            batches = [windows[i::BATCHES] for i in range(BATCHES)]
            S = {
                use: {
                    mean: {e.of: e.value for e in found.select(by="type", quantity=quantity)}
                    for mean, quantity in (("arithmetic", "sharpness"), ("geometric", "sharpness, geometric mean"))
                }
                for use in (("both", "lookup") if tied else ("both",))
                for found in [sharpness(built.model, batches, tied=use)]  # type: ignore[arg-type]
            }
            own.append({"step": step.step, "loss": step.loss, "S": S})
    result["runs"].append({**about, "data": built.data.about, "environment": environment(), "measured": own})
    print(f"{model}, vocabulary {built.data.vocabulary:,}, seed {seed}: loss {own[-1]['loss']:.3f}", flush=True)
    if not args.quick:
        args.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def ratio(runs: Sequence[Mapping[str, Any]], step: int, use: str, mean: str, pair: tuple[str, str]) -> list[float]:
    """Of the first type's sharpness to the second's: geometric mean over the runs, and the ends of its interval.

    The embedding's is through `use`, that of all other types is through all uses.
    """
    logs = []
    for run in runs:
        S = next(own["S"] for own in run["measured"] if own["step"] == step)
        a, b = (S[use if kind == "Emb" else "both"][mean][kind] for kind in pair)
        logs.append(math.log(a / b))
    middle, half = t_interval(logs)
    return [math.exp(middle), math.exp(middle - (half or math.nan)), math.exp(middle + (half or math.nan))]


def show(result: Mapping[str, Any]) -> None:
    runs = result["runs"]
    for model in dict.fromkeys(run["model"] for run in runs):
        for vocabulary in sorted({run["vocabulary"] for run in runs if run["model"] == model}):
            own = [run for run in runs if (run["model"], run["vocabulary"]) == (model, vocabulary)]
            for use in own[0]["measured"][0]["S"]:
                for mean in ("arithmetic", "geometric"):
                    cells = []
                    for step in (one["step"] for one in own[0]["measured"]):
                        middle, low, high = ratio(own, step, use, mean, ("QK", "Emb"))
                        cells.append(f"{step}: {middle:.3g} ({low:.3g} to {high:.3g})")
                    print(f"{model} {vocabulary:6,} Emb {use:7s}{mean:11s} QK / Emb after step " + "   ".join(cells))


if __name__ == "__main__":
    main()
