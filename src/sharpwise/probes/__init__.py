"""Probes: what a block's curvature, spectrum, updates and noise are, each with its uncertainty and cost."""

from sharpwise.probes.calibrate import calibrate
from sharpwise.probes.directional import directional
from sharpwise.probes.estimate import Cost, Estimate, Measurement
from sharpwise.probes.fisher import sharpness
from sharpwise.probes.hessian import Diagonal, diagonal, frobenius, norm_11, trace
from sharpwise.probes.lanczos import Density, density, eigenvalues
from sharpwise.probes.noise_scale import GradientSNR, NoiseScale, two_batch
from sharpwise.probes.products import Curvature, Operator
from sharpwise.probes.rrc import rrc
from sharpwise.probes.second_moment import sharpness_from_optimizer
from sharpwise.probes.spectrum import alpha_hill, alpha_of_random, gram_eigenvalues, spectrum
from sharpwise.probes.update_size import UpdateSize

__all__ = [
    "Cost",
    "Curvature",
    "Density",
    "Diagonal",
    "Estimate",
    "GradientSNR",
    "Measurement",
    "NoiseScale",
    "Operator",
    "UpdateSize",
    "alpha_hill",
    "alpha_of_random",
    "calibrate",
    "density",
    "diagonal",
    "directional",
    "eigenvalues",
    "frobenius",
    "gram_eigenvalues",
    "norm_11",
    "rrc",
    "sharpness",
    "sharpness_from_optimizer",
    "spectrum",
    "trace",
    "two_batch",
]
