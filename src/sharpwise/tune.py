"""What to give an optimizer, found by training with it: `from sharpwise import tune`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharpwise.arms import arm_name
from sharpwise.block_lr import PerRole, make_block_lr
from sharpwise.installing import needs
from sharpwise.train.code import parse_optimizer
from sharpwise.train.config import OptimizerConfig


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        lr: the best uniform learning rate, at which the factors were searched; NaN where every one diverged.
        block_lr: the factors, for `block_lr=` of an optimizer; `str()` of it is the spelling for configurations. None
            where no step was better than factors of 1.
        settings_of: weight decay and betas by type, for `sharpwise.param_groups`; {} where none was searched, or no
            step was better.
        result: of the study, as in its `result.json`: its `arms` are the uniform rate and the factors, the latter with
            `search` (every step) and `difference` (on fresh seeds, nats per token).
        page: `index.html`.
    """

    lr: float
    block_lr: PerRole | None
    settings_of: Mapping[str, Mapping[str, Any]]
    result: Mapping[str, Any]
    page: Path


def roles(
    optimizer: str = "adamw",
    *,
    run: Mapping[str, Any],
    tokens: int,
    folder: str | Path,
    types: Sequence[str] = (),
    of: Sequence[str] = ("lr",),
    runs: int | None = None,
    lrs: Sequence[float] = (),
    settings: Mapping[str, Any] | None = None,
    seeds: int = 3,
    margin: float = 0.01,
    jobs: int = 1,
) -> Tuned:
    """The factors that the block types of a model want on the learning rate, or more, by a search around the best rate.

    The same as `sharpwise compare OPTIMIZER --tune roles`. The learning rate is tuned first. Then a step multiplies the
    factor of one type by 2 or 1/2, later by the root of 2 or its inverse; it is taken if it ends lower with both of two
    seeds. In the end the factors and the uniform rate train on fresh seeds. Called again, or after it was stopped, it
    goes on where it was.

    Args:
        optimizer: an arm without a block_lr, such as "adamw" or "muon".
        run: what all runs share, as `sharpwise train` takes it: `model`, `data`, `batch`, ...
        tokens: of every run.
        folder: for the study and its page, made if need be.
        types: block types or roles, such as "Emb" or "q"; by default all that the model has, `pos_emb` by itself.
        of: what the factors are on, one after the other: "lr", "weight_decay" and "beta2" (a factor of 1 - beta2). The
            latter two are settings of whole parameters: types that are a part of some, as in a joint matrix of
            queries, keys and values, are left out of them by default, and refused where `types` says them.
        runs: of the search at most, those of the learning rate and the last ones not counted; by default twice those
            of its first round.
        lrs: three learning rates or more to begin with.
        settings: of the optimizer and its schedule, by dotted key: {"optimizer.weight_decay": 0.1}.
        seeds: on which factors and uniform rate are compared in the end, 2 or more.
        margin: nats per token, the least gain for which a step is taken.
        jobs: runs at a time. Other than 1 needs a script that guards its entry point, as processes are spawned.

    Raises:
        ValueError: what cannot be meant; a type that the model lacks, with those that it has; a weight decay of 0, or
            an optimizer without second moment, where these are to have factors; too few runs, with how many it takes;
            another study in that folder.
        ImportError: what comparisons need is not installed.
    """
    with needs("a search", "compare"):
        from sharpwise.compare.report.page import write_study_page
        from sharpwise.compare.results import results
        from sharpwise.compare.runner import run_study
        from sharpwise.compare.stored import open_study
    given = role_study(optimizer, types=types, of=of, runs=runs, table={"lrs": list(lrs)} if lrs else {})
    given |= {"run": run, "tokens": tokens, "seeds": seeds, "margin": margin, "name": Path(folder).name or "roles"}
    if settings:
        given["settings"] = dict(settings)
    folder = Path(folder)
    result = results(run_study(open_study(given, folder), folder, jobs=jobs))
    found = result["arms"][1]
    searched = found["search"] or {}
    block_lr = make_block_lr(searched.get("block_lr") or None)
    assert block_lr is None or isinstance(block_lr, PerRole)
    lr = float("nan") if found["setting"] is None else float(found["setting"]["optimizer.lr"])
    settings_of = OptimizerConfig(settings_of=searched.get("settings_of", {})).groups
    return Tuned(lr, block_lr, settings_of, result, write_study_page(result, folder))


def role_study(
    optimizer: str,
    *,
    types: Sequence[str] = (),
    of: Sequence[str] = ("lr",),
    runs: int | None = None,
    table: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A search as a study: the optimizer, and itself with searched factors at the same learning rate.

    Args:
        optimizer: as an arm.
        types, of, runs: see `roles`.
        table: of the arm that is tuned, such as its `lrs`.
    """
    name = arm_name(parse_optimizer(optimizer))
    search: dict[str, Any] = {"name": name, "setting_of": name, "tune": "roles"}
    if types:
        search["types"] = types if isinstance(types, str) else list(types)
    if tuple(of) != ("lr",):
        search["of"] = of if isinstance(of, str) else list(of)
    if runs is not None:
        search["runs"] = runs
    return {"arms": {name: dict(table or {}), f"{name}, searched": search}, "baseline": name, "horizons": []}
