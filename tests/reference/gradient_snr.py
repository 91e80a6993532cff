"""SGD-SaI's scaling (arXiv 2412.11768): learning rates by the signal-to-noise ratio of the first gradient, float64.

    s = min(||g|| / sqrt(mean (g - mean g)^2), 10 sqrt(n))      at the first gradient that is not zero; once
    multiplier s ("none", as released), or s / max over all s so far ("max", the paper's Algorithm 1)

n = 1 has s = 1. What has had no gradient yet has multiplier 1. With SGD(momentum = dampening = mu), that is m_1 = g,
m <- mu m + (1 - mu) g, and p <- p (1 - lr wd) - lr s m, it is SGD-SaI.
"""

import numpy as np


def snr(g):
    """s of the elements of a block; NaN of a gradient that is zero."""
    scale = np.max(np.abs(g), initial=0.0)
    if scale == 0:
        return np.nan
    if g.size == 1:
        return 1.0
    g = g / scale
    norm, deviation, cap = np.sqrt(np.sum(g**2)), np.sqrt(np.mean((g - np.mean(g)) ** 2)), 10 * np.sqrt(g.size)
    return norm / deviation if deviation * cap > norm else cap


class GradientSNR:
    """For `measured_lr.Follows`."""

    def __init__(self, pieces, *, normalize="none"):
        self.parts = [(name, piece) for name, own in pieces.items() for piece in own]
        self.normalize = normalize
        self.s = np.full(len(self.parts), np.nan)

    def wants(self, view):
        """Until all that have gradients have a value."""
        return any(
            np.isnan(s) and view.grads[name] is not None for s, (name, _) in zip(self.s, self.parts, strict=True)
        )

    def look(self, view):
        """The first one of each stays."""
        for i, (name, piece) in enumerate(self.parts):
            if np.isnan(self.s[i]) and view.grads[name] is not None:
                self.s[i] = snr(view.grads[name].ravel()[piece.index])

    def multipliers(self):
        """One per piece."""
        known = self.s[~np.isnan(self.s)]
        largest = known.max() if self.normalize == "max" and known.size else 1.0
        return np.where(np.isnan(self.s), 1.0, self.s / largest)
