"""How far, per block: one file per paper; ablations of them; and one spelling of all."""

from sharpwise.block_lr.ablations import Ablation, MeanMatched, Only, Reversed, Shuffled
from sharpwise.block_lr.base import BlockLR
from sharpwise.block_lr.blockwise import BlockwiseLR
from sharpwise.block_lr.layer_decay import LayerDecay
from sharpwise.block_lr.spelling import make_block_lr

__all__ = [
    "Ablation",
    "BlockLR",
    "BlockwiseLR",
    "LayerDecay",
    "MeanMatched",
    "Only",
    "Reversed",
    "Shuffled",
    "make_block_lr",
]
