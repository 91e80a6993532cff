"""How state rests in memory: one file per format."""

from sharpwise.storage.base import Format
from sharpwise.storage.dense import BF16, FP32, Dense
from sharpwise.storage.int8 import Int8

__all__ = ["BF16", "FP32", "Dense", "Format", "Int8"]
