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
from sharpwise.groups import param_groups
from sharpwise.named import AdamH, AdamW8bit, LionA, LionAR, Muon8bit, MuonH
from sharpwise.optim import (
    SGD,
    AdamMini,
    AdamW,
    AdaPM,
    AdaSGD,
    BlockwiseAdam,
    Lion,
    Muon,
    SGDSaI,
    create_optimizer,
    list_optimizers,
    parse_arm,
)
from sharpwise.rotated import Rotated

__all__ = [
    "SGD",
    "AdaPM",
    "AdaSGD",
    "AdamH",
    "AdamMini",
    "AdamW",
    "AdamW8bit",
    "BlockMap",
    "BlockOptimizer",
    "BlockwiseAdam",
    "BlockwiseLR",
    "GradientSNR",
    "HeavyTailLR",
    "LayerDecay",
    "Lion",
    "LionA",
    "LionAR",
    "MeanMatched",
    "Muon",
    "Muon8bit",
    "MuonH",
    "Only",
    "PerRole",
    "Product",
    "Reversed",
    "Rotated",
    "SGDSaI",
    "SharpnessLR",
    "Shuffled",
    "__version__",
    "create_optimizer",
    "list_optimizers",
    "make_block_lr",
    "param_groups",
    "parse_arm",
]
