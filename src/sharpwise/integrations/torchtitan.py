"""torchtitan: the component that a config's `optimizer` builds (torchtitan 0.3.0, `components/optimizer`).

    config.optimizer = sharpwise_optimizer("adam-mini", lr=8e-4)

torchtitan makes one optimizer per kind and model part, of groups with names, and saves it by these names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from sharpwise.engine import BlockOptimizer
from sharpwise.optim import create_optimizer, list_optimizers

__all__ = ["SharpwiseOptimizers", "sharpwise_optimizer"]


def sharpwise_optimizer(name: str = "adam-mini", *, lr: float = 8e-4, **options: Any) -> "SharpwiseOptimizers.Config":
    """A config with one group, of all parameters.

    For more groups, write `SharpwiseOptimizers.Config(param_groups=[...])`: `optimizer_name` is one of
    `sharpwise.list_optimizers()` or of torchtitan's; `optimizer_kwargs` are numbers of the group, such as `lr` and
    `weight_decay`; options of the whole optimizer, such as `block_lr`, stand in `optimizer_factory_kwargs_by_name`.

    Args:
        name, options: as `sharpwise.create_optimizer` takes them. lr: the peak, which torchtitan's schedule scales.
    """
    group = ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs={"lr": lr})
    return SharpwiseOptimizers.Config(param_groups=[group], optimizer_factory_kwargs_by_name={name: options})


class SharpwiseOptimizers(OptimizersContainer):
    """torchtitan's container, which also knows the names of `sharpwise.list_optimizers()`."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan's; `implementation` is for torch's own optimizers."""

    def _resolve_optimizer_factory(self, name: str) -> Callable[..., Any]:
        if name in list_optimizers():
            return lambda groups, **options: self._build(groups, name, options)
        return OptimizersContainer._resolve_optimizer_factory(name)

    def _build(self, groups: list[dict[str, Any]], name: str, options: dict[str, Any]) -> BlockOptimizer:
        for group in groups:
            group.pop("fused", None)  # these two say how torch's optimizers step
            group.pop("foreach", None)
        held = {id(p) for group in groups for p in group["params"]}
        part = next(part for part in self.model_parts if any(id(p) in held for p in part.parameters()))
        return create_optimizer(groups, name, model=part, **options)
