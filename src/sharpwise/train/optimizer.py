"""The optimizer of a configuration: built, and as the code that a user would write for it."""

from typing import Any

from torch import Tensor, nn

from sharpwise.block_lr import make_block_lr
from sharpwise.blocks import BlockMap
from sharpwise.blocks.map import blocks_for
from sharpwise.engine import BlockOptimizer
from sharpwise.groups import param_groups
from sharpwise.optim import create_optimizer
from sharpwise.train.code import names_class
from sharpwise.train.config import OptimizerConfig
from sharpwise.train.foreign import Foreign, build_foreign, foreign_code


def build_optimizer(
    own: OptimizerConfig,
    model: nn.Module,
    blocks: BlockMap | None = None,
    steps: int | None = None,
    batches: list[Tensor] | None = None,
) -> BlockOptimizer | Foreign:
    """The optimizer that a configuration names.

    `blocks` of the model, where they are known already; the `steps` of the run and `batches` to probe the model on, for
    block_lrs that need them. It leaves steps with non-finite gradients out whatever `on_nonfinite` says: so the weights
    are good when the run decides what to do.

    Raises:
        ValueError, TypeError: from its constructor.
    """
    if names_class(own.name):
        return build_foreign(own, model, blocks_for(model, blocks, own.name, include_frozen=True))
    first: Any = model
    options = own.arguments
    if own.groups:
        blocks = blocks_for(model, blocks, own.name, include_frozen=True)
        first, options["model"] = param_groups(model, own.groups, blocks=blocks), model
    if blocks is not None:
        options["blocks"] = blocks
    found = create_optimizer(
        first,
        own.name,
        lr=own.lr,
        block_lr=own.block_lr or None,
        max_grad_norm=own.max_grad_norm or None,
        on_nonfinite="skip",
        total_steps=steps,
        probe_batches=batches,
        **options,
    )
    own.check_groups(("weight_decay", *found.rule.defaults))
    return found


def as_code(own: OptimizerConfig, steps: int | None = None) -> str:
    """The optimizer as a user would write it, for a training of so many steps."""
    if names_class(own.name):
        return foreign_code(own)
    arguments: dict[str, Any] = {"lr": own.lr, **own.arguments}
    if own.block_lr:
        arguments["block_lr"] = own.block_lr
        sources = make_block_lr(own.block_lr).sources
        if steps is not None and sources:
            arguments["total_steps"] = steps
    if own.max_grad_norm:
        arguments["max_grad_norm"] = own.max_grad_norm
    said = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    if own.groups:
        groups = f"sharpwise.param_groups(model, {own.groups!r})"
        return f"sharpwise.create_optimizer({groups}, {own.name!r}, model=model, {said})"
    return f"sharpwise.create_optimizer(model, {own.name!r}, {said})"
