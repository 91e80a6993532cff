"""The engine: the one `torch.optim.Optimizer` that runs every combination."""

from sharpwise.engine.optimizer import BlockOptimizer

__all__ = ["BlockOptimizer"]
