"""Folders of runs that no process trained: what a training loop writes, made up from a few formulas."""

import json
import math
import random
from pathlib import Path
from typing import Any

from sharpwise.blocks import BlockMap, Role, Segment

VOCABULARY, WIDTH, CONTEXT, TOKENS_PER_STEP = 1024, 64, 128, 2048


def block_map(layers: int) -> BlockMap:
    """A GPT-2 of so many layers; the map that its family would give."""

    def matrix(name: str, role: Role, layer: int, **more: Any) -> Segment:
        return Segment(name=name, shape=(WIDTH, 4 * WIDTH), role=role, layer=layer, dim=1, source="gpt2", **more)

    segments = [
        Segment("wte.weight", (VOCABULARY, WIDTH), Role.TOK_EMB, source="gpt2", tied=("lm_head.weight",)),
        Segment("wpe.weight", (CONTEXT, WIDTH), Role.POS_EMB, source="gpt2"),
    ]
    for i in range(layers):
        attention = [
            Segment(
                f"h.{i}.attn.c_attn.weight", (WIDTH, 3 * WIDTH), role, i, 1, n * WIDTH, WIDTH, heads=4, source="gpt2"
            )
            for n, role in enumerate((Role.Q, Role.K, Role.V))
        ]
        segments += [
            Segment(f"h.{i}.ln_1.weight", (WIDTH,), Role.NORM, i, source="gpt2"),
            *attention,
            Segment(f"h.{i}.attn.c_proj.weight", (WIDTH, WIDTH), Role.O, i, 1, source="gpt2"),
            matrix(f"h.{i}.mlp.c_fc.weight", Role.UP, i),
            Segment(f"h.{i}.mlp.c_proj.weight", (4 * WIDTH, WIDTH), Role.DOWN, i, 1, source="gpt2"),
        ]
    return BlockMap([*segments, Segment("ln_f.weight", (WIDTH,), Role.NORM, source="gpt2")])


BLOCKWISE = {"tok_emb": 10.0, "pos_emb": 10.0, "q": 8.0, "k": 8.0, "v": 4.0, "o": 4.0, "up": 6.0, "down": 6.0}


def multipliers(kind: str, layers: int) -> dict[str, float | list[float]]:
    """What a loop writes down: a number, or a list of the layers in order and then the rest."""
    if kind == "blockwise":
        return {**BLOCKWISE, "norm": 1.0}
    if kind == "layer_decay":
        by_layer = [0.75 ** (layers - i) for i in range(layers)]
        roles = ("q", "k", "v", "o", "up", "down")
        return {
            "tok_emb": 0.75 ** (layers + 1),
            "pos_emb": 0.75 ** (layers + 1),
            **dict.fromkeys(roles, by_layer),
            "norm": [*by_layer, 1.0],
        }
    return dict.fromkeys((*BLOCKWISE, "norm"), 1.0)


