"""What the arms of a comparison are, in a line each, and which of them are ablations of which."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sharpwise.block_lr import (
    Ablation,
    BlockLR,
    GradientSNR,
    MeanMatched,
    Only,
    Product,
    Reversed,
    Shuffled,
    make_block_lr,
)
from sharpwise.compare.rates import RULES
from sharpwise.compare.report.arms import setting_words
from sharpwise.compare.roles import LR, OF
from sharpwise.compare.study import Arm, Study
from sharpwise.controls import make_control
from sharpwise.report.blocks import names_of_roles

# Per-block learning rates that belong to an optimizer.
OWN: dict[str, type[BlockLR]] = {"sgd-sai": GradientSNR}
# What an ablation does instead, as it stands in "ended 0.1 nats below ...".
INSTEAD: dict[type[Ablation], str] = {
    MeanMatched: "the same learning rate for every block",
    Reversed: "the multipliers in reversed order",
    Shuffled: "the multipliers in another order",
    Only: "the multipliers for some of the blocks alone",
}


def block_lr_of(arm: Arm) -> BlockLR | None:
    """The per-block learning rate of an arm."""
    return make_block_lr(arm.optimizer.get("block_lr"))


def ablations(study: Study) -> Iterator[tuple[Arm, Arm]]:
    """Every arm with each of its ablations, alike in all but that the multipliers are changed; and the first of those
    that differ in the settings of their block_lr alone, with each of the others.
    """
    for i, arm in enumerate(study.arms):
        own = block_lr_of(arm)
        first = not any(_is_variant(own, arm, other) for other in study.arms[:i])
        for j, other in enumerate(study.arms):
            changed = block_lr_of(other)
            ablation = isinstance(changed, Ablation) and changed.of == own and _alike(arm, other)
            if ablation or (first and j > i and _is_variant(own, arm, other)):
                yield arm, other


def _is_variant(own: BlockLR | None, arm: Arm, other: Arm) -> bool:
    """Whether the other arm has other settings of the same kind of block_lr, of one that is no combination."""
    changed = block_lr_of(other)
    single = not isinstance(own, (Ablation, Product))
    return single and type(changed) is type(own) and changed != own and _alike(arm, other)


def _alike(arm: Arm, other: Arm) -> bool:
    return (
        arm.optimizer["name"] == other.optimizer["name"]
        and arm.settings == other.settings
        and arm.space.search == other.space.search
    )


def instead(ablation: Arm) -> str:
    """What the other arm of a pair has instead of the multipliers, in words."""
    changed = block_lr_of(ablation)
    if not isinstance(changed, Ablation):
        return str(changed)
    return INSTEAD.get(type(changed), ablation.name).replace("some of the blocks", _types(changed))


def _types(changed: Ablation) -> str:
    """The blocks that an ablation spares."""
    return " and ".join(changed.types) if isinstance(changed, Only) else ""


# --- definitions -----------------------------------------------------------------------------------------------------


def definitions(study: Study, blocks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """One line for each arm that says what it is.

    Args:
        study: with the arms.
        blocks: with `type`, `role` and under `multipliers` those of every arm by name.
    """
    found, told = {}, set()
    for arm in study.arms:
        optimizer, block_lr = str(arm.optimizer["name"]), block_lr_of(arm)
        known = optimizer in told and block_lr is not None
        text = optimizer if known or optimizer not in RULES else first_line(RULES[optimizer])
        text += ", of another library" * (optimizer not in RULES)
        if optimizer in OWN and not known:
            text += f", with {_lower(first_line(OWN[optimizer]))}"
        if control := make_control(arm.settings.get("optimizer.control", arm.optimizer.get("control"))):
            text += f", with {_lower(first_line(type(control))).replace('`', '')}"
        if block_lr is not None:
            text += f"{' with' if known else ', with'} {_block_lr(block_lr)}"
            if not block_lr.sources:  # else they are measured on the way
                text += ": " + factors([(b["type"], b["role"], b["multipliers"][arm.name]) for b in blocks])
            text += "; a control" * isinstance(block_lr, Ablation)
        roles = arm.roles or (study.arm(arm.setting_of).roles if arm.setting_of else None)
        if roles and LR in roles.of:
            text += ", with a factor for every type of block that a search has found: "
            text += factors([(b["type"], b["role"], b["multipliers"][arm.name]) for b in blocks])
        if roles and (further := [OF[of] for of in roles.of if of != LR]):
            text += f", with {' and '.join(further)} by type of block as a search has found them"
        if own := {key: v for key, v in arm.settings.items() if any(o.settings.get(key) != v for o in study.arms)}:
            text += f"; {setting_words(own)}"
        told.add(optimizer)
        found[arm.name] = f"{'The baseline: ' * (arm.name == study.baseline)}{text}."
    return found


def first_line(kind: type) -> str:
    """What the docstring of a class says in its first line, without the full stop."""
    return (kind.__doc__ or kind.__name__).strip().partition("\n")[0].rstrip(".")


def _block_lr(block_lr: BlockLR) -> str:
    line = first_line(type(block_lr))
    if isinstance(block_lr, Ablation):
        line = line.replace("`of`", str(block_lr.of)).replace("some of the blocks", _types(block_lr))
    return _lower(line)


def _lower(line: str) -> str:
    return line[0].lower() + line[1:]


def factors(blocks: Sequence[tuple[str, str, float]]) -> str:
    """Multipliers by type of block, from the largest down.

    Args:
        blocks: type, role and multiplier of each.

    >>> factors([("Emb", "tok_emb", 10.0), ("Norm", "norm", 1.0), ("Emb", "pos_emb", 1.0), ("FFN", "up", 6.0)])
    'Emb x10, FFN x6, others x1'
    >>> factors([("FFN", "up", 0.5), ("FFN", "up", 1.0), ("Norm", "norm", 1.0)])
    'Norm x1, FFN x0.5 to x1'
    """
    values: dict[str, list[float]] = {}
    for _, role, factor in blocks:
        values.setdefault(role, []).append(factor)
    ranges = {role: ((min(of), max(of)),) for role, of in values.items()}
    names = names_of_roles({role: kind for kind, role, _ in blocks}, ranges)
    by_range: dict[tuple[float, float], dict[str, None]] = {}
    for role, name in names.items():
        by_range.setdefault(ranges[role][0], {})[name] = None
    if len(by_range) == 1:
        return f"{_times(*next(iter(by_range)))} everywhere"
    if len(by_range.get((1.0, 1.0), ())) > 1:
        by_range[1.0, 1.0] = {"others": None}
    return ", ".join(f"{', '.join(by_range[ends])} {_times(*ends)}" for ends in sorted(by_range, reverse=True))


def _times(low: float, high: float) -> str:
    texts = [f"x{low:.3g}", f"x{high:.3g}"]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)
