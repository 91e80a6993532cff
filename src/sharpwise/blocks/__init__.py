"""What each parameter is: roles, segments, and the map that places every trainable element in exactly one segment."""

from sharpwise.blocks.map import BlockMap
from sharpwise.blocks.names import canonical_name
from sharpwise.blocks.roles import BLOCK_TYPE, BlockType, Role
from sharpwise.blocks.segment import Cut, Segment

__all__ = ["BLOCK_TYPE", "BlockMap", "BlockType", "Cut", "Role", "Segment", "canonical_name"]
