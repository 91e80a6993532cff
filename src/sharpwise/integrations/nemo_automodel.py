"""NeMo Automodel: a typed optimizer config (nemo_automodel 0.7, `components/optim/optimizer.py`). In the YAML file::

    optimizer:
      _target_: sharpwise.integrations.nemo_automodel.SharpwiseConfig
      name: adam-mini
      lr: 1.0e-4

The class itself as `_target_` would get tensors without the model.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from nemo_automodel.components.optim.optimizer import OptimizerConfig
from torch import nn

from sharpwise.engine import BlockOptimizer
from sharpwise.optim import create_optimizer

__all__ = ["SharpwiseConfig"]


@dataclass
class SharpwiseConfig(OptimizerConfig):
    """An optimizer by name; `options` are its other keyword arguments. `param_group_overrides` are NeMo's."""

    name: str = "adam-mini"
    lr: float = 1e-4
    weight_decay: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, model: nn.Module, *, device_mesh: Any = None, is_peft: bool = False) -> list[BlockOptimizer]:
        """One optimizer per part of the model, as the recipes expect."""
        return [self._of(part) for part in getattr(model, "parts", [model])]

    def _of(self, part: nn.Module) -> BlockOptimizer:
        numbers = {"lr": self.lr, "weight_decay": self.weight_decay}
        groups: list[dict[str, Any]] = [{"params": []}]
        # NeMo's scheduler multiplies by these two, each time it sets lr and weight_decay.
        groups += [{"params": [], "lr_mult": own.lr_mult, "wd_mult": own.wd_mult} for own in self.param_group_overrides]
        for name, p in part.named_parameters():
            if p.requires_grad:
                found = (i for i, own in enumerate(self.param_group_overrides, 1) if re.search(own.pattern, name))
                groups[next(found, 0)]["params"].append((name, p))
        groups = [group for group in groups if group["params"]]
        return create_optimizer(groups, self.name, model=part, **numbers, **self.options)
