"""Which factor on the learning rate, weight decay or 1 - beta2 each type of block wants: a coordinate search.

    It starts at the best uniform setting. A step multiplies the factor of one type by 2 or by 1/2. It is tried on one
    seed, and where it wins there on another one; it is taken if it wins on both, each time against the factors that
    hold, and by `margin` or more in the mean (the better one, where both directions do). So in a round over all types;
    those that moved are tried further, in the same direction, until none moves. Then the same with the root of 2, until
    a whole round takes nothing, or the runs are spent. So for one quantity after the other, each from what holds; the
    first round of a later one is kept back from the runs of those before it.

A pure function of the runs that are done, as `tuning.needed` is. The seeds are neither that of the tuning, on which the
uniform rate was the luckiest one, nor those of final runs, on which the factors are judged.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sharpwise.compare.roles import SEEDS, Exponents, Roles, factor
from sharpwise.compare.trial import Losses, Setting, Trial

SIZES = (2, 1)  # of a step, in half powers of two


@dataclass(frozen=True)
class Step:
    """A step that was tried, from the factor `before` of a type to `after`, with the losses on each of `seeds`.

    `of` is what the factor is on.

    `against` are those of the factors that held, on the same seeds, the number of which is 1 where the step lost on the
    first. `round` counts from 1.
    """

    of: str
    type: str
    round: int
    before: float
    after: float
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    against: tuple[float, ...]
    taken: bool


@dataclass(frozen=True)
class Search:
    """How far a search is: the factors that hold, by quantity and type, and what it wants next.

    `trials` are all of it so far, those that are wanted included. `ended` says why it ended: nothing won any more, or
    what the next type may take is more than the runs that are left; "" while it goes on.
    """

    factors: Mapping[str, Mapping[str, float]]
    setting: Setting
    steps: tuple[Step, ...]
    trials: tuple[Trial, ...]
    wanted: tuple[Trial, ...]
    ended: Literal["", "nothing", "runs"]


def search(arm: str, start: Setting, roles: Roles, done: Losses) -> Search:
    """How far the search of an arm is.

    Args:
        arm: whose trials it has, of stage "roles".
        start: the best uniform setting; factors come on top of it.
        roles: what it may do, with types.
        done: results so far.
    """
    assert roles.types, "the types of the model are not known yet"
    walk = _Walk(arm, start, roles, done)
    wanted: tuple[Trial, ...] = ()
    for batch in walk.batches():
        walk.used.update(dict.fromkeys(batch))
        wanted = tuple(trial for trial in batch if trial not in done)
        if wanted:
            break
    factors = {of: {name: factor(power) for name, power in own.items()} for of, own in walk.at.items()}
    ended: Literal["", "nothing", "runs"] = "" if wanted else "runs" if walk.short else "nothing"
    return Search(factors, walk.setting(walk.at), tuple(walk.steps), tuple(walk.used), wanted, ended)


class _Walk:
    """A search from its start, as far as its runs are done."""

    def __init__(self, arm: str, start: Setting, roles: Roles, done: Losses) -> None:
        self.arm, self.start, self.roles, self.done = arm, start, roles, done
        self.at = roles.none
        self.used: dict[Trial, None] = {}
        self.steps: list[Step] = []
        self.short = False
        self._round = 0

    def setting(self, at: Exponents) -> Setting:
        """The setting with these factors; where all are 1, that of the start."""
        return self.roles.setting(self.start, at)

    def batches(self) -> Iterator[list[Trial]]:
        """The trials that the walk needs next, all at a time; it goes on when they are done."""
        yield self._runs(self.at)
        for number, of in enumerate(self.roles.of):
            most, short = self.roles.most_before(number), False
            for size in SIZES:
                moved: bool | None = True
                while moved and not short:
                    moved = yield from self._rounds(of, size, most)
                    short = moved is None
                    moved = moved and size == SIZES[-1]
            self.short |= short

    def _rounds(self, of: str, size: int, most: int) -> Generator[list[Trial], None, bool | None]:
        """A round over all types, and rounds over those that moved; returns whether any did, None if runs are short."""
        types, went = list(self.roles.types_of(of)), dict[str, int]()
        while types:
            self._round += 1
            moved = []
            for name in types:
                # Not back where it came from with a step of the same size.
                at = self.at[of][name]
                sides = [by for by in (size, -size) if by != -went.get(name, 0)]
                sides = [by for by in sides if self.roles.allows(self.start, of, at + by)]
                tries = {by: self._runs({**self.at, of: {**self.at[of], name: at + by}}) for by in sides}
                if len(self.used | {trial: None for pair in tries.values() for trial in pair}) > most:
                    return None
                by = yield from self._visit(of, name, tries)
                if by:
                    self.at[of][name] += by
                    went[name] = by
                    moved.append(name)
            types = moved
        return bool(went)

    def _visit(self, of: str, name: str, tries: Mapping[int, list[Trial]]) -> Generator[list[Trial], None, int]:
        """Try the steps of a type; returns the one that is taken, 0 if none is."""
        here = [self.done[trial] for trial in self._runs(self.at)]
        yield [pair[0] for pair in tries.values()]
        won = [by for by, pair in tries.items() if self.done[pair[0]] < here[0]]
        yield [tries[by][1] for by in won]
        gains = {}
        for by in won:
            losses = [self.done[trial] for trial in tries[by]]
            gain = sum(here) / len(here) - sum(losses) / len(losses)
            if losses[1] < here[1] and gain >= self.roles.margin:
                gains[by] = gain
        at, taken = self.at[of][name], max(gains, key=lambda by: gains[by]) if gains else 0
        for by, pair in tries.items():
            kept = pair if by in won else pair[:1]
            step = Step(
                of, name, self._round, factor(at), factor(at + by), SEEDS[: len(kept)],
                tuple(self.done[trial] for trial in kept), tuple(here[: len(kept)]), by == taken,
            )  # fmt: skip
            if not any(replace(step, round=known.round) == known for known in self.steps):  # in a round before
                self.steps.append(step)
        return taken

    def _runs(self, at: Exponents) -> list[Trial]:
        return [Trial(self.arm, "roles", self.setting(at), seed) for seed in SEEDS]
