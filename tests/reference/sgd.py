"""SGD as torch defines it (momentum, dampening, Nesterov; coupled weight decay, or decoupled as an option), float64.

    coupled:    g_t <- g_t + wd p_{t-1}
    decoupled:  p_{t-1} <- p_{t-1} (1 - decay_lr wd)
    momentum:   b_1 = g_1,   b_t = mu b_{t-1} + (1 - dampening) g_t
    u_t = g_t + mu b_t (Nesterov),  b_t (momentum),  g_t (mu = 0)
    p_t = p_{t-1} - lr u_t

`lr` and `decay_lr` are numbers, or arrays that broadcast to p. Without momentum there is no buffer; one that is there
when the momentum falls to 0 is kept as it is.
"""

from reference.decay import decayed

STATE = ("momentum_buffer",)


def init(p):
    return {"step": 0}


def step(
    p,
    g,
    state,
    *,
    lr,
    decay_lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    decoupled_weight_decay=False,
    cautious_decay=False,
):
    """Returns the new p and the new state."""
    new = {**state, "step": state["step"] + 1}
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    u = g
    if momentum:
        b = momentum * state["momentum_buffer"] + (1 - dampening) * g if "momentum_buffer" in state else g.copy()
        new["momentum_buffer"] = b
        u = g + momentum * b if nesterov else b
    if decoupled_weight_decay:
        p = decayed(p, u, decay_lr, weight_decay, cautious_decay)
    return p - lr * u, new
