"""The runs below a folder, a line each: read from the ends of their files, so that a hundred runs take a moment."""

import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharpwise.report import reading
from sharpwise.report.run import State, lookup, read_status, whole
from sharpwise.report.run_text import last_name, optimizer_name

DEPTH = 5  # levels of folders below the one that is asked about
# A validation may lie this far back. Scanning it for one takes milliseconds.
REACH = 1 << 22
RECENT = 50  # steps that the throughput is the median of


@dataclass(frozen=True)
class RunLine:
    """One run. What is not known is None; losses in nats per token, `tokens_per_second` of the last steps.

    `problem` says why nothing more is known, "" where all could be read.
    """

    name: str
    path: str
    state: State
    model: str = ""
    optimizer: str = ""
    lr: float | None = None
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    problem: str = ""


def list_runs(folder: Path) -> list[RunLine]:
    """All runs in and below a folder, by name. Raises ValueError where there is no such folder."""
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; name one with runs, or train one with `sharpwise train`")
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder with runs")
    return [summarize(path, folder) for path in find_runs(folder)]


def find_runs(folder: Path) -> list[Path]:
    """Folders with a configuration and metrics, at most `DEPTH` levels below; hidden ones and those in runs are not.

    Raises:
        OSError: the folder itself cannot be read.
    """

    def search(path: str, depth: int) -> Iterator[Path]:
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: _natural(entry.name))
        if {reading.CONFIG, reading.METRICS} <= {entry.name for entry in found}:
            yield Path(path)
            return
        for entry in found if depth else ():
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                try:
                    yield from search(entry.path, depth - 1)
                except PermissionError:  # somebody else's
                    continue

    return list(search(str(folder), DEPTH))


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in names by their value, so that run-10 comes after run-9."""
    parts, digits = [], ""
    for letter in f"{name}\0":
        if letter.isdecimal():
            digits += letter
            continue
        if digits:
            parts.append((int(digits), ""))
            digits = ""
        parts.append((-1, letter))
    return parts


def summarize(path: Path, base: Path) -> RunLine:
    """What the ends of a run's files say."""
    name = path.resolve().name if path == base else str(path.relative_to(base))
    state = read_status(path).state
    try:
        _, config = reading.read_config(path)
        facts = reading.read_json(path / reading.FACTS, dict)
    except ValueError as error:
        return RunLine(name, str(path), state, problem=str(error))
    lr = lookup(config, "optimizer", "lr")
    last: dict[str, Any] = next(reading.last_lines(path / reading.METRICS), {})
    return RunLine(
        name=name,
        path=str(path),
        state=state,
        model=last_name(lookup(config, "model", "name")),
        optimizer=optimizer_name(config),
        lr=lr if isinstance(lr, (int, float)) else None,
        step=last.get("step", 0),
        steps=whole(facts.get("steps")) or whole(lookup(config, "schedule", "steps")),
        loss=_finite(last.get("loss")),
        validation_loss=_last_validation(path / reading.METRICS),
        tokens_per_second=_throughput(path / reading.TIMING, whole(facts.get("tokens_per_step")), last),
    )


def _finite(value: Any) -> float | None:
    # NaN is not equal to itself, and what is infinite is no loss.
    return float(value) if isinstance(value, (int, float)) and abs(value) < float("inf") else None


def _last_validation(path: Path) -> float | None:
    size = 1 << 15
    while True:
        for record in reading.last_lines(path, size, containing=b'"validation_loss"'):
            value = _finite(record.get("validation_loss"))
            if value is not None:
                return value
        if size >= min(REACH, path.stat().st_size):
            return None
        size *= 8


def _throughput(path: Path, tokens: int | None, last: dict[str, Any]) -> float | None:
    if not tokens and whole(last.get("tokens")) and last["step"] > 0:
        tokens = last["tokens"] // last["step"]
    seconds = [_finite(record.get("seconds")) for record in reading.last_lines(path, 1 << 13)]
    known = [value for value in seconds[:RECENT] if value]
    return tokens / statistics.median(known) if known and tokens else None
