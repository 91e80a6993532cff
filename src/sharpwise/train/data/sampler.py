"""Which windows of the tokens a step sees: pure functions, so that nothing has to be saved to resume."""

import numpy as np
from numpy.typing import NDArray


def window_starts(total: int, *, seed: int, step: int, sequences: int, context: int) -> NDArray[np.int64]:
    """Where the windows of one step start, int64 [sequences]: a pure function of its arguments.

    The places are random, with replacement, and windows have `context` + 1 tokens. The generator is a counter keyed by
    (seed, step): nothing has to be saved to resume, and any step can be drawn without those before it. A process that
    handles a part of the batch takes its slice: the whole does not depend on the micro-batch or the number of
    processes.

    >>> window_starts(1000, seed=0, step=3, sequences=4, context=16)[1:3]
    array([467, 433])

    Raises:
        ValueError: fewer tokens than one window.
    """
    if total < context + 1:
        raise ValueError(
            f"{total} tokens hold no window of {context} + 1; prepare more text, or take a shorter context"
        )
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    return generator.integers(0, total - context, size=sequences)


def even_starts(total: int, sequences: int, context: int) -> NDArray[np.int64]:
    """Where at most `sequences` windows of `context` + 1 tokens start, int64 [n]: evenly spaced, targets not shared.

    >>> even_starts(1000, 3, 64)
    array([  0, 320, 640])

    Raises:
        ValueError: fewer tokens than one window.
    """
    room = (total - 1) // context
    if room < 1:
        raise ValueError(
            f"{total} tokens hold no window of {context} + 1; prepare more text, or take a shorter context"
        )
    count = min(sequences, room)
    return np.arange(count, dtype=np.int64) * (room // count) * context
