"""Where to go: one file per paper."""

from sharpwise.rules.adam_mini import AdamMini
from sharpwise.rules.adamw import AdamW
from sharpwise.rules.adapm import AdaPM
from sharpwise.rules.base import Rule
from sharpwise.rules.blockwise_adam import BlockwiseAdam
from sharpwise.rules.lion import Lion
from sharpwise.rules.muon import Muon
from sharpwise.rules.sgd import SGD

__all__ = ["SGD", "AdaPM", "AdamMini", "AdamW", "BlockwiseAdam", "Lion", "Muon", "Rule"]
