"""Adam with one second moment per block (arXiv 2410.08198), float64, over all parameters together.

    v_B <- b2 v_B + (1 - b2) sum_{i in B} g_i^2 / |B|
    m   <- b1 m + (1 - b1) g
    p   <- p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v_B / (1 - b2^t)) + eps)

A partition is {name: [(flat indices, key)]}: what has one key is one block, wherever it lies. A parameter without a
gradient is not in B, and stands still.
"""

import numpy as np

from reference import cuts


def partition(model_name, names, cut):
    """The blocks of a model, from the literal index sets."""
    found = {}
    for name, parts in cuts.pieces(model_name, names).items():
        found[name] = [(index, key) for number, part in enumerate(parts) for index, key in _of(name, number, part, cut)]
    return found


def _of(name, number, part, cut):
    if cut == "model":
        return [(part.index, "all")]
    if cut == "role":
        return [(part.index, part.role)]
    if cut == "layer":
        return [(part.index, (name, number) if part.layer is None else part.layer)]
    if cut == "tensor":
        return [(part.index, (name, number))]
    assert cut == "element"
    return [(part.index[i : i + 1], (name, number, i)) for i in range(part.index.size)]


class Model:
    """Parameters and state of all of them."""

    def __init__(self, p, partition):
        self.p, self.partition = p, partition
        self.m = {name: np.zeros(a.size) for name, a in p.items()}
        self.v = {name: np.zeros(a.size) for name, a in p.items()}
        self.t = dict.fromkeys(p, 0)

    def step(self, grads, lr, betas, eps, weight_decay):
        (b1, b2), squares, counts = betas, {}, {}
        for name, g in grads.items():
            for index, key in self.partition[name] if g is not None else ():
                squares[key] = squares.get(key, 0.0) + np.sum(g.ravel()[index] ** 2)
                counts[key] = counts.get(key, 0) + index.size
        for name, g in grads.items():
            if g is None:
                continue
            self.t[name] += 1
            t, flat = self.t[name], self.p[name].ravel()
            self.m[name] = b1 * self.m[name] + (1 - b1) * g.ravel()
            for index, key in self.partition[name]:
                self.v[name][index] = b2 * self.v[name][index] + (1 - b2) * squares[key] / counts[key]
            u = (self.m[name] / (1 - b1**t)) / (np.sqrt(self.v[name] / (1 - b2**t)) + eps)
            self.p[name] = (flat - lr * weight_decay * flat - lr * u).reshape(self.p[name].shape)
