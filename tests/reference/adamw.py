"""AdamW (decoupled weight decay), float64.

    m_t = b1 m_{t-1} + (1 - b1) g_t
    v_t = b2 v_{t-1} + (1 - b2) g_t^2
    p_t = p_{t-1} (1 - decay_lr wd) - lr (m_t / (1 - b1^t)) / (sqrt(v_t / (1 - b2^t)) + eps)

`lr` and `decay_lr` are numbers, or arrays that broadcast to p (a learning rate per element).
"""

import numpy as np

from reference.decay import decayed

STATE = ("exp_avg", "exp_avg_sq")


def init(p):
    return {"step": 0, "exp_avg": np.zeros_like(p), "exp_avg_sq": np.zeros_like(p)}


def step(p, g, state, *, lr, decay_lr, betas, eps, weight_decay, cautious_decay=False):
    """Returns the new p and the new state; p, g: arrays of the same shape."""
    b1, b2 = betas
    t = state["step"] + 1
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g**2
    u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    p = decayed(p, u, decay_lr, weight_decay, cautious_decay) - lr * u
    return p, {"step": t, "exp_avg": m, "exp_avg_sq": v}
