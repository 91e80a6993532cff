"""A plan in words, for the command and the page."""

import shlex
from collections.abc import Iterator

from sharpwise.memory.plan import MemoryPlan, Planned
from sharpwise.memory.sizes import size_text

_HOW = {"replicate": "replicas (DDP)", "fsdp": "FSDP2", "tp": "tensor parallelism"}


def title(plan: MemoryPlan) -> str:
    """What is planned."""
    count = sum(plan.parameters.values())
    where = f" On each of {plan.processes} GPUs, {_HOW[plan.shard]}." if plan.processes > 1 else ""
    return f"{plan.model}: {count:,} trainable parameters.{where}"


def span(plan: MemoryPlan) -> tuple[Planned, Planned] | None:
    """What keeps least state and what keeps most; what keeps hardly any, as SGD without momentum, does not count."""
    most = max(plan.distinct, key=lambda one: one.state, default=None)
    if most is None or most.state == 0:
        return None
    return min((one for one in plan.distinct if 100 * one.state > most.state), key=lambda one: one.state), most


def conclusion(plan: MemoryPlan) -> str:
    """What there is to save, in a line."""
    ends = span(plan)
    if ends is None:
        return title(plan)
    least, most = ends
    if least is most:
        return f"{plan.model}: {most.name} keeps {size_text(most.state)} of state"
    return (
        f"{plan.model}: {size_text(most.state)} of state with {most.name}, {size_text(least.state)} with {least.name}"
    )


def what_fits(plan: MemoryPlan, size: int) -> str:
    """How much of it fits into so many bytes, in a line."""
    shown = plan.distinct
    every = [one for one in plan.fits(size) if one.planned in shown]
    fits = [one for one in every if one.fits]
    said = f"Into {size_text(size)} {len(fits)} of {len(every)} combinations fit."
    if not fits:
        return f"{said} Share it among more GPUs: --gpus {2 * plan.processes} --shard fsdp."
    most = max((one for one in fits if one.micro_batch), key=lambda one: one.micro_batch or 0, default=None)
    if most is not None:
        said += f" The largest micro-batch is {most.micro_batch}, with {most.planned.name}."
    return said


def next_command(plan: MemoryPlan) -> str:
    """The comparison of what keeps most state with what keeps least: whether the loss is the same; "" of only one."""
    ends = span(plan)
    if ends is None or ends[0].optimizer == ends[1].optimizer:
        return ""
    arms = [ends[1].optimizer, ends[0].optimizer]
    return shlex.join(["sharpwise", "compare", *arms, "--model", plan.model, "--data", "DATA", "--budget", "1x"])


def estimates(plan: MemoryPlan) -> Iterator[str]:
    """What every optimizer needs besides its state."""
    yield f"{plan.precision}: weights {size_text(plan.weights)}, gradients {size_text(plan.gradients)}."
    about = []
    if plan.activations is not None:
        about.append(f"activations {size_text(plan.activations)} per sequence of {plan.context} tokens")
    if plan.casts:
        about.append(f"{size_text(plan.casts)} for bf16 copies of matrices")
    if plan.gathered:
        about.append(f"{size_text(plan.gathered)} for what is gathered of other GPUs")
    if about:
        yield f"Estimated: {', '.join(about)}."
    else:
        yield "Activations are not known: no attention was found in it, and 'in all' is without them."
    if plan.activations is not None:
        yield f"In all: with micro-batches of {plan.micro_batch}. State is exact, to the byte."


def refusals(plan: MemoryPlan) -> Iterator[str]:
    """What the model cannot have, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in plan.combinations:
        if one.refused:
            reasons.setdefault((one.optimizer, one.refused), []).append(one.name)
    for (optimizer, reason), names in reasons.items():
        all_of_it = all(one.refused == reason for one in plan.combinations if one.optimizer == optimizer)
        yield f"Not {optimizer if all_of_it else ', '.join(names)}. {reason}"
