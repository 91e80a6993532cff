"""Which factor on the learning rate each type of block wants: a coordinate search around the best uniform rate.

    A step multiplies the factor of one type by 2 or by 1/2. It is tried on one seed, and where it wins there on another
    one; it is taken if it wins on both, each time against the factors that hold, and by `margin` or more in the mean
    (the better one, where both directions do). So in a round over all types; those that moved are tried further, in
    the same direction, until none moves. Then the same with the root of 2, until a whole round takes nothing, or the
    runs are spent.

A pure function of the runs that are done, as `tuning.needed` is. The seeds are neither that of the tuning, on which the
uniform rate was the luckiest one, nor those of final runs, on which the factors are judged.
"""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sharpwise.block_lr import PerRole
from sharpwise.blocks import BlockType, Role, Segment
from sharpwise.compare.trial import Losses, Setting, Trial
from sharpwise.train.code import names_class

SEEDS = (1001, 1002)
SIZES = (2, 1)  # of a step, in half powers of two
BLOCK_LR = "optimizer.block_lr"
KEYS = ("runs", "types")
"""What an arm with `tune = "roles"` may say besides."""
Exponents = Mapping[str, int]
"""By type, the half powers of two of its factor."""


@dataclass(frozen=True)
class Roles:
    """What a search may do.

    Args:
        types: block types, roles or globs, as `PerRole` takes them, in the order of a round; () until the model is
            known, which then gives its own.
        runs: at most; 0 for twice those that a first round may take.
        margin: nats per token, the least mean gain of a step that is taken.
    """

    types: tuple[str, ...] = ()
    runs: int = 0
    margin: float = 0.0

    @property
    def least(self) -> int:
        """Runs that try every type whatever comes out; as many as a search takes in which nothing wins."""
        return len(SEEDS) * (1 + 2 * len(self.types))

    @property
    def most(self) -> int:
        """Runs at most."""
        return self.runs or len(SEEDS) * (1 + 4 * len(self.types))

    def of_model(self, segments: Sequence[Segment]) -> "Roles":
        """The same with the types of a model, where none were said.

        Raises:
            ValueError: a type that the model lacks, or that has no block of its own; too few runs.
        """
        types = self.types or _types_of(segments)
        numbers = {name: float(number) for number, name in enumerate(types, 2)}  # 1 is that of what none matches
        numbered = PerRole(numbers)
        numbered.check(segments)
        held = numbered.multipliers(segments)
        for name in types:
            if numbers[name] not in held:
                raise ValueError(
                    f"types: {name!r} has no block of its own; of several types that match a block the last one holds, "
                    f"so name it after {', '.join(types[types.index(name) + 1 :])}"
                )
        found = replace(self, types=types)
        if found.runs and found.runs < found.least:
            raise ValueError(
                f"runs must be {found.least} or more, got {self.runs}: a search over {', '.join(types)} takes "
                f"{len(SEEDS)} for the uniform rate and up to {2 * len(SEEDS)} to try each of the {len(types)}; give "
                "more runs, or name fewer types"
            )
        return found


@dataclass(frozen=True)
class Step:
    """A step that was tried, from the factor `before` of a type to `after`, with the losses on each of `seeds`.

    `against` are those of the factors that held, on the same seeds, the number of which is 1 where the step lost on the
    first. `round` counts from 1.
    """

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
    """How far a search is: the factors that hold, and what it wants next.

    `trials` are all of it so far, those that are wanted included. `ended` says why it ended: nothing won any more, or
    what the next type may take is more than the runs that are left; "" while it goes on.
    """

    factors: Mapping[str, float]
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
    factors = {name: factor(power) for name, power in walk.at.items()}
    ended: Literal["", "nothing", "runs"] = "" if wanted else "runs" if walk.short else "nothing"
    return Search(factors, walk.setting(walk.at), tuple(walk.steps), tuple(walk.used), wanted, ended)


