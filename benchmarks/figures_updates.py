"""The sentences of the studies of update sizes (`recipes/update_size`); see `figures.py`."""

from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

from figures_docs import losses, seeds_apart, span
from figures_methods import edge
from figures_results import best, to_baseline

Load = Callable[[str], Any]
WARMED = ("adamw", "lion", "liona", "lionar", "lionar, momentum")


def update_size(load: Load) -> Iterator[str]:
    study = load("recipes/update_size/warmup.json")
    for arm in WARMED:
        cells = [f"{mean(losses(study, arm)):.3f}", to_baseline(study, arm)]
        for other in (unwarmed(arm), f"{unwarmed(arm)}, lr/2"):
            gap = seeds_apart(study, other, arm)
            cells.append(f"{gap.mean:+.3f} ({span((gap.low, gap.high), 3)})")
        yield f"| `{arm}` | {best(study, arm)} | {' | '.join(cells)} |"
    budget = study["budget"]
    yield f"{budget['steps']} steps, {budget['tokens']:,} tokens, {budget['tokens_per_parameter']:.1f} per parameter"
    yield from batch(load)
    yield from hyperball(load)
    yield from edge(load)


def batch(load: Load) -> Iterator[str]:
    """Four times the batch and twice the learning rates."""
    study = load("recipes/update_size/batch.json")
    for arm in ("adamw", "lionar, momentum", "lionar, snr"):
        gap = seeds_apart(study, unwarmed(arm), arm)
        cells = [best(study, arm), f"{mean(losses(study, arm)):.3f}", to_baseline(study, arm)]
        cells.append(f"{gap.mean:+.3f} ({span((gap.low, gap.high), 3)})")
        yield f"| `{arm}` | {' | '.join(cells)} |"
    budget = study["budget"]
    yield f"{budget['steps']} steps, {budget['tokens']:,} tokens, {budget['tokens_per_parameter']:.1f} per parameter"


def hyperball(load: Load) -> Iterator[str]:
    quarter, full = (load(f"recipes/update_size/{name}.json") for name in ("hyperball-quarter", "hyperball"))
    for arm in (one["name"] for one in full["arms"]):
        cells = [f"{best(s, arm)} | {mean(losses(s, arm)):.3f} | {to_baseline(s, arm)}" for s in (quarter, full)]
        yield f"| `{arm}` | {' | '.join(cells)} |"
    tried = {arm["name"]: {f"{one['lr']:g}": one["final_loss"] for one in arm["tuning"]} for arm in full["arms"]}
    for arm, lr in (("adamh", "0.032"), ("muonh", "0.1")):
        yield f"{lr} costs {tried[arm][lr] - min(tried[arm].values()):.3f} nats"


def unwarmed(arm: str) -> str:
    """The arm without warm-up at the same learning rate."""
    return f"{arm}, 0%" if "," in arm else f"{arm} 0%"
