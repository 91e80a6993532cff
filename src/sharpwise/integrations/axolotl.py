"""axolotl: a plugin (axolotl 0.19). In the YAML file::

    plugins:
      - sharpwise.integrations.axolotl.SharpwisePlugin
    sharpwise:
      name: adam-mini
      block_lr: blockwise

`learning_rate`, `weight_decay` and `adam_*` of the file are used. axolotl never calls `create_optimizer` of a plugin,
so that this one tells the trainer what to build.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from sharpwise.integrations.hf import set_optimizer

__all__ = ["SharpwiseArgs", "SharpwisePlugin"]


class SharpwiseArgs(BaseModel):
    """The key that the plugin adds to axolotl's file: `name`, and options of that optimizer."""

    sharpwise: dict[str, Any] | None = None


class SharpwisePlugin(BasePlugin):
    """Trains with the optimizer that stands under `sharpwise:`."""

    def get_input_args(self) -> str:
        """Where axolotl finds the keys of this plugin."""
        return "sharpwise.integrations.axolotl.SharpwiseArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Set the optimizer of a trainer that axolotl has made.

        Raises:
            ValueError: where the file names no optimizer, and as `sharpwise.integrations.hf.set_optimizer`.
        """
        options = dict(cfg.sharpwise or {})
        if "name" not in options:
            raise ValueError(
                f"the plugin of sharpwise needs an optimizer, got sharpwise: {options}; write for instance\n"
                f"sharpwise:\n  name: adam-mini"
            )
        set_optimizer(trainer, **options)
