"""Hugging Face `Trainer`: the form in which it takes an optimizer that has to see the model.

`Trainer(optimizer_cls_and_kwargs=(cls, kwargs))` calls an Optimizer subclass with its own two parameter groups, which
carry no names and no model; a `model` among the kwargs it passes in their place, so that `(sharpwise.AdamMini,
{"model": model, "lr": 6e-4})` works on one process. Anything else it takes for a factory class, and calls
`cls()(model, **kwargs)` (transformers 5.23, `Trainer.create_optimizer`).
"""

from typing import Any

import torch
from torch import nn

from sharpwise.optim import create_optimizer


class Factory:
    """Builds a sharpwise optimizer inside the Trainer.

    Example::

        Trainer(
            model=model,
            args=args,
            optimizer_cls_and_kwargs=(Factory, {"name": "adam-mini", "lr": 6e-4, "weight_decay": 0.1}),
        )

    The Trainer does not tell a factory what stands in its `TrainingArguments`: `learning_rate`, `weight_decay` and
    `adam_*` there have no effect, and the Trainer's own habit of no decay on biases and norms is said as
    `no_decay=("norm", "bias")`. Its schedule and its gradient clipping work as always.

    Under FSDP2 this is the only form: the Trainer refuses `optimizers=` there, and exchanges the parameters of what it
    built itself for sharded ones.
    """

    def __call__(self, model: nn.Module, *, name: str = "adamw", **options: Any) -> torch.optim.Optimizer:
        """The optimizer of `model`.

        Args:
            model: the model that the Trainer trains.
            name: one of `sharpwise.list_optimizers()`.
            options: the keyword arguments of that optimizer.

        Raises:
            ValueError: `name` is no optimizer of ours, or an option has a value that it cannot have.
        """
        return create_optimizer(model, name, **options)
