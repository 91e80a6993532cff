"""Learning rate against step: linear warm-up, then a cosine down to a floor."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine_factor(step: int, *, warmup: int, total: int, floor: float) -> float:
    """The factor on the peak learning rate in step `step` (0-based) of `total`.

        (step + 1) / warmup                                                    step < warmup
        floor + (1 - floor) (1 + cos(pi (step - warmup) / (total - warmup))) / 2    after

    The first step is taken at 1/warmup of the peak, not at 0; from `total` on the factor is `floor`.

    >>> [round(warmup_cosine_factor(s, warmup=2, total=6, floor=0.1), 3) for s in range(7)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if step < warmup:
        return (step + 1) / warmup
    if step >= total:
        return floor
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def warmup_cosine(optimizer: Optimizer, *, warmup: int, total: int, floor: float = 0.1) -> LambdaLR:
    """A torch scheduler that follows `warmup_cosine_factor`; call its `step()` after each optimizer step.

    Args:
        optimizer: its learning rates are the peak.
        warmup: steps of linear warm-up, 0 <= warmup <= total.
        total: steps of the whole run.
        floor: what is left of the peak at the end, a fraction in [0, 1].

    Raises:
        ValueError: a number outside its range.
    """
    if not 0 <= warmup <= total or total < 1:
        raise ValueError(f"need 0 <= warmup <= total and total >= 1, got warmup={warmup} and total={total}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is a fraction of the peak learning rate, 0 <= floor <= 1, got {floor}")
    return LambdaLR(optimizer, partial(warmup_cosine_factor, warmup=warmup, total=total, floor=floor))
