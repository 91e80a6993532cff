"""Runs in processes that are killed: a tiny model, what a run may be killed at, and what must be equal afterwards."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from sharpwise.train.run import run

# Processes are forked off one that has imported everything: a start takes a tenth of a second.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["sharpwise.train.run", "sharpwise.train.final", "safetensors.torch", "tokenizers", "torch._dynamo"]
)

STEPS = 24


class Block(nn.Module):
    """LLaMA's names, two heads, and dropout, so that its random numbers have to come out the same too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in "qkvo"})
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"up_proj": nn.Linear(width, 2 * width), "down_proj": nn.Linear(2 * width, width)},
        )

    def forward(self, x: Tensor) -> Tensor:
        h, own = self.input_layernorm(x), self.self_attn
        q, k, v = (own[f"{name}_proj"](h).unflatten(-1, (2, -1)).transpose(1, 2) for name in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(own["o_proj"](y.transpose(1, 2).flatten(2)), 0.1, self.training)
        return x + self.mlp["down_proj"](F.gelu(self.mlp["up_proj"](self.post_attention_layernorm(x))))


class Tiny(nn.Module):
    """A transformer of 6,000 parameters."""

    def __init__(self, vocab_size: int, width: int = 16) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList([Block(width)])
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def build(vocab_size: int) -> nn.Module:
    """What `model.name` of the tests names."""
    return Tiny(vocab_size)


def settings(data: Path, optimizer: Mapping[str, Any], **tables: Any) -> dict[str, Any]:
    """A configuration of a run of a second."""
    return {
        "seed": 3,
        "model": {"name": f"{__name__}:build"},
        "data": {"path": str(data), "context": 16},
        "batch": {"sequences": 4, "micro": 2},
        "optimizer": {"lr": 3e-3, **optimizer},
        "schedule": {"steps": STEPS, "warmup": 4},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
        "validation": {"every": 5, "sequences": 4},
        "log": {"diagnostics": 6, "tensorboard": False},
        "checkpoint": {"every": 2, "keep": 2, "best": True},
    } | tables


def _train(given: dict[str, Any], folder: str, die_at: int | None, seen: Any) -> None:
    """Train, and die at the `die_at`-th time that a file of the run is opened, moved, made or removed."""
    if die_at is not None:
        place, count = os.path.abspath(folder), 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir"):
                return
            if any(isinstance(a, str | os.PathLike) and os.fspath(a).startswith(place) for a in arguments):
                count += 1
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    run(given, Path(folder))
    seen.value = 1


def attempt(given: dict[str, Any], folder: Path, *, die_at: int | None = None, after: float | None = None) -> bool:
    """Train in a process of its own, killed at an instant or after so many seconds; whether it came to its end."""
    seen = processes.Value("i", 0)
    process = processes.Process(target=_train, args=(given, str(folder), die_at, seen))
    process.start()
    process.join(60 if after is None else after)
    if process.is_alive():
        assert after is not None, "a run of a second took a minute"
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "the run ended with an error of its own"
    return bool(seen.value)


def killed_often(given: dict[str, Any], folder: Path, kills: int, seed: int, *, timed: bool = False) -> int:
    """Kill a run until it was killed so often at a random operation, or by turns so and after a time; then let it end.

    Returns how often it was killed: less than `kills` only if it came to its end before.
    """
    chance = random.Random(seed)
    for killed in range(kills):
        how: dict[str, Any] = {"die_at": chance.randint(1, 45)}
        if timed and killed % 2:
            how = {"after": chance.uniform(0.1, 0.8)}
        if attempt(given, folder, **how):
            return killed
    assert attempt(given, folder)
    return kills


def assert_same_run(folder: Path, reference: Path) -> None:
    """Metrics to the byte, timings without gaps or doubles, and the weights to the bit."""
    assert (folder / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    lines = (folder / "timing.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    mine, other = (load_file(path / "final" / "model.safetensors") for path in (folder, reference))
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), f"{name} differs"
    assert (folder / "sample.txt").read_bytes() == (reference / "sample.txt").read_bytes()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (reference / "checkpoints").iterdir())


def seconds_of(given: dict[str, Any], folder: Path) -> float:
    """How long an uninterrupted run takes."""
    before = time.perf_counter()
    assert attempt(given, folder)
    return time.perf_counter() - before
