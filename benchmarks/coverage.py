"""Counts how often intervals hold the truth, in simulated studies and draws whose truth is known; no times.

    python benchmarks/coverage.py            results/coverage.json, whose figures docstrings tell
    python benchmarks/coverage.py --quick    few studies, to see that it runs; saves nothing

Speed-ups: a baseline whose loss is 3 + 0.2 D^-0.3 at 0.5, 1 and 2 times the tokens, an arm that needs 1.3 (or 1) times
fewer, noise of 0.01 nats a run, half of its variance shared by the runs of a seed. Draws: squares of one normal
variable, which are as skewed as those of a trace with few samples; and normal ones.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from environment import environment

from sharpwise.compare.speedup import speedup
from sharpwise.probes.estimate import t_interval
from sharpwise.probes.monte_carlo import Draws

HORIZONS = (0.5, 1.0, 2.0)
SEEDS = (3, 4, 5)
NOISE, SHARED = 0.01, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few studies; saves nothing")
    args = parser.parse_args()
    studies, draws = (50, 200) if args.quick else (3000, 20_000)
    result = {
        "environment": environment(),
        "speedup": {
            "studies": studies,
            "noise": NOISE,
            "per_doubling": law(1.0) - law(2.0),
            "covered": {str(true): {n: speedups(n, true, studies) for n in SEEDS} for true in (1.3, 1.0)},
            "percentile_bootstrap_of_3": percentile_bootstrap(3, 1.3, studies),
        },
        "draws": {"studies": draws, **{str(n): squares(n, draws) for n in (10, 30)}, "normal": normal(30, draws)},
    }
    print(json.dumps({key: result[key] for key in ("speedup", "draws")}, indent=1))
    if args.quick:
        print("\nNothing saved: this was not a full run.")
        return
    path = Path(__file__).parent / "results" / "coverage.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nSaved {path.relative_to(path.parents[2])}")


def law(tokens: float) -> float:
    return 3.0 + 0.2 * tokens**-0.3


def study(rng: np.random.Generator, n: int, true: float) -> tuple[list[float], dict[float, list[float]]]:
    """End losses of the arm, and of the baseline at each horizon, by seed."""
    own, shared = (NOISE * math.sqrt(part) for part in (1 - SHARED, SHARED))
    noise = rng.normal(0, own, (4, n)) + rng.normal(0, shared, n)
    baseline = {1000 * h: (law(h) + noise[k]).tolist() for k, h in enumerate(HORIZONS)}
    return (law(true) + noise[3]).tolist(), baseline


def speedups(n: int, true: float, studies: int) -> float:
    """Part of the 95% intervals that hold the true speed-up."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(studies):
        arm, baseline = study(rng, n, true)
        found = speedup(arm, 1000, baseline)
        assert found.low is not None and found.high is not None
        inside += found.low <= true <= found.high
    return inside / studies


def percentile_bootstrap(n: int, true: float, studies: int) -> float:
    """The same of the percentiles of resampled seeds."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(studies):
        arm, baseline = study(rng, n, true)
        seeds = rng.integers(0, n, (400, n))
        means = np.stack([np.array(losses)[seeds].mean(1) for losses in (arm, *baseline.values())], 1)
        values = [np.interp(-row[0], np.sort(-row[1:]), np.log(HORIZONS)) for row in means]
        low, high = np.exp(np.percentile(values, [2.5, 97.5]))
        inside += bool(low <= true <= high)
    return inside / studies


def squares(n: int, studies: int) -> dict[str, float]:
    """Part of the intervals that hold the mean, 1, of n squares: Student's, and those of `Draws`."""
    rng = np.random.default_rng(0)
    inside = dict.fromkeys(("t", "positive", "mean"), 0)
    for _ in range(studies):
        values = rng.normal(size=n) ** 2
        mean, half = t_interval(list(values))
        assert half is not None
        inside["t"] += abs(mean - 1) <= half
        for of in ("positive", "mean"):
            inside[of] += abs(mean - 1) <= half_width(values, of)  # type: ignore[arg-type]
    return {key: count / studies for key, count in inside.items()}


def normal(n: int, studies: int) -> dict[str, Any]:
    """How much wider the interval of `Draws` is than Student's where draws are normal: the mean over studies."""
    rng = np.random.default_rng(0)
    wider = []
    for _ in range(studies // 10):
        values = rng.normal(size=n)
        half = t_interval(list(values))[1]
        assert half is not None
        wider.append(half_width(values, "mean") / half)
    return {"draws": n, "wider": float(np.mean(wider))}


def half_width(values: np.ndarray, of: Literal["mean", "positive"]) -> float:
    draws = Draws(of)
    for value in values:
        draws.add(np.array([value]))
    error = draws.interval()[1]
    assert error is not None
    return float(error[0])


if __name__ == "__main__":
    main()
