"""Training runs in processes of their own, one thread each unless told otherwise.

Two processes of one thread train a tiny model 1.3 to 1.7 times as fast as one process of two, and they do not stall
when something else wants the cores (two threads meet at every kernel's end).
"""

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from sharpwise.processes import end_with_parent, interrupts_deferred
from sharpwise.train.run import Diverged, run
from sharpwise.train.steps import Step

logger = logging.getLogger("sharpwise.compare")

ATTEMPTS = 3  # at a run whose process dies
REPORT_EVERY = 5  # steps


class Stopped(Exception):
    """A run was told to stop; its folder holds a checkpoint."""


class Workers:
    """Processes that train; a context manager that ends them. They also end with this one, even if it is killed.

    Args:
        jobs: how many; 1 trains in this process, when `wait` is called.
        threads: of torch in each.
        setup: called first in every process (a function that can be pickled).
        on_step: called with the key of a run and its step, every few steps.
    """

    def __init__(
        self,
        jobs: int,
        *,
        threads: int = 1,
        setup: Callable[[], object] | None = None,
        on_step: Callable[[str, int], object] = lambda key, step: None,
    ) -> None:
        self.jobs, self.threads, self.setup, self.on_step = jobs, threads, setup, on_step
        self.running: dict[str, tuple[Mapping[str, Any], Path]] = {}
        self._attempts: dict[str, int] = {}
        self._futures: dict[Future[None], str] = {}
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self.jobs > 1:
            self._start()
        return self

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._steps: SimpleQueue[tuple[str, int]] = context.SimpleQueue()
        self._stop = context.Event()
        self._pool = ProcessPoolExecutor(
            self.jobs, context, initializer=_start_worker, initargs=(self._steps, self._stop, self.threads, self.setup)
        )

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._stop.set()
            # Waits for the processes: `shutdown(wait=False)` may leave one behind.
            self._pool.shutdown(cancel_futures=True)

    @property
    def free(self) -> int:
        """How many more can be started."""
        return self.jobs - len(self.running)

    def start(self, key: str, given: Mapping[str, Any], folder: Path) -> None:
        """Train in `folder`, or go on there."""
        self.running[key] = (given, folder)
        self._attempts[key] = self._attempts.get(key, 0) + 1
        if self._pool is not None:
            # Ctrl-C reaches every process of the terminal; workers inherit that it is blocked, and obey `_stop`.
            try:
                with interrupts_deferred():
                    self._futures[self._pool.submit(_run_in_worker, key, given, folder)] = key
            except BrokenProcessPool:  # since the last `wait`
                self._again()

    def wait(self) -> list[str]:
        """The keys of runs that ended meanwhile: to their end, or because they diverged.

        Raises:
            What a run raises; RuntimeError if its process died again and again.
        """
        if self._pool is None:
            key, (given, folder) = next(iter(self.running.items()))
            with _threads(self.threads):
                _run(key, given, folder, self.on_step, lambda: False)
            del self.running[key]
            return [key]
        done, _ = wait(self._futures, timeout=0.2, return_when=FIRST_COMPLETED)
        while not self._steps.empty():
            self.on_step(*self._steps.get())
        ended: list[str] = []
        for future in done:
            key = self._futures[future]
            try:
                future.result()
            except BrokenProcessPool:
                self._again()
                return ended
            del self._futures[future], self.running[key]
            ended.append(key)
        return ended

    def _again(self) -> None:
        """A process died and took the pool with it: start all that was running again, from their checkpoints."""
        running, self.running, self._futures = self.running, {}, {}
        for key in running:
            if self._attempts[key] >= ATTEMPTS:
                raise RuntimeError(
                    f"a process that trained in {running[key][1]} died {ATTEMPTS} times; was there too little memory? "
                    "Take fewer --jobs"
                )
        logger.warning("a process died; %d runs go on from their checkpoints", len(running))
        assert self._pool is not None
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._start()
        for key, (given, folder) in running.items():
            self.start(key, given, folder)


def _run(
    key: str,
    given: Mapping[str, Any],
    folder: Path,
    on_step: Callable[[str, int], object],
    stopped: Callable[[], bool],
) -> None:
    def report(step: Step) -> None:
        if step.step % REPORT_EVERY == 0:
            on_step(key, step.step)

    with suppress(Diverged):  # the run's folder says so
        if run(given, folder, on_step=report, should_stop=stopped).state == "interrupted":
            raise Stopped


_steps: "SimpleQueue[tuple[str, int]]"
_stop: Event


def _start_worker(
    steps: "SimpleQueue[tuple[str, int]]", stop: Event, threads: int, setup: Callable[[], object] | None
) -> None:
    global _steps, _stop
    end_with_parent()
    if setup:
        setup()
    torch.set_num_threads(threads)
    _steps, _stop = steps, stop


def _run_in_worker(key: str, given: Mapping[str, Any], folder: Path) -> None:
    _run(key, given, folder, lambda key, step: _steps.put((key, step)), _stop.is_set)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
