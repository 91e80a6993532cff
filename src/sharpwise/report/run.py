"""A training run, read from its folder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sharpwise.blocks import BlockMap
from sharpwise.report import reading
from sharpwise.report.curves import Array

State = Literal["finished", "running", "interrupted", "killed", "diverged", "failed"]
# What a run says of itself when it ends; "running" and "killed" are seen from outside.
ENDED: tuple[State, ...] = ("finished", "interrupted", "diverged", "failed")


@dataclass(frozen=True)
class Status:
    """Whether a run is running, or how it ended; `message` is empty or says why."""

    state: State
    step: int | None = None
    message: str = ""


@dataclass(frozen=True)
class RunData:
    """What a run wrote down. Arrays have one value per step that is on record; NaN is what is not there.

    Args:
        folder: of the run.
        config: the resolved configuration, and `config_text` as it was written.
        facts: numbers about model, data and optimizer; may be empty.
        blocks: the block map, None where there is none.
        starts: the environment of each start, the first one and every resume.
        status: see there.
        step, tokens, loss, lr, grad_norm: of metrics.jsonl; losses in nats per token.
        skipped: steps that were left out because something was not finite.
        validation_step, validation_loss: where the validation loss was measured.
        diagnostics: records that also hold `multipliers`, `update_rms` or `update_relative`.
        timing_step, seconds, optimizer_seconds, memory: of timing.jsonl; memory in bytes.
        sample: a text that the model wrote, "" for none.
        problems: what could not be read, in words.
    """

    folder: Path
    config: Mapping[str, Any]
    config_text: str
    facts: Mapping[str, Any]
    blocks: BlockMap | None
    starts: tuple[Mapping[str, Any], ...]
    status: Status
    step: Array
    tokens: Array
    loss: Array
    lr: Array
    grad_norm: Array
    skipped: Array
    validation_step: Array
    validation_loss: Array
    diagnostics: tuple[Mapping[str, Any], ...]
    timing_step: Array
    seconds: Array
    optimizer_seconds: Array
    memory: Array
    sample: str
    problems: tuple[str, ...]

    def setting(self, *path: str) -> Any:
        """A value of the configuration, None where it is not there."""
        return lookup(self.config, *path)

    @property
    def last_step(self) -> int:
        """The last step on record, 0 before the first one."""
        return int(self.step[-1]) if len(self.step) else 0

    @property
    def steps(self) -> int | None:
        """Steps of the whole run."""
        return whole(self.facts.get("steps")) or whole(self.setting("schedule", "steps"))

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one step."""
        known = whole(self.facts.get("tokens_per_step"))
        if known or not self.last_step or not math.isfinite(self.tokens[-1]):
            return known
        return round(self.tokens[-1] / self.last_step)

    @property
    def tokens_seen(self) -> int | None:
        """Tokens that the run was trained on so far."""
        if len(self.tokens) and math.isfinite(self.tokens[-1]):
            return int(self.tokens[-1])
        return None if self.tokens_per_step is None else self.tokens_per_step * self.last_step


def read_run(folder: str | Path) -> RunData:
    """Read a run, whether it has ended or not.

    Optional files may be missing; a last line that is cut is left out; what cannot be read is said in `problems`.

    Raises:
        ValueError: the folder holds no run, or its configuration cannot be read.
    """
    folder = Path(folder)
    reading.check_is_run(folder)
    problems: list[str] = []
    text, config = reading.read_config(folder)
    records = _records(folder, reading.METRICS, problems)
    timing = _records(folder, reading.TIMING, problems)
    validated = [record for record in records if math.isfinite(_number(record.get("validation_loss")))]
    starts = [start for start in _json(folder, reading.ENVIRONMENT, list, problems) if isinstance(start, dict)]
    return RunData(
        folder=folder,
        config=config,
        config_text=text,
        facts=_json(folder, reading.FACTS, dict, problems),
        blocks=_blocks(folder, problems),
        starts=tuple(starts),
        status=read_status(folder, problems),
        step=_column(records, "step"),
        tokens=_column(records, "tokens"),
        loss=_column(records, "loss"),
        lr=_column(records, "lr"),
        grad_norm=_column(records, "grad_norm"),
        skipped=_column([record for record in records if record.get("skipped")], "step"),
        validation_step=_column(validated, "step"),
        validation_loss=_column(validated, "validation_loss"),
        diagnostics=tuple(r for r in records if any(key in r for key in ("multipliers", "update_relative"))),
        timing_step=_column(timing, "step"),
        seconds=_column(timing, "seconds"),
        optimizer_seconds=_column(timing, "optimizer_seconds"),
        memory=_column(timing, "memory"),
        sample=_sample(folder),
        problems=tuple(problems),
    )


def read_status(folder: Path, problems: list[str] | None = None) -> Status:
    """Whether a run is running, or how it ended; what cannot be read is added to `problems`."""
    if reading.is_locked(folder):
        return Status("running")
    found = _json(folder, reading.STATUS, dict, problems if problems is not None else [])
    step, message = whole(found.get("step")), str(found.get("message") or "")
    state = next((state for state in ENDED if state == found.get("state")), None)
    return Status("killed") if state is None else Status(state, step, message)


def lookup(values: Any, *path: str) -> Any:
    """`values[a][b]...`, None where that is not there."""
    for key in path:
        if not isinstance(values, Mapping):
            return None
        values = values.get(key)
    return values


def whole(value: Any) -> int | None:
    """A whole number, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _column(records: list[dict[str, Any]], key: str) -> Array:
    column = np.array([_number(record.get(key)) for record in records], dtype=np.float64)
    return np.where(np.isfinite(column), column, np.nan)


def _records(folder: Path, name: str, problems: list[str]) -> list[dict[str, Any]]:
    records, damaged = reading.read_lines(folder / name)
    if damaged:
        problems.append(f"{name}: {damaged} damaged {'line is' if damaged == 1 else 'lines are'} left out.")
    return records


def _json(folder: Path, name: str, kind: type, problems: list[str]) -> Any:
    try:
        return reading.read_json(folder / name, kind)
    except ValueError as error:
        problems.append(f"{error}; it is left out.")
        return kind()


def _blocks(folder: Path, problems: list[str]) -> BlockMap | None:
    path = folder / reading.BLOCKS
    try:
        return BlockMap.load(path) if path.is_file() else None
    except ValueError as error:
        problems.append(f"{path.name}: {str(error).removeprefix(f'{path}: ')}; it is left out.")
        return None


def _sample(folder: Path) -> str:
    try:
        return (folder / reading.SAMPLE).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""
