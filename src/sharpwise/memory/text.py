"""A plan in words, for the command and the page."""

from collections.abc import Iterator

from sharpwise.memory.plan import MemoryPlan
from sharpwise.memory.sizes import size_text

_HOW = {"replicate": "replicas (DDP)", "fsdp": "FSDP2", "tp": "tensor parallelism"}


def title(plan: MemoryPlan) -> str:
    """What is planned."""
    count = sum(plan.parameters.values())
    where = f" On each of {plan.processes} GPUs, {_HOW[plan.shard]}." if plan.processes > 1 else ""
    return f"{plan.model}: {count:,} trainable parameters.{where}"


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
