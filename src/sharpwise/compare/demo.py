"""The demo: three arms, the same three learning rates each, one tiny GPT-2 on real text, one seed."""

import datetime
import multiprocessing
import os
import platform
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sharpwise
from sharpwise._version import __version__
from sharpwise.train.data import Corpus, prepare, read_documents
from sharpwise.train.loop import LoopSettings, Record, bf16_autocast, train

# Shared by all arms: the defaults of nanoGPT.
COMMON: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 1.0}


@dataclass(frozen=True)
class Arm:
    """One optimizer of the comparison: `code` is what a user would write, `build` makes it for (model, lr)."""

    name: str
    code: str
    build: Callable[[nn.Module, float], Any]


ARMS: tuple[Arm, ...] = (
    Arm("AdamW", "sharpwise.AdamW(model, lr=lr)", lambda model, lr: sharpwise.AdamW(model, lr=lr, **COMMON)),
    Arm(
        "AdamW + BlockwiseLR",
        "sharpwise.AdamW(model, lr=lr, block_lr=sharpwise.BlockwiseLR())",
        lambda model, lr: sharpwise.AdamW(model, lr=lr, block_lr=sharpwise.BlockwiseLR(), **COMMON),
    ),
    Arm("Adam-mini", "sharpwise.AdamMini(model, lr=lr)", lambda model, lr: sharpwise.AdamMini(model, lr=lr, **COMMON)),
)
BASELINE = ARMS[0].name

# Chosen so that plain AdamW has its best one in the middle; no arm gets others.
LEARNING_RATES: tuple[float, ...] = (1e-3, 3e-3, 1e-2)

VOCABULARY = 1024
MODEL: dict[str, Any] = {"n_layer": 2, "n_embd": 128, "n_head": 4}


@dataclass(frozen=True)
class Progress:
    """What a run reports: `step` of run `run` is done; a run that stops early reports all its steps at once."""

    run: int
    step: int


def build_model(vocabulary: int, context: int, seed: int) -> nn.Module:
    """A GPT-2 without dropout from a Hugging Face config, its weights drawn from `seed`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    # Two choices for speed on a CPU at this size: the tanh formula in one kernel, and attention written out (the
    # backward pass of torch's fused CPU attention takes three times as long as the matrix products).
    fast: dict[str, Any] = {"activation_function": "gelu_pytorch_tanh", "attn_implementation": "eager"}
    config = GPT2Config(
        **MODEL,
        **fast,
        vocab_size=vocabulary,
        n_positions=context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(seed)
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def load_corpus(data: Path | None, context: int) -> Corpus:
    """Read and tokenize the text of the demo. Raises ValueError for what cannot be used, see `read_documents`."""
    source = f"standard library of Python {platform.python_version()}" if data is None else data.name
    return prepare(read_documents(data), vocabulary=VOCABULARY, context=context, source=source)


def run_demo(
    corpus: Corpus,
    settings: LoopSettings,
    *,
    jobs: int = 2,
    worker_setup: Callable[[], object] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train every arm with every learning rate; the result as plain values, ready for JSON.

    Args:
        corpus: from `load_corpus`.
        settings: of every run; the seed is also that of the weights, so that all runs start alike.
        jobs: processes at a time, one thread each; 1 runs here. The losses do not depend on it.
        worker_setup: called first in every worker process (a function that can be pickled).
        on_progress: called every few steps.
    """
    trials = [(arm.name, lr) for lr in LEARNING_RATES for arm in ARMS]
    settings = replace(settings, autocast=bf16_autocast(settings.autocast))
    report = on_progress or (lambda progress: None)
    if jobs == 1:
        with _one_thread():
            records = [
                _run_trial(i, arm, lr, corpus, settings, report, lambda: False) for i, (arm, lr) in enumerate(trials)
            ]
    else:
        records = _run_in_processes(trials, corpus, settings, min(jobs, len(trials)), worker_setup, report)
    order = {arm.name: i for i, arm in enumerate(ARMS)}
    runs = [{"arm": arm, "lr": lr, **asdict(record)} for (arm, lr), record in zip(trials, records, strict=True)]
    return {
        "format": 1,
        "baseline": BASELINE,
        "arms": [{"name": arm.name, "code": arm.code} for arm in ARMS],
        "learning_rates": list(LEARNING_RATES),
        "common": {key: list(value) if isinstance(value, tuple) else value for key, value in COMMON.items()},
        "settings": {**asdict(settings), "tokens": settings.tokens},
        "data": dict(corpus.about),
        **_describe_model(corpus, settings),
        "environment": _environment(jobs),
        "runs": sorted(runs, key=lambda run: (order[run["arm"]], run["lr"])),
    }


