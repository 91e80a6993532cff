"""The 8-bit codes, float64: what each code means of a block whose largest magnitude is 1.

linear    c / 127, c = -127..127; unsigned c / 255
dynamic   0, 1, and +-10^(i-6) times the middles of 2^i equal parts of [0.1, 1], i = 0..6; unsigned 2^(i+1) parts
"""

import numpy as np


def dynamic(unsigned):
    """The values in order."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (i + unsigned) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles] if unsigned else [*middles, *-middles]
    return np.sort(values)


def meaning(code, unsigned):
    """All codes, and their values in the order of these."""
    if code == "dynamic":
        codes, values = np.arange(256), dynamic(unsigned)
        return codes, values if unsigned else np.roll(values, -127)
    codes = np.arange(256) if unsigned else np.arange(-127, 128)
    return codes, codes / codes.max()


def smallest_error(x, absmax, values):
    """Of x from the nearest of all values."""
    return np.abs(x[:, None] - absmax * values).min(axis=1)
