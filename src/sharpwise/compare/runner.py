"""Carry out a study: plan, train, store, until nothing is needed any more. Stopped anywhere, the same call goes on."""

import hashlib
import logging
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharpwise.compare.budget import Budget, expected, work_out
from sharpwise.compare.record import Record, read_record
from sharpwise.compare.storage import Storage, losses_of
from sharpwise.compare.stored import build_arms
from sharpwise.compare.study import Study
from sharpwise.compare.trial import Losses, Trial
from sharpwise.compare.workers import Workers
from sharpwise.files import check_name, held, remove_leftovers, write_whole
from sharpwise.train.build import Built

logger = logging.getLogger("sharpwise.compare")

POINTS = 200  # of a training curve that is kept


@dataclass(frozen=True)
class Progress:
    """How far a study is: runs that are stored, runs that it will have at least, and the share of their tokens.

    `ended` is the run that has just been stored, with its end loss (None if it diverged); None on the way.
    """

    done: int
    expected: int
    share: float
    running: Mapping[str, int]
    ended: tuple[Trial, float | None] | None = None


@dataclass(frozen=True)
class StudyState:
    """A study with what it has found so far. `first` is a run of the baseline, ready to start."""

    study: Study
    folder: Path
    budget: Budget
    results: Mapping[Trial, Mapping[str, Any]]
    first: Built

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not self.study.needed(losses_of(self.results))


def run_study(
    study: Study,
    folder: Path,
    *,
    jobs: int = 1,
    setup: Callable[[], object] | None = None,
    on_budget: Callable[[Budget], object] = lambda budget: None,
    on_progress: Callable[[Progress], object] = lambda progress: None,
) -> StudyState:
    """Run all that a study needs and does not have; what is complete is looked at alone.

    Args:
        study: see `stored.open_study`.
        folder: its place, made if need be: `study.toml`, `study.db`, and the runs below `runs/`.
        jobs: processes that train at a time. The results do not depend on it.
        setup: called first in every process.
        on_budget, on_progress: called before anything starts, and every few steps.

    Raises:
        ValueError: an arm that cannot be built, a budget too small to say anything, another process at work there, a
            folder whose name is not UTF-8.
        OSError: the disk is full; all that was recorded is kept.
        KeyboardInterrupt: after the runs were saved.
    """
    import tomli_w

    check_name(folder)
    done = _done(folder)
    if done and not study.needed(done):
        return look(study, folder)
    budget, built = plan(study, folder, jobs)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / "study.lock", f"another process runs the study in {folder}"):
        remove_leftovers(folder)
        on_budget(budget)
        write_whole(folder / "study.toml", tomli_w.dumps(study.given))
        storage = Storage(folder / "study.db")
        runner = _Runner(study, folder, budget, storage, on_progress)
        with Workers(jobs, threads=study.threads, setup=setup, on_step=runner.note) as workers:
            runner.run(workers)
    return StudyState(study, folder, budget, storage.results, built)


def _done(folder: Path) -> Losses:
    return Storage(folder / "study.db").losses if (folder / "study.db").exists() else {}


def plan(study: Study, folder: Path, jobs: int = 1) -> tuple[Budget, Built]:
    """What the study takes, timed by a few steps, and its baseline; every arm is built once, and nothing is written.

    Raises:
        ValueError: an arm that cannot be built, a budget too small to say anything.
    """
    built = build_arms(study, study.arms)
    return work_out(study, built, _done(folder), jobs, timed=True), built


def look(study: Study, folder: Path) -> StudyState:
    """What a study has found so far. Nothing is trained, and another process may be at work there.

    Raises:
        ValueError: nothing has begun there.
    """
    if not (folder / "study.db").exists():
        raise ValueError(f"{folder} holds no runs yet")
    results = Storage(folder / "study.db").results
    built = build_arms(study, [study.arm(study.baseline)])
    return StudyState(study, folder, work_out(study, built, losses_of(results)), results, built)


