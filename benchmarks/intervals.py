"""Ratios of what was timed in turns, and their intervals."""

import random
import statistics
from typing import Any


def within_rounds(numerators: list[float], denominators: list[float]) -> list[float]:
    """Ratios of what was timed in the same round."""
    return [n / d for n, d in zip(numerators, denominators, strict=True)]


def over_processes(ratios: dict[int, float], rounds: int) -> dict[str, Any]:
    """The median over processes of the median of their rounds, its interval, and the median of each process.

    Args:
        ratios: by round; round r of process p is p * rounds + r.
        rounds: of a process.
    """
    by_process: dict[int, list[float]] = {}
    for number, ratio in ratios.items():
        by_process.setdefault(number // rounds, []).append(ratio)
    processes = list(by_process.values())
    return {
        "ratio": median_of_medians(processes),
        "ratio_95": bootstrap(processes),
        "ratio_by_process": [statistics.median(own) for own in processes],
    }


def bootstrap(processes: list[list[float]], draws: int = 2000) -> list[float]:
    """95% interval of the median of medians: processes are drawn, then rounds of each, both with replacement.

    Rounds of one process have its memory layout in common, and say nothing of how others differ from it. Of a single
    process the interval is over its rounds, and leaves that out.
    """
    generator, n = random.Random(0), len(processes)
    medians = sorted(
        median_of_medians([generator.choices(own, k=len(own)) for own in generator.choices(processes, k=n)])
        for _ in range(draws)
    )
    return [medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]]


def median_of_medians(processes: list[list[float]]) -> float:
    return statistics.median(statistics.median(own) for own in processes)
