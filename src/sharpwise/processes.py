"""Processes that this one starts: they end when it does, however that happens, and Ctrl-C is for it alone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def end_with_parent() -> None:
    """End this process at once when the one that spawned it has ended; to be called first in a process of a pool.

    Without that, a parent that is killed leaves the processes of its pool behind: they go on with what they are at,
    and then wait for more for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="end-with-parent", daemon=True).start()


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block, and never in processes that start within."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
    # New processes inherit the mask. It alone would not do here: other threads of this process take the signal.
    seen: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    # A thread may not set handlers, and what is ignored stays so.
    own = callable(handler) and threading.current_thread() is threading.main_thread()
    if own:
        signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if own:
            signal.signal(signal.SIGINT, handler)
    if seen:
        raise KeyboardInterrupt
