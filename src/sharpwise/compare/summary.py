"""What came out of a demo, in numbers and in sentences; every function takes the result of `run_demo`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharpwise.report.words import USUAL_TOKENS_PER_PARAMETER, mebibytes, number

Result = Mapping[str, Any]

# Standard deviation of the final loss over seeds: AdamW at learning rate 3e-3 on the standard library of Python 3.11,
# 260 steps, ended at 4.150, 4.268, 4.239 and 4.480 with seeds 0 to 3 (0.06 after 360 steps, which take five minutes
# on two cores of a Zen 4).
SEED_NOISE = 0.14


@dataclass(frozen=True)
class Best:
    """An arm's lowest final validation loss; `edge` says which end of the grid it lies at, "" if it is inside."""

    arm: str
    lr: float
    loss: float
    edge: str
    run: Mapping[str, Any]


def arm_names(result: Result) -> list[str]:
    """Names of the arms, in the order of the comparison."""
    return [arm["name"] for arm in result["arms"]]


def runs_of(result: Result, arm: str) -> list[Mapping[str, Any]]:
    """The runs of one arm, by learning rate."""
    return sorted((run for run in result["runs"] if run["arm"] == arm), key=lambda run: run["lr"])


def best_run(result: Result, arm: str) -> Best | None:
    """The best run of one arm; None if none of its runs reached the end."""
    ended = [run for run in runs_of(result, arm) if run["final_loss"] is not None]
    if not ended:
        return None
    run = min(ended, key=lambda run: run["final_loss"])
    rates = result["learning_rates"]
    edge = "smallest" if run["lr"] == min(rates) else "largest" if run["lr"] == max(rates) else ""
    return Best(arm, run["lr"], run["final_loss"], edge, run)


def learned_nothing(result: Result, run: Mapping[str, Any]) -> bool:
    """Whether a run that reached its end is no better than naming all tokens equally likely."""
    return run["final_loss"] is not None and run["final_loss"] >= math.log(result["model"]["vocabulary"])


def difference(result: Result, arm: str) -> float | None:
    """Best final validation loss of `arm` minus that of the baseline, nats per token; negative is better."""
    mine, baseline = best_run(result, arm), best_run(result, result["baseline"])
    return None if mine is None or baseline is None else mine.loss - baseline.loss


def throughput(result: Result, arm: str) -> float | None:
    """Tokens per second of the quickest run of one arm."""
    return max(
        (r["tokens_per_second"] for r in runs_of(result, arm) if r["tokens_per_second"] is not None), default=None
    )


def step_ms(result: Result, arm: str) -> float | None:
    """Time of an optimizer step in the quickest run of one arm."""
    return min((run["step_ms"] for run in runs_of(result, arm) if run["step_ms"] is not None), default=None)


def state_bytes(result: Result, arm: str) -> int | None:
    """Bytes of optimizer state of one arm, as its optimizer measured them."""
    return next((run["state_bytes"] for run in runs_of(result, arm) if run["state_bytes"] is not None), None)


def mean_multiplier(result: Result, arm: str) -> float:
    """The arm's multiplier of the learning rate, averaged over all parameters."""
    blocks = result["blocks"]
    return sum(b["multipliers"][arm] * b["parameters"] for b in blocks) / sum(b["parameters"] for b in blocks)


# --- sentences -------------------------------------------------------------------------------------------------------


def headline(result: Result) -> str:
    """What came out, best against best, whichever way."""
    baseline = result["baseline"]
    if best_run(result, baseline) is None:
        ended = [arm for arm in arm_names(result) if best_run(result, arm)]
        rest = f"; {' and '.join(ended)} did not" if ended else ", and so did every other arm"
        return f"{baseline} diverged at every learning rate{rest}"
    parts = [f"{arm} {_outcome(difference(result, arm), baseline)}" for arm in arm_names(result) if arm != baseline]
    return "; ".join(parts)


