"""What a study compares: its arms, what all its runs share, and how much it may spend."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sharpwise.arms import arm_name
from sharpwise.block_lr import Ablation, make_block_lr
from sharpwise.compare.arm import (
    OWN,
    Arm,
    called,
    make_arm,
    name_of,
    numbers,
    positive,
    table_of,
    with_settings,
    with_taken,
)
from sharpwise.compare.keys import STUDY_KEYS
from sharpwise.compare.role_search import Search
from sharpwise.compare.roles import SEEDS, Roles
from sharpwise.compare.trial import Losses, Setting, Trial, plain
from sharpwise.compare.tuning import HORIZONS, Space, Taken, chosen, needed, next_of_arm, searched, tried
from sharpwise.hints import nearest
from sharpwise.train.code import parse_optimizer
from sharpwise.train.config import Config
from sharpwise.train.config_file import make_config

TOKENS_PER_PARAMETER = 20  # Training Compute-Optimal Large Language Models, arXiv 2203.15556
FEWEST_STEPS = 50  # a shorter run says nothing about an optimizer: that is not much more than its warm-up
ABLATIONS = ("mean_matched", "reversed", "shuffled")


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
    def on_gpu(self) -> bool:
        """Whether its runs train on a GPU: all on the same one."""
        import torch

        device = self.run.get("compute", {}).get("device")
        return torch.cuda.is_available() if device is None else str(device).startswith("cuda")

    @property
    def spaces(self) -> dict[str, Space]:
        """What each arm that is tuned may try."""
        return {arm.name: arm.space for arm in self.arms if arm.tuned}

    @property
    def configs(self) -> list[Config]:
        """A configuration of every arm, with a value for everything that is tuned."""
        return [make_config(self.config(arm.example, steps=1)) for arm in self.arms]

    @property
    def taken(self) -> dict[str, Taken]:
        """By arm that is not tuned itself, what it takes."""
        return {arm.name: Taken(arm.setting_of, arm.lr_times, arm.lr) for arm in self.arms if not arm.tuned}

    @property
    def roles(self) -> dict[str, Roles]:
        """The searches of arms that have one."""
        return {arm.name: arm.roles for arm in self.arms if arm.roles}

    def needed(self, done: Losses) -> list[Trial]:
        """The trials that can be started now; none when the study is complete."""
        return needed(self.spaces, self.baseline, self.seed_numbers, done, self.horizons, self.taken, self.roles)

    def setting(self, name: str, done: Losses) -> Setting | None:
        """The best setting of an arm so far, None where every run that it rests on diverged, or there is none yet."""
        of = self.arm(self.tuned(name))
        if of.tuned and all(math.isinf(loss) for loss in tried(of.name, done).values()):
            return None
        return chosen(name, done, self.taken, self.roles)

    def search(self, name: str, done: Losses) -> Search | None:
        """How far the search of an arm is, None where it has none, or what it starts from is not tuned yet."""
        of = self.tuned(name)
        if name not in self.roles or (of in self.spaces and next_of_arm(of, self.spaces[of], done)):
            return None
        return searched(name, done, self.taken, self.roles)

    def tuned(self, name: str) -> str:
        """The arm that is tuned itself or has its learning rate, and whose setting this one takes in the end."""
        of = self.arm(name).setting_of
        return self.tuned(of) if of else name

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def config(self, trial: Trial, steps: int) -> dict[str, Any]:
        """The configuration of one run of `steps` at horizon 1."""
        arm = self.arm(trial.arm)
        given = {**self.run, "seed": trial.seed}
        given["optimizer"] = {**self.run.get("optimizer", {}), **arm.optimizer}
        given["schedule"] = {**self.run.get("schedule", {}), "steps": max(1, round(steps * trial.horizon))}
        given["compute"] = {**self.run.get("compute", {}), "threads": self.threads}
        given = with_settings(given, arm.settings)
        return with_settings(given, plain(trial.setting))


def make_study(given: Mapping[str, Any]) -> Study:
    """The study that is meant.

    Args:
        given: as TOML gives it, with the keys of `STUDY_KEYS` and, for an arm that is a table, of `ARM_KEYS`.

    Raises:
        ValueError: what cannot be meant, or an arm that cannot be built.
    """
    for key in given:
        if key not in STUDY_KEYS:
            raise ValueError(f"a study has no {key!r}{nearest(key, STUDY_KEYS)}; it has {', '.join(STUDY_KEYS)}")
    named = given.get("arms", ())
    tables = dict(named) if isinstance(named, Mapping) else {name: {} for name in _unique(named)}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ValueError(f"arm {name!r}: expected a table, got {table!r}")
    if given.get("ablations"):
        tables |= _ablations(tables)
    run = _run_of(given)
    arms = [make_arm(name, table, given) for name, table in tables.items()]
    arms = [arm.started(run) for arm in with_taken(arms)]
    searches = {arm.name: arm.roles for arm in arms}
    arms = [replace(arm, takes=searches.get(arm.setting_of)) for arm in arms]
    if len(arms) < 2:
        raise ValueError(f"a comparison needs two arms or more, got {[arm.name for arm in arms]}")
    names = [arm.name for arm in arms]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two arms are the same: {', '.join(sorted(doubled))}")
    baseline = called(given.get("baseline", names[0]), names, "the baseline")
    seeds = given.get("seeds", 3)
    if not isinstance(seeds, int) or seeds < 2:
        raise ValueError(f"seeds must be 2 or more, got {seeds!r}: with one nothing can be said about chance")
    if seeds >= min(SEEDS):
        raise ValueError(f"seeds must be below {min(SEEDS)}, got {seeds}: from there on they are those of searches")
    margin = given.get("margin", 0.01)
    if not isinstance(margin, (int, float)) or not 0 < margin < math.inf:
        raise ValueError(f"margin must be a number of nats above 0, got {margin!r}")
    tokens, ratio = _budget_of(given)
    horizons = given.get("horizons", HORIZONS)
    if not numbers(horizons) or 1 in horizons or len({*horizons}) < len(horizons):
        raise ValueError(f"horizons must be different shares of the tokens above 0, other than 1, got {horizons!r}")
    name, horizons = given.get("name", "study"), tuple(horizons)
    if not isinstance(name, str):
        raise ValueError(f"name must be text, got {name!r}")
    study = Study(name, run, tuple(arms), baseline, seeds, tokens, ratio, float(margin), horizons, given)
    for arm in arms:
        try:
            make_config(study.config(arm.example, steps=1))
        except ValueError as error:
            source = f" with the setting of {arm.setting_of}" if arm.setting_of else ""
            raise ValueError(f"arm {arm.name!r}{source}: {error}") from None
    return study


def _budget_of(given: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """Tokens of a run, or their ratio to the usual ones."""
    tokens, ratio = given.get("tokens"), given.get("ratio")
    if (tokens is None) == (ratio is None):
        raise ValueError("the budget of a run is tokens = N, or ratio = X (times 20 per parameter); give one of them")
    if not (positive(ratio) if tokens is None else isinstance(tokens, int) and positive(tokens)):
        raise ValueError(f"the budget of a run must be above 0, got {tokens if ratio is None else ratio!r}")
    return tokens, ratio


def _ablations(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The arms that `ablations` adds: those of every arm with a block_lr that is none itself, and is not there yet."""
    found: dict[str, Any] = {}
    there = {name_of(name, table) for name, table in tables.items()}
    for name, table in tables.items():
        arm = parse_optimizer(table.get("name", name))
        block_lr = arm.get("block_lr")
        if block_lr is None or isinstance(make_block_lr(block_lr), Ablation):
            continue
        for kind in ABLATIONS:
            spelled = arm_name({**arm, "block_lr": f"{kind}({block_lr})"})
            found |= {f"{name}, {kind}": {**table, "name": spelled}} if "name" in table else {spelled: table}
    return {name: table for name, table in found.items() if name not in there}


def _run_of(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What all runs share. Raises ValueError where it says what every run has of its own."""
    run = table_of(given, "run")
    for name in ("optimizer", "schedule", "compute", "checkpoint", "log"):
        table_of(run, name, "run.")
    for key, instead in OWN.items():
        table, _, last = key.rpartition(".")
        if last in (run.get(table, {}) if table else run):
            raise ValueError(f"run.{key} is not shared by the runs of a study; say {instead}")
    return run


def _unique(names: Any) -> list[str]:
    if not isinstance(names, Sequence) or isinstance(names, str) or any(not isinstance(name, str) for name in names):
        raise ValueError(f"arms must be a list of names, or a table, got {names!r}")
    if doubled := {name for name in names if list(names).count(name) > 1}:
        raise ValueError(f"two arms are the same: {', '.join(sorted(doubled))}")
    return list(names)
