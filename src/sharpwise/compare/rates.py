"""What is known of optimizers by name: their rules, and where the learning rates of an arm begin.

The latter is a middle for models of some million parameters, a start and no claim.
"""

from collections.abc import Mapping
from typing import Any

from sharpwise import Rotated, rules
from sharpwise.controls import make_control

RULES: dict[str, type[rules.Rule] | type[Rotated]] = {
    **{
        rule.name: rule
        for rule in (
            rules.AdamMini,
            rules.AdamW,
            rules.AdaPM,
            rules.BlockwiseAdam,
            rules.Lion,
            rules.Muon,
            rules.SGD,
        )
    },
    "adasgd": rules.BlockwiseAdam,
    "rotated": Rotated,
    "sgd-sai": rules.SGD,
}
"""What a page says of an optimizer: the first line of its rule, or of itself."""
MIDDLE = {
    "adamw": 3e-3, "adam-mini": 3e-3, "adapm": 3e-3, "blockwise-adam": 3e-3, "adasgd": 3e-3, "lion": 5e-4,
    "muon": 3e-3, "sgd": 0.3, "sgd-sai": 1e-2,
}  # fmt: skip


def middle_rate(optimizer: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """Where its learning rates begin: under a control that sets the size of updates, whatever the rule."""
    control = make_control(settings.get("optimizer.control", optimizer.get("control")))
    if control is not None and control.name in ("angular", "l2"):
        return MIDDLE["adamw"]
    name = optimizer["name"]
    if name == "rotated":
        name = settings.get("optimizer.rule", "adamw")
    return 1e-2 if control is not None and control.name == "hyperball" else MIDDLE.get(name, 1e-3)
