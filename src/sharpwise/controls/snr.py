"""The factor by gradient SNR: an automatic warm-up, per matrix (Kosson et al., arXiv 2410.23922).

Where the gradients of a batch agree, an update of the same size changes more of what a layer gives. Of one linear
neuron: the gradient of a sample is s x with |s| = 1, that of a batch the mean of B of them. Their mean is G, what
varies is isotropic over C inputs, phi = |G|^2 / E|noise|^2 of one sample. For an update of a fixed norm along the
batch's gradient

    RRC^2  ~  K / ((1 + phi) (phi + 1/B))
    K = (phi + 1/B)^2 + (phi / C) ((1 + 1/B)^2 + (B-1) / B^2) + (B-1) / (B^2 C) + 2 / (B^2 C)
    f(phi) = sqrt(RRC^2(0) / RRC^2(phi))                      the factor: what changes is as at phi = 0
    S <- .98 S + .02 <g_t, M_{t-1}> / w_{t-1}                 |G|^2, unbiased while G drifts slowly
    N <- .98 N + .02 (|g_t|^2 - <g_t, M_{t-1}> / w_{t-1})     the noise of a batch
    phi = S / (B N)

g is the gradient before clipping, M the momentum of the rule, w the weight that gradients have in it: what M would be
if each had been 1 before clipping, so that clipped steps and schedules of b leave S unbiased.

Departs: the paper's own factor was not released; this one is derived, and agrees with simulation. It takes an update to
lie along the gradient of its batch, which sign and momentum change. In the first step no momentum tells of phi: the
factor is the smallest, as if all gradients agreed.

| symbol | name | shape |
|---|---|---|
| S, N, w | gradient_snr | [matrices, 3], fp64 |
"""

from typing import Any

import torch
from torch import Tensor

KEPT = 0.98
"""Of the means of signal and noise per step."""
LEAST = 1e-6
"""Noise is taken to be at least this part of the signal."""


def rrc_growth(snr: Any, batch: float, inputs: Any) -> Any:
    """RRC of an update, over that of one of the same size along gradients whose mean is 0; 1 where that is so.

    1 over this is the factor on the learning rate under which representations change as fast as they would then.

    Args:
        snr: phi, of the gradient of one sample, >= 0. batch: samples per step, >= 1. inputs: of a neuron, C. Numbers or
            tensors, as is what it gives.

    >>> rrc_growth(0.0, 512, 256)
    1.0
    """
    return (_square(snr, batch, inputs) / _square(0.0, batch, inputs)) ** 0.5


def _square(phi: Any, batch: float, inputs: Any) -> Any:
    one = 1 / batch
    k = (phi + one) ** 2 + phi / inputs * ((1 + one) ** 2 + (batch - 1) * one**2) + (batch + 1) * one**2 / inputs
    return k / ((1 + phi) * (phi + one))


def snr_of(kept: Tensor, batch: float) -> Tensor:
    """phi of one sample, fp64 [matrices], from the state; the largest where nothing is known yet."""
    signal, noise = kept[:, 0], kept[:, 1]
    signal, noise = (torch.where((signal == 0) & (noise == 0), of, x) for x, of in ((signal, 1.0), (noise, 0.0)))
    signal = signal.clamp(min=0)
    noise = torch.maximum(noise, LEAST * signal)
    return torch.where(noise > 0, signal / torch.where(noise > 0, noise, 1.0), 0.0) / batch


def with_draw(kept: Tensor, product: Tensor, square: Tensor) -> Tensor:
    """The state with the means of signal and noise moved on by a step; where that is not known or not finite, as it is.

    Args:
        product, square: <g, M> and |g|^2, fp64 [matrices].
    """
    weight = kept[:, 2]
    signal = product / torch.where(weight != 0, weight, 1.0)
    drawn = torch.stack([signal, square - signal], 1)
    moved = KEPT * kept[:, :2] + (1 - KEPT) * drawn
    fits = ((weight != 0) & moved.isfinite().all(1))[:, None]
    return torch.cat([torch.where(fits, moved, kept[:, :2]), kept[:, 2:]], 1)
