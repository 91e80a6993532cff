"""Every run of a comparison as a flat list, and that list as CSV."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharpwise.compare.report.arms import Result, searched
from sharpwise.compare.trial import TUNING_SEED

STAGES = {
    "tune": "tuning",
    "roles": "search of factors",
    "even": "extra trial, so that every arm has {most}",
    "refine": "learning rate on another seed, so that every arm has {most} trials",
    "final": "final",
    "horizon": "baseline on another number of tokens",
}


@dataclass(frozen=True)
class Run:
    """One run; `share` is that of the budget, `chosen` whether its setting is what the arm was judged by."""

    arm: str
    stage: str
    seed: int
    share: float
    tokens: int
    setting: Mapping[str, Any]
    final_loss: float | None
    stopped_at: int | None
    folder: str
    chosen: bool


def runs_of(result: Result) -> list[Run]:
    """All runs that are done, by arm and stage."""
    return [run for arm in result["arms"] for run in (*_tuning(result, arm), *_final(result, arm))]


def _tuning(result: Result, arm: Mapping[str, Any]) -> list[Run]:
    tokens = result["budget"]["tokens"]
    return [
        Run(
            arm["name"], run["stage"], run.get("seed", TUNING_SEED), 1.0, tokens, run["setting"], run["final_loss"],
            run["stopped_at"], run["folder"], run["setting"] == arm["setting"],
        )
        for run in (*arm["tuning"], *searched(arm), *arm.get("refined", ()))
    ]  # fmt: skip


def _final(result: Result, arm: Mapping[str, Any]) -> list[Run]:
    tokens, setting = result["budget"]["tokens"], arm["setting"] or {}
    runs = [
        Run(
            arm["name"], "final", run["seed"], 1.0, tokens, setting, run["final_loss"], run["stopped_at"],
            run["folder"], True,
        )
        for run in arm["final"]
    ]  # fmt: skip
    if arm["name"] != result["baseline"]:
        return runs
    for horizon in result["horizons"]:
        share, ran = horizon["share"], horizon["tokens"]
        columns = (horizon[key] for key in ("seeds", "final_losses", "stopped_at", "folders"))
        for seed, loss, stopped_at, folder in zip(*columns, strict=True):
            runs.append(Run(arm["name"], "horizon", seed, share, ran, setting, loss, stopped_at, folder, True))
    return runs


def csv_text(result: Result) -> str:
    """One row per run. Losses are in nats per token; a run that diverged has none."""
    runs = runs_of(result)
    keys = list(dict.fromkeys(key for run in runs for key in run.setting))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        [
            "arm", "setting_of", "stage", "seed", "share", "tokens", *keys, "final_loss", "diverged_at_step", "chosen",
            "folder",
        ]
    )  # fmt: skip
    setting_of = {arm["name"]: arm["setting_of"] for arm in result["arms"]}
    for run in runs:
        settings = [_cell(run.setting.get(key)) for key in keys]
        writer.writerow(
            [
                run.arm, setting_of[run.arm], run.stage, run.seed, run.share, run.tokens, *settings,
                _cell(run.final_loss), _cell(run.stopped_at), "yes" if run.chosen else "no", run.folder,
            ]
        )  # fmt: skip
    return file.getvalue()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, (list, dict, bool)) else value
