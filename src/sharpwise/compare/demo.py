"""The demo: a small study on the source text of the running Python's standard library."""

from pathlib import Path
from typing import Any

from sharpwise.train.data import Prepared, prepare_tokens

# Learning rates around the best one for the standard library's text, so that it mostly lies inside; where it does not,
# the range is widened and every arm gets as many trials.
ARMS = {
    "adamw": {"lrs": [5e-4, 1e-3, 2e-3, 4e-3]},
    "adamw+blockwise": {"lrs": [1e-4, 2e-4, 4e-4, 8e-4]},
    "adam-mini": {"lrs": [5e-4, 1e-3, 2e-3, 4e-3]},
}
# A t-interval of two seeds is 12.7 standard errors wide on each side, of five 2.8.
SEEDS = 5
SEQUENCES, CONTEXT = 16, 128
VOCABULARY = 1024
MODEL: dict[str, Any] = {"name": "gpt2-0.4m", "settings": {"context": CONTEXT}}


def demo_data(source: Path | None, folder: Path) -> Prepared:
    """The tokens of the demo, prepared once.

    Raises:
        ValueError: a text that cannot be used, see `prepare_tokens`.
    """
    return prepare_tokens([source or "stdlib"], folder, vocabulary=VOCABULARY, validation=0.05, max_bytes=32 * 2**20)


def demo_study(data: Path, steps: int) -> dict[str, Any]:
    """The study of the demo, as a study file would give it: small enough for a few minutes on two cores.

    There are no runs at other horizons, so no speed-ups.
    """
    return {
        "name": "demo",
        "arms": ARMS,
        "seeds": SEEDS,
        "tokens": steps * SEQUENCES * CONTEXT,
        "margin": 0.05,
        "most": 6,
        "horizons": [],
        "settings": {"optimizer.betas": [0.9, 0.95], "optimizer.weight_decay": 0.1},
        "run": {
            "model": MODEL,
            "data": {"path": str(data), "context": CONTEXT},
            "batch": {"sequences": SEQUENCES},
            "compute": {"device": "cpu"},
            "validation": {"every": max(1, steps // 3), "sequences": 96},
        },
    }
