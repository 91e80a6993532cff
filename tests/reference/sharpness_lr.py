"""Learning rates by the sharpness of the blocks (after arXiv 2502.19002), float64.

    S(b) = mean over the elements of b of v / (1 - b2^t)          b: a segment; Adam-mini's v is that of its block
    S(b) = mean of the variance of g                              centred, see `variance`
    log S(b) <- ema log S(b) + (1 - ema) log S(b) now             from the second measurement on
    S of a type = arithmetic or geometric mean over its elements of the S of their segments
    r = clip((S_ref / S)^power, 1, max_ratio)                     S of the type, or of the segment; S_ref: of the norms
    r = clip((C / S)^power, 1 / max_ratio, max_ratio)             C: sum over elements of log r = 0

Where nothing has been measured, or S is 0, r = 1. Types are those of arXiv 2502.19002, positions one of their own. A
segment counts from its second measurement on; with `settle`, from the first one after which no two of what multipliers
are given for have moved apart by more, in the logarithm, from what was kept before to what is measured now.
"""

import numpy as np

from reference.blockwise_lr import RATIO_OF_ROLE


def variance(gradients, b1, b2):
    """Of every element, from all gradients so far, [t, elements]: unbiased if they are independent and alike.

    v-hat - m-hat^2 has the mean sigma^2 (1 - sum u^2), where u are the weights of the gradients in m-hat.
    """
    t = len(gradients)
    age = np.arange(t)[::-1]
    u, w = (1 - b1) * b1**age, (1 - b2) * b2**age
    u, w = u / u.sum(), w / w.sum()
    return (w @ gradients**2 - (u @ gradients) ** 2) / (1 - (u**2).sum())


class Sharpness:
    """For `measured_lr.Follows`."""

    def __init__(
        self,
        pieces,
        *,
        power=0.6,
        max_ratio=10.0,
        by="type",
        reference="norm",
        ema=0.5,
        mean="arithmetic",
        normalize="reference",
        fixed=None,
        settle=None,
        source="second_moment",
        rows=None,
    ):
        self.parts = [(name, piece) for name, own in pieces.items() for piece in own]
        self.power, self.max_ratio, self.by, self.reference, self.ema = power, max_ratio, by, reference, ema
        self.mean, self.normalize, self.fixed, self.settle, self.source = mean, normalize, fixed or {}, settle, source
        self.kinds = [RATIO_OF_ROLE[piece.role] for _, piece in self.parts]
        self.sizes = np.array([piece.index.size for _, piece in self.parts])
        self.S, self.settled = np.full(len(self.parts), np.nan), np.zeros(len(self.parts), dtype=bool)
        self.rows = [rows if rows and piece.role == "tok_emb" else 1 for _, piece in self.parts]
        self.tolerance = 1e-6 if source == "second_moment" else 1e-5

    def now(self, view, name, piece):
        """S of a segment."""
        found = (view.variance if self.source == "centred" else view.second_moment)(name)
        value = np.nan if found is None else np.mean(found[piece.index])
        return value if value > 0 else np.nan

    def look(self, view):
        """Averages log S with what is there now."""
        self.take(np.array([self.now(view, *part) for part in self.parts]))

    def take(self, now):
        """The same with these values, NaN where there is none."""
        both = ~np.isnan(now) & ~np.isnan(self.S)
        free = both & ~np.isin(self.kinds, list(self.fixed))
        agree = True
        if self.settle is not None and free.any():
            moved = np.log(self.of_blocks(np.where(free, now, np.nan))) - np.log(
                self.of_blocks(np.where(free, self.S, np.nan))
            )
            agree = np.ptp(moved[free]) <= self.settle
        if agree:
            self.settled |= both
        mixed = np.exp(self.ema * np.log(self.S) + (1 - self.ema) * np.log(now))
        self.S = np.where(np.isnan(now), self.S, np.where(np.isnan(self.S), now, mixed))

    def of_type(self, S, kind):
        """S of a type; NaN where none of its segments has been measured."""
        S = S * self.rows
        mine = (np.array(self.kinds) == kind) & ~np.isnan(S)
        if self.mean == "geometric" and mine.any():
            mine &= np.nanmax(S) * 1e-12 <= S
        if not mine.any():
            return np.nan
        if self.mean == "geometric":
            return np.exp(np.average(np.log(S[mine]), weights=self.sizes[mine]))
        return np.average(S[mine], weights=self.sizes[mine])

    def of_blocks(self, S):
        """For every segment, S of its block."""
        return S * self.rows if self.by == "module" else np.array([self.of_type(S, kind) for kind in self.kinds])

    def multipliers(self):
        """One per piece."""
        S = np.where(self.settled, self.S, np.nan)
        own = self.of_blocks(S)
        if self.normalize == "geometric":
            r = self.redistributed(own)
        else:
            r = np.clip((self.of_type(S, self.reference) / own) ** self.power, 1.0, self.max_ratio)
        r = np.where(np.isnan(r), 1.0, r)
        return np.array([self.fixed.get(kind, m) for kind, m in zip(self.kinds, r, strict=True)])

    def redistributed(self, S):
        """By bisection for log C."""
        free = ~np.isnan(S) & ~np.isin(self.kinds, list(self.fixed))
        if not free.any():
            return np.ones(len(S))
        most = np.log(self.max_ratio)

        def logs(level):
            return np.clip(level - self.power * np.log(S), -most, most)

        low, high = -1e4, 1e4
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if self.sizes[free] @ logs(middle)[free] < 0 else (low, middle)
        return np.exp(logs((low + high) / 2))
