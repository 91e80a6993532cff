"""OLMo-core: a registered `OptimConfig` (ai2-olmo-core 3.0, `optim/config.py`).

train_module = TransformerTrainModuleConfig(..., optim=SharpwiseConfig(name="adam-mini", lr=4e-4))
"""

from dataclasses import dataclass, field
from typing import Any

from olmo_core.optim import OptimConfig
from torch import nn

from sharpwise.engine import BlockOptimizer
from sharpwise.optim import create_optimizer

__all__ = ["SharpwiseConfig"]


@OptimConfig.register("sharpwise")
@dataclass
class SharpwiseConfig(OptimConfig):
    """An optimizer by name; `options` are its other keyword arguments.

    `group_overrides` and `fixed_fields` are OLMo-core's. `compile` has to stay False: sharpwise compiles its own step.
    """

    name: str = "adam-mini"
    lr: float = 1e-3
    weight_decay: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def optimizer(cls) -> type[BlockOptimizer]:
        """The class of what is built."""
        return BlockOptimizer

    def build(self, model: nn.Module, strict: bool = True) -> BlockOptimizer:
        """The optimizer of `model`, in the groups that OLMo-core makes.

        Raises:
            ValueError: for `compile=True`, and as `sharpwise.create_optimizer`.
        """
        if self.compile:
            raise ValueError("SharpwiseConfig: sharpwise compiles its own step, got compile=True; leave it out")
        groups = self.build_groups(model, strict=strict)
        numbers = {"lr": self.lr, "weight_decay": self.weight_decay}
        found = create_optimizer(groups, self.name, model=model, **numbers, **self.options)
        for group in found.param_groups:
            group.setdefault("initial_lr", group["lr"])
        fixed = [{key: group[key] for key in self.fixed_fields if key in group} for group in found.param_groups]

        def keep_fixed(optimizer: Any) -> None:
            for own, group in zip(fixed, optimizer.param_groups, strict=True):
                group.update(own)

        found.register_load_state_dict_post_hook(keep_fixed)
        return found
