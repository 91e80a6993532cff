"""What a study compares: its arms, what all its runs share, and how much it may spend."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sharpwise.arms import arm_name
from sharpwise.block_lr import Ablation, make_block_lr
from sharpwise.compare.keys import ARM_KEYS, STUDY_KEYS
from sharpwise.compare.rates import middle_rate
from sharpwise.compare.role_search import Search
from sharpwise.compare.roles import LR, SEEDS, Roles, read_roles
from sharpwise.compare.trial import Losses, Setting, Trial, plain
from sharpwise.compare.tuning import HORIZONS, Space, chosen, needed, next_of_arm, searched, tried
from sharpwise.hints import nearest
from sharpwise.train.code import parse_optimizer
from sharpwise.train.config import Config
from sharpwise.train.config_file import make_config, set_keys

TOKENS_PER_PARAMETER = 20  # Training Compute-Optimal Large Language Models, arXiv 2203.15556
FEWEST_STEPS = 50  # a shorter run says nothing about an optimizer: that is not much more than its warm-up
ABLATIONS = ("mean_matched", "reversed", "shuffled")
# What `run` may not say, as every run has its own; the same for arms, which differ in nothing but the optimizer and its
# schedule: another model, text, batch or number of steps would be another comparison.
_OWN = {
    "seed": "seeds = N",
    "optimizer.name": "arms",
    "optimizer.block_lr": "arms, as in adamw+blockwise",
    "optimizer.lr": "lrs",
    "schedule.steps": "tokens or ratio",
    "schedule.tokens": "tokens or ratio",
}
_OF_ARMS = ("optimizer.", "schedule.")


@dataclass(frozen=True)
class Arm:
    """One optimizer of the comparison; `settings` by dotted key are those besides what `space` tunes.

    `setting_of` is the arm whose tuned setting it takes, "" where it is tuned itself; `space` is then that one's. With
    `roles` the factors of its block types are searched from there on; `takes`: of the arm that it takes from.
    """

    name: str
    optimizer: Mapping[str, Any]
    space: Space
    settings: Mapping[str, Any] = field(default_factory=dict)
    setting_of: str = ""
    roles: Roles | None = None
    takes: Roles | None = field(default=None, compare=False)

    @property
    def example(self) -> Trial:
        """A trial with a value for everything that is tuned, to see whether the arm can be built."""
        first = {"optimizer.lr": self.space.lrs[0], **{key: values[0] for key, values in self.space.search.items()}}
        setting = tuple(first.items())
        if (roles := self.roles or self.takes) and roles.types:
            setting = roles.setting(setting, roles.none, every=True)
        return Trial(self.name, "tune", setting, 0)

    def started(self, run: Mapping[str, Any]) -> "Arm":
        """The same with a search that knows the values of the optimizer that it starts from."""
        if self.roles is None or self.roles.of == (LR,):
            return self
        given = _with({"optimizer": {**run.get("optimizer", {}), **self.optimizer}}, self.settings)
        try:
            own = make_config({"optimizer": given["optimizer"]}).optimizer
            return replace(self, roles=self.roles.starting_at(own, self.space.search))
        except ValueError as error:
            raise ValueError(f"arm {self.name!r}: {error}") from None


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
        return {arm.name: arm.space for arm in self.arms if not arm.setting_of}

    @property
    def configs(self) -> list[Config]:
        """A configuration of every arm, with a value for everything that is tuned."""
        return [make_config(self.config(arm.example, steps=1)) for arm in self.arms]

    @property
    def taken(self) -> dict[str, str]:
        """By arm that is not tuned itself, the one whose setting it takes."""
        return {arm.name: arm.setting_of for arm in self.arms if arm.setting_of}

    @property
    def roles(self) -> dict[str, Roles]:
        """The searches of arms that have one."""
        return {arm.name: arm.roles for arm in self.arms if arm.roles}

    def needed(self, done: Losses) -> list[Trial]:
        """The trials that can be started now; none when the study is complete."""
        return needed(self.spaces, self.baseline, self.seed_numbers, done, self.horizons, self.taken, self.roles)

    def setting(self, name: str, done: Losses) -> Setting | None:
        """The best setting of an arm so far, None where every run that it rests on diverged, or there is none yet."""
        if all(math.isinf(loss) for loss in tried(self.tuned(name), done).values()):
            return None
        return chosen(name, done, self.taken, self.roles)

    def search(self, name: str, done: Losses) -> Search | None:
        """How far the search of an arm is, None where it has none, or what it starts from is not tuned yet."""
        of = self.tuned(name)
        if name not in self.roles or next_of_arm(of, self.spaces[of], done):
            return None
        return searched(name, done, self.taken, self.roles)

    def tuned(self, name: str) -> str:
        """The arm that is tuned itself, and whose setting this one takes in the end."""
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
        given = _with(given, arm.settings)
        return _with(given, plain(trial.setting))


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
    arms = [_make_arm(name, table, given) for name, table in tables.items()]
    arms = [arm.started(run) for arm in _with_taken(arms)]
    searches = {arm.name: arm.roles for arm in arms}
    arms = [replace(arm, takes=searches.get(arm.setting_of)) for arm in arms]
    if len(arms) < 2:
        raise ValueError(f"a comparison needs two arms or more, got {[arm.name for arm in arms]}")
    names = [arm.name for arm in arms]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two arms are the same: {', '.join(sorted(doubled))}")
    baseline = _called(given.get("baseline", names[0]), names, "the baseline")
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
    if not _numbers(horizons) or 1 in horizons or len({*horizons}) < len(horizons):
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
    if not (_positive(ratio) if tokens is None else isinstance(tokens, int) and _positive(tokens)):
        raise ValueError(f"the budget of a run must be above 0, got {tokens if ratio is None else ratio!r}")
    return tokens, ratio


def _make_arm(name: str, table: Mapping[str, Any], given: Mapping[str, Any]) -> Arm:
    """An arm by itself; that its `setting_of` is another one shows when all are known."""
    for key in table:
        if key not in ARM_KEYS:
            allowed = ", ".join(ARM_KEYS)
            raise ValueError(f"arm {name!r} has no {key!r}{nearest(key, ARM_KEYS)}; it may have {allowed}")
    optimizer = parse_optimizer(table.get("name", name))
    settings = {**_table(given, "settings"), **_table(table, "settings", f"arm {name!r}: ")}
    middle = middle_rate(optimizer, settings) / (3 if optimizer.get("block_lr") else 1)
    lrs = table.get("lrs", given.get("lrs", [middle / math.sqrt(10), middle, middle * math.sqrt(10)]))
    rounded = tuple(sorted({float(f"{lr:.3g}") for lr in lrs})) if _numbers(lrs) else ()
    if len(rounded) < 3:
        raise ValueError(f"arm {name!r}: lrs must be three or more learning rates above 0, got {lrs!r}")
    search = {**_table(given, "search"), **_table(table, "search", f"arm {name!r}: ")}
    for key in (*settings, *search):
        if key in _OWN or not key.startswith(_OF_ARMS):
            say = f"say {_OWN[key]}" if key in _OWN else f"arms differ in {' and '.join(_OF_ARMS)}* alone"
            raise ValueError(f"arm {name!r}: {key} is no setting of an arm; {say}")
    for key, values in search.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ValueError(f"arm {name!r}: search.{key!r} must be a list of values to try, got {values!r}")
    most = given.get("most", Space.most)
    if not isinstance(most, int) or most < len(rounded):
        raise ValueError(
            f"most must be a whole number, at least the {len(rounded)} learning rates to begin with: {most!r}"
        )
    space = Space(rounded, {key: tuple(map(_frozen, values)) for key, values in search.items()}, most=most)
    setting_of = table.get("setting_of", "")
    if not isinstance(setting_of, str):
        raise ValueError(f"arm {name!r}: setting_of must be the name of another arm, got {setting_of!r}")
    if own := [key for key in ("lrs", "search") if setting_of and key in table]:
        raise ValueError(
            f"arm {name!r} takes the setting of {setting_of!r} and has {' and '.join(own)} of its own, which it would "
            "not try; leave out one of them"
        )
    try:
        roles = read_roles(table, optimizer, given.get("margin", 0.01))
    except ValueError as error:
        raise ValueError(f"arm {name!r}: {error}") from None
    return Arm(_name_of(name, table), optimizer, space, settings, setting_of, roles)


def _name_of(name: str, table: Mapping[str, Any]) -> str:
    """What an arm is called: as its optimizer is spelled, or where the table names that, as the study says."""
    if "name" not in table:
        return arm_name(parse_optimizer(name))
    own = arm_name(parse_optimizer(table["name"]))
    if not name.strip() or not name.isprintable():
        raise ValueError(f"an arm needs a name that can be shown, got {name!r}")
    try:
        meant = arm_name(parse_optimizer(name))
    except ValueError:  # it is called as nothing else is
        return name
    if meant != own:
        raise ValueError(f"arm {name!r}: its optimizer is {own}, and {meant} is another one; call the arm otherwise")
    return own


def _with_taken(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """The arms, those that take the setting of another with the space of the one that is tuned in the end."""
    by_name = {arm.name: arm for arm in arms}
    found = []
    for arm in arms:
        chain = [arm]
        while chain[-1].setting_of:
            what = f"arm {arm.name!r}: setting_of"
            chain.append(by_name[_called(chain[-1].setting_of, by_name, what)])
            if chain[-1] in chain[:-1]:
                way = " -> ".join(one.name for one in chain)
                raise ValueError(f"{what} comes back to where it was: {way}; one of them has to be tuned itself")
        # It takes what a search found, or in the end what is tuned itself.
        of, root = next((one for one in chain[1:] if one.roles), chain[-1]), chain[-1]
        own = {key: value for key, value in arm.settings.items() if value != root.settings.get(key)}
        if twice := [key for key in root.space.search if key in own]:
            raise ValueError(
                f"arm {arm.name!r} takes the setting of {root.name}, which tunes {', '.join(twice)}, and sets that "
                "itself; leave it out of its settings"
            )
        if of is not arm and arm.roles and of.roles:
            raise ValueError(
                f"arm {arm.name!r} takes the setting of {of.name}, which has searched factors, and would search them "
                'again; leave out its tune = "roles"'
            )
        found.append(arm if of is arm else replace(arm, space=root.space, setting_of=of.name))
    return tuple(found)


def _called(name: Any, names: Collection[str], what: str) -> str:
    """The arm that is meant by a name of it. Raises ValueError, with `what` names it, where there is none."""
    found = name if name in names else arm_name(parse_optimizer(name))
    if found not in names:
        raise ValueError(f"{what} {name!r} is no arm{nearest(found, names)}; arms are {', '.join(names)}")
    return found


def _ablations(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The arms that `ablations` adds: those of every arm with a block_lr that is none itself, and is not there yet."""
    found: dict[str, Any] = {}
    there = {_name_of(name, table) for name, table in tables.items()}
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
    run = _table(given, "run")
    for name in ("optimizer", "schedule", "compute", "checkpoint", "log"):
        _table(run, name, "run.")
    for key, instead in _OWN.items():
        table, _, last = key.rpartition(".")
        if last in (run.get(table, {}) if table else run):
            raise ValueError(f"run.{key} is not shared by the runs of a study; say {instead}")
    return run


def _table(given: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    found = given.get(key, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}{key}: expected a table, got {found!r}")
    return found


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**63


def _numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(map(_positive, values))


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
