"""How far, per block: one file per paper; products and ablations of them; and one spelling of all."""

from sharpwise.block_lr.ablations import Ablation, MeanMatched, Only, Reversed, Shuffled
from sharpwise.block_lr.aux import AuxLR
from sharpwise.block_lr.base import BlockLR, MeasuredLR, Product
from sharpwise.block_lr.blockwise import BlockwiseLR
from sharpwise.block_lr.gradient_snr import GradientSNR
from sharpwise.block_lr.heavy_tail import HeavyTailLR
from sharpwise.block_lr.layer_decay import LayerDecay
from sharpwise.block_lr.per_role import PerRole
from sharpwise.block_lr.sharpness import SharpnessLR
from sharpwise.block_lr.spelling import make_block_lr

__all__ = [
    "Ablation",
    "AuxLR",
    "BlockLR",
    "BlockwiseLR",
    "GradientSNR",
    "HeavyTailLR",
    "LayerDecay",
    "MeanMatched",
    "MeasuredLR",
    "Only",
    "PerRole",
    "Product",
    "Reversed",
    "SharpnessLR",
    "Shuffled",
    "make_block_lr",
]
