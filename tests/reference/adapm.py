"""AdaPM (arXiv 2510.09103), float64. A matrix G [rows, columns], rows are outputs, moves by

    none        m = G
    full        M = b1 M + (1-b1) G;   m = M / (1-b1^t)
    low_rank    M = b1 L R + (1-b1) G                              formed here, as it is the definition
                Y = M R^T (R R^T + ridge)^-1;   L = Y C^-T,  C C^T = Y^T Y + ridge
                R = (L^T L + ridge)^-1 L^T M
                m = L R / (1-b1^t) + c (M - L R),   c = 1 / (1-b1), 1 or 0
    u = m / (sqrt(v / (1-b2^t)) + eps),   v = b2 v + (1-b2) mean_B(G^2), a block B an element or one of Adam-mini's
    p <- p (1 - decay_lr wd) - lr min(1, clip / rms(u)) u,         rms over the matrix; vectors are not clipped

ridge = 1e-6 trace / r. R begins as `sketch`.
"""

from dataclasses import dataclass

import numpy as np

from reference.decay import decayed

STATE = (
    "exp_avg", "exp_avg_sq", "left", "right",
    *(f"{name}.{role}" for name in ("exp_avg", "exp_avg_sq", "left", "right") for role in "qkv"),
)  # fmt: skip
NONE, LOW = {"tok_emb", "pos_emb", "head", "o"}, {"q", "k", "up", "gate", "down"}


@dataclass
class Part:
    """A piece of a parameter: flat indices [rows, columns] (a vector: one row), its momentum, blocks (None: elements).

    suffix: of its own state, "" where the parameter is one; turned: that lies with outputs last.
    """

    grid: np.ndarray
    momentum: str
    matrix: bool
    suffix: str
    turned: bool
    blocks: list[np.ndarray] | None


def parts_of(pieces, shape, turned, momentum, by_block, mini_blocks):
    """The parts of a parameter, from the literal index sets of `cuts`.

    Args:
        momentum: by role, where it is another; by_block: whether second moments are Adam-mini's.
    """
    if len(shape) < 2:
        blocks = mini_blocks(pieces) if by_block and not pieces[0].bias else None
        every = np.sort(np.concatenate([piece.index for piece in pieces]))
        return [Part(every[None], "full", False, "", False, blocks)]
    found = []
    for piece in pieces:
        index = np.sort(piece.index)
        grid = index.reshape(shape[0], -1).T if turned else index.reshape(-1, shape[1])
        usual = "none" if piece.role in NONE else "low_rank" if piece.role in LOW else "full"
        suffix = f".{piece.role}" if len(pieces) > 1 else ""
        own = momentum.get(piece.role, usual)
        found.append(Part(grid, own, True, suffix, turned, mini_blocks([piece]) if by_block else None))
    return found


def sketch(rank, columns):
    """Uniform in [-1, 1): a 32-bit finalizer of each place, in whole numbers of Python."""

    def mixed(x):
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    return np.array([np.float32(mixed(i) / 2**31 - 1) for i in range(rank * columns)], float).reshape(rank, columns)


def init(p, blocks):
    """blocks: (parts of the parameter, rank)."""
    parts, rank = blocks
    state = {"step": 0}
    if any(part.blocks is None for part in parts):
        state["exp_avg_sq"] = np.zeros_like(p)
    for part in parts:
        rows, columns = part.grid.shape
        if part.blocks is not None:
            state["exp_avg_sq" + part.suffix] = np.zeros(len(part.blocks))
        if part.momentum == "full":
            own = (columns, rows) if part.turned else (rows, columns)
            state["exp_avg" + part.suffix] = np.zeros(own if part.suffix else p.shape)
        if part.momentum == "low_rank":
            state["left" + part.suffix] = np.zeros((rows, rank))
            state["right" + part.suffix] = sketch(rank, columns)
    return state


def _ridged(gram):
    return gram + 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram))


def low_rank(g, left, right, b1):
    """New factors, and the matrix that they are of."""
    m = b1 * left @ right + (1 - b1) * g
    if not m.any():
        return np.zeros_like(left), right, m
    right = right / np.abs(right).max()
    y = m @ right.T @ np.linalg.inv(_ridged(right @ right.T))
    left = y @ np.linalg.inv(np.linalg.cholesky(_ridged(y.T @ y))).T
    return left, np.linalg.inv(_ridged(left.T @ left)) @ left.T @ m, m


def step(p, g, state, *, blocks, lr, decay_lr, betas, eps, weight_decay, debias=None, clip=1.0, cautious_decay=False):
    """Returns the new p and the new state."""
    parts, _ = blocks
    (b1, b2), t = betas, state["step"] + 1
    c = 1 / (1 - b1) if debias is None else debias
    new = {name: np.array(value) for name, value in state.items()} | {"step": t}
    u = np.empty(p.size)
    for part in parts:
        own, suffix = g.ravel()[part.grid], part.suffix
        if part.momentum == "none":
            m = own
        elif part.momentum == "full":
            name = "exp_avg" + suffix
            held = new[name] if suffix else new[name].ravel()[part.grid]
            held = held.T if suffix and part.turned else held
            average = b1 * held + (1 - b1) * own
            if suffix:
                new[name] = average.T if part.turned else average
            else:
                new[name].ravel()[part.grid] = average
            m = average / (1 - b1**t)
        else:
            left, right, whole = low_rank(own, state["left" + suffix], state["right" + suffix], b1)
            new["left" + suffix], new["right" + suffix] = left, right
            m = left @ right / (1 - b1**t) + c * (whole - left @ right)
        v = np.empty(p.size)
        if part.blocks is None:
            old = new["exp_avg_sq"].ravel()
            old[part.grid] = b2 * old[part.grid] + (1 - b2) * own**2
            v[part.grid] = old[part.grid]
        else:
            for number, index in enumerate(part.blocks):
                old = new["exp_avg_sq" + suffix]
                old[number] = b2 * old[number] + (1 - b2) * np.mean(g.ravel()[index] ** 2)
                v[index] = old[number]
        update = m / (np.sqrt(v[part.grid] / (1 - b2**t)) + eps)
        if part.matrix and clip is not None:
            update = update * min(1.0, clip / max(np.sqrt(np.mean(update**2)), 1e-300))
        u[part.grid] = update
    u = u.reshape(p.shape)
    return decayed(p, u, decay_lr, weight_decay, cautious_decay) - lr * u, new
