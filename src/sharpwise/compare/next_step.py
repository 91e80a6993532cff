"""The command to give after a comparison, and why: the one that would tell most."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharpwise.block_lr import Ablation
from sharpwise.compare.arms import block_lr_of
from sharpwise.compare.statistics import seeds_needed
from sharpwise.compare.study import TOKENS_PER_PARAMETER, Study
from sharpwise.train.code import runs_code

LONGER = 4
"""Times the tokens of the next study, where runs were short."""
FEW = 20
"""More seeds than this are no next step: what takes so many to see is small, or the seeds differ too much."""


def next_step(study: Study, result: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The `command` to give next, and the `reason` for it.

    The first of these that applies: train what is missing; where seeds diverged, warm up longer; learning rates beyond
    the edge at which an arm was best, where the verdict hangs on it; more seeds for what is undecided, where that is
    possible; the ablations of what was better; longer runs; train with the best arm.

    Args:
        study: that was compared.
        result: of `results`: its `complete`, `budget`, `seeds`, `arms` and `ablations`.
        folder: of the study, as a command has to name it.
    """
    trust = "--trust-code " if runs_code(study.configs) else ""
    stored = f"sharpwise compare {trust}{shlex.quote(str(folder / 'study.toml'))}"
    here = f"--out {shlex.quote(str(folder))}"
    if not result["complete"]:
        return _step("Runs are missing. This goes on with them:", f"sharpwise compare {trust}{here}")
    candidates = [arm for arm in result["arms"] if arm["name"] != study.baseline]
    if lost := _unstable(study, result["arms"]):
        there = shlex.quote(f"{folder}-warmup")
        return _step(
            f"{lost} diverged at the learning rate that was best with the seed of the tuning. A longer warm-up "
            "may help; the same study with one for every arm:",
            f"{stored} --set schedule.warmup=0.3 --out {there}",
        )
    if at_edge := _at_edge(result["arms"]):
        there, arms = shlex.quote(f"{folder}-lrs"), " and ".join(arm["name"] for arm in at_edge)
        lrs = ", ".join(f"{lr:g}" for lr in _wider(result["arms"]))
        return _step(
            f"{arms} ended best at the {at_edge[0]['edge']} learning rate that was tried, so the comparison is not "
            "fair to it yet. The same study with learning rates beyond it, for every arm:",
            f"{stored} --search {shlex.quote(f'optimizer.lr=[{lrs}]')} --out {there}",
        )
    if (seeds := _seeds(study, candidates)) is not None:
        undecided = " and ".join(seeds[1])
        counted = " (more than each verdict says, as there are several)" if len(candidates) > 1 else ""
        more = (seeds[0] - study.seeds) * (len(study.arms) + len(study.horizons))
        return _step(
            f"Undecided: {undecided}. {seeds[0]} seeds would most likely tell{counted}, if the true gap is as large as "
            f"the one seen, or as the margin. That is {more} runs more. Keep to that number: adding seeds until "
            "something is significant finds it by chance.",
            f"{stored} --seeds {seeds[0]} {here}",
        )
    if names := _without_ablations(study, result):
        return _step(
            f"{' and '.join(names)} ended lower than {study.baseline}. Whether that comes from which block gets which "
            "learning rate, or from larger steps, the ablations tell:",
            f"{stored} --ablations {here}",
        )
    budget = result["budget"]
    if budget["tokens_per_parameter"] < TOKENS_PER_PARAMETER:
        there = shlex.quote(f"{folder}-x{LONGER}")
        return _step(
            f"These runs were short. Whether the order lasts, the same study with {LONGER} times the tokens tells, "
            f"which takes {LONGER} times as long:",
            f"{stored} --budget {LONGER * budget['tokens']} --out {there}",
        )
    ended = [arm for arm in result["arms"] if arm["verdict"] in ("baseline", "better") and arm["mean"] is not None]
    best = min(ended, key=lambda arm: float(arm["mean"]))
    config = folder / best["final"][0]["folder"] / "config.toml"
    return _step(
        f"Nothing is left to decide here. To train with {best['name']} as it was tuned, from a configuration to change "
        "as you like:",
        f"sharpwise train {trust}{shlex.quote(str(config))} --out {shlex.quote(f'{folder}-best')}",
    )


def _step(reason: str, command: str) -> dict[str, str]:
    return {"reason": reason, "command": command}


def _unstable(study: Study, arms: Sequence[Mapping[str, Any]]) -> str:
    """The first arm whose lost runs leave something open: the baseline, or one that is undecided; "" if none."""
    lost = [arm for arm in arms if any(run["final_loss"] is None for run in arm["final"])]
    lost.sort(key=lambda arm: arm["name"] != study.baseline)
    return next((arm["name"] for arm in lost if arm["verdict"] in ("baseline", "undecided")), "")


def _at_edge(arms: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Arms that other learning rates may make better, where that may change a verdict: not those that won anyway."""
    return [arm for arm in arms if arm["edge"] and arm["verdict"] != "better"]


def _wider(arms: Sequence[Mapping[str, Any]]) -> list[float]:
    """Learning rates sqrt(10) apart: from one below what was best for any arm to one above, two beyond an edge."""
    steps = [
        (
            2 * math.log10(arm["setting"]["optimizer.lr"]),
            1 + (arm["edge"] == "smallest"),
            1 + (arm["edge"] == "largest"),
        )
        for arm in arms
        if arm["setting"] is not None and not arm["setting_of"]
    ]
    low, high = min(at - below for at, below, _ in steps), max(at + above for at, _, above in steps)
    return [float(f"{10 ** ((low + i) / 2):.2g}") for i in range(math.ceil(high - low - 1e-6) + 1)]


def _seeds(study: Study, candidates: list[Mapping[str, Any]]) -> tuple[int, list[str]] | None:
    """How many seeds would decide what is undecided, and of which arms; None if none is, or if `FEW` would not."""
    found = {}
    for arm in candidates:
        difference = arm["difference"]
        if arm["verdict"] == "undecided" and difference and difference["low"] is not None:
            # As sure as the adjustment for several candidates may ask for.
            level = 1 - 0.05 / len(candidates)
            gap = max(abs(difference["mean"]), study.margin)
            found[arm["name"]] = max(seeds_needed(difference["sd"], gap, level=level), study.seeds + 1)
    found = {name: seeds for name, seeds in found.items() if seeds <= FEW}
    return (max(found.values()), list(found)) if found else None


def _without_ablations(study: Study, result: Mapping[str, Any]) -> list[str]:
    """Arms with a learning rate per block that were better than the baseline, and have no ablation in the study."""
    there = {pair["arm"] for pair in result["ablations"]}
    better = [arm["name"] for arm in result["arms"] if arm["verdict"] == "better" and arm["name"] not in there]
    block_lrs = {name: block_lr_of(study.arm(name)) for name in better}
    return [name for name, own in block_lrs.items() if own is not None and not isinstance(own, Ablation)]
