"""Encoding in processes. Not in threads: looking words up is Python's own work, one thread at a time."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from sharpwise.processes import end_with_parent, interrupts_deferred
from sharpwise.train.data.encode import Encoder


class Pending(Protocol):
    """A result that is there or will be."""

    def result(self) -> NDArray[Any]:
        """Wait for it."""
        ...


class Here:
    """Encodes in this process, when the result is asked for."""

    def __init__(self, jobs: int = 1) -> None:
        self._encoder: Encoder | None = None

    def submit(self, tokenizer: Path, end: int, dtype: str, texts: Sequence[str]) -> Pending:
        """Encode with the tokenizer of a file; see `Encoder`."""
        if self._encoder is None:
            self._encoder = _load(tokenizer, end, dtype)
        return _Later(self._encoder, texts)

    def close(self) -> None:
        """Nothing is left behind."""


class _Later:
    def __init__(self, encoder: Encoder, texts: Sequence[str]) -> None:
        self._encoder, self._texts = encoder, texts

    def result(self) -> NDArray[Any]:
        return self._encoder(self._texts)


class Processes:
    """Encodes in `jobs` processes of one thread, which start at once and end with this one, even if it is killed."""

    def __init__(self, jobs: int) -> None:
        self._pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_start)
        with interrupts_deferred():  # what starts now inherits that: Ctrl-C is for this process alone
            for _ in range(jobs):
                self._pool.submit(_ready)

    def submit(self, tokenizer: Path, end: int, dtype: str, texts: Sequence[str]) -> Pending:
        """Encode with the tokenizer of a file; see `Encoder`."""
        future: Future[NDArray[Any]] = self._pool.submit(_encode, tokenizer, end, dtype, texts)
        return future

    def close(self) -> None:
        """Give up what was not begun, wait for the rest."""
        self._pool.shutdown(cancel_futures=True)


_encoder: tuple[Path, Encoder] | None = None


def _encode(tokenizer: Path, end: int, dtype: str, texts: Sequence[str]) -> NDArray[Any]:
    global _encoder
    if _encoder is None or _encoder[0] != tokenizer:
        _encoder = tokenizer, _load(tokenizer, end, dtype)
    return _encoder[1](texts)


def _load(path: Path, end: int, dtype: str) -> Encoder:
    from tokenizers import Tokenizer

    return Encoder(Tokenizer.from_file(str(path)), end, dtype)


def _ready() -> None:
    pass


def _start() -> None:
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as there should be threads
