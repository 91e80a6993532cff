"""What the tests of runs share: tokens, and the files of a run's folder."""

import json
from pathlib import Path
from typing import Any

from sharpwise.train.data import prepare_tokens
from sharpwise.train.run import run
from train.kill_rig import settings

ADAMW = {"name": "adamw", "block_lr": "blockwise"}


def prepare(folder: Path, text: str = "The fox {} jumps over {} dogs; who saw it? Fox {}.\n") -> Path:
    source = folder / "text.txt"
    source.write_text("\n<|endoftext|>\n".join(text.format(i, i * 7, i * i) * 20 for i in range(40)))
    prepare_tokens([source], folder / "tokens", vocabulary=300, validation=0.1)
    return folder / "tokens"


def changed(given: dict[str, Any], **tables: dict[str, Any]) -> dict[str, Any]:
    """The configuration with some keys of some tables replaced."""
    return given | {name: {**given.get(name, {}), **values} for name, values in tables.items()}


def stop_after(step: int) -> dict[str, Any]:
    """Arguments of `run` that end it after a step."""
    at: list[int] = []
    return {"on_step": lambda done: at.append(done.step), "should_stop": lambda: at[-1] == step}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / name).read_text().splitlines()]


def assert_same(folder: Path, reference: Path) -> None:
    """Metrics, weights and text; not the checkpoints, of which a stop makes one more."""
    mine, other = content(folder), content(reference)
    for name in ("metrics.jsonl", "sample.txt", "final/model.safetensors", "blocks.json", "facts.json"):
        assert mine[name] == other[name], name
    assert [line["step"] for line in lines(folder, "timing.jsonl")] == [line["step"] for line in lines(reference)]


def half_a_run(folder: Path) -> Path:
    """A run that was stopped after 7 of its steps."""
    run(settings(prepare(folder), ADAMW), folder / "run", **stop_after(7))
    return folder / "run"
