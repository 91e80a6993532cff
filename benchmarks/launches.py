"""Counts what a step asks of a CUDA device, on a fake one: launches, host reads, copies. Needs no GPU.

    python benchmarks/launches.py                  every combination on a tiny model, the main ones on GPT-2 124M and
                                                   Llama-3-8B; results/launches.json
    python benchmarks/launches.py gpt2 adam-mini   only what has all these words; saves nothing
    python benchmarks/launches.py -v gpt2 lion     with the lines and operations that launch most
    python benchmarks/launches.py --bounds         prints the tables of tests/engine/test_launches.py as they are now

A row is a steady step, the fourth. `fake_device.py` says what is counted, and how.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import environment
from fake_device import Counts, FakeCuda
from shapes import FULL, conv1d_model
from torch import nn

from sharpwise.optim import create_optimizer
from sharpwise.table import Table
from sharpwise.testing import tiny_model

HERE = Path(__file__).parent
STEPS = 4
MOST = 12
"""Lines and operations that are noted."""

OPTIMIZERS = ("adamw", "adam-mini", "adapm", "adasgd", "blockwise-adam", "lion", "muon", "sgd", "sgd-sai")
LARGE = ("adamw", "adam-mini", "lion", "sgd")
"""Those that are counted on large models too, with the options of MAIN."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"max_grad_norm": 1.0},
    "clip-skip": {"max_grad_norm": 1.0, "on_nonfinite": "skip"},
    "raise": {"on_nonfinite": "raise"},
    "bf16-weights": {"dtype": torch.bfloat16},
    "bf16-state-stochastic": {"storage": "bf16", "stochastic_rounding": True},
    "bf16-all-stochastic": {"dtype": torch.bfloat16, "storage": "bf16", "stochastic_rounding": True},
    "8-bit": {"storage": "int8-dynamic"},
    "fp64-weights": {"dtype": torch.float64},
    "eager": {"compile": False},
    "blockwise": {"block_lr": "blockwise"},
    "blockwise-clip": {"block_lr": "blockwise", "max_grad_norm": 1.0},
    "everything": {"block_lr": "blockwise", "max_grad_norm": 1.0, "on_nonfinite": "skip"},
    "sharpness": {"block_lr": "sharpness(start=1,every=50,soft=0,by=module)"},
    "sharpness-moving": {"block_lr": "sharpness(start=1,every=50,soft=50,by=module)"},
    "llr": {"block_lr": "llr(start=1,every=50,stop=50,soft=0,least=4)"},
    "llr-moving": {"block_lr": "llr(start=1,every=50,stop=50,soft=50,least=4)"},
    "gradient_snr": {"block_lr": "gradient_snr"},
}
"""By name: what is passed to the constructor, but for `dtype`, which is that of the parameters. What is
measured in training is so in the second step (in the first by gradient_snr), and *moves* the multipliers at each."""
OF_OPTIMIZER: dict[str, dict[str, Any]] = {"adapm": {"rank": 2, "second_moment": "block"}, "sgd": {"momentum": 0.9}}
"""What is passed with every option: the rank is for the tiny model."""
MAIN = ("plain", "clip", "clip-skip", "bf16-weights", "8-bit", "blockwise", "everything")


def llama() -> nn.Module:
    """Llama-3-8B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tiny": tiny_model,
    "gpt2": lambda: on_meta(lambda: conv1d_model(FULL)),
    "llama3-8b": lambda: on_meta(llama),
}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What it builds, without memory."""
    with torch.device("meta"):
        return build()


class Case(NamedTuple):
    """A row."""

    model: str
    optimizer: str
    options: str

    def __str__(self) -> str:
        return f"{self.model} {self.optimizer} {self.options}"


def cases(model: str) -> list[Case]:
    """The rows of a model."""
    tiny = model == "tiny"
    names, options = (OPTIMIZERS, tuple(OPTIONS)) if tiny else (LARGE, MAIN)
    return [Case(model, name, option) for name in names for option in options]


