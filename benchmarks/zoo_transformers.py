"""Tiny random models of transformers for the zoo: the name of a class, and what differs from its default config."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Built = tuple[nn.Module, Any]


def tiny(name: str, example: Mapping[str, Any], config: str = "", **sizes: Any) -> Callable[[], Built]:
    """What builds a model and gives what its forward takes.

    Args:
        name: of a model class of transformers.
        example: keyword arguments of its forward.
        config: name of the config's class; that of the model if not given.
        sizes: fields of the config, those of a config inside it as a dict.
    """

    def build() -> Built:
        torch.manual_seed(0)
        cls = getattr(transformers, name)
        settings = getattr(transformers, config) if config else cls.config_class
        return cls(settings(**sizes)).eval(), dict(example)

    return build


def ids(length: int = 9, below: int = 90, batch: int = 2) -> Tensor:
    """Token numbers [batch, length], none below 4, where special ones are."""
    return torch.randint(4, below, (batch, length), generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> Tensor:
    """Normal numbers: an image [batch, channels, height, width], a sound [batch, samples]."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))
