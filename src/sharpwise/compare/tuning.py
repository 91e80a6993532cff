"""What a fair comparison has to try: a pure function of what it has tried, so that a study can be stopped anywhere.

    tune     every arm: three learning rates, then one more on the side where the best one is, until it is interior or
             seven were tried; then the arm's further settings, one after the other, each at the best so far
    roles    an arm that asks for it: the factors of its block types, by a search of many runs (`role_search`)
    even     every arm gets as many trials as the one that had most: between the best learning rate and its neighbours
    refine   the same where one that had most had a search: a fine grid of learning rates, on one seed after the other
    final    the best setting of every arm, on the same fresh seeds
    horizon  the baseline's best setting on half and on twice the tokens, on the same seeds: what speed-ups are read off

An arm may take the setting of another, or a learning rate that is given: its final runs are at that, and it has no
trials, or those of a search of its own that starts there, which nobody else gets.

All of `tune` and `even` is on one seed that `final` does not use, `roles` and `refine` on others. What is decided
depends on complete sets of results only, never on the order in which they came: one process and ten decide alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from sharpwise.compare.role_search import Search, search
from sharpwise.compare.roles import SEEDS, Roles
from sharpwise.compare.trial import TUNING_SEED, Losses, Setting, Trial

HORIZONS = (0.5, 2.0)
GRID = (0, 1, -1, 2, -2, 3, -3, 4, -4)
"""Quarter powers of two around the best learning rate, an octave on either side."""
NO_ROLES: Mapping[str, Roles] = MappingProxyType({})


@dataclass(frozen=True)
class Taken:
    """Of an arm that is not tuned: whose setting it takes, at `lr_times` its learning rate; or the learning rate."""

    arm: str = ""
    lr_times: float = 1.0
    lr: float = 0.0

    def of(self, setting: Setting) -> Setting:
        """What is taken of a setting, whose first entry is the learning rate."""
        if self.lr_times == 1:
            return setting
        (key, lr), *others = setting
        return ((key, _rounded(lr * self.lr_times)), *others)


NONE: Mapping[str, Taken] = MappingProxyType({})


@dataclass(frozen=True)
class Space:
    """What an arm may try.

    Args:
        lrs: the learning rates it starts with, three or more.
        search: further settings by dotted key, with the values to try besides the one it starts with.
        factor: from one learning rate to the next when the range is widened.
        most: learning rates at most when it is widened.
    """

    lrs: tuple[float, ...]
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    factor: float = math.sqrt(10)
    most: int = 7


def needed(
    spaces: Mapping[str, Space],
    baseline: str,
    seeds: Sequence[int],
    done: Losses,
    horizons: Sequence[float] = HORIZONS,
    taken: Mapping[str, Taken] = NONE,
    roles: Mapping[str, Roles] = NO_ROLES,
) -> list[Trial]:
    """The trials that can be started now; none when the study is complete.

    Args:
        spaces: of every arm that is tuned, in the order of the study.
        baseline: one of the arms.
        seeds: of the final runs.
        done: results so far. What is running is still among the needed ones.
        horizons: shares of the budget that the baseline is trained on too.
        taken: further arms, each with what it takes: the setting of one of `spaces`, of one that searches from there,
            or a learning rate.
        roles: the searches of arms that have one.
    """
    trials: list[Trial] = []
    for arm, space in spaces.items():
        trials += next_of_arm(arm, space, done) or (searched(arm, done, {}, roles).wanted if arm in roles else ())
    if trials:
        return [trial for trial in trials if trial not in done]
    most = max((count_trials(arm, done, roles) for arm in spaces), default=0)
    for arm in spaces:
        trials += refine(arm, most, done, roles) if roles.keys() & spaces.keys() else even_out(arm, most, done)
    trials = [trial for trial in trials if trial not in done]
    if trials:
        return trials
    for arm in (arm for arm in taken if arm in roles):
        trials += searched(arm, done, taken, roles).wanted
    if trials:
        return trials
    for arm in (*spaces, *taken):
        setting = chosen(arm, done, taken, roles)
        trials += [Trial(arm, "final", setting, seed) for seed in seeds]
        if arm == baseline:
            trials += [Trial(arm, "horizon", setting, seed, share) for share in horizons for seed in seeds]
    return [trial for trial in trials if trial not in done]


def tried(arm: str, done: Losses) -> dict[Trial, float]:
    """The tuning trials of an arm on one seed, in the order of their settings."""
    found = {trial: loss for trial, loss in done.items() if trial.arm == arm and trial.stage in ("tune", "even")}
    return dict(sorted(found.items(), key=lambda item: (item[0].lr, item[0].key)))


def best(arm: str, done: Losses) -> Trial:
    """The tuning trial with the lowest loss; where several are equal, that with the smallest learning rate."""
    return _lowest(tried(arm, done))


def chosen(arm: str, done: Losses, taken: Mapping[str, Taken] = NONE, roles: Mapping[str, Roles] = NO_ROLES) -> Setting:
    """The setting that tuning found for an arm, or for the one whose setting it takes; or that is given."""
    if arm in roles:
        found = searched(arm, done, taken, roles).setting
        return found if arm in taken else _refined(arm, found, done)
    if arm in taken:
        own = taken[arm]
        return own.of(chosen(own.arm, done, taken, roles)) if own.arm else (("optimizer.lr", own.lr),)
    return _refined(arm, best(arm, done).setting, done)


def searched(arm: str, done: Losses, taken: Mapping[str, Taken], roles: Mapping[str, Roles]) -> Search:
    """How far the search of an arm is: from its own best setting, or that of another one."""
    of = taken[arm].arm if arm in taken else arm
    start = chosen(of, done, taken, roles) if arm in taken else best(arm, done).setting
    tuned = tried(of, done)
    if tuned and all(math.isinf(loss) for loss in tuned.values()):  # there is nothing to start from
        return Search(
            {of: dict.fromkeys(own, 1.0) for of, own in roles[arm].none.items()}, start, (), (), (), "nothing"
        )
    return search(arm, start, roles[arm], done)


def count_trials(arm: str, done: Losses, roles: Mapping[str, Roles] = NO_ROLES) -> int:
    """How many trials an arm has had, those of its search among them, and no others that make it equal to one.

    Of a search those too that more runs have led away from.
    """
    if arm not in roles:
        return len(tried(arm, done))
    search = {trial for trial in done if trial.arm == arm and trial.stage == "roles"}
    return len(tried(arm, done)) + len(search.union(searched(arm, done, {}, roles).trials))


def _lowest(found: Losses) -> Trial:
    return min(found, key=lambda trial: (found[trial], trial.lr))


def at_edge(arm: str, done: Losses) -> Literal["", "smallest", "largest"]:
    """Which end of the learning rates that were tried the best one lies at, "" if it is inside."""
    lr, lrs = best(arm, done).lr, sorted({trial.lr for trial in tried(arm, done)})
    return "smallest" if lr == lrs[0] else "largest" if lr == lrs[-1] else ""


def next_of_arm(arm: str, space: Space, done: Losses) -> list[Trial]:
    """The trials that an arm needs next before it is tuned; none when it is."""

    def trial(setting: Mapping[str, Any]) -> Trial:
        return Trial(arm, "tune", tuple(setting.items()), TUNING_SEED)

    def plain(lr: float) -> Trial:
        return trial({"optimizer.lr": lr})

    first = [plain(lr) for lr in space.lrs]
    if any(one not in done for one in first):
        return [one for one in first if one not in done]
    known = {one.lr: loss for one, loss in done.items() if one == plain(one.lr)}
    while len(known) < space.most:
        lr = widened(known, space.factor)
        if lr is None:
            break
        if plain(lr) not in done:
            return [plain(lr)]
        known[lr] = done[plain(lr)]
    # One setting after the other, each at the best of what was decided before it.
    setting: dict[str, Any] = {"optimizer.lr": min(known, key=lambda lr: (known[lr], lr))}
    loss = known[setting["optimizer.lr"]]
    for key, values in space.search.items():
        others = [trial({**setting, key: value}) for value in values]
        if any(one not in done for one in others):
            return [one for one in others if one not in done]
        for one in others:
            if done[one] < loss:
                setting, loss = dict(one.setting), done[one]
    return []


def widened(known: Mapping[float, float], factor: float) -> float | None:
    """The next learning rate on the side where the best one is, rounded to three digits; None if it is inside.

    Where every run diverged the next is smaller.

    >>> widened({1e-3: 4.0, 3e-3: 3.9, 1e-2: 3.8}, 10**0.5)
    0.0316
    """
    lrs = sorted(known)
    chosen = min(lrs, key=lambda lr: (known[lr], lr))
    if chosen == lrs[0]:
        return _rounded(lrs[0] / factor)
    if chosen == lrs[-1]:
        return _rounded(lrs[-1] * factor)
    return None


def even_out(arm: str, count: int, done: Losses) -> list[Trial]:
    """The next trial of an arm that had fewer than `count`: between its best learning rate and a neighbour of it."""
    found = tried(arm, done)
    if len(found) >= count:
        return []
    chosen = best(arm, done)
    others = sorted({t.lr for t in found})
    place = others.index(chosen.lr)
    sides = [others[i] for i in (place - 1, place + 1) if 0 <= i < len(others)]
    if not sides:
        sides = [chosen.lr * 2]
    # The wider gap first; of equal ones the larger learning rate.
    gap = max(sides, key=lambda lr: (round(abs(math.log(lr / chosen.lr)), 3), lr))
    lr = _rounded(math.sqrt(gap * chosen.lr))
    while lr in others:  # three digits do not tell them apart any more
        lr = _rounded(lr * 1.01)
    return [Trial(arm, "even", (("optimizer.lr", lr), *chosen.setting[1:]), TUNING_SEED)]


def refine(arm: str, count: int, done: Losses, roles: Mapping[str, Roles]) -> list[Trial]:
    """All trials that an arm lacks to `count`, where another one had a search: a fine grid of learning rates around the
    best one, on one seed after the other. As many learning rates on a single seed would find the luckiest of them.
    """
    setting = searched(arm, done, {}, roles).setting if arm in roles else best(arm, done).setting
    lrs = [_rounded(setting[0][1] * 2 ** (power / 4)) for power in GRID]
    return [
        Trial(arm, "refine", (("optimizer.lr", lrs[i % len(lrs)]), *setting[1:]), SEEDS[0] + i // len(lrs))
        for i in range(count - count_trials(arm, done, roles))
    ]


def _refined(arm: str, start: Setting, done: Losses) -> Setting:
    """The best setting of the grid, in the mean over the seeds on which all of it ran; the start where nothing did."""
    by_seed: dict[int, dict[Setting, float]] = {}
    for trial, loss in done.items():
        if trial.arm == arm and trial.stage == "refine" and trial.setting[1:] == start[1:]:
            by_seed.setdefault(trial.seed, {})[trial.setting] = loss
    if not by_seed:
        return start
    whole = [losses for losses in by_seed.values() if len(losses) == len(GRID)] or [by_seed[min(by_seed)]]
    # Of settings that end equally low, the one with the smallest learning rate.
    return min(whole[0], key=lambda setting: (sum(losses[setting] for losses in whole), setting[0][1]))


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")