def counted(case: Case, steps: int = STEPS, **where: Any) -> list[Counts]:
    """What each of the first steps asks for; `where` is the `place` of `FakeCuda.model`.

    Raises:
        ValueError: the library refuses the combination.
        RuntimeError: an operation would mix devices.
    """
    settings = {**OPTIONS[case.options]}
    dtype = settings.pop("dtype", torch.float32)
    settings |= OF_OPTIMIZER.get(case.optimizer, {})
    with FakeCuda() as cuda:
        model, blocks = cuda.model(MODELS[case.model], dtype, **where)
        optimizer = create_optimizer(model, case.optimizer, lr=1e-3, weight_decay=0.1, blocks=blocks, **settings)
        return [cuda.step(model, optimizer) for _ in range(steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="only rows that have all of these words; saves nothing")
    parser.add_argument("-v", "--verbose", action="store_true", help="say which lines and operations launch")
    parser.add_argument("--bounds", action="store_true", help="print bounds for the test; saves nothing")
    args = parser.parse_args()
    logging.getLogger("sharpwise").setLevel(logging.ERROR)
    models = ("tiny", "gpt2") if args.bounds else tuple(MODELS)
    wanted = [c for model in models for c in cases(model) if set(args.words) <= {*c}]
    rows = []
    for case in wanted:
        rows.append(row(case))
        if args.verbose:
            say(case, rows[-1])
    if args.bounds:
        for model in models:
            print(f"\n{bounds([r for r in rows if r['model'] == model])}")
        return
    columns = ("model", "optimizer", "options", "launches", "reads", "blocking", "uploads", "first step")
    print(Table(columns, [cells(r) for r in rows]))
    if args.words:
        print("\nNothing saved: these were not all.")
        return
    path = HERE / "results" / "launches.json"
    path.write_text(json.dumps({"environment": environment(), "steps": STEPS, "rows": rows}, indent=1) + "\n")
    print(f"\nSaved {path.relative_to(HERE.parent)}")


def row(case: Case) -> dict[str, Any]:
    """A row as it is saved: sums of a steady step, and of the first."""
    began = time.perf_counter()
    try:
        first, *_, last = counted(case)
    except (ValueError, TypeError) as error:
        return {**case._asdict(), "refused": str(error).split("\n")[0]}
    return {
        **case._asdict(),
        "launches": last.launches.total(),
        "reads": last.reads.total(),
        "blocking": last.blocking.total(),
        "uploads": last.uploads.total(),
        "first_step": {name: getattr(first, name).total() for name in ("launches", "reads", "blocking", "uploads")},
        "by_operation": dict(last.launches.most_common(MOST)),
        "by_line": dict(last.lines.most_common(MOST)),
        "read_by": dict(last.reads),
        "copied_by": dict(last.blocking + last.uploads),
        "seconds": round(time.perf_counter() - began, 1),
    }


def cells(row: dict[str, Any]) -> tuple[Any, ...]:
    """Of a line of the table."""
    own = (row["model"], row["optimizer"], row["options"])
    if "refused" in row:
        return (*own, "refused", "", "", "", "")
    return (*own, row["launches"], row["reads"], row["blocking"], row["uploads"], row["first_step"]["launches"])


def bounds(rows: list[dict[str, Any]]) -> Table:
    """Launches by options and optimizer."""
    names = list(dict.fromkeys(r["optimizer"] for r in rows))
    found = {(r["options"], r["optimizer"]): r.get("launches") for r in rows}
    options = list(dict.fromkeys(r["options"] for r in rows))
    return Table(("", *names), [(o, *(found.get((o, n)) for n in names)) for o in options])


def say(case: Case, found: dict[str, Any]) -> None:
    """Where the launches come from."""
    print(f"{case}: {found.get('refused') or found['launches']}")
    for key in () if "refused" in found else ("by_line", "by_operation", "read_by", "copied_by"):
        for what, count in found[key].items():
            print(f"    {key:14}{count:6}  {what}")


if __name__ == "__main__":
    main()
