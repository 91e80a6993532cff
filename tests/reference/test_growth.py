"""The growth of RRC with gradient SNR against a simulation of one neuron."""

import numpy as np
import pytest

from sharpwise.controls.snr import rrc_growth


def simulated(phi, batch, inputs, draws=400):
    """Root mean square of what a normalized update changes for a sample of its own batch, in units of |g| = 0."""
    rng = np.random.default_rng(0)

    def square(phi):
        mean = np.zeros(inputs)
        mean[0] = np.sqrt(phi / (1 + phi) * inputs)
        noise = np.sqrt(1 / (1 + phi))
        changed, size = 0.0, 0.0
        for _ in range(draws):
            signs = rng.choice([-1.0, 1.0], size=batch)
            g = mean + noise * rng.standard_normal((batch, inputs))  # per sample: s x
            total = g.mean(0)
            changed += np.square(g * signs[:, None] @ total).mean()
            size += np.square(total).sum()
        return changed / size

    return np.sqrt(square(phi) / square(0.0))


@pytest.mark.parametrize(
    ("phi", "batch", "inputs"), [(0.01, 16, 256), (0.05, 64, 64), (0.3, 8, 128), (1.0, 32, 64)], ids=str
)
def test_it_is_what_a_simulation_gives(phi, batch, inputs):
    assert rrc_growth(phi, batch, inputs) == pytest.approx(simulated(phi, batch, inputs), rel=0.05)


def test_it_grows_from_one():
    values = [rrc_growth(phi, 480, 768) for phi in (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)]
    assert values[0] == 1.0 and values == sorted(values)
    # From the published sketch of the factor: of 480 samples .88 at 1e-3, .51 at .01, .19 at .1, .08 at 1.
    assert [1 / v for v in values[2:]] == pytest.approx([0.88, 0.51, 0.19, 0.08], abs=0.01)
