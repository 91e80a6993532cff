"""timm: `create_optimizer_v2` with the arguments that timm's has, for sharpwise's names too (timm 1.0.31).

timm's registry passes groups of tensors without the model, so that a class of ours registered there could not tell what
they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2 as timms
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from sharpwise.optim import create_optimizer, list_optimizers

__all__ = ["create_optimizer_v2"]


def create_optimizer_v2(
    model: nn.Module,
    opt: str = "adam-mini",
    lr: float | None = None,
    weight_decay: float = 0.0,
    *,
    filter_bias_and_bn: bool = True,
    layer_decay: float | None = None,
    param_group_fn: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer in timm's groups: no decay of vectors and of what the model excepts, and layer decay if wanted.

    Layer decay goes by timm's `lr_scale` in the groups, which timm's schedulers apply. A name that sharpwise does not
    have is timm's, called as it would be there.

    Args:
        model: the model; for parameters there is `sharpwise.create_optimizer(groups, opt, model=model)`.
        opt: one of `sharpwise.list_optimizers()`, or a name of timm's.
        lr: None for the optimizer's default.
        weight_decay, filter_bias_and_bn, layer_decay, param_group_fn: as timm has them.
        options: keyword arguments of the optimizer.

    Raises:
        TypeError: for parameters in place of a model; else as `sharpwise.create_optimizer`.
    """
    grouping: dict[str, Any] = {"filter_bias_and_bn": filter_bias_and_bn, "layer_decay": layer_decay}
    grouping["param_group_fn"] = param_group_fn
    if opt not in list_optimizers():
        return timms(model, opt, lr=lr, weight_decay=weight_decay, **grouping, **options)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"create_optimizer_v2: {opt!r} needs the model, to know what its parameters are, got {type(model).__name__}"
        )
    spared: Any = getattr(model, "no_weight_decay", set)()
    common = {
        "weight_decay": weight_decay,
        "no_weight_decay_list": spared,
        "weight_decay_exclude_1d": filter_bias_and_bn,
    }
    if param_group_fn is not None:
        groups = param_group_fn(model)
    elif layer_decay is not None:
        groups = param_groups_layer_decay(model, layer_decay=layer_decay, **common)
    else:
        groups = param_groups_weight_decay(model, **common)
    rate = {} if lr is None else {"lr": lr}
    return create_optimizer(groups, opt, model=model, weight_decay=weight_decay, **rate, **options)
