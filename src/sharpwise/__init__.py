"""sharpwise gives every block of a transformer its own step size and just the optimizer memory it needs."""

from sharpwise._version import __version__
from sharpwise.block_lr import BlockwiseLR, LayerDecay
from sharpwise.blocks import BlockMap
from sharpwise.engine import BlockOptimizer
from sharpwise.optim import SGD, AdamMini, AdamW, Lion, create_optimizer, list_optimizers

__all__ = [
    "SGD",
    "AdamMini",
    "AdamW",
    "BlockMap",
    "BlockOptimizer",
    "BlockwiseLR",
    "LayerDecay",
    "Lion",
    "__version__",
    "create_optimizer",
    "list_optimizers",
]
