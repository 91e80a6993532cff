"""Adam-mini (arXiv 2406.16793), float64: Adam with one second moment per block.

    m_t   = b1 m_{t-1} + (1 - b1) g_t
    v_B,t = b2 v_B,t-1 + (1 - b2) mean_{i in B} g_{i,t}^2
    p_t   = p_{t-1} (1 - decay_lr wd) - lr (m_t / (1 - b1^t)) / (sqrt(v_B,t / (1 - b2^t)) + eps)

The blocks B of a parameter are a list of arrays of flat (row-major) indices, which partition it. `exp_avg_sq` is one
number per block in the order of that list. `lr` and `decay_lr` are numbers, or arrays that broadcast to p.
"""

import numpy as np

from reference.decay import decayed

STATE = ("exp_avg", "exp_avg_sq")


def init(p, blocks):
    seen = np.sort(np.concatenate(blocks)) if blocks else np.empty(0, int)
    assert np.array_equal(seen, np.arange(p.size)), "the blocks must partition the parameter"
    return {"step": 0, "exp_avg": np.zeros_like(p), "exp_avg_sq": np.zeros(len(blocks))}


def step(p, g, state, *, blocks, lr, decay_lr, betas, eps, weight_decay, cautious_decay=False):
    """Returns the new p and the new state."""
    b1, b2 = betas
    t = state["step"] + 1
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = state["exp_avg_sq"].copy()
    v_of_element = np.empty(p.size)
    for number, index in enumerate(blocks):
        v[number] = b2 * v[number] + (1 - b2) * np.mean(g.ravel()[index] ** 2)
        v_of_element[index] = v[number]
    v_of_element = v_of_element.reshape(p.shape)
    u = (m / (1 - b1**t)) / (np.sqrt(v_of_element / (1 - b2**t)) + eps)
    p = decayed(p, u, decay_lr, weight_decay, cautious_decay) - lr * u
    return p, {"step": t, "exp_avg": m, "exp_avg_sq": v}
