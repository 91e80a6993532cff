"""Times what per-block learning rates cost that follow a measurement, and weighs the state of SGD-SaI.

    python benchmarks/block_lr.py            GPT-2 124M shapes, and a 10M model that is trained; results/block_lr.json
    python benchmarks/block_lr.py --quick    small shapes, to see that it runs; saves nothing

What a measurement costs is the time of a step that makes one, less that of a step that does not, in the same round. It
is told as a part of the step (SharpnessLR, GradientSNR) or of the training step, forward and backward included
(HeavyTailLR), and as a part of all steps at the default cadence.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from intervals import bootstrap, within_rounds
from shapes import FULL, QUICK, Shape, model_with_gradients
from step_time import in_turns, timed
from torch import nn
from torch.nn import functional as F

import sharpwise
from sharpwise.block_lr import HeavyTailLR, SharpnessLR
from sharpwise.train.models import load_model

HERE = Path(__file__).parent
LR = 1e-6
NEVER = 10**9
STEPS = 1000
"""Of the training in which HeavyTailLR's phase is a fifth; a longer one has less of it in proportion."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds; saves nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds, shape = (3, QUICK) if args.quick else (args.rounds, FULL)

    result: dict[str, Any] = {"environment": environment(), "shape": vars(shape), "rounds": rounds}
    for layout in ("conv1d", "linear"):
        result[layout] = step_costs(layout, shape, rounds)
        show(f"{layout}: part of a step of AdamW (of SGD)", result[layout])
    result["heavy_tail"] = heavy_tail("gpt2-1m" if args.quick else "gpt2-10m", 2 if args.quick else 5)
    show(f"HeavyTailLR, {result['heavy_tail']['model']}: part of a training step", result["heavy_tail"]["ratios"])
    result["state"] = state_bytes()
    for name, weighed in result["state"].items():
        print(f"{name:14s} SGD-SaI {weighed['sgd_sai_gib']:.2f} GiB, {weighed['of_adamw']:.2%} of AdamW's")
    if args.quick:
        print("\nNothing saved: this was not a full run.")
        return
    path = HERE / "results" / "block_lr.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nSaved {path.relative_to(HERE.parent)}")


def step_costs(layout: str, shape: Shape, rounds: int) -> dict[str, Any]:
    """Ratios to AdamW's step (to SGD's for GradientSNR), each with its interval."""
    model = model_with_gradients(layout, shape)
    moving = SharpnessLR(start=1, every=NEVER, soft=NEVER)
    seldom, always = SharpnessLR(start=0, every=NEVER, soft=0), SharpnessLR(start=0, every=1, soft=0)
    made: dict[str, Callable[[], Any]] = {
        "AdamW": lambda: sharpwise.AdamW(model, lr=LR),
        "AdamW SharpnessLR, no measurement": lambda: sharpwise.AdamW(model, lr=LR, block_lr=seldom),
        "AdamW SharpnessLR, a measurement": lambda: sharpwise.AdamW(model, lr=LR, block_lr=always),
        "AdamW SharpnessLR, on its way": lambda: sharpwise.AdamW(model, lr=LR, block_lr=moving),
        "AdamMini": lambda: sharpwise.AdamMini(model, lr=LR),
        "AdamMini SharpnessLR, no measurement": lambda: sharpwise.AdamMini(model, lr=LR, block_lr=seldom),
        "AdamMini SharpnessLR, a measurement": lambda: sharpwise.AdamMini(model, lr=LR, block_lr=always),
        "AdamMini SharpnessLR, on its way": lambda: sharpwise.AdamMini(model, lr=LR, block_lr=moving),
        "SGD": lambda: sharpwise.SGD(model, lr=LR, momentum=0.9, dampening=0.9),
        "SGDSaI": lambda: sharpwise.SGDSaI(model, lr=LR * 1e-3),
    }
    times: dict[str, list[float]] = {}
    for base in ("AdamW", "AdamMini", "SGD"):
        optimizers = {name: make() for name, make in made.items() if name.startswith(base)}
        first = {name: timed(optimizer.step)() for name, optimizer in optimizers.items() if name == "SGDSaI"}
        for optimizer in optimizers.values():
            for _ in range(3):
                optimizer.step()
        times |= in_turns({name: timed(optimizer.step) for name, optimizer in optimizers.items()}, rounds)
        times |= {f"{name}, first step": [seconds] for name, seconds in first.items()}
    found: dict[str, Any] = {}
    for base in ("AdamW", "AdamMini"):
        plain, without, measured, going = (times[n] for n in times if n == base or n.startswith(f"{base} "))
        found[f"{base} with SharpnessLR"] = ratio(within_rounds(without, plain))
        parts = within_rounds([b - a for a, b in zip(without, measured, strict=True)], plain)
        found[f"{base}, a measurement"] = ratio(parts)
        on_way = within_rounds([b - a for a, b in zip(without, going, strict=True)], plain)
        found[f"{base}, a step on the way"] = ratio(on_way)
        every, soft = SharpnessLR().every, SharpnessLR().smooth
        costs = [(part + soft * step) / every for part, step in zip(parts, on_way, strict=True)]
        found[f"{base}, every {every} steps, there in {soft}"] = ratio(costs)
    found["SGD, with GradientSNR measured"] = ratio(within_rounds(times["SGDSaI"], times["SGD"]))
    return found


def heavy_tail(preset: str, rounds: int) -> dict[str, Any]:
    """What measuring all spectra costs, as a part of a training step of 4096 tokens."""
    torch.manual_seed(0)
    model = load_model(preset)
    tokens = torch.randint(4096, (16, 257))

    def train(model: nn.Module, optimizer: Any) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad()
            logits = model(tokens[:, :-1]).logits
            F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
            optimizer.step()

        return step

    usual = sharpwise.AdamW(model, lr=LR, block_lr=HeavyTailLR(start=NEVER, stop=None))
    measuring = sharpwise.AdamW(model, lr=LR, block_lr=HeavyTailLR(every=1, stop=None))
    steps = {"without": timed(train(model, usual)), "with": timed(train(model, measuring))}
    for step in steps.values():
        step()
    times = in_turns(steps, rounds)
    parts = within_rounds([b - a for a, b in zip(times["without"], times["with"], strict=True)], times["without"])
    own = HeavyTailLR()
    share = (1 + STEPS * float(own.stop or 0) // own.every) / STEPS
    ratios = {
        "a measurement": ratio(parts),
        f"all of them, in a training of {STEPS} steps": ratio([part * share for part in parts]),
    }
    return {"model": preset, "tokens": tokens[:, 1:].numel(), "step_s": times["without"], "ratios": ratios}


def state_bytes() -> dict[str, Any]:
    """The state of SGD-SaI and of AdamW for GPT-2 1.5B and Llama-2-7B, on the meta device."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    configs = {
        "GPT-2 1.5B": GPT2Config(n_layer=48, n_head=25, n_embd=1600),
        "Llama-2-7B": LlamaConfig(vocab_size=32000),
    }
    found = {}
    for name, config in configs.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        ours, theirs = sharpwise.SGDSaI(model).state_bytes(), sharpwise.AdamW(model).state_bytes()
        found[name] = {"sgd_sai": ours, "adamw": theirs, "sgd_sai_gib": ours / 2**30, "of_adamw": ours / theirs}
    return found


def ratio(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "interval": bootstrap([values])}


def show(title: str, found: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in found.items():
        low, high = value["interval"]
        print(f"  {name:52s} {value['median']:9.4f}   {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main()