class _Walk:
    """A search from its start, as far as its runs are done."""

    def __init__(self, arm: str, start: Setting, roles: Roles, done: Losses) -> None:
        self.arm, self.start, self.roles, self.done = arm, start, roles, done
        self.at: dict[str, int] = dict.fromkeys(roles.types, 0)
        self.used: dict[Trial, None] = {}
        self.steps: list[Step] = []
        self.short = False
        self._round = 0

    def setting(self, at: Exponents) -> Setting:
        """The setting with these factors; where all are 1, that of the start."""
        if not any(at.values()):
            return self.start
        ratios = PerRole({name: factor(power) for name, power in at.items()})
        return (*self.start, (BLOCK_LR, str(ratios)))

    def batches(self) -> Iterator[list[Trial]]:
        """The trials that the walk needs next, all at a time; it goes on when they are done."""
        yield self._runs(self.at)
        for size in SIZES:
            moved = True
            while moved and not self.short:
                moved = yield from self._rounds(size)
                moved = moved and size == SIZES[-1]

    def _rounds(self, size: int) -> Generator[list[Trial], None, bool]:
        """A round over all types, and rounds over those that moved; returns whether any did."""
        types, went = list(self.roles.types), dict[str, int]()
        while types:
            self._round += 1
            moved = []
            for name in types:
                # Not back where it came from with a step of the same size.
                sides = [by for by in (size, -size) if by != -went.get(name, 0)]
                tries = {by: self._runs({**self.at, name: self.at[name] + by}) for by in sides}
                if len(self.used | {trial: None for pair in tries.values() for trial in pair}) > self.roles.most:
                    self.short = True
                    return False
                by = yield from self._visit(name, tries)
                if by:
                    self.at[name] += by
                    went[name] = by
                    moved.append(name)
            types = moved
        return bool(went)

    def _visit(self, name: str, tries: Mapping[int, list[Trial]]) -> Generator[list[Trial], None, int]:
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
        taken = max(gains, key=lambda by: gains[by]) if gains else 0
        for by, pair in tries.items():
            kept = pair if by in won else pair[:1]
            step = Step(
                name, self._round, factor(self.at[name]), factor(self.at[name] + by), SEEDS[: len(kept)],
                tuple(self.done[trial] for trial in kept), tuple(here[: len(kept)]), by == taken,
            )  # fmt: skip
            if not any(replace(step, round=known.round) == known for known in self.steps):  # in a round before
                self.steps.append(step)
        return taken

    def _runs(self, at: Exponents) -> list[Trial]:
        return [Trial(self.arm, "roles", self.setting(at), seed) for seed in SEEDS]


def factor(power: int) -> float:
    """The factor of a half power of two, to three digits: what a setting says.

    >>> [factor(power) for power in (-3, -2, -1, 0, 1, 2, 3)]
    [0.354, 0.5, 0.707, 1.0, 1.41, 2.0, 2.83]
    """
    return float(f"{math.sqrt(2) ** power:.3g}")


def uniform(types: Sequence[str]) -> str:
    """The spelling of a factor of 1 for every type: to see whether an optimizer takes factors at all."""
    return str(PerRole(dict.fromkeys(types, 1.0)))


def _types_of(segments: Sequence[Segment]) -> tuple[str, ...]:
    """The block types of a model, and `pos_emb` beside `Emb` where that holds both embeddings."""
    kinds = {segment.block_type for segment in segments}
    roles = {segment.role for segment in segments}
    found = [str(kind) for kind in BlockType if kind in kinds]
    if {Role.TOK_EMB, Role.POS_EMB} <= roles:
        found.insert(1, str(Role.POS_EMB))  # after Emb, so that its own factor holds
    return tuple(found)


def read_roles(table: Mapping[str, Any], optimizer: Mapping[str, Any], margin: float) -> Roles | None:
    """The search that an arm's table asks for with `tune = "roles"`, None where it asks for none.

    Raises:
        ValueError: what cannot be meant.
    """
    if "tune" not in table:
        if own := [key for key in KEYS if key in table]:
            raise ValueError(f'{" and ".join(own)} are those of a search; say tune = "roles" too')
        return None
    if table["tune"] != "roles":
        raise ValueError(f'tune must be "roles", got {table["tune"]!r}; leave it out for a learning rate alone')
    if names_class(optimizer["name"]):
        raise ValueError(
            f"{optimizer['name']} is of another library, and moves all blocks alike: there is nothing to search"
        )
    if optimizer.get("block_lr"):
        raise ValueError(
            f"a search starts at one rate for all blocks, and its optimizer has {optimizer['block_lr']}; leave that out"
        )
    runs, types = table.get("runs", 0), table.get("types", ())
    if not isinstance(runs, int) or isinstance(runs, bool) or ("runs" in table and runs < 1):
        raise ValueError(f"runs must be a whole number above 0, got {runs!r}")
    named = isinstance(types, Sequence) and not isinstance(types, str) and all(isinstance(t, str) for t in types)
    if not named or len(set(types)) < len(types) or ("types" in table and not types):
        raise ValueError(f"types must be different block types or roles, such as ['Emb', 'FFN'], got {types!r}")
    return Roles(tuple(types), runs, margin)
