"""What a run's folder says that it did, as plain values: all that a comparison knows of it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharpwise.blocks.roles import BLOCK_TYPE, Role
from sharpwise.train.folder import read_starts


@dataclass
class Record:
    """What a run did. `x` values are steps, counted from 1; losses are in nats per token.

    `stopped_at` is the step whose loss was not finite, None for a run that reached its end. `final_loss` is the
    validation loss after the last step, None if there is none. `learning_rates` holds, for every role, the learning
    rate times the block's multiplier at `learning_rate_steps` (of roles whose layers differ, the mean over layers).

    How long steps took is not among it: runs share the machine with each other and with whatever else goes on there,
    so that their times rank its load, not the optimizers. `sharpwise train --profile` times steps.
    """

    train_steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    learning_rate_steps: list[int] = field(default_factory=list)
    learning_rates: dict[str, list[float]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    stopped_at: int | None = None
    final_loss: float | None = None
    state_bytes: int | None = None


def read_record(folder: Path) -> Record:
    """The record of a run that has ended. Raises OSError or ValueError where its files are not there or damaged."""
    try:
        return _read(folder)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"the files of the run in {folder} are damaged ({type(error).__name__}: {error}); remove that folder, and "
            "the same command makes the run again"
        ) from error


def _read(folder: Path) -> Record:
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    status, facts = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("status.json", "facts.json"))
    validated = [step for step in steps if step.get("validation_loss") is not None]
    noted = [step for step in steps if "multipliers" in step]
    rates: dict[str, list[float]] = {}
    for step in noted:
        for role, multiplier in step["multipliers"].items():
            by_layer = multiplier if isinstance(multiplier, list) else [multiplier]
            rates.setdefault(role, []).append(step["lr"] * sum(by_layer) / len(by_layer))
    ended = status["state"] == "finished" and bool(validated) and validated[-1]["step"] == facts["steps"]
    return Record(
        train_steps=[step["step"] for step in steps],
        train_loss=[step["loss"] for step in steps],
        validation_steps=[step["step"] for step in validated],
        validation_loss=[step["validation_loss"] for step in validated],
        learning_rate_steps=[step["step"] for step in noted],
        learning_rates=rates,
        types={role: str(BLOCK_TYPE[Role(role)]) for role in rates},
        stopped_at=status["step"] if status["state"] == "diverged" else None,
        final_loss=validated[-1]["validation_loss"] if ended else None,
        state_bytes=facts["state_bytes"] if steps else None,
    )


def read_environment(folder: Path) -> dict[str, Any] | None:
    """Where and with what a run was made, when it was last begun or gone on with; None where its folder is gone."""
    starts = read_starts(folder)
    return {key: value for key, value in starts[-1].items() if key != "step"} if starts else None
