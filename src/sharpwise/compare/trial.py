"""One run of a study, by what sets it apart from the others."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Stage = Literal["tune", "roles", "even", "refine", "final", "horizon"]
TUNING_SEED = 0
Setting = tuple[tuple[str, Any], ...]
"""Dotted keys of a configuration with their values, the learning rate first; of `SETTINGS_OF` pairs of pairs."""
SETTINGS_OF = "optimizer.settings_of"


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


def plain(setting: Setting) -> dict[str, Any]:
    """A setting as configurations and JSON have it.

    >>> plain((("optimizer.lr", 0.1), ("optimizer.settings_of", (("Emb", (("betas", (0.9, 0.98)),)),))))
    {'optimizer.lr': 0.1, 'optimizer.settings_of': {'Emb': {'betas': [0.9, 0.98]}}}
    """
    return {
        key: {name: {k: _plain(v) for k, v in own} for name, own in value} if key == SETTINGS_OF else _plain(value)
        for key, value in setting
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