class _Runner:
    """The loop of a study."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        budget: Budget,
        storage: Storage,
        on_progress: Callable[[Progress], object],
    ) -> None:
        self.study, self.folder, self.budget = study, folder, budget
        self.storage, self.on_progress = storage, on_progress
        self.running: dict[str, Trial] = {}
        self._steps: dict[str, int] = {}
        self._told = 0.0
        for trial in storage.results:  # a kill may have come before that
            self._tidy(trial)

    def note(self, key: str, step: int) -> None:
        """A run has taken a step."""
        self._steps[key] = step

    def run(self, workers: Workers) -> None:
        """Train until nothing is needed."""
        study = self.study
        while True:
            wanted = study.needed(self.storage.losses)
            if not wanted and not self.running:
                return
            running = set(self.running.values())
            for trial in [trial for trial in wanted if trial not in running][: workers.free]:
                self.running[trial.key] = trial
                workers.start(trial.key, self._config(trial), self._place(trial))
            ended: list[str] = []
            while not ended:
                ended = workers.wait()
                self._tell()
            for key in ended:
                self._store(self.running.pop(key), workers.jobs)

    def _config(self, trial: Trial) -> dict[str, Any]:
        given = self.study.config(trial, self.budget.steps)
        # So that a run that is stopped loses little, and a study's folder stays small.
        steps = given["schedule"]["steps"]
        given["checkpoint"] = {"every": max(1, steps // 4), "keep": 1, **given.get("checkpoint", {})}
        given["log"] = {"tensorboard": False, **given.get("log", {})}
        return given

    def _place(self, trial: Trial) -> Path:
        return self.folder / place_of(trial)

    def _store(self, trial: Trial, jobs: int) -> None:
        self.storage.add(trial, summary(read_record(self._place(trial)), self.budget.tokens_per_step, jobs))
        self._tidy(trial)
        self._tell((trial, self.storage.results[trial]["final_loss"]))

    def _tidy(self, trial: Trial) -> None:
        """Remove what nobody needs of a run that is stored."""
        for name in ("checkpoints", "final") if trial.stage != "final" else ("checkpoints",):
            shutil.rmtree(self._place(trial) / name, ignore_errors=True)

    def _tell(self, ended: tuple[Trial, float | None] | None = None) -> None:
        if ended is None and time.monotonic() - self._told < 0.5:
            return
        self._told = time.monotonic()
        done = self.storage.losses
        runs = expected(self.study, done)
        whole = sum(share * count for share, count in runs.items())
        tokens = sum(trial.horizon for trial in done)
        steps = {key: self._steps.get(key, 0) for key in self.running}
        tokens += sum(steps.values()) / self.budget.steps
        self.on_progress(Progress(len(done), sum(runs.values()), min(1.0, tokens / whole), steps, ended))


def place_of(trial: Trial) -> str:
    """The folder of a trial's run below that of the study: readable, and one for each."""
    arm = re.sub(r"[^\w.-]+", "-", trial.arm).strip("-")
    share = "" if trial.horizon == 1 else f"-x{trial.horizon:g}"
    digest = hashlib.sha256(trial.key.encode()).hexdigest()[:6]
    return f"runs/{arm}/{trial.stage}-lr{trial.lr:g}-seed{trial.seed}{share}-{digest}"


def summary(record: Record, tokens_per_step: int, jobs: int) -> dict[str, Any]:
    """What is stored of a run: its record, the training curve thinned, and how many runs were made at a time."""
    values = asdict(record)
    every = max(1, len(record.train_steps) // POINTS)
    steps = range(0, len(record.train_steps), every)
    values["train_steps"] = [record.train_steps[min(i + every, len(record.train_steps)) - 1] for i in steps]
    values["train_loss"] = [_mean(record.train_loss[i : i + every]) for i in steps]
    return {**values, "tokens_per_step": tokens_per_step, "jobs": jobs}


def _mean(losses: list[float]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return statistics.fmean(known) if known else None
