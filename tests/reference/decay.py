"""Decoupled weight decay, plain and cautious (arXiv 2510.12402), float64.

    plain:     p_{t-1} (1 - decay_lr wd)
    cautious:  p_{t-1} - decay_lr wd 1[u p_{t-1} >= 0] p_{t-1}

u is what moves p, by -lr u.
"""

import numpy as np


def decayed(p, u, decay_lr, weight_decay, cautious):
    """p without what decays; `u` in any units, `decay_lr` a number or an array that broadcasts to p."""
    where = np.sign(u) * np.sign(p) >= 0 if cautious else True
    return p - np.where(where, decay_lr * weight_decay, 0.0) * p
