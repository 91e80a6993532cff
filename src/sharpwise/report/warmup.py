"""Whether the warm-up of a run was needed, too short or too long, by how far its first updates turned the neurons.

An update turns a neuron by an angle that goes with the learning rate. Divided by it and times the peak, angles of the
beginning say what the first updates would have been without a warm-up; those after it, what is usual. Where gradients
of a batch agree, an update of the same size changes more of what a layer gives: angles are multiplied by
`controls.snr.rrc_growth` of the measured gradient SNR, where there is one. (The three causes of arXiv 2410.23922.)
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

from sharpwise.blocks.roles import HIDDEN
from sharpwise.controls.snr import rrc_growth
from sharpwise.report.run import RunData, lookup, whole
from sharpwise.train.config import steps_of

LARGE = 1.5
"""Times what is usual, and above nine tenths of what comes later: such a first update is one that a warm-up is for."""
LONG = 5
"""A warm-up of more than so many times the steps that were large is longer than needed."""


class Update(NamedTuple):
    """What was noted of one step.

    Attributes:
        angle: mean over the roles of hidden matrices, in radians, times the growth by SNR.
        per_peak: what that would have been at the peak of the learning rate.
    """

    step: int
    angle: float
    per_peak: float


def advice(run: RunData) -> str:
    """A sentence on the warm-up of a run, with the figures behind it; "" where too little was noted."""
    steps, given = run.steps, run.setting("schedule", "warmup")
    peak = run.setting("optimizer", "lr")
    if not steps or not isinstance(given, (int, float)) or not isinstance(peak, (int, float)) or peak <= 0:
        return ""
    return advise(_updates(run, peak), steps_of(given, steps), steps)


def advise(updates: Sequence[Update], warmup: int, steps: int) -> str:
    """The sentence, from what was noted.

    Args:
        updates: in order of steps. warmup: its steps, 0 for none. steps: of the whole run.
    """
    begin = warmup if warmup else steps // 20
    early = [one for one in updates if one.step <= begin]
    late = [one for one in updates if begin < one.step <= begin + steps // 2]
    if len(early) < 2 or len(late) < 2:
        return ""
    usual = median(one.per_peak for one in late)
    most = max(early, key=lambda one: one.per_peak)
    taken = max(early, key=lambda one: one.angle)
    bound = max(LARGE * usual, quantiles([one.per_peak for one in late], n=10)[-1])
    large = max((one.step for one in early if one.per_peak > bound), default=0)
    figure = f"{most.per_peak / usual:.2g} times as far as is usual after it ({usual:.2g} rad), step {most.step} most"
    if not warmup:
        figure = figure.replace("after it", "later")
        if not large:
            return f"No warm-up was needed: the first updates turned neurons at most {figure}."
        return (
            f"A warm-up was missing: the first updates turned neurons {figure}; they were large up to step {large}, "
            f"and a warm-up of {2 * large} steps or more would have kept them small."
        )
    without = f"at the peak of the learning rate the first updates would have turned neurons {figure}"
    if taken.angle > bound:
        return (
            f"The warm-up of {warmup} steps was too short: even under it, step {taken.step} turned neurons "
            f"{taken.angle / usual:.2g} times as far as is usual after it ({usual:.2g} rad)."
        )
    if not large:
        return f"The warm-up of {warmup} steps was not needed for the size of updates: {without}."
    if warmup > LONG * large:
        return (
            f"The warm-up of {warmup} steps was longer than the size of updates asks for: {without}, and large ones "
            f"up to step {large}."
        )
    return f"The warm-up of {warmup} steps was needed, and long enough: {without}, and large ones up to step {large}."


def _updates(run: RunData, peak: float) -> list[Update]:
    sequences = whole(lookup(run.config, "batch", "sequences")) or 0
    inputs = _inputs(run)
    found = []
    for record in run.diagnostics:
        angles = [a for role, a in _of(record, "update_angle").items() if role in HIDDEN]
        lr, step = record.get("lr"), whole(record.get("step"))
        if not angles or step is None or not isinstance(lr, (int, float)) or lr <= 0:
            continue
        growth = rrc_growth(_snr(record, sequences), max(sequences, 1), inputs) if inputs else 1.0
        angle = growth * sum(angles) / len(angles)
        if math.isfinite(angle) and angle > 0:
            found.append(Update(step, angle, angle * peak / lr))
    return found


def _snr(record: Mapping[str, Any], sequences: int) -> float:
    """Gradient SNR of one sequence, 0 where none was noted."""
    noise = _of(record, "noise_scale").get("model")
    if noise and noise > 0:
        return 1 / noise
    batch = _of(record, "gradient_snr").get("model")
    return batch / sequences if batch and batch > 0 and sequences else 0.0


def _of(record: Mapping[str, Any], key: str) -> dict[str, float]:
    values = record.get(key)
    return dict(values) if isinstance(values, Mapping) else {}


def _inputs(run: RunData) -> float:
    """Of the hidden matrices of a model, the usual number of inputs; 0 where they are not known."""
    own = [math.prod(s.shape[i] for i in s.inputs) for s in run.blocks or () if s.is_hidden_matrix]
    return float(median(own)) if own else 0.0
