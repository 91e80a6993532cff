"""Muon, with NorMuon's rows, float64: hidden matrices by orthogonalized momentum, everything else by AdamW.

    m_t = mu m_{t-1} + (1 - mu) g_t            or  mu m_{t-1} + g_t  (heavy ball)
    x_t = mu m_t + (1 - mu) g_t                or  mu m_t + g_t;   m_t without Nesterov
    p_t = p_{t-1} (1 - lr wd) - lr s O(x_t)    of every matrix, rows are outputs

`matrices`: flat indices [rows, columns] of each matrix in the parameter, empty where it is none.
"""

import numpy as np

from reference import adamw
from reference.orthogonalize import newton_schulz, normalize_rows, polar_express

STATE = ("momentum_buffer", "row_second_moment", "exp_avg", "exp_avg_sq")
SCALES = {
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
}


def init(p, blocks):
    if not blocks:
        return adamw.init(p)
    return {
        "step": 0,
        "momentum_buffer": np.zeros_like(p),
        "row_second_moment": np.zeros(sum(len(index) for index in blocks)),
    }


def step(p, g, state, *, blocks, lr, decay_lr, weight_decay, momentum=0.95, nesterov=True, heavy_ball=False,
         scale="match_rms_adamw", method="newton_schulz", normalize_rows_by=None, ratio=1.0, aux=(0.9, 0.95, 1e-8),
         aux_weight_decay=None):  # fmt: skip
    """Returns the new p and the new state."""
    if not blocks:
        wd = weight_decay if aux_weight_decay is None else aux_weight_decay
        lrs = {"lr": lr * ratio, "decay_lr": decay_lr * ratio}
        return adamw.step(p, g, state, **lrs, betas=aux[:2], eps=aux[2], weight_decay=wd)
    new = 1.0 if heavy_ball else 1 - momentum
    m = momentum * state["momentum_buffer"] + new * g
    x = momentum * m + new * g if nesterov else m
    v, u, begin = state.get("row_second_moment", np.zeros(0)).copy(), np.full(p.size, np.nan), 0
    for index in blocks:
        o = {"newton_schulz": newton_schulz, "polar_express": polar_express}[method](x.ravel()[index])
        rows = slice(begin, begin + len(index))
        if normalize_rows_by is not None:
            o, v[rows] = normalize_rows(o, v[rows], normalize_rows_by, 1e-10)
        u[index] = SCALES[scale](*index.shape) * o
        begin = rows.stop
    p = p * (1 - decay_lr * weight_decay) - lr * u.reshape(p.shape)
    return p, {"step": state["step"] + 1, "momentum_buffer": m} | ({"row_second_moment": v} if len(v) else {})
