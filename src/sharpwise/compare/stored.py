"""The study of a folder: that which is stored there, what it may go on with, and what only its model knows."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharpwise.arms import arm_name
from sharpwise.compare.budget import tokens_of
from sharpwise.compare.roles import LR
from sharpwise.compare.study import FEWEST_STEPS, Arm, Study, make_study
from sharpwise.model_facts import count_parameters
from sharpwise.train.build import Built, build
from sharpwise.train.code import confirm_code
from sharpwise.train.config_file import make_config, read_given


def open_study(given: Mapping[str, Any] | None, folder: Path, *, trust_code: bool = False) -> Study:
    """The study of a folder: that which is stored there, with the arms and seeds that `given` adds.

    Args:
        given: as `make_study` takes it; None goes on with the stored study.
        folder: of the study.
        trust_code: the stored study may name code to import, `module:function` for its models, `module:class` for an
            optimizer; one in `given` may in any case.

    Raises:
        ValueError: `given` contradicts it; or there is none and `given` is None; or a search over types that the model
            lacks, or with too few runs for them.
    """
    path = folder / "study.toml"
    stored = make_study(read_given(path, "study")) if path.exists() else None
    if given is None:
        if stored is None:
            raise ValueError(f"{folder} holds no study to go on with; name arms, or a study file")
        confirm_code(stored.configs, path, trust_code)
        return stored
    study = _with_types(make_study(given))
    if stored is not None and (lines := differences(stored, study)):
        raise ValueError(f"{folder} holds another study:\n  " + "\n  ".join(lines) + "\nName another folder with --out")
    return study


def extends(folder: Path, given: Mapping[str, Any]) -> bool:
    """Whether the folder holds that study, perhaps with more arms or seeds."""
    path = folder / "study.toml"
    return path.exists() and not differences(make_study(given), make_study(read_given(path, "study")))


def _with_types(study: Study) -> Study:
    """The same with the types of its model for every search. Raises ValueError for one that the model lacks."""
    if not study.roles:
        return study
    segments = build_arms(study, [study.arm(study.baseline)]).optimizer.blocks.segments
    tables = dict(study.given["arms"])  # in the order of the study
    for name, arm in zip(tables, study.arms, strict=False):
        if arm.roles:
            try:
                found = arm.roles.of_model(segments)
                tables[name] = {**tables[name], "types": list(found.types)}
                if found.lr_only:
                    tables[name]["lr_only"] = list(found.lr_only)
            except ValueError as error:
                raise ValueError(f"arm {arm.name!r}: {error}") from None
    return make_study({**study.given, "arms": tables})


def build_arms(study: Study, arms: Collection[Arm]) -> Built:
    """Build each of these once, so that what cannot be built is found before anything is trained.

    Returns:
        That of the baseline, or else of the first one.

    Raises:
        ValueError: with the name of the arm.
    """
    found: Built | None = None
    for arm in sorted(arms, key=lambda arm: arm.name != study.baseline):
        given = study.config(arm.example, steps=FEWEST_STEPS if found is None else _steps(study, found))
        if found is None and study.tokens:
            del given["schedule"]["steps"]
            given["schedule"]["tokens"] = study.tokens
        try:
            built = build(make_config(given))
        except (ValueError, TypeError) as error:
            raise ValueError(f"arm {arm.name!r} cannot be built: {error}") from error
        found = found or built
    assert found is not None
    return found


def _steps(study: Study, built: Built) -> int:
    """Of a run, as what a block_lr does when depends on them. Of too few `work_out` speaks."""
    tokens = tokens_of(study, count_parameters(built.model)[1])
    return max(FEWEST_STEPS, tokens // built.plan.tokens_per_step)


def differences(stored: Study, wanted: Study) -> list[str]:
    """What a stored study cannot go on with, a line each. Arms and seeds may be added, and runs to a search."""
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
        elif _as_before(names[arm.name], arm) != arm:
            lines.append(f"arm {arm.name}: the study has {_said(arm)}, now it is {_said(names[arm.name])}")
    return lines


def _as_before(arm: Arm, stored: Arm) -> Arm:
    """The arm, with no more runs for its search than the stored one."""
    if arm.roles is None or stored.roles is None or arm.roles.most < stored.roles.most:
        return arm
    return replace(arm, roles=replace(arm.roles, runs=stored.roles.runs))


def _said(arm: Arm) -> str:
    space, roles = arm.space, arm.roles
    tuned = f"lrs {list(space.lrs)}, most {space.most}, search {dict(space.search)}"
    how = tuned if arm.tuned else f"setting_of {arm.source}" if arm.setting_of else f"lr {arm.lr:g}"
    searched = f", a search of {roles.most} runs over {', '.join(roles.types)}" if roles else ""
    if roles and roles.of != (LR,):
        searched += f" of {', '.join(roles.of)} from {dict(roles.base)}"
    return f"{arm_name(arm.optimizer)}, {how}, settings {dict(arm.settings)}{searched}"
