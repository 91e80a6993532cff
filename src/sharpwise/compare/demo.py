"""The demo: a small study on the source text of the running Python's standard library."""

from pathlib import Path
from typing import Any

from sharpwise.train.data import Prepared, prepare_tokens

ARMS = ("adamw", "adamw+blockwise", "adam-mini")
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

    Arms are widened once if need be. There are no runs at other horizons, so no speed-ups.
    """
    return {
        "name": "demo",
        "arms": list(ARMS),
        "seeds": 2,
        "tokens": steps * SEQUENCES * CONTEXT,
        "margin": 0.05,
        "most": 4,
        "horizons": [],
        "settings": {"optimizer.betas": [0.9, 0.95], "optimizer.weight_decay": 0.1},
        "run": {
            "model": MODEL,
            "data": {"path": str(data), "context": CONTEXT},
            "batch": {"sequences": SEQUENCES},
            "compute": {"device": "cpu"},
            "validation": {"every": max(1, steps // 5), "sequences": 96},
        },
    }