class Cancelled(Exception):
    """A run was told to stop."""


def _run_trial(
    number: int,
    arm_name: str,
    lr: float,
    corpus: Corpus,
    settings: LoopSettings,
    report: Callable[[Progress], None],
    stopped: Callable[[], bool],
) -> Record:
    arm = next(arm for arm in ARMS if arm.name == arm_name)
    model = build_model(corpus.vocabulary, settings.context, settings.seed)

    def on_step(step: int, loss: float) -> None:
        if stopped():
            raise Cancelled
        if step % 5 == 0:
            report(Progress(number, step))

    record = train(model, arm.build(model, lr), corpus, settings, on_step)
    report(Progress(number, settings.steps))
    return record


# --- processes -------------------------------------------------------------------------------------------------------
# One thread each: two processes of one thread train a tiny model 1.3 to 1.7 times as fast as one process of two, and
# they do not stall when something else wants the cores (two threads meet at every kernel's end).


def _run_in_processes(
    trials: list[tuple[str, float]],
    corpus: Corpus,
    settings: LoopSettings,
    jobs: int,
    worker_setup: Callable[[], object] | None,
    report: Callable[[Progress], None],
) -> list[Record]:
    context = multiprocessing.get_context("spawn")
    progress: SimpleQueue[Progress] = context.SimpleQueue()
    stop = context.Event()
    with ProcessPoolExecutor(
        jobs, context, initializer=_start_worker, initargs=(corpus, settings, progress, stop, worker_setup)
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
    corpus: Corpus
    settings: LoopSettings
    progress: "SimpleQueue[Progress]"
    stop: Event


_worker: _Worker


def _start_worker(
    corpus: Corpus,
    settings: LoopSettings,
    progress: "SimpleQueue[Progress]",
    stop: Event,
    worker_setup: Callable[[], object] | None,
) -> None:
    global _worker
    if worker_setup:
        worker_setup()
    torch.set_num_threads(1)
    _worker = _Worker(corpus, settings, progress, stop)


def _run_in_worker(number: int, arm: str, lr: float) -> Record:
    return _run_trial(number, arm, lr, _worker.corpus, _worker.settings, _worker.progress.put, _worker.stop.is_set)


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


def _describe_model(corpus: Corpus, settings: LoopSettings) -> dict[str, Any]:
    """The model in numbers, and its block map with the multipliers of each arm."""
    model = build_model(corpus.vocabulary, settings.context, settings.seed)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    optimizers = {arm.name: arm.build(model, 1.0) for arm in ARMS}
    segments = optimizers[BASELINE].blocks.segments
    multipliers = {
        name: [float(row["multiplier"]) for row in optimizer.lr_multipliers()] for name, optimizer in optimizers.items()
    }
    return {
        "model": {
            "family": "gpt2",
            **MODEL,
            "context": settings.context,
            "vocabulary": corpus.vocabulary,
            "parameters": total,
            "non_embedding_parameters": total - embedding,
        },
        "blocks": [
            {
                "name": segment.name,
                "shape": list(segment.shape),
                "type": str(segment.block_type),
                "role": str(segment.role),
                "rows": segment.describe_rows(),
                "heads": segment.heads,
                "parameters": segment.numel,
                "tied": list(segment.tied),
                "multipliers": {name: values[i] for name, values in multipliers.items()},
            }
            for i, segment in enumerate(segments)
        ],
    }


def _environment(jobs: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sharpwise": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": available_cpus(),
        "processes": jobs,
        "threads_per_process": 1,
        "matrix_products": "bf16 autocast" if bf16_autocast(None) else "fp32",
    }


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
