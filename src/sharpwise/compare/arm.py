"""An arm of a study: an optimizer, what is tuned of it, and whose setting it takes where it is not tuned itself."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sharpwise.arms import arm_name
from sharpwise.compare.keys import ARM_KEYS
from sharpwise.compare.rates import middle_rate
from sharpwise.compare.roles import LR, Roles, read_roles
from sharpwise.compare.trial import Trial
from sharpwise.compare.tuning import Space
from sharpwise.hints import nearest
from sharpwise.train.code import parse_optimizer
from sharpwise.train.config_file import make_config, set_keys

# What `run` may not say, as every run has its own; the same for arms, which differ in nothing but the optimizer and its
# schedule: another model, text, batch or number of steps would be another comparison.
OWN = {
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

    It is tuned, unless `lr` is given, or `setting_of`, the arm whose tuned setting it takes, at `lr_times` its learning
    rate; `space` is then that one's. With `roles` the factors of its block types are searched from there on; `takes`:
    of the arm that it takes from.
    """

    name: str
    optimizer: Mapping[str, Any]
    space: Space
    settings: Mapping[str, Any] = field(default_factory=dict)
    setting_of: str = ""
    lr_times: float = 1.0
    lr: float = 0.0
    roles: Roles | None = None
    takes: Roles | None = field(default=None, compare=False)

    @property
    def tuned(self) -> bool:
        """Whether it has trials of its own, besides those of a search."""
        return not (self.setting_of or self.lr)

    @property
    def source(self) -> str:
        """Of one that is not tuned: what its setting was best for, "" of one that is."""
        times = f" at {self.lr_times:g} times its learning rate" if self.lr_times != 1 else ""
        return "" if self.tuned else f"{self.setting_of or 'another study'}{times}"

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
        given = with_settings({"optimizer": {**run.get("optimizer", {}), **self.optimizer}}, self.settings)
        try:
            own = make_config({"optimizer": given["optimizer"]}).optimizer
            return replace(self, roles=self.roles.starting_at(own, self.space.search))
        except ValueError as error:
            raise ValueError(f"arm {self.name!r}: {error}") from None


def make_arm(name: str, table: Mapping[str, Any], given: Mapping[str, Any]) -> Arm:
    """An arm by itself; that its `setting_of` is another one shows when all are known."""
    for key in table:
        if key not in ARM_KEYS:
            allowed = ", ".join(ARM_KEYS)
            raise ValueError(f"arm {name!r} has no {key!r}{nearest(key, ARM_KEYS)}; it may have {allowed}")
    optimizer = parse_optimizer(table.get("name", name))
    settings = {**table_of(given, "settings"), **table_of(table, "settings", f"arm {name!r}: ")}
    middle = middle_rate(optimizer, settings) / (3 if optimizer.get("block_lr") else 1)
    lrs = table.get("lrs", given.get("lrs", [middle / math.sqrt(10), middle, middle * math.sqrt(10)]))
    rounded = tuple(sorted({float(f"{lr:.3g}") for lr in lrs})) if numbers(lrs) else ()
    if len(rounded) < 3:
        raise ValueError(f"arm {name!r}: lrs must be three or more learning rates above 0, got {lrs!r}")
    search = {**table_of(given, "search"), **table_of(table, "search", f"arm {name!r}: ")}
    for key in (*settings, *search):
        if key in OWN or not key.startswith(_OF_ARMS):
            say = f"say {OWN[key]}" if key in OWN else f"arms differ in {' and '.join(_OF_ARMS)}* alone"
            raise ValueError(f"arm {name!r}: {key} is no setting of an arm; {say}")
    for key, values in search.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ValueError(f"arm {name!r}: search.{key!r} must be a list of values to try, got {values!r}")
    most = given.get("most", Space.most)
    if not isinstance(most, int) or most < len(rounded):
        raise ValueError(
            f"most must be a whole number, at least the {len(rounded)} learning rates to begin with: {most!r}"
        )
    lr_times = _number(name, table, "lr_times", 1.0, "0.5 for half the learning rate of setting_of")
    lr = _number(name, table, "lr", 0.0, "1e-3")
    if (lr or lr_times != 1) and (own := [key for key in ("lrs", "search", "tune") if key in table]):
        raise ValueError(f"arm {name!r} is not tuned, as it has a learning rate; leave out {' and '.join(own)}")
    space = Space(
        (lr,) if lr else rounded,
        {} if lr else {key: tuple(map(_frozen, values)) for key, values in search.items()},
        most=most,
    )
    setting_of = table.get("setting_of", "")
    if bool(setting_of) == bool(lr) and (lr or lr_times != 1):
        raise ValueError(f"arm {name!r}: give lr, or setting_of with lr_times")
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
    return Arm(name_of(name, table), optimizer, space, settings, setting_of, lr_times, lr, roles)


def _number(name: str, table: Mapping[str, Any], key: str, default: float, example: str) -> float:
    if not positive(table.get(key, 1)):
        raise ValueError(f"arm {name!r}: {key} must be a number above 0, such as {example}, got {table[key]!r}")
    return float(table.get(key, default))


def name_of(name: str, table: Mapping[str, Any]) -> str:
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


def with_taken(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """The arms, those that take the setting of another with the space of the one that is tuned in the end."""
    by_name = {arm.name: arm for arm in arms}
    found = []
    for arm in arms:
        chain = [arm]
        while chain[-1].setting_of:
            what = f"arm {arm.name!r}: setting_of"
            chain.append(by_name[called(chain[-1].setting_of, by_name, what)])
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
        times = math.prod(one.lr_times for one in chain[: chain.index(of)])
        found.append(arm if of is arm else replace(arm, space=root.space, setting_of=of.name, lr_times=times))
    return tuple(found)


def called(name: Any, names: Collection[str], what: str) -> str:
    """The arm that is meant by a name of it. Raises ValueError, with `what` names it, where there is none."""
    found = name if name in names else arm_name(parse_optimizer(name))
    if found not in names:
        raise ValueError(f"{what} {name!r} is no arm{nearest(found, names)}; arms are {', '.join(names)}")
    return found


def table_of(given: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    found = given.get(key, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}{key}: expected a table, got {found!r}")
    return found


def positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**63


def numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(map(positive, values))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def with_settings(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with dotted keys on top."""
    result = set_keys(given, [])
    for key, value in settings.items():
        *tables, last = key.split(".")
        at = result
        for table in tables:
            at = at.setdefault(table, {})
        at[last] = list(value) if isinstance(value, tuple) else value
    return result
