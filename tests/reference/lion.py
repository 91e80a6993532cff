"""Lion (arXiv 2302.06675), float64.

    u_t = sign(b1 m_{t-1} + (1 - b1) g_t)
    p_t = p_{t-1} (1 - decay_lr wd) - lr u_t
    m_t = b2 m_{t-1} + (1 - b2) g_t

`lr` and `decay_lr` are numbers, or arrays that broadcast to p.
"""

import numpy as np

from reference.decay import decayed

STATE = ("exp_avg",)


def init(p):
    return {"step": 0, "exp_avg": np.zeros_like(p)}


def step(p, g, state, *, lr, decay_lr, betas, weight_decay, cautious_decay=False):
    """Returns the new p and the new state."""
    b1, b2 = betas
    m = state["exp_avg"]
    u = np.sign(b1 * m + (1 - b1) * g)
    p = decayed(p, u, decay_lr, weight_decay, cautious_decay) - lr * u
    return p, {"step": state["step"] + 1, "exp_avg": b2 * m + (1 - b2) * g}
