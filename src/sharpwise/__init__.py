"""sharpwise gives every block of a transformer its own step size and just the optimizer memory it needs."""

from sharpwise._version import __version__
from sharpwise.block_lr import (
    BlockwiseLR,
    GradientSNR,
    HeavyTailLR,
    LayerDecay,
    MeanMatched,
    Only,
    PerRole,
    Product,
    Reversed,
    SharpnessLR,
    Shuffled,
    make_block_lr,
)
from sharpwise.blocks import BlockMap
from sharpwise.engine import BlockOptimizer
from sharpwise.optim import (
    SGD,
    AdamMini,
    AdamW,
    AdamW8bit,
    Lion,
    Muon,
    Muon8bit,
    SGDSaI,
    create_optimizer,
    list_optimizers,
    parse_arm,
)

__all__ = [
    "SGD",
    "AdamMini",
    "AdamW",
    "AdamW8bit",
    "BlockMap",
    "BlockOptimizer",
    "BlockwiseLR",
    "GradientSNR",
    "HeavyTailLR",
    "LayerDecay",
    "Lion",
    "MeanMatched",
    "Muon",
    "Muon8bit",
    "Only",
    "PerRole",
    "Product",
    "Reversed",
    "SGDSaI",
    "SharpnessLR",
    "Shuffled",
    "__version__",
    "create_optimizer",
    "list_optimizers",
    "make_block_lr",
    "parse_arm",
]
