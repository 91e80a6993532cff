"""The sentences of studies of methods: AdaPM, the geometry of l_inf, the edge of learning rates; see `figures.py`."""

from collections.abc import Callable, Iterator
from itertools import combinations
from statistics import mean
from typing import Any

from figures_docs import by_name
from figures_results import ended, length

Load = Callable[[str], Any]


def adapm(load: Load) -> Iterator[str]:
    layouts = load("benchmarks/results/step_time_further.json")["layouts"]
    linear, conv = (layouts[of]["arms"]["sharpwise AdaPM r=16, block v"]["ratio"] for of in ("linear", "conv1d"))
    yield f"takes {linear:.1f} times as long where matrices are `Linear`, {conv:.1f} where they are `Conv1D`"
    study = load("recipes/adapm/result.json")
    yield from rows(study)
    yield length(study)


NORM, OF_WEIGHTS, SPECTRAL = "norm_11 / d", "norm_11 / d, of the weights", "norm_2"
PAPERS = ("adamw", "adasgd", "rotated adam")


def blockwise_adam(load: Load) -> Iterator[str]:
    for name in ("gpt2", "digits"):
        study, curvature = load(f"recipes/l_inf/{name}.json"), load(f"recipes/l_inf/{name}-curvature.json")
        measured = {arm["name"]: arm["runs"] for arm in curvature["arms"]}
        for arm, runs in measured.items():
            norms = [f"{norm(runs, of):.3g}" for of in (NORM, OF_WEIGHTS, SPECTRAL)]
            yield f"| `{arm}` | {' | '.join((*ended(study, arm), *norms))} |"
        for of, words in ((NORM, "the (1,1)-norm"), (SPECTRAL, "the spectral norm")):
            agreeing, pairs = curvature["agrees"][of]
            yield f"{words} orders {agreeing} of {pairs} pairs"
            if name == "gpt2":
                yield f"{words} orders {ordered([measured[arm] for arm in PAPERS], of)} of 3"
    yield length(load("recipes/l_inf/gpt2.json"))


def norm(runs: list[dict[str, Any]], of: str) -> float:
    """The mean over runs; of the weights it is that of the optimizer's basis, where there is no other."""
    return mean(run.get(of, run[NORM])["value"] for run in runs)


def ordered(arms: list[list[dict[str, Any]]], of: str) -> int:
    """How many pairs of arms it orders as their losses are."""
    points = [(mean(run["loss"] for run in runs), norm(runs, of)) for runs in arms]
    return sum((one[0] < two[0]) == (one[1] < two[1]) for one, two in combinations(points, 2))


def edge(load: Load) -> Iterator[str]:
    """How large a learning rate is stood (`recipes/warmup_edge`)."""
    found = load("recipes/warmup_edge/edge.json")
    for row in found["rows"]:
        means = [f"{mean(own):.3f}" for own in row["losses"].values()]
        yield f"| `{row['optimizer']}` | {row['warmup']} | {' | '.join(means)} | {row['edge']:g} |"
    gains = [
        mean(cold) - mean(warm)
        for k in (0, 2)
        for cold, warm in zip(*(found["rows"][k + i]["losses"].values() for i in range(2)), strict=True)
    ]
    yield f"by {min(gains):.2f} to {max(gains):.2f} nats"


def rows(study: dict[str, Any]) -> Iterator[str]:
    """A row for each arm: best rate, loss, difference, state."""
    for arm in (one["name"] for one in study["arms"]):
        yield f"| `{arm}` | {' | '.join(ended(study, arm))} | {by_name(study, arm)['state_bytes'] / 2**20:.2f} MiB |"
