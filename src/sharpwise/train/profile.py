"""Where the time of a step goes: the loop as it is, under torch's profiler, for a few steps."""

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sharpwise.train.build import Built
from sharpwise.train.steps import train_steps

PHASES = ("data", "forward", "backward", "optimizer")
WARM_UP = 5  # steps: compilation, allocation of state


@dataclass(frozen=True)
class Profile:
    """Milliseconds per step. `phases` ends with the rest; `operators` are (name, own time, calls), the longest first.

    On a GPU times are those of its kernels, and the rest is what the host did not hide.
    """

    steps: int
    step_ms: float
    tokens_per_second: float
    phases: list[tuple[str, float]]
    operators: list[tuple[str, float, float]]


def profile_steps(built: Built, steps: int = 10) -> Profile:
    """Train for a few steps, and say where their time went; the model is not the same afterwards.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"a profile needs at least one step, got {steps}")
    plan = replace(built.plan, validation_every=0)  # which is no part of a step's time
    cuda = plan.device.type == "cuda"
    running = train_steps(
        built.model, built.optimizer, built.data.train, built.data.validation, plan, forward=built.forward
    )
    list(islice(running, WARM_UP))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    # Without the profiler first: it makes many small operations look longer than they are.
    seconds = [step.seconds for step in islice(running, steps)]
    with profile(activities=activities, acc_events=True) as found:
        taken = len(list(islice(running, steps)))
        if cuda:
            torch.cuda.synchronize(plan.device)
    running.close()
    if not taken:
        raise ValueError(f"the run has {plan.schedule.total} steps; a profile of {steps} needs {WARM_UP + 2 * steps}")
    events = found.key_averages()
    step_ms = 1e3 * sorted(seconds)[len(seconds) // 2]
    total = {event.key: _ms(event, cuda) / taken for event in events if event.key in PHASES}
    phases = [(name, total.get(name, 0.0)) for name in PHASES]
    profiled = sum(ms for _, ms in phases)
    rest = max(0.0, step_ms - profiled)
    operators = [
        (event.key, own / taken, event.count / taken)
        for event in events
        if event.key not in PHASES and (own := _own_ms(event, cuda)) > 0
    ]
    operators.sort(key=lambda row: -row[1])
    return Profile(taken, step_ms, plan.tokens_per_step / step_ms * 1e3, [*phases, ("the rest", rest)], operators[:12])


def _ms(event: Any, cuda: bool) -> float:
    return float(event.device_time_total if cuda else event.cpu_time_total) / 1e3


def _own_ms(event: Any, cuda: bool) -> float:
    return float(event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
