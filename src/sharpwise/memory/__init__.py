"""What a training will hold and move, planned from the shapes of a model alone."""

from sharpwise.memory.activations import PRECISIONS
from sharpwise.memory.pieces import SHARDS
from sharpwise.memory.plan import Fit, MemoryPlan, Planned, plan
from sharpwise.memory.sizes import parse_size, size_text

__all__ = ["PRECISIONS", "SHARDS", "Fit", "MemoryPlan", "Planned", "parse_size", "plan", "size_text"]
