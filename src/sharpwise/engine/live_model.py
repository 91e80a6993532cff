"""What a live model tells of tensors: whose parameters a generator gives, and whether an adapter has taken over."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from sharpwise.blocks import canonical_name


def model_behind(first: Any) -> nn.Module | None:
    """The module that `module.parameters()`, not read yet, belongs to; None for anything else.

    So the line that everybody writes works, and hosts that pass this generator without the model (Lightning's CLI,
    litgpt, verl) need no adapter.
    """
    if not inspect.isgenerator(first) or first.gi_code is not nn.Module.parameters.__code__:
        return None
    if inspect.getgeneratorstate(first) != inspect.GEN_CREATED:
        return None
    # Where an interpreter keeps no frames this is empty, and tensors have no names, as in any list of them.
    found = inspect.getgeneratorlocals(first).get("self")
    return found if isinstance(found, nn.Module) else None


def check_adapted(held: Sequence[Tensor], model: nn.Module | None, known: Iterable[str], who: str) -> None:
    """Raise RuntimeError if all these are frozen now, and what trains came to the model after the optimizer was built.

    Args:
        held: what the optimizer holds; known: names of all parameters that the model had then.
    """
    if model is None or not held or any(tensor.requires_grad for tensor in held):
        return
    before = set(known)
    new = [canonical_name(name) for name, p in model.named_parameters() if p.requires_grad]
    new = [name for name in new if name not in before]
    if new:
        raise RuntimeError(
            f"{who}: an adapter was added after this optimizer was built: the {len(held)} parameters that it holds "
            f"are frozen, and it lacks the {len(new)} that train, such as {new[0]}. Build the optimizer after "
            f"get_peft_model(model, config); in a Trainer that is given peft_config, take "
            f"sharpwise.integrations.hf.set_optimizer(trainer, ...) in place of optimizers="
        )
