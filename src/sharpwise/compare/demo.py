"""The demo: three arms, the same three learning rates each, one tiny GPT-2 on real text, one seed."""

import json
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from sharpwise.blocks.roles import BLOCK_TYPE, Role
from sharpwise.report.blocks import describe
from sharpwise.train.build import build, build_optimizer
from sharpwise.train.config_file import make_config
from sharpwise.train.data import Prepared, prepare_tokens
from sharpwise.train.environment import environment
from sharpwise.train.models import count_parameters
from sharpwise.train.run import Diverged, run
from sharpwise.train.steps import Step

# Shared by all arms: the defaults of nanoGPT.
COMMON: dict[str, Any] = {"betas": [0.9, 0.95], "weight_decay": 0.1, "max_grad_norm": 1.0}


@dataclass(frozen=True)
class Arm:
    """One optimizer of the comparison: `code` is what a user would write, `optimizer` the same as a configuration."""

    name: str
    code: str
    optimizer: dict[str, Any]

    def settings(self, lr: float) -> dict[str, Any]:
        """The configuration's table [optimizer]."""
        return {**COMMON, **self.optimizer, "lr": lr}


ARMS: tuple[Arm, ...] = (
    Arm("AdamW", "sharpwise.AdamW(model, lr=lr)", {"name": "adamw"}),
    Arm(
        "AdamW + BlockwiseLR",
        "sharpwise.AdamW(model, lr=lr, block_lr=sharpwise.BlockwiseLR())",
        {"name": "adamw", "block_lr": "blockwise"},
    ),
    Arm("Adam-mini", "sharpwise.AdamMini(model, lr=lr)", {"name": "adam-mini"}),
)
BASELINE = ARMS[0].name

# Chosen so that plain AdamW has its best one in the middle; no arm gets others.
LEARNING_RATES: tuple[float, ...] = (1e-3, 3e-3, 1e-2)

VOCABULARY = 1024
MODEL: dict[str, Any] = {"n_layer": 2, "n_embd": 128, "n_head": 4}


