"""The sentences of the studies of update sizes (`recipes/update_size`); see `figures.py`."""

from collections.abc import Callable, Iterator
from typing import Any

from figures_docs import seeds_apart, span
from figures_methods import edge
from figures_results import ended, length

Load = Callable[[str], Any]
WARMED = ("adamw", "lion", "liona", "lionar", "lionar, momentum")


def update_size(load: Load) -> Iterator[str]:
    study = load("recipes/update_size/warmup.json")
    for arm in WARMED:
        gaps = (gap(study, other, arm) for other in (unwarmed(arm), f"{unwarmed(arm)}, lr/2"))
        yield f"| `{arm}` | {' | '.join((*ended(study, arm), *gaps))} |"
    yield length(study)
    yield from batch(load)
    yield from hyperball(load)
    yield from edge(load)


def batch(load: Load) -> Iterator[str]:
    """Four times the batch and twice the learning rates."""
    study = load("recipes/update_size/batch.json")
    for arm in ("adamw", "lionar, momentum", "lionar, snr"):
        yield f"| `{arm}` | {' | '.join((*ended(study, arm), gap(study, unwarmed(arm), arm)))} |"
    yield length(study)


def hyperball(load: Load) -> Iterator[str]:
    quarter, full = (load(f"recipes/update_size/{name}.json") for name in ("hyperball-quarter", "hyperball"))
    for arm in (one["name"] for one in full["arms"]):
        yield f"| `{arm}` | {' | '.join((*ended(quarter, arm), *ended(full, arm)))} |"
    tried = {arm["name"]: {f"{one['lr']:g}": one["final_loss"] for one in arm["tuning"]} for arm in full["arms"]}
    for arm, lr in (("adamh", "0.032"), ("muonh", "0.1")):
        yield f"{lr} costs {tried[arm][lr] - min(tried[arm].values()):.3f} nats"


def gap(study: dict[str, Any], arm: str, other: str) -> str:
    """How far one arm ended above another, with its interval."""
    found = seeds_apart(study, arm, other)
    return f"{found.mean:+.3f} ({span((found.low, found.high), 3)})"


def unwarmed(arm: str) -> str:
    """The arm without warm-up at the same learning rate."""
    return f"{arm}, 0%" if "," in arm else f"{arm} 0%"
