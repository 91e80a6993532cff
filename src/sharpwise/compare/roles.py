"""What a search of factors per block type may do: quantities, types, runs; and how factors stand in a configuration."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sharpwise.block_lr import PerRole
from sharpwise.blocks import BlockType, Role, Segment
from sharpwise.compare.rates import RULES
from sharpwise.compare.trial import SETTINGS_OF, Setting
from sharpwise.hints import nearest
from sharpwise.train.code import names_class
from sharpwise.train.config import OptimizerConfig

SEEDS = (1001, 1002)
BLOCK_LR = "optimizer.block_lr"
LR, DECAY, BETA2 = "lr", "weight_decay", "beta2"
OF = {LR: "the learning rate", DECAY: "weight decay", BETA2: "1 - beta2"}
"""The quantities that may have factors."""
KEYS = ("runs", "types", "of", "lr_only")
"""What an arm with `tune = "roles"` may say besides."""
Exponents = Mapping[str, Mapping[str, int]]
"""By quantity and type, the half powers of two of its factor."""


@dataclass(frozen=True)
class Roles:
    """What a search may do.

    Args:
        types: block types, roles or globs, as `PerRole` takes them, in the order of a round; () until the model is
            known, which then gives its own.
        runs: at most; 0 for twice those that the first rounds may take.
        margin: nats per token, the least mean gain of a step that is taken.
        of: the quantities, in their order.
        lr_only: types that are parts of parameters: they have a factor on the learning rate at most.
        base: weight decay and betas of the optimizer, for what a tuned setting does not say.
    """

    types: tuple[str, ...] = ()
    runs: int = 0
    margin: float = 0.0
    of: tuple[str, ...] = (LR,)
    lr_only: tuple[str, ...] = ()
    base: Setting = ()

    def types_of(self, of: str) -> tuple[str, ...]:
        """The types that have a factor on a quantity."""
        return tuple(name for name in self.types if of == LR or name not in self.lr_only)

    @property
    def least(self) -> int:
        """Runs that try every type whatever comes out; as many as a search takes in which nothing wins."""
        return len(SEEDS) * (1 + sum(2 * len(self.types_of(of)) for of in self.of))

    @property
    def most(self) -> int:
        """Runs at most."""
        return self.runs or len(SEEDS) * (1 + sum(4 * len(self.types_of(of)) for of in self.of))

    def most_before(self, number: int) -> int:
        """Runs at most before those kept back for quantities after this one, by its place in `of`."""
        return self.most - len(SEEDS) * sum(2 * len(self.types_of(of)) for of in self.of[number + 1 :])

    @property
    def said(self) -> str:
        """What has a factor, in words."""
        if self.of == (LR,):
            return f"a factor for each of {', '.join(self.types)}"
        parts = [f"on {of} for each of {', '.join(self.types_of(of))}" for of in self.of]
        return f"a factor {'; '.join(parts)}{f' ({self.left_out})' if self.left_out else ''}"

    @property
    def left_out(self) -> str:
        """Which types have no factor on what groups of parameters have, in words, "" for none."""
        if not self.lr_only:
            return ""
        further = " and ".join(of for of in self.of if of != LR)
        return f"{', '.join(self.lr_only)} left out of {further}: parts of fused parameters, which have one for all"

    # -- with a model --------------------------------------------------------------------------------------------------

    def of_model(self, segments: Sequence[Segment]) -> "Roles":
        """The same with the types of a model, where none were said.

        Raises:
            ValueError: a type that the model lacks, that has no block of its own, or of whose parameters it is a part
                where they are to have settings; too few runs.
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
        if self.of != (LR,):
            names = {number: name for name, number in numbers.items()}
            inside: dict[str, dict[str, None]] = {}
            for segment, number in zip(segments, held, strict=True):
                inside.setdefault(segment.name, {})[names.get(number, "others")] = None
            fused = {name: (parameter, own) for parameter, own in inside.items() if len(own) > 1 for name in own}
            lr_only = self.lr_only if self.types else tuple(name for name in types if name in fused)
            found = replace(found, lr_only=lr_only)
            found._check_whole(fused)
        if found.runs and found.runs < found.least:
            count = found.least // len(SEEDS) - 1
            raise ValueError(
                f"runs must be {found.least} or more, got {self.runs}: a search over {', '.join(types)} takes "
                f"{len(SEEDS)} for the uniform rate and up to {2 * len(SEEDS)} to try each of the {count // 2}"
                f"{'' if self.of == (LR,) else ' factors'}; give more runs, or name fewer types"
            )
        return found

    def _check_whole(self, fused: Mapping[str, tuple[str, Mapping[str, None]]]) -> None:
        """Raise ValueError where a part of a parameter would need settings of its own.

        Args:
            fused: by type a parameter of which it is a part, with all types that it holds.
        """
        needs = f"{' and '.join(of for of in self.of if of != LR)} can differ between whole parameters only"
        whole = [name for name in self.types if name not in self.lr_only]
        if not whole:
            raise ValueError(
                f"of: {needs}, and all of {', '.join(self.types)} are parts of fused ones; search {LR} alone, or name "
                "parameters by glob as types"
            )
        for name in whole:
            if name in fused:
                parameter, own = fused[name]
                others = " and ".join(other for other in own if other != name)
                raise ValueError(
                    f"types: {name!r} shares {parameter} with {others}, and {needs}; leave it out, name the parameter "
                    f"by a glob in place of its types ({parameter!r}), or say lr_only = [{name!r}] in a study file"
                )

    # -- in a configuration --------------------------------------------------------------------------------------------

    def setting(self, start: Setting, at: Exponents, every: bool = False) -> Setting:
        """A setting with these factors; a quantity in which all are 1 is left out, unless `every` one is spelled."""
        known = dict((*self.base, *start))
        said: list[tuple[str, Any]] = []
        settings: dict[str, dict[str, Any]] = {}
        for of in self.of:
            powers = at[of]
            if not every and not any(powers.values()):
                continue
            if of == LR:
                said.append((BLOCK_LR, str(PerRole({name: factor(power) for name, power in powers.items()}))))
                continue
            for name, power in powers.items():
                settings.setdefault(name, {}).update([_value(of, power, known)])
        if settings:
            said.append((SETTINGS_OF, tuple((name, tuple(own.items())) for name, own in settings.items())))
        return (*start, *said)

    @property
    def none(self) -> dict[str, dict[str, int]]:
        """Exponents of a search that has taken nothing."""
        return {of: dict.fromkeys(self.types_of(of), 0) for of in self.of}

    def allows(self, start: Setting, of: str, power: int) -> bool:
        """Whether an optimizer takes the value with this factor: beta2 is in [0, 1)."""
        if of != BETA2:
            return True
        beta2 = _value(of, power, dict((*self.base, *start)))[1][1]
        return 0 <= beta2 < 1

    def starting_at(self, own: OptimizerConfig, search: Mapping[str, Sequence[Any]]) -> "Roles":
        """The same from the values of an optimizer.

        Args:
            own: its configuration.
            search: what is tuned of it before, by dotted key.

        Raises:
            ValueError: it has no such quantity, one of 0, or several already.
        """
        if self.of == (LR,):
            return self
        if own.settings_of:
            raise ValueError(
                f"a search of {' and '.join(of for of in self.of if of != LR)} starts at one value for all blocks, and "
                f"its optimizer has settings_of; leave that out"
            )
        base: list[tuple[str, Any]] = []
        if DECAY in self.of:
            decay = own.options.get(DECAY, 0.0)
            if not all(value > 0 for value in (decay, *search.get(f"optimizer.{DECAY}", ()))):
                raise ValueError(
                    f"of: a weight decay of 0 has nothing to multiply; give {own.name} one above 0, as with --set "
                    f"optimizer.{DECAY}=0.1 (of a study file settings.'optimizer.{DECAY}'), or leave {DECAY} out"
                )
            base.append((f"optimizer.{DECAY}", float(decay)))
        if BETA2 in self.of:
            base.append(("optimizer.betas", tuple(own.options["betas"])))
        return replace(self, base=tuple(base))


