"""What a study compares: its arms, what all its runs share, and how much it may spend."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sharpwise.compare.tuning import HORIZONS, Space, Trial
from sharpwise.hints import nearest
from sharpwise.optim import parse_arm
from sharpwise.train.config_file import make_config, set_keys

TOKENS_PER_PARAMETER = 20  # Training Compute-Optimal Large Language Models, arXiv 2203.15556
FEWEST_STEPS = 50  # a shorter run says nothing about an optimizer: that is not much more than its warm-up
# Where each rule's learning rates begin: their middle, for models of some million parameters. A start, not a claim.
MIDDLE = {"adamw": 3e-3, "adam-mini": 3e-3, "lion": 5e-4, "sgd": 0.3}
ABLATIONS = ("mean_matched", "reversed", "shuffled")
_KEYS = (
    "name", "arms", "baseline", "seeds", "tokens", "ratio", "margin", "ablations", "run", "lrs", "search", "settings",
    "most", "horizons",
)  # fmt: skip
_ARM_KEYS = ("lrs", "search", "settings")


@dataclass(frozen=True)
class Arm:
    """One optimizer of the comparison; `settings` by dotted key are those besides what `space` tunes."""

    name: str
    optimizer: Mapping[str, Any]
    space: Space
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A comparison, ready to be run.

    Args:
        name: for the page.
        run: what all runs share, as `sharpwise train` takes it.
        arms: in the order of the page.
        baseline: the name of one of them.
        seeds: how many final runs each arm gets; 0 is the seed of tuning.
        tokens: of a run.
        margin: nats per token; smaller differences do not matter to whoever asks.
        horizons: shares of the tokens that the baseline is trained on too; none gives no speed-ups.
    """

    name: str
    run: Mapping[str, Any]
    arms: tuple[Arm, ...]
    baseline: str
    seeds: int = 3
    tokens: int | None = None
    ratio: float | None = None
    margin: float = 0.01
    horizons: tuple[float, ...] = HORIZONS
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """Seeds of the final runs."""
        return tuple(range(1, self.seeds + 1))

    @property
    def threads(self) -> int:
        """Of torch in each run: results depend on it in the last bits."""
        return int(self.run.get("compute", {}).get("threads", 1))

    @property
    def spaces(self) -> dict[str, Space]:
        """What each arm may try."""
        return {arm.name: arm.space for arm in self.arms}

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def config(self, trial: Trial, steps: int) -> dict[str, Any]:
        """The configuration of one run of `steps` at horizon 1."""
        arm = self.arm(trial.arm)
        given = {**self.run, "seed": trial.seed}
        given["optimizer"] = {**self.run.get("optimizer", {}), **arm.optimizer}
        schedule = {key: value for key, value in self.run.get("schedule", {}).items() if key != "tokens"}
        given["schedule"] = {**schedule, "steps": max(1, round(steps * trial.horizon))}
        given["compute"] = {**self.run.get("compute", {}), "threads": self.threads}
        given = _with(given, arm.settings)
        return _with(given, dict(trial.setting))


def make_study(given: Mapping[str, Any]) -> Study:
    """The study that is meant.

    Args:
        given: as TOML gives it: `arms` (names, or tables by name with `lrs`, `settings`, `search`), `run` (what all
            runs share, as for `sharpwise train`), `baseline` (the first arm), `seeds` (3), `tokens` or `ratio` (of 20
            tokens per parameter outside the embeddings), `margin`, `ablations`; `lrs`, `settings` and `search` for all
            arms; `most` learning rates of an arm (7), `horizons` of the baseline (0.5 and 2).

    Raises:
        ValueError: what cannot be meant, or an arm that cannot be built.
    """
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"a study has no {key!r}{nearest(key, _KEYS)}; it has {', '.join(_KEYS)}")
    named = given.get("arms", ())
    tables = dict(named) if isinstance(named, Mapping) else {name: {} for name in _unique(named)}
    if given.get("ablations"):
        for name in list(tables):
            rule, plus, block_lr = name.partition("+")
            tables |= {f"{rule}+{kind}({block_lr})": tables[name] for kind in ABLATIONS if plus}
    arms = tuple(_make_arm(name, table, given) for name, table in tables.items())
    if len(arms) < 2:
        raise ValueError(f"a comparison needs two arms or more, got {[arm.name for arm in arms]}")
    names = [arm.name for arm in arms]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two arms are the same: {', '.join(sorted(doubled))}")
    baseline = given.get("baseline", names[0])
    baseline = _canonical(baseline)
    if baseline not in names:
        raise ValueError(f"the baseline {baseline!r} is no arm{nearest(baseline, names)}; arms are {', '.join(names)}")
    seeds = given.get("seeds", 3)
    if not isinstance(seeds, int) or seeds < 2:
        raise ValueError(f"seeds must be 2 or more, got {seeds!r}: with one nothing can be said about chance")
    margin = given.get("margin", 0.01)
    if not isinstance(margin, (int, float)) or not 0 < margin < math.inf:
        raise ValueError(f"margin must be a number of nats above 0, got {margin!r}")
    tokens, ratio = given.get("tokens"), given.get("ratio")
    if (tokens is None) == (ratio is None):
        raise ValueError("the budget of a run is tokens = N, or ratio = X (times 20 per parameter); give one of them")
    if not (tokens is None or (isinstance(tokens, int) and tokens > 0)) or not (ratio is None or ratio > 0):
        raise ValueError(f"the budget of a run must be above 0, got {tokens if ratio is None else ratio}")
    horizons = tuple(given.get("horizons", HORIZONS))
    if any(not isinstance(share, (int, float)) or not 0 < share < math.inf for share in horizons):
        raise ValueError(f"horizons must be shares of the tokens above 0, got {list(horizons)}")
    name, run = str(given.get("name", "study")), given.get("run", {})
    study = Study(name, run, arms, baseline, seeds, tokens, ratio, float(margin), horizons, given)
    for arm in arms:
        make_config(study.config(Trial(arm.name, "tune", (("optimizer.lr", arm.space.lrs[0]),), 0), steps=1))
    return study