def _outcome(delta: float | None, baseline: str) -> str:
    if delta is None:
        return "diverged at every learning rate"
    if abs(delta) < SEED_NOISE:
        return f"ended too close to {baseline} to call ({delta:+.3f} nats)"
    return f"ended {abs(delta):.3f} nats {'below' if delta < 0 else 'above'} {baseline}"


def subtitle(result: Result) -> str:
    """How to read the headline."""
    settings = result["settings"]
    return (
        f"Validation loss at the end of complete schedules, lower is better; each arm at the best of the same "
        f"{len(result['learning_rates'])} learning rates. One seed, so there is no interval. "
        f"{settings['tokens']:,} tokens a run, a GPT-2 with {result['model']['parameters']:,} parameters."
    )


def caveats(result: Result) -> list[str]:
    """What a reader has to know before believing any of it."""
    settings, model = result["settings"], result["model"]
    per_parameter = settings["tokens"] / model["parameters"]
    notes = [
        f"A short run. It saw {per_parameter:.2g} tokens per parameter, where {USUAL_TOKENS_PER_PARAMETER} are usual. "
        "The paper's own curves of blockwise learning rates run behind AdamW for most of the training and cross late, "
        "so that a short run may well lose; and a short run that wins says little about a long one.",
        f"One seed ({settings['seed']}). Four seeds of AdamW in this demo, at its usual length, ended 4.15 to 4.48: a "
        f"standard deviation of {SEED_NOISE:g} nats. A smaller difference says nothing, one of twice that not much.",
    ]
    for arm in arm_names(result):
        best = best_run(result, arm)
        if best and best.edge:
            other = "smaller" if best.edge == "smallest" else "larger"
            notes.append(
                f"{arm} was best at the {best.edge} learning rate tried: a {other} one might be better still, so this "
                "arm is not tuned."
            )
        diverged = [run for run in runs_of(result, arm) if run["stopped_at"] is not None]
        if diverged:
            rates = ", ".join(f"{run['lr']:g} (step {run['stopped_at']})" for run in diverged)
            notes.append(f"{arm} diverged at learning rate {rates}: the loss was not a finite number.")
        if flat := [run for run in runs_of(result, arm) if learned_nothing(result, run)]:
            rates = ", ".join(f"{run['lr']:g}" for run in flat)
            notes.append(f"{arm} learned nothing at learning rate {rates}: it ended no better than guessing.")
        if (mean := mean_multiplier(result, arm)) > 1.05:
            notes.append(
                f"{arm} multiplies the learning rate of an average parameter by {mean:.1f}. Part of what it does at a "
                "given learning rate is what any optimizer does at a larger one; compare best with best."
            )
    return notes


def rows(result: Result) -> list[tuple[str, list[str]]]:
    """The table of results: a label, and one text per arm."""
    arms = arm_names(result)
    table = []
    for lr in result["learning_rates"]:
        runs = [next((run for run in runs_of(result, arm) if run["lr"] == lr), None) for arm in arms]
        table.append((f"final loss, lr {lr:g}", ["-" if run is None else _ended(run) for run in runs]))
    best = [best_run(result, arm) for arm in arms]
    table.append(("best", ["-" if b is None else f"{b.loss:.3f}" for b in best]))
    table.append(("best lr", ["-" if b is None else f"{b.lr:g}{' (edge)' if b.edge else ''}" for b in best]))
    deltas = [None if arm == result["baseline"] else difference(result, arm) for arm in arms]
    table.append((f"against {result['baseline']}", ["" if d is None else f"{d:+.3f}" for d in deltas]))
    table.append(("tokens/s", [number(throughput(result, arm), ",.0f") for arm in arms]))
    table.append(("optimizer step", [number(step_ms(result, arm), ".2f", " ms") for arm in arms]))
    table.append(("optimizer state", [mebibytes(state_bytes(result, arm)) for arm in arms]))
    return table


def _ended(run: Mapping[str, Any]) -> str:
    return "diverged" if run["final_loss"] is None else f"{run['final_loss']:.3f}"
