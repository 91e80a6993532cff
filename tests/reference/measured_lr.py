"""When per-block learning rates that follow a measurement are measured, and how they get there, float64.

Steps are counted from 0: t steps have been taken before the step that is being taken.

    phase        first = start, last = stop; a fraction f of the training is round(f total_steps) steps
    measured     at t = first, first + every, first + 2 every, ..., as long as t <= last
    m(t)         = m_before + (m_after - m_before) min((t - begin + 1) / soft, 1),   soft = every where it is not said

m_after follows from the measurement at `begin`, m_before is what m(begin) was without it. A measurement that leads to
the same multipliers as the last one changes nothing. Before the first measurement all is 1.

Multipliers of a product are the products of those of the factors; an ablation changes m_after as a whole.
"""

import numpy as np


def in_steps(when, total_steps):
    """A phase as a number of steps."""
    return round(when * total_steps) if 0 < when < 1 else int(when)


def matrix_of(piece, weight):
    """The elements of a piece of a matrix, as a matrix: it takes whole rows, or whole columns."""
    columns = weight.shape[1]
    rows, cols = np.unique(piece.index // columns), np.unique(piece.index % columns)
    assert rows.size * cols.size == piece.index.size
    return weight[np.ix_(rows, cols)]


class Follows:
    """As `blockwise_lr.BlockwiseLR`, for the driver of the tests: one for all groups, told of every step.

    Args:
        pieces: {name: [cuts.Piece]} of the whole model.
        source: has `look(view)`, `wants(view)` and `multipliers()`: one per piece of the whole model, in their order.
        fixed: (role, layer) -> multiplier of another factor.
        change: ([elements] multipliers, [elements] roles) -> [elements]: an ablation.
    """

    def __init__(self, pieces, source, *, start=0, stop=None, every=1, soft=0, decay="scaled", fixed=None, change=None):
        self.parts = [(name, number, piece) for name, own in pieces.items() for number, piece in enumerate(own)]
        self.source, self.decay, self.fixed, self.change = source, decay, fixed, change
        self.start, self.stop, self.every, self.soft = start, stop, every, soft
        self.taken, self.begin, self.length = 0, 0, 0
        self.before = self.after = self.now = self.targets()

    def targets(self):
        """Where the multipliers go after what has been measured so far: [pieces]."""
        m = np.array(self.source.multipliers(), dtype=np.float64)
        if self.fixed is not None:
            m = m * [self.fixed(piece.role, piece.layer) for _, _, piece in self.parts]
        if self.change is not None:
            sizes = [piece.index.size for _, _, piece in self.parts]
            roles = np.repeat([piece.role for _, _, piece in self.parts], sizes)
            m = self.change(np.repeat(m, sizes), roles)[np.concatenate(([0], np.cumsum(sizes)[:-1]))]
        return m

    def due(self, view):
        """Whether to measure before this step."""
        if hasattr(self.source, "wants"):
            return self.source.wants(view)
        t = self.taken
        return t >= self.start and (t - self.start) % self.every == 0 and (self.stop is None or t <= self.stop)

    def path(self, t):
        """m(t)."""
        share = 1.0 if self.length <= 1 else min((t - self.begin + 1) / self.length, 1.0)
        return self.after if share == 1.0 else self.before + (self.after - self.before) * share

    def measure(self, view):
        """Called once per step, before anything moves; `view`: what the driver knows of the model."""
        t = self.taken
        here = self.path(t)
        if self.due(view):
            self.source.look(view)
            after = self.targets()
            if not np.array_equal(after, self.after):
                self.before, self.after, self.begin, self.length = here, after, t, self.soft
        self.now, self.taken = self.path(t), t + 1

    def observe(self, lr):
        """Nothing to remember."""

    def multipliers(self):
        """{name: [multiplier of each piece]} of the last step, and where they are going."""
        now, after = {}, {}
        for (name, _, _), m, target in zip(self.parts, self.now, self.after, strict=True):
            now.setdefault(name, []).append(m)
            after.setdefault(name, []).append(target)
        return now, after

    def rates_at(self, name, number, lr):
        """The learning rate of the update, and the one of the decay, of a piece of a parameter."""
        block_lr = lr * self.multipliers()[0][name][number]
        return block_lr, block_lr if self.decay == "scaled" else lr