@dataclass(frozen=True)
class Settings:
    """How each run goes; the seed is also that of the weights, so that all runs start alike."""

    steps: int = 260
    sequences: int = 16
    context: int = 128
    warmup: int = 26
    floor: float = 0.1
    seed: int = 0
    evaluations: int = 6
    validation_sequences: int = 192

    @property
    def tokens(self) -> int:
        """Tokens of a whole run, repetitions counted."""
        return self.steps * self.sequences * self.context

    def given(self, data: Path, optimizer: dict[str, Any]) -> dict[str, Any]:
        """The configuration of one run."""
        return {
            "seed": self.seed,
            "model": {"name": "gpt2-0.4m", "settings": {**MODEL, "context": self.context}},
            "data": {"path": str(data), "context": self.context},
            "batch": {"sequences": self.sequences},
            "optimizer": optimizer,
            "schedule": {"steps": self.steps, "warmup": self.warmup, "floor": self.floor},
            "compute": {"device": "cpu", "threads": 1},
            "validation": {"every": max(1, self.steps // self.evaluations), "sequences": self.validation_sequences},
            "log": {"diagnostics": max(1, self.steps // 60), "tensorboard": False},
            "checkpoint": {"every": 0},
        }


@dataclass
class Record:
    """What a run did. `x` values are steps, counted from 1; losses are in nats per token.

    `stopped_at` is the step whose loss was not finite, None for a run that reached its end. `final_loss` is the
    validation loss after the last step, None if there is none. `learning_rates` holds, for every role, the learning
    rate times the block's multiplier at `learning_rate_steps`. `tokens_per_second` of whole steps and `step_ms` of
    `optimizer.step()` are those that the quickest tenth of the steps keep to: other work on the machine can only slow
    the rest. Evaluations do not count.
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
    tokens_per_second: float | None = None
    step_ms: float | None = None
    state_bytes: int | None = None


@dataclass(frozen=True)
class Progress:
    """What a run reports: `step` of run `run` is done; a run that stops early reports all its steps at once."""

    run: int
    step: int


def load_corpus(data: Path | None, folder: Path, settings: Settings) -> Prepared:
    """Tokenize the text of the demo, into a folder.

    Raises:
        ValueError: a text that cannot be used (see `prepare_tokens`), or that is too short.
    """
    corpus = prepare_tokens([data or "stdlib"], folder, vocabulary=VOCABULARY, validation=0.05, max_bytes=32 * 2**20)
    for part, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) < settings.context + 1:
            raise ValueError(
                f"the text is too short: its {part} part has {len(tokens)} tokens, and a context of "
                f"{settings.context} needs at least {settings.context + 1}; give more text"
            )
    return corpus


def run_demo(
    corpus: Prepared,
    settings: Settings,
    *,
    folder: Path,
    jobs: int = 2,
    worker_setup: Callable[[], object] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train every arm with every learning rate; the result as plain values, ready for JSON.

    Args:
        corpus: from `load_corpus`.
        settings: of every run.
        folder: where the folders of the runs are made.
        jobs: processes at a time, one thread each; 1 runs here. The losses do not depend on it.
        worker_setup: called first in every worker process (a function that can be pickled).
        on_progress: called every few steps.
    """
    trials = [(arm.name, lr) for lr in LEARNING_RATES for arm in ARMS]
    report = on_progress or (lambda progress: None)
    place = _Place(corpus.folder, folder, settings)
    if jobs == 1:
        with _one_thread():
            records = [_run_trial(place, i, arm, lr, report, lambda: False) for i, (arm, lr) in enumerate(trials)]
    else:
        records = _run_in_processes(place, trials, min(jobs, len(trials)), worker_setup, report)
    order = {arm.name: i for i, arm in enumerate(ARMS)}
    runs = [{"arm": arm, "lr": lr, **asdict(record)} for (arm, lr), record in zip(trials, records, strict=True)]
    return {
        "format": 1,
        "baseline": BASELINE,
        "arms": [{"name": arm.name, "code": arm.code} for arm in ARMS],
        "learning_rates": list(LEARNING_RATES),
        "common": dict(COMMON),
        "settings": {**asdict(settings), "tokens": settings.tokens},
        "data": dict(corpus.about),
        **_describe(corpus, settings, jobs),
        "runs": sorted(runs, key=lambda run: (order[run["arm"]], run["lr"])),
    }


class Cancelled(Exception):
    """A run was told to stop."""


@dataclass(frozen=True)
class _Place:
    """Where the tokens are and the runs go, and how each goes."""

    data: Path
    runs: Path
    settings: Settings


def _run_trial(
    place: _Place,
    number: int,
    arm_name: str,
    lr: float,
    report: Callable[[Progress], None],
    stopped: Callable[[], bool],
) -> Record:
    arm = next(arm for arm in ARMS if arm.name == arm_name)
    folder = place.runs / f"run-{number}"

    def on_step(step: Step) -> None:
        if stopped():
            raise Cancelled
        if step.step % 5 == 0:
            report(Progress(number, step.step))

    with suppress(Diverged):  # the run's folder says so
        run(place.settings.given(place.data, arm.settings(lr)), folder, on_step=on_step)
    report(Progress(number, place.settings.steps))
    return read_record(folder, place.settings)


def read_record(folder: Path, settings: Settings) -> Record:
    """What the folder of a run says that it did."""
    steps, timing = ([json.loads(line) for line in (folder / name).read_text().splitlines()]
                     for name in ("metrics.jsonl", "timing.jsonl"))  # fmt: skip
    status = json.loads((folder / "status.json").read_text())
    facts = json.loads((folder / "facts.json").read_text())
    validated = [step for step in steps if step.get("validation_loss") is not None]
    noted = [step for step in steps if "multipliers" in step]
    rates: dict[str, list[float]] = {}
    for step in noted:
        for role, multiplier in step["multipliers"].items():
            rates.setdefault(role, []).append(step["lr"] * multiplier)
    finished = bool(validated) and validated[-1]["step"] == settings.steps
    return Record(
        train_steps=[step["step"] for step in steps],
        train_loss=[step["loss"] for step in steps],
        validation_steps=[step["step"] for step in validated],
        validation_loss=[step["validation_loss"] for step in validated],
        learning_rate_steps=[step["step"] for step in noted],
        learning_rates=rates,
        types={role: str(BLOCK_TYPE[Role(role)]) for role in rates},
        stopped_at=status["step"] if status["state"] == "diverged" else None,
        final_loss=validated[-1]["validation_loss"] if finished else None,
        tokens_per_second=settings.sequences * settings.context / _quick(timing, "seconds") if timing else None,
        step_ms=_quick(timing, "optimizer_seconds") * 1e3 if timing else None,
        state_bytes=facts["state_bytes"] if steps else None,
    )


def _quick(timing: list[dict[str, float]], key: str) -> float:
    """The tenth percentile."""
    return sorted(line[key] for line in timing)[len(timing) // 10]


# --- processes -------------------------------------------------------------------------------------------------------
# One thread each: two processes of one thread train a tiny model 1.3 to 1.7 times as fast as one process of two, and
# they do not stall when something else wants the cores (two threads meet at every kernel's end).


def _run_in_processes(
    place: _Place,
    trials: list[tuple[str, float]],
    jobs: int,
    worker_setup: Callable[[], object] | None,
    report: Callable[[Progress], None],
) -> list[Record]:
    context = multiprocessing.get_context("spawn")
    progress: SimpleQueue[Progress] = context.SimpleQueue()
    stop = context.Event()
    with ProcessPoolExecutor(
        jobs, context, initializer=_start_worker, initargs=(place, progress, stop, worker_setup)
    ) as executor:
        futures: list[Future[Record]] = []
        try:
            # Ctrl-C reaches every process of the terminal; workers inherit that it is blocked, and obey `stop`.
            with _interrupts_deferred():
                for i, (arm, lr) in enumerate(trials):
                    futures.append(executor.submit(_run_in_worker, i, arm, lr))
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while not progress.empty():
                    report(progress.get())
                for future in done:
                    future.result()  # an error ends the demo now, not after the other runs
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise  # and leaving the executor waits for its processes: `shutdown(wait=False)` may leave one behind
    return [future.result() for future in futures]


@dataclass(frozen=True)
class _Worker:
    place: _Place
    progress: "SimpleQueue[Progress]"
    stop: Event


_worker: _Worker


def _start_worker(
    place: _Place, progress: "SimpleQueue[Progress]", stop: Event, worker_setup: Callable[[], object] | None
) -> None:
    global _worker
    if worker_setup:
        worker_setup()
    torch.set_num_threads(1)
    _worker = _Worker(place, progress, stop)


def _run_in_worker(number: int, arm: str, lr: float) -> Record:
    return _run_trial(_worker.place, number, arm, lr, _worker.progress.put, _worker.stop.is_set)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block, and never in processes that start within."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not (on_main_thread and hasattr(signal, "pthread_sigmask")):  # a thread may not set handlers; Windows
        yield
        return
    # New processes inherit the mask. It alone would not do here: other threads of this process take the signal.
    seen: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if seen:
        raise KeyboardInterrupt


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- what was trained, and where -------------------------------------------------------------------------------------


def _describe(corpus: Prepared, settings: Settings, jobs: int) -> dict[str, Any]:
    """The model in numbers, its block map with the multipliers of each arm, and the environment."""
    with _one_thread():
        built = build(make_config(settings.given(corpus.folder, ARMS[0].settings(LEARNING_RATES[0]))))
    total, without_embedding = count_parameters(built.model)
    multipliers = {}
    for arm in ARMS:
        own = make_config({"optimizer": arm.settings(1.0)}).optimizer
        multipliers[arm.name] = [float(row["multiplier"]) for row in build_optimizer(own, built.model).lr_multipliers()]
    return {
        "model": {
            "family": "gpt2",
            **MODEL,
            "context": settings.context,
            "vocabulary": corpus.vocabulary,
            "parameters": total,
            "non_embedding_parameters": without_embedding,
        },
        "blocks": [
            {**describe(segment), "multipliers": {name: values[i] for name, values in multipliers.items()}}
            for i, segment in enumerate(built.optimizer.blocks.segments)
        ],
        "environment": {**environment(built.config), "processes": jobs, "threads_per_process": 1},
    }
