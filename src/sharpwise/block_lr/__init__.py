"""How far, per block: one file per paper."""

from sharpwise.block_lr.base import BlockLR
from sharpwise.block_lr.blockwise import BlockwiseLR
from sharpwise.block_lr.layer_decay import LayerDecay

__all__ = ["BlockLR", "BlockwiseLR", "LayerDecay"]
