"""Sharpness for free: what an optimizer's second moment says of it.

    S(b) ~ N mean_b(v / (1 - b2^t)),    v <- b2 v + (1-b2) g^2

That is the formula of `sharpwise.probes.fisher` with three differences, for which a gradient is not paid:

- *true labels*: g is the gradient of the text's own loss, so that |mean gradient|^2 N is in it, little while gradients
  are mostly noise;
- *the past*: v averages over the last 1/(1-b2) steps or so, and the weights moved meanwhile;
- *clipping*: v is of clipped gradients, scaled by min(1, c/|g|) each, all segments of a step alike: ratios between
  segments are those of the clipped steps, values are too small.

N counts the tokens of a step of the optimizer, those of all its passes and processes. What
a block_lr needs is ratios between types, on which N has no influence.

References: Wang et al., arXiv 2502.19002; Kingma and Ba, arXiv 1412.6980; Zhang et al., arXiv 2406.16793 (v per block).
"""

import time

import numpy as np

from sharpwise.engine.measuring import second_moments, steps_taken
from sharpwise.engine.optimizer import BlockOptimizer
from sharpwise.engine.view import ParamView
from sharpwise.probes.estimate import Cost, Measurement
from sharpwise.probes.gather import Groups
from sharpwise.probes.monte_carlo import check_count

_WHO = "sharpness_from_optimizer"


def sharpness_from_optimizer(optimizer: BlockOptimizer, *, tokens: int | None = None) -> Measurement:
    """Sharpness per segment, type and role from the second moment that an optimizer keeps anyway: no pass is made.

    The three differences from `sharpness` are in the text of this module: true labels, an average over past steps,
    and clipped gradients. Where parameters are sharded every process has to call this at the same time: local sums are
    put together, in one collective.

    Args:
        optimizer: `sharpwise.AdamW` or `sharpwise.AdamMini`, after a step. Others keep no average of squared gradients.
        tokens: of one optimizer step, N. Without it the values are those per token over N, which leaves ratios alone.

    Returns:
        Quantity "sharpness" as `sharpness` has it. Errors are not known; `samples` is how many steps the average is
        worth: (sum w)^2 / sum w^2 of its weights.

    Raises:
        TypeError: the optimizer keeps no second moment.
        ValueError: it has not taken a step yet.
    """
    started = time.perf_counter()
    check_count(_WHO, tokens=tokens)
    views = _views(optimizer)
    steps = {e.name: t for e, t in zip(views, steps_taken(views), strict=True)}
    views = [view for view in views if steps[view.name] > 0]
    if not views:
        raise ValueError(
            f"{_WHO}: the optimizer has not taken a step yet, so that its second moment is 0; measure later"
        )
    totals = second_moments(views, optimizer._bind().group)
    segments = [segment for view in views for segment in view.segments]
    found = Groups(segments)
    sums = np.array([total for own in totals for total in own])
    values = (tokens or 1) * found.means(sums)
    samples = round(min(_worth(view.rule.second_moment_decay(view.group), steps[view.name]) for view in views))
    unit = "per token" if tokens else "per token, over the tokens of a step"
    settings = {"labels": "true", "rule": optimizer.rule.name, "tokens": tokens}
    settings["clipped"] = optimizer.options.max_grad_norm is not None
    estimates = found.estimates("sharpness", values, None, samples=max(samples, 1), unit=unit)
    return Measurement(_WHO, estimates, settings=settings, cost=Cost(time.perf_counter() - started, 0.0))


def _views(optimizer: BlockOptimizer) -> list[ParamView]:
    keeps = "AdamW keeps one per element, AdamMini one per block"
    if not isinstance(optimizer, BlockOptimizer):
        raise TypeError(
            f"{_WHO}: got {type(optimizer).__name__}, expected sharpwise.AdamW or sharpwise.AdamMini; {keeps}"
        )
    if optimizer.rule.second_moment is None:
        raise TypeError(f"{_WHO}: the rule {optimizer.rule.name!r} keeps no second moment; {keeps}")
    return [view for view in optimizer._bind().views if view.rule.second_moment is not None]


def _worth(b2: float, steps: float) -> float:
    """Independent steps that an average with these weights is worth."""
    return (1 - b2**steps) * (1 + b2) / ((1 + b2**steps) * (1 - b2))


__all__ = ["sharpness_from_optimizer"]
