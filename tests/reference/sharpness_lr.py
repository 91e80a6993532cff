"""Learning rates by the sharpness of the blocks (after arXiv 2502.19002), from the second moment, float64.

    S(b) = mean over the elements of b of v / (1 - b2^t)          b: a segment; Adam-mini's v is that of its block
    log S(b) <- ema log S(b) + (1 - ema) log S(b) now             from the second measurement on
    S of a type = mean over its elements of the S of their segments
    r = clip((S_ref / S)^power, 1, max_ratio)                     S of the type, or of the segment; S_ref: of the norms

Where nothing has been measured, or S is 0, r = 1. Types are those of arXiv 2502.19002, positions one of their own.
"""

import numpy as np

from reference.blockwise_lr import RATIO_OF_ROLE


class Sharpness:
    """For `measured_lr.Follows`."""

    def __init__(self, pieces, *, power=0.6, max_ratio=10.0, by="type", reference="norm", ema=0.5):
        self.parts = [(name, piece) for name, own in pieces.items() for piece in own]
        self.power, self.max_ratio, self.by, self.reference, self.ema = power, max_ratio, by, reference, ema
        self.S = np.full(len(self.parts), np.nan)

    def look(self, view):
        """Averages log S with what is there now."""
        for i, (name, piece) in enumerate(self.parts):
            v = view.second_moment(name)
            if v is None or not (now := np.mean(v[piece.index])) > 0:
                continue
            old = self.S[i]
            self.S[i] = now if np.isnan(old) else np.exp(self.ema * np.log(old) + (1 - self.ema) * np.log(now))

    def of_type(self, kind):
        """S of a type; NaN where none of its segments has been measured."""
        own = [(S, piece.index.size) for S, (_, piece) in zip(self.S, self.parts, strict=True)
               if RATIO_OF_ROLE[piece.role] == kind and not np.isnan(S)]  # fmt: skip
        return np.average([S for S, _ in own], weights=[n for _, n in own]) if own else np.nan

    def multipliers(self):
        """One per piece."""
        reference = self.of_type(self.reference)
        S = self.S if self.by == "module" else [self.of_type(RATIO_OF_ROLE[piece.role]) for _, piece in self.parts]
        r = np.clip((reference / np.asarray(S)) ** self.power, 1.0, self.max_ratio)
        return np.where(np.isnan(r), 1.0, r)
