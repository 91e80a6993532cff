"""Carry out a study: plan, train, store, until nothing is needed any more. Stopped anywhere, the same call goes on."""

import hashlib
import logging
import math
import re
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sharpwise.compare.record import Record, read_record
from sharpwise.compare.statistics import detectable
from sharpwise.compare.storage import Storage, losses_of
from sharpwise.compare.study import FEWEST_STEPS, TOKENS_PER_PARAMETER, Arm, Study, differences, make_study
from sharpwise.compare.tuning import Losses, Trial, tried
from sharpwise.compare.workers import Workers
from sharpwise.files import check_name, held, remove_leftovers, write_whole
from sharpwise.model_facts import count_parameters
from sharpwise.train.build import Built, build, validation_every
from sharpwise.train.code import confirm_code
from sharpwise.train.config_file import make_config, read_given
from sharpwise.train.steps import train_steps

logger = logging.getLogger("sharpwise.compare")

# Standard deviation over seeds of the end loss: AdamW, 0.4M parameters, 4.1M tokens of mixed text, three seeds. What a
# study can see is worked out from its own runs once there are some.
SEED_NOISE = 0.012
POINTS = 200  # of a training curve that is kept


@dataclass(frozen=True)
class Budget:
    """What a study takes: `runs` at least and at most, `done` of them, `seconds` of the others (None if not timed)."""

    runs: tuple[int, int]
    done: int
    tokens: int
    steps: int
    tokens_per_step: int
    parameters: int
    non_embedding_parameters: int
    seconds: tuple[float, float] | None
    detectable: float

    @property
    def tokens_per_parameter(self) -> float:
        """Of a run, by parameters outside the embeddings."""
        return self.tokens / self.non_embedding_parameters


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


def open_study(given: Mapping[str, Any] | None, folder: Path, *, trust_code: bool = False) -> Study:
    """The study of a folder: that which is stored there, with the arms and seeds that `given` adds.

    Args:
        given: as `make_study` takes it; None goes on with the stored study.
        folder: of the study.
        trust_code: the stored study may name code to import, `module:function` for its models, `module:class` for an
            optimizer; one in `given` may in any case.

    Raises:
        ValueError: `given` contradicts it; or there is none and `given` is None.
    """
    path = folder / "study.toml"
    stored = make_study(read_given(path, "study")) if path.exists() else None
    if given is None:
        if stored is None:
            raise ValueError(f"{folder} holds no study to go on with; name arms, or a study file")
        confirm_code(stored.configs, path, trust_code)
        return stored
    study = make_study(given)
    if stored is not None and (lines := differences(stored, study)):
        raise ValueError(f"{folder} holds another study:\n  " + "\n  ".join(lines) + "\nName another folder with --out")
    return study


def extends(folder: Path, given: Mapping[str, Any]) -> bool:
    """Whether the folder holds that study, perhaps with more arms or seeds."""
    path = folder / "study.toml"
    return path.exists() and not differences(make_study(given), make_study(read_given(path, "study")))


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
        study: see `open_study`.
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
    done = Storage(folder / "study.db").losses if (folder / "study.db").exists() else {}
    if done and not study.needed(done):
        return look(study, folder)
    built = build_arms(study, study.arms)
    budget = work_out(study, built, done, jobs, timed=True)
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


def build_arms(study: Study, arms: Collection[Arm]) -> Built:
    """Build each of these once, so that what cannot be built is found before anything is trained.

    Returns:
        That of the baseline, or else of the last one.

    Raises:
        ValueError: with the name of the arm.
    """
    found: Built | None = None
    for arm in sorted(arms, key=lambda arm: arm.name == study.baseline):
        try:
            found = build(make_config(study.config(arm.example, steps=FEWEST_STEPS)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"arm {arm.name!r} cannot be built: {error}") from error
    assert found is not None
    return found


def work_out(study: Study, built: Built, done: Losses, jobs: int = 1, *, timed: bool = False) -> Budget:
    """Runs, tokens and, if it is to be `timed` by a few steps of the baseline, time that a study takes.

    Raises:
        ValueError: fewer than `FEWEST_STEPS` steps a run.
    """
    total, without_embedding = count_parameters(built.model)
    per_step = built.plan.tokens_per_step
    tokens = study.tokens or round((study.ratio or 0) * TOKENS_PER_PARAMETER * without_embedding)
    steps = tokens // per_step
    if steps < FEWEST_STEPS:
        raise ValueError(
            f"a run of {tokens:,} tokens has {steps} steps of {per_step:,}: too few to say anything about an "
            f"optimizer; {FEWEST_STEPS * per_step:,} tokens are the least"
        )
    others = study.seeds * (len(study.arms) + sum(study.horizons))
    tuned = study.spaces.values()
    further = max(sum(len(v) for v in space.search.values()) for space in tuned)
    least = (max(len(space.lrs) for space in tuned) + further) * len(tuned)
    most = (max(space.most for space in tuned) + further) * len(tuned)
    seconds = None
    if timed and (per_token := _seconds_per_token(study, built, steps)) is not None:
        others -= sum(trial.horizon for trial in done)
        seconds = (
            per_token * tokens * max(0.0, least + others) / jobs,
            per_token * tokens * max(0.0, most + others) / jobs,
        )
    count = study.seeds * (len(study.arms) + len(study.horizons))
    return Budget(
        runs=(least + count, most + count),
        done=len(done),
        tokens=steps * per_step,
        steps=steps,
        tokens_per_step=per_step,
        parameters=total,
        non_embedding_parameters=without_embedding,
        seconds=seconds,
        detectable=detectable(SEED_NOISE * 2**0.5, study.seeds),
    )


def _seconds_per_token(study: Study, built: Built, steps: int) -> float | None:
    """Of a run of so many steps, validation included: a forward pass is a third of a step's work."""
    running = train_steps(built.model, built.optimizer, built.data.train, built.data.validation, built.plan)
    seconds = [step.seconds for step in islice(running, 4)][1:]
    running.close()
    every = validation_every(study.run.get("validation", {}).get("every"), steps)
    validations = math.ceil(steps / every) if every else 1  # the last step has one too
    validated = validations * built.plan.validation_sequences / (steps * built.plan.sequences)
    return statistics.median(seconds) / built.plan.tokens_per_step * (1 + validated / 3) if seconds else None


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


def expected(study: Study, done: Losses) -> Mapping[float, int]:
    """How many runs a study has in the end, as far as is known, by their share of the tokens."""
    tuning = max(max(len(tried(arm, done)), len(space.lrs)) for arm, space in study.spaces.items())
    runs = Counter(dict.fromkeys(study.horizons, study.seeds))
    runs[1.0] += tuning * len(study.spaces) + study.seeds * len(study.arms)
    return runs


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
