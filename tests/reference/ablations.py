"""Ablations of a per-block learning rate, float64, on an array of one multiplier per element of the model.

    mean_matched   every element: the arithmetic mean of all elements
    reversed       an element with the i-th smallest of the k distinct values: the i-th largest
    shuffled       an element with the i-th smallest of the k distinct values: the p(i)-th smallest
    only           an element whose role is chosen keeps its value, all others have 1

p(1..k) of a seed: SHA-256 of the text seed/attempt/k/i ranks i = 1..k; p(r) is the i of rank r; the first attempt
from 0 on that leaves no i in its place (k = 1 has only one).
"""

import hashlib

import numpy as np

from reference import blockwise_lr

ROLES_OF_TYPE = {
    "Emb": ["tok_emb", "pos_emb"],
    "QK": ["q", "k"],
    "VO": ["v", "o"],
    "FFN": ["gate", "up", "down"],
    "Norm": ["norm"],
    "Head": ["head"],
    "Other": ["other"],
}


def mean_matched(m):
    """m: [elements] -> [elements]."""
    return np.full_like(m, np.mean(m.astype(np.longdouble)))


def reversed_(m):
    """m: [elements] -> [elements]."""
    values, rank = np.unique(m, return_inverse=True)
    return values[::-1][rank]


def permutation(seed, k):
    """p as a list: p[i - 1] = p(i)."""
    attempt = 0
    while True:
        digest = {i: hashlib.sha256(b"%d/%d/%d/%d" % (seed, attempt, k, i)).hexdigest() for i in range(1, k + 1)}
        p = sorted(digest, key=lambda i: digest[i])
        if k < 2 or not any(p[i - 1] == i for i in range(1, k + 1)):
            return p
        attempt += 1


def shuffled(m, seed):
    """m: [elements] -> [elements]."""
    values, rank = np.unique(m, return_inverse=True)
    return np.array([values[i - 1] for i in permutation(seed, len(values))])[rank]


def only(m, roles, types):
    """m: [elements], roles: of each element, types: block types or roles -> [elements]."""
    chosen = [role for kind in types for role in ROLES_OF_TYPE.get(kind, [kind])]
    return np.where(np.isin(roles, chosen), m, 1.0)


class Ablated:
    """As `blockwise_lr.BlockwiseLR`, for the driver of the tests: a multiplier by role and layer.

    Args:
        pieces: {name: [cuts.Piece]} of the whole model.
        multiplier: (role, layer) -> that of the block_lr itself.
        change: ([elements] multipliers, [elements] roles) -> [elements]; one of the functions above.
    """

    def __init__(self, pieces, multiplier, change, *, floor=None, decay="scaled"):
        parts = [piece for own in pieces.values() for piece in own]
        sizes = [piece.index.size for piece in parts]
        before = np.repeat([float(multiplier(piece.role, piece.layer)) for piece in parts], sizes)
        after = change(before, np.repeat([piece.role for piece in parts], sizes))
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        self.of = {(piece.role, piece.layer): after[start] for piece, start in zip(parts, starts, strict=True)}
        self.floor, self.decay, self.peak = floor, decay, 0.0

    def observe(self, lr):
        """Called once per step, before `rates`."""
        self.peak = max(self.peak, lr)

    def rates(self, role, layer, lr):
        """The learning rate of the update, and the one of the decay."""
        ratios = {blockwise_lr.RATIO_OF_ROLE[role]: self.of[role, layer]}
        one = blockwise_lr.BlockwiseLR(ratios, floor=self.floor, decay=self.decay)
        one.observe(self.peak)
        return one.rates(role, layer, lr)
