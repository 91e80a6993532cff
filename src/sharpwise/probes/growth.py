"""How much further a normalized update changes what a layer gives where gradients agree (Kosson et al., 2410.23922).

Of one linear neuron: the gradient of a sample is s x with |s| = 1, that of a batch the mean of B of them. Their mean is
g, what varies is isotropic over C inputs, phi = |g|^2 / E|noise|^2 of one sample. For an update of a fixed norm along
the batch's gradient

    RRC^2  ~  K / ((1 + phi) (phi + 1/B))
    K = (phi + 1/B)^2 + (phi / C) ((1 + 1/B)^2 + (B-1) / B^2) + (B-1) / (B^2 C) + 2 / (B^2 C)

Departs: the paper's own factor was not released; this one is derived, and agrees with simulation.
"""

import math


def rrc_growth(snr: float, batch: float, inputs: float) -> float:
    """RRC of an update, over that of one of the same size along gradients whose mean is 0; 1 where that is so.

    1 over this is the factor on the learning rate under which representations change as fast as they would then.

    Args:
        snr: phi, of the gradient of one sample, >= 0. batch: samples per step, >= 1. inputs: of a neuron, C.

    >>> rrc_growth(0.0, 512, 256)
    1.0
    """
    return math.sqrt(_square(snr, batch, inputs) / _square(0.0, batch, inputs))


def _square(phi: float, batch: float, inputs: float) -> float:
    one = 1 / batch
    k = (phi + one) ** 2 + phi / inputs * ((1 + one) ** 2 + (batch - 1) * one**2) + (batch + 1) * one**2 / inputs
    return k / ((1 + phi) * (phi + one))