def explained(blocks: BlockMap) -> dict[str, Any]:
    """What AdamW would note of each segment."""
    how = ["adamw", "element", 0.1, "fp32"]
    rows = [[s.name, s.describe_rows(), *how, 8 * s.numel, "cpp", ""] for s in blocks]
    return {"columns": ["name", "rows", "rule", "cut", "decay", "storage", "bytes", "backend", "why"], "rows": rows}


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    until: int | None = None,
    layers: int = 2,
    block_lr: str = "blockwise",
    resumed_at: int | None = None,
    skipped: tuple[int, ...] = (),
    diverged_at: int | None = None,
    status: dict[str, Any] | None = None,
    model: str = "gpt2-0.4m",
    data: str = "data/stdlib",
) -> Path:
    """Write the folder of a run of `steps` steps that is on record up to step `until`."""
    folder.mkdir(parents=True, exist_ok=True)
    until = diverged_at or until or steps
    draw = random.Random(1)
    blocks = block_map(layers)
    parameters = sum(segment.numel for segment in blocks)
    (folder / "config.toml").write_text(
        f"seed = 3\n\n[model]\nname = {json.dumps(model)}\n\n[data]\npath = {json.dumps(data)}\n\n"
        f'[optimizer]\nname = "adamw"\nlr = 0.003\nblock_lr = {json.dumps(block_lr)}\nmax_grad_norm = 1.0\n\n'
        f'[schedule]\nkind = "cosine"\nsteps = {steps}\nwarmup = 0.1\nfloor = 0.1\n',
        encoding="utf-8",
    )
    facts = {
        "parameters": parameters,
        "non_embedding_parameters": parameters - (VOCABULARY + CONTEXT) * WIDTH,
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "tokens_per_step": TOKENS_PER_STEP,
        "steps": steps,
        "state_bytes": 8 * parameters,
        "data": {"source": "standard library", "documents": 1234, "train_tokens": 9_000_000, "sha256": "0123abcd" * 8},
        "explained": explained(blocks),
        "optimizer": "sharpwise.AdamW(model, lr=0.003, betas=(0.9, 0.95), block_lr='blockwise')",
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    blocks.save(folder / "blocks.json")
    start = {
        "date": "2026-01-02T03:04:05+00:00", "sharpwise": "0.1", "torch": "2.13.0", "python": "3.11.2",
        "platform": "Linux x86_64", "cpus": 2, "threads": 2, "device": "cpu", "matrix_products": "fp32",
    }  # fmt: skip
    starts = [{"step": 1, **start}]
    if resumed_at:
        starts.append({"step": resumed_at, **start, "date": "2026-01-03T08:00:00+00:00", "threads": 1})
    (folder / "environment.json").write_text(json.dumps(starts))
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "timing.jsonl").open("w") as timing:
        for step in range(1, until + 1):
            metrics.write(json.dumps(_record(step, steps, layers, block_lr, draw, skipped, diverged_at)) + "\n")
            slow = 1.6 if resumed_at and step >= resumed_at else 1.0
            seconds = slow * (0.08 + 0.01 * draw.random()) + (2.0 if step == 1 else 0.3 * (draw.random() < 0.01))
            memory = (700 + 60 * (step > steps // 3)) * 2**20
            timing.write(
                json.dumps({"step": step, "seconds": seconds, "optimizer_seconds": 0.004 * slow, "memory": memory})
                + "\n"
            )
    ended = {"state": "finished", "step": steps, "message": ""} if until == steps else None
    if diverged_at:
        ended = {"state": "diverged", "step": diverged_at, "message": "The loss is not finite (nan)."}
    if status or ended:
        (folder / "status.json").write_text(json.dumps(status or ended))
    if until == steps:
        (folder / "sample.txt").write_text("def main():\n    return [self for self in range(10)]\n" * 3)
    return folder


def _record(
    step: int, steps: int, layers: int, block_lr: str, draw: random.Random, skipped: tuple[int, ...], bad: int | None
) -> dict[str, Any]:
    warmup = max(1, steps // 10)
    progress = max(0.0, (step - warmup) / max(1, steps - warmup))
    factor = min(1.0, step / warmup) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    mean = 3.2 + 3.75 * math.exp(-12 * step / steps) - 0.3 * progress
    if bad:
        mean += 8 * math.exp((step - bad) / 12)
    record: dict[str, Any] = {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": None if step == bad else mean + 0.08 * draw.gauss(0, 1),
        "lr": 0.003 * factor,
        "grad_norm": None if step in skipped or step == bad else 0.9 * math.exp(0.35 * draw.gauss(0, 1)) + 2 / step,
    }
    if step in skipped:
        record["skipped"] = True
    if step != bad and (step == steps or step % max(1, steps // 20) == 0):
        record["validation_loss"] = mean + 0.15 + 0.01 * draw.gauss(0, 1)
    if step == steps or step % max(1, steps // 50) == 0:
        record["multipliers"] = multipliers(block_lr, layers)
        sizes = {role: 1e-4 * value**0.5 * factor * (1 + 0.1 * draw.random()) for role, value in BLOCKWISE.items()}
        record["update_rms"] = {**sizes, "norm": 3e-4 * factor}
        record["update_relative"] = {role: 40 * size for role, size in record["update_rms"].items()}
    return record