def _value(of: str, power: int, known: Mapping[str, Any]) -> tuple[str, Any]:
    """The setting of a group in which a quantity has the factor of a half power of two, to three digits."""
    if of == DECAY:
        decay = known[f"optimizer.{DECAY}"]
        return DECAY, float(f"{decay * factor(power):.3g}") if power else decay
    beta1, beta2 = known["optimizer.betas"]
    share = float(f"{(1 - beta2) * factor(power):.3g}")
    return "betas", (beta1, float(f"{1 - share:.12g}") if power else beta2)


def factor(power: int) -> float:
    """The factor of a half power of two, to three digits: what a setting says.

    >>> [factor(power) for power in (-3, -2, -1, 0, 1, 2, 3)]
    [0.354, 0.5, 0.707, 1.0, 1.41, 2.0, 2.83]
    """
    return float(f"{math.sqrt(2) ** power:.3g}")


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
    runs, types, of, lr_only = (table.get(key, default) for key, default in zip(KEYS, (0, (), (LR,), ()), strict=True))
    if not isinstance(runs, int) or isinstance(runs, bool) or ("runs" in table and runs < 1):
        raise ValueError(f"runs must be a whole number above 0, got {runs!r}")
    if not _names(types) or ("types" in table and not types):
        raise ValueError(f"types must be different block types or roles, such as ['Emb', 'FFN'], got {types!r}")
    if not _names(of) or not of or not set(of) <= set(OF):
        wrong = [name for name in of if name not in OF] if _names(of) else []
        hint = nearest(wrong[0], OF) if wrong else ""
        raise ValueError(f"of must be some of {', '.join(OF)}, each once, got {of!r}{hint}")
    if not _names(lr_only) or not set(lr_only) <= set(types):
        raise ValueError(f"lr_only must be some of types, got {lr_only!r} of {list(types)}")
    if BETA2 in of and getattr(RULES[optimizer["name"]], "second_moment", None) is None:
        others = ", ".join(name for name, rule in RULES.items() if getattr(rule, "second_moment", None))
        raise ValueError(
            f"of: {optimizer['name']} has no second moment, whose {BETA2} could differ by type; leave {BETA2} out, or "
            f"take one of {others}"
        )
    return Roles(tuple(types), runs, margin, tuple(of), tuple(lr_only))


def _names(value: Any) -> bool:
    """Whether it is a list of different texts."""
    listed = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, str) for one in value)
    return listed and len(set(value)) == len(value)
