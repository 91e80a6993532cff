"""Newton-Schulz, Polar Express and NorMuon's normalization of rows, of one matrix, float64.

X <- a X + (b A + c A^2) X,    A = X X^T,    of M^T where M has more rows than columns
v <- b2 v + (1 - b2) mean over columns of O^2,    O' = O / (sqrt(v) + eps),    u = O' ||O||_F / ||O'||_F
"""

import numpy as np

NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def newton_schulz(M):
    return _polynomials(M, max(np.linalg.norm(M), 1e-7), NEWTON_SCHULZ)


def polar_express(M):
    return _polynomials(M, 1.02 * np.linalg.norm(M) + 1e-6, POLAR_EXPRESS)


def _polynomials(M, norm, coefficients):
    if M.shape[0] > M.shape[1]:
        return _polynomials(M.T, norm, coefficients).T
    X = M / norm
    for a, b, c in coefficients:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def normalize_rows(o, v, beta2, eps):
    """Returns u and the new v."""
    v = beta2 * v + (1 - beta2) * (o**2).mean(axis=1)
    scaled = o / (np.sqrt(v) + eps)[:, None]
    return scaled * np.linalg.norm(o) / np.linalg.norm(scaled), v