def _make_arm(name: str, table: Any, given: Mapping[str, Any]) -> Arm:
    if not isinstance(table, Mapping):
        raise ValueError(f"arm {name!r}: expected a table, got {table!r}")
    for key in table:
        if key not in _ARM_KEYS:
            allowed = ", ".join(_ARM_KEYS)
            raise ValueError(f"arm {name!r} has no {key!r}{nearest(key, _ARM_KEYS)}; it may have {allowed}")
    optimizer = parse_arm(name)
    middle = MIDDLE.get(optimizer["name"], 1e-3) / (3 if optimizer.get("block_lr") else 1)
    lrs = table.get("lrs", given.get("lrs", [middle / math.sqrt(10), middle, middle * math.sqrt(10)]))
    if not isinstance(lrs, Sequence) or len(set(lrs)) < 3 or any(not 0 < lr < math.inf for lr in lrs):
        raise ValueError(f"arm {name!r}: lrs must be three or more learning rates above 0, got {lrs!r}")
    settings = {**given.get("settings", {}), **table.get("settings", {})}
    search = {**given.get("search", {}), **table.get("search", {})}
    for key, values in search.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ValueError(f"arm {name!r}: search.{key!r} must be a list of values to try, got {values!r}")
    rounded = tuple(sorted({float(f"{lr:.3g}") for lr in lrs}))
    most = given.get("most", Space.most)
    if not isinstance(most, int) or most < len(rounded):
        raise ValueError(
            f"most must be a whole number, at least the {len(rounded)} learning rates to begin with: {most!r}"
        )
    space = Space(rounded, {key: tuple(map(_frozen, values)) for key, values in search.items()}, most=most)
    return Arm(_canonical(name), optimizer, space, settings)


def _canonical(name: str) -> str:
    parsed = parse_arm(name)
    return f"{parsed['name']}+{parsed['block_lr']}" if parsed.get("block_lr") else str(parsed["name"])


def _unique(names: Any) -> list[str]:
    if not isinstance(names, Sequence) or isinstance(names, str) or any(not isinstance(name, str) for name in names):
        raise ValueError(f"arms must be a list of names, or a table, got {names!r}")
    if doubled := {name for name in names if list(names).count(name) > 1}:
        raise ValueError(f"two arms are the same: {', '.join(sorted(doubled))}")
    return list(names)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _with(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with dotted keys on top."""
    result = set_keys(given, [])
    for key, value in settings.items():
        *tables, last = key.split(".")
        at = result
        for table in tables:
            at = at.setdefault(table, {})
        at[last] = list(value) if isinstance(value, tuple) else value
    return result


def differences(stored: Study, wanted: Study) -> list[str]:
    """What a stored study cannot go on with, a line each. Arms and seeds may be added."""
    lines = []
    for key in ("run", "baseline", "tokens", "ratio", "margin", "horizons"):
        before, now = getattr(stored, key), getattr(wanted, key)
        if before != now:
            lines.append(f"{key}: the study has {before!r}, now it is {now!r}")
    if wanted.seeds < stored.seeds:
        lines.append(f"seeds: the study has {stored.seeds}, now it is {wanted.seeds}")
    names = {arm.name: arm for arm in wanted.arms}
    for arm in stored.arms:
        if arm.name not in names:
            lines.append(f"arms: the study has {arm.name}, now it is missing")
        elif names[arm.name] != arm:
            lines.append(f"arm {arm.name}: the study has {_said(arm)}, now it is {_said(names[arm.name])}")
    return lines


def _said(arm: Arm) -> str:
    return f"lrs {list(arm.space.lrs)}, settings {dict(arm.settings)}, search {dict(arm.space.search)}"
