"""Few of many cases, in which any two values of any two columns that occur together still do."""

import heapq
import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar

Case = TypeVar("Case", bound=tuple[Any, ...])


def pairwise(cases: Sequence[Case]) -> list[Case]:
    """One case after the other, each time the first of those that add the most pairs.

    What a case adds only shrinks as others are taken. So a count from before is a bound, and no case is counted again
    while it is not at the top.
    """
    seen: set[Any] = set()
    found: list[Case] = []
    bounds = [(-(len(case) ** 2), i) for i, case in enumerate(cases)]  # sorted, as a heap is
    while bounds:
        bound, i = bounds[0]
        new = set(itertools.combinations(enumerate(cases[i]), 2)) - seen
        if not new:
            heapq.heappop(bounds)
        elif len(new) < -bound:
            heapq.heapreplace(bounds, (-len(new), i))
        else:
            found.append(cases[i])
            seen |= new
    return found


def columns(values: Iterable[Any]) -> tuple[Hashable, ...]:
    """A case of what a test is parametrized by: words and numbers, those of a tuple one by one, and of all else which
    object it is."""
    found: list[Hashable] = []
    for value in values:
        parts = value if isinstance(value, tuple) else (value,)
        simple = all(part is None or isinstance(part, str | int | float) for part in parts)
        found += parts if simple else [id(value)]
    return tuple(found)
