"""Results of a demo that no run made: enough for summary, charts and page."""

import math
from typing import Any

from sharpwise.compare.summary import Result

RATES = [1e-3, 3e-3, 1e-2]
ARMS = ["AdamW", "AdamW + BlockwiseLR", "Adam-mini"]


def run(arm: str, lr: float, final: float | None, *, stopped_at: int | None = None) -> dict[str, Any]:
    """A run of 20 steps; one that stopped has losses up to there."""
    steps = list(range(1, (stopped_at or 21)))
    factor = 10.0 if "Blockwise" in arm else 1.0
    return {
        "arm": arm,
        "lr": lr,
        "train_steps": steps,
        "train_loss": [7.0 - 0.1 * step for step in steps],
        "validation_steps": [step for step in (10, 20) if step in steps],
        "validation_loss": [5.0, final][: len([step for step in (10, 20) if step in steps])],
        "learning_rate_steps": steps,
        "learning_rates": {
            "tok_emb": [factor * lr / step for step in steps],
            "pos_emb": [lr / step for step in steps],
            "norm": [lr / step for step in steps],
        },
        "types": {"tok_emb": "Emb", "pos_emb": "Emb", "norm": "Norm"},
        "stopped_at": stopped_at,
        "final_loss": final,
        "tokens_per_second": 1000.0 if steps else None,
        "step_ms": 1.5 if steps else None,
        "state_bytes": (2 if arm == "Adam-mini" else 4) * 2**20 if steps else None,
    }


def block(name: str, role: str, kind: str, factor: float, **more: Any) -> dict[str, Any]:
    """One segment of the block map."""
    common = {"shape": [4, 4], "rows": "all", "heads": None, "parameters": 16, "tied": []}
    return {
        "name": name,
        "role": role,
        "type": kind,
        **common,
        **more,
        "multipliers": {"AdamW": 1.0, "AdamW + BlockwiseLR": factor, "Adam-mini": 1.0},
    }


def result(losses: dict[str, list[float | None]] | None = None, *, stopped_at: int = 7) -> Result:
    """A result with these final losses by arm and learning rate; None is a run that diverged at `stopped_at`."""
    losses = losses or {
        "AdamW": [4.2, 3.8, 4.1],
        "AdamW + BlockwiseLR": [3.9, 4.4, None],
        "Adam-mini": [4.3, 3.85, 4.2],
    }
    runs = [
        run(arm, lr, loss, stopped_at=stopped_at if loss is None else None)
        for arm, finals in losses.items()
        for lr, loss in zip(RATES, finals, strict=True)
    ]
    return {
        "format": 1,
        "baseline": "AdamW",
        "arms": [{"name": arm, "code": f"sharpwise.Some({arm!r})"} for arm in losses],
        "learning_rates": RATES,
        "common": {"betas": [0.9, 0.95], "weight_decay": 0.1},
        "settings": {
            "steps": 20,
            "sequences": 4,
            "context": 8,
            "warmup": 2,
            "floor": 0.1,
            "seed": 3,
            "tokens": 640,
        },
        "data": {
            "source": "a <b>bold</b> text & more",
            "documents": 9,
            "bytes": 9000,
            "sha256": "0123456789abcdef",
            "vocabulary": 300,
            "bytes_per_token": 2.5,
            "train_tokens": 3000,
        },
        "model": {
            "family": "gpt2",
            "n_layer": 2,
            "n_embd": 4,
            "n_head": 2,
            "vocabulary": 300,
            "parameters": 64,
            "non_embedding_parameters": 48,
        },
        "blocks": [
            block("wte.weight", "tok_emb", "Emb", 10.0, tied=["lm_head.weight"]),
            block("h.0.attn.weight", "q", "QK", 8.0, rows="0:2", heads=2),
            block("h.0.attn.weight", "v", "VO", 4.0, rows="2:4", heads=2),
            block("h.1.attn.weight", "q", "QK", 8.0, rows="0:2", heads=2),
            block("h.1.attn.weight", "v", "VO", 4.0, rows="2:4", heads=2),
            block("ln.weight", "norm", "Norm", 1.0),
        ],
        "environment": {
            "date": "2026-01-02T03:04:05+00:00",
            "sharpwise": "0",
            "torch": "2",
            "transformers": "5",
            "python": "3",
            "platform": "Linux",
            "cpus": 2,
            "processes": 2,
            "threads_per_process": 1,
            "matrix_products": "fp32",
        },
        "runs": runs,
    }


GUESSING = math.log(300)
