"""One run of a study, by what sets it apart from the others."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Stage = Literal["tune", "roles", "even", "refine", "final", "horizon"]
TUNING_SEED = 0
Setting = tuple[tuple[str, Any], ...]
"""Dotted keys of a configuration with their values, the learning rate first."""


@dataclass(frozen=True)
class Trial:
    """One run: an arm's setting (dotted keys of a configuration), a seed, and the share of the budget it gets."""

    arm: str
    stage: Stage
    setting: Setting
    seed: int
    horizon: float = 1.0

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return float(dict(self.setting)["optimizer.lr"])

    @property
    def key(self) -> str:
        """What names it in the study's storage."""
        return json.dumps([self.arm, self.stage, self.setting, self.seed, self.horizon], separators=(",", ":"))


Losses = Mapping[Trial, float]
"""End validation losses in nats per token of trials that are done; inf where the run diverged."""
