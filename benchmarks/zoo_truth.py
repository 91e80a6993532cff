"""What the sources of the zoo's models say of their parameters, read from `zoo_truths`, and compared with a map.

A file has, by model, rules [pattern, truth] over the names of parameters, of which the first that matches counts:

    "q"               all output rows are of this role
    "q k v"           equal parts of the output rows, in this order
    "4:q 1:k 1:v"     parts of these weights
    "2*(q k v)"       the same twice: heads one after the other
    "conv,patch_emb"  either is right, and a third element of the rule gives the reason

A rule `["$name"]` stands for the rules under that name in the same file. `other` in a map is never wrong; where it is
not the truth, the map is not complete. A truth of `other` makes every named role wrong.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sharpwise.blocks import BlockMap, Role, Segment

TRUTHS = Path(__file__).parent / "zoo_truths"
OTHER = "other"
ROLES = {str(role) for role in Role} | {"patch_emb", "conv", "modulation", "rel_pos"}

Part = tuple[int, frozenset[str]]
"""A weight, and the roles that are right."""


@dataclass(frozen=True)
class Rule:
    """A truth of the parameters that match `pattern`; `shared` rules may match none."""

    pattern: str
    truth: str
    shared: bool = False


def models_of(file: str) -> tuple[str, ...]:
    """Names of the models that a file of truths knows."""
    return tuple(name for name in _read(file) if not name.startswith("$"))


def rules_of(file: str, model: str) -> list[Rule]:
    """The rules of a model, those of others put in. Raises ValueError for a rule that is none."""
    tables = _read(file)
    if model not in tables:
        raise ValueError(f"{TRUTHS / file}.json has no model {model!r}; write its truth from its source")
    return list(_rules(tables, model, f"{file}.json: {model}"))


def _read(file: str) -> dict[str, list[list[str]]]:
    tables: dict[str, list[list[str]]] = json.loads((TRUTHS / f"{file}.json").read_text(encoding="utf-8"))
    return tables


def _rules(tables: dict[str, list[list[str]]], name: str, where: str, shared: bool = False) -> Any:
    for item in tables[name]:
        if len(item) == 1 and item[0].startswith("$"):
            if item[0] not in tables:
                raise ValueError(f"{where}: nothing is called {item[0]}")
            yield from _rules(tables, item[0], where, True)
            continue
        if len(item) not in (2, 3):
            raise ValueError(f"{where}: {item} is no rule; expected [pattern, truth] or [pattern, truth, reason]")
        if ("," in item[1]) != (len(item) == 3):
            raise ValueError(f"{where}: {item}: several roles need a reason, and one has none")
        parse(item[1])
        yield Rule(item[0], item[1], shared)


def parse(truth: str) -> list[Part]:
    """The parts of a truth, in order.

    >>> [(weight, sorted(roles)) for weight, roles in parse("2*(3:q 1:k,v)")]
    [(3, ['q']), (1, ['k', 'v']), (3, ['q']), (1, ['k', 'v'])]
    """
    parts: list[Part] = []
    for token in re.findall(r"\d+\*\([^()]*\)|\S+", truth):
        repeated = re.fullmatch(r"(\d+)\*\(([^()]*)\)", token)
        if repeated:
            parts += int(repeated[1]) * parse(repeated[2])
            continue
        weight, _, roles = token.rpartition(":")
        right = frozenset(roles.split(","))
        if right - ROLES or not (weight or "1").isdecimal():
            raise ValueError(f"truth {truth!r}: {token!r} is no part; roles are {', '.join(sorted(ROLES))}")
        parts.append((int(weight or 1), right))
    if not parts:
        raise ValueError("a truth is empty")
    return parts


def rule_for(name: str, rules: Sequence[Rule]) -> Rule | None:
    """The first rule that a parameter matches."""
    return next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)


@dataclass(frozen=True)
class Judged:
    """A parameter whose map is not complete: `wrong` or only without a role. `got`: roles of its rows in order."""

    name: str
    truth: str
    got: str
    wrong: bool


def judge(blocks: BlockMap, rules: Sequence[Rule]) -> list[Judged]:
    """The parameters of a map that are wrong or without a role.

    Raises:
        ValueError: a parameter matches no rule, or a rule no parameter.
    """
    used: set[Rule] = set()
    found: list[Judged] = []
    missed: list[str] = []
    for name in blocks.names():
        rule = rule_for(name, rules)
        if rule is None:
            missed.append(name)
            continue
        used.add(rule)
        judged = compare(name, blocks[name], rule.truth)
        found += [judged] if judged else []
    idle = [rule.pattern for rule in rules if not rule.shared and rule not in used]
    if missed or idle:
        raise ValueError(f"parameters without a truth: {missed}; rules that no parameter takes: {idle}")
    return found


def compare(name: str, segments: Sequence[Segment], truth: str) -> Judged | None:
    """One parameter, row by row; None where it is complete."""
    rows = [OTHER] * segments[0].output_size
    for segment in segments:
        for row in segment.row_index().tolist():
            rows[row] = str(segment.role)
    parts = parse(truth)
    total = sum(weight for weight, _ in parts)
    if len(parts) == 1:
        right = [parts[0][1]] * len(rows)
    elif len(rows) % total == 0:
        right = [roles for weight, roles in parts for _ in range(weight * len(rows) // total)]
    else:  # the map has another dimension for its output
        right = [frozenset((OTHER,))] * len(rows)
    wrong = any(role not in (OTHER, *roles) for role, roles in zip(rows, right, strict=True))
    lacks = any(role == OTHER and OTHER not in roles for role, roles in zip(rows, right, strict=True))
    unfit = len(parts) > 1 and len(rows) % total != 0
    if not (wrong or lacks or unfit):
        return None
    return Judged(name, truth, _runs(rows), wrong)


def _runs(rows: Sequence[str]) -> str:
    """Roles of rows in order, those of equal neighbours once: `q k v`; of many the first."""
    runs = [role for i, role in enumerate(rows) if i == 0 or rows[i - 1] != role]
    return " ".join(runs[:6]) + (" ..." if len(runs) > 6 else "")
