"""What a study has found, as plain values: what the page, the JSON and the CSV show."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from sharpwise.compare.arms import OWN, ablations, block_lr_of, definitions, instead
from sharpwise.compare.budget import expected
from sharpwise.compare.caveats import caveats, not_tested, of_horizons, of_places
from sharpwise.compare.next_step import next_step
from sharpwise.compare.record import read_environment
from sharpwise.compare.role_search import Step
from sharpwise.compare.roles import BLOCK_LR, LR
from sharpwise.compare.runner import StudyState, place_of
from sharpwise.compare.speedup import Speedup, speedup
from sharpwise.compare.statistics import Difference, holm, mean_interval, paired_difference
from sharpwise.compare.storage import losses_of
from sharpwise.compare.study import Arm, Study
from sharpwise.compare.trial import SETTINGS_OF, Setting, Stage, Trial, plain
from sharpwise.compare.tuning import at_edge, tried
from sharpwise.compare.verdict import sentence, verdict
from sharpwise.report.blocks import describe
from sharpwise.train.config_file import as_given, make_config
from sharpwise.train.environment import environment
from sharpwise.train.optimizer import as_code, build_optimizer

Result = dict[str, Any]
LEVEL = 0.95


def results(state: StudyState) -> Result:
    """The result of a study, or what it has found so far, ready for `write_study_page`."""
    study, budget, built = state.study, state.budget, state.first
    arms = [_arm(state, arm) for arm in study.arms]
    _compare(state, arms)
    multipliers = {arm.name: _multipliers(state, arm) for arm in study.arms}
    blocks = [
        {**describe(segment), "multipliers": {name: values[i] for name, values in multipliers.items()}}
        for i, segment in enumerate(built.optimizer.blocks.segments)
    ]
    said = definitions(study, blocks)
    for arm in arms:
        mean = _mean_multiplier(state, multipliers[arm["name"]])
        if _is_measured(study.arm(arm["name"])):
            mean = None
        lr = None if arm["setting"] is None or mean is None else arm["setting"]["optimizer.lr"] * mean
        arm |= {"definition": said[arm["name"]], "mean_multiplier": mean, "mean_lr": lr}
    horizons = [_horizon(state, share) for share in study.horizons]
    done, places = len(state.results), _places(state)
    first = Trial(study.baseline, "tune", (("optimizer.lr", study.arm(study.baseline).space.lrs[0]),), 0)
    shared = as_given(make_config(study.config(first, budget.steps)))
    for name in ("optimizer", "seed"):
        del shared[name]
    result = {
        "format": 1,
        "name": study.name,
        "baseline": study.baseline,
        "margin": study.margin,
        "seeds": list(study.seed_numbers),
        "complete": state.complete,
        "progress": {"done": done, "expected": _expected(state)},
        "budget": {
            "tokens": budget.tokens,
            "steps": budget.steps,
            "tokens_per_step": budget.tokens_per_step,
            "tokens_per_parameter": budget.tokens_per_parameter,
        },
        "model": {
            "name": built.config.model.name,
            "parameters": budget.parameters,
            "non_embedding_parameters": budget.non_embedding_parameters,
            "vocabulary": built.data.vocabulary,
            "context": built.plan.context,
        },
        "data": dict(built.data.about),
        "environment": {k: v for place in places for k, v in place.items()} or environment(built.config),
        "config": shared,
        "arms": arms,
        "ablations": _ablations(state),
        "horizons": horizons,
        "blocks": blocks,
        "caveats": [*caveats(state, arms), *of_places(places), *of_horizons(state, arms, horizons)],
        "not_tested": not_tested(state),
    }
    return {**result, "next": next_step(study, result, state.folder)}


def _expected(state: StudyState) -> int:
    """How many runs there will be: those that there are, where none is missing."""
    done = losses_of(state.results)
    return len(done) if state.complete else max(len(done), sum(expected(state.study, done).values()))


def _arm(state: StudyState, arm: Arm) -> Result:
    losses = losses_of(state.results)
    tuning = tried(arm.name, losses) if arm.tuned else {}
    chosen = state.study.setting(arm.name, losses)
    final = list(_runs(state, arm.name, "final").values())
    records = [state.results[trial] for trial in final]
    mean = mean_interval([record["final_loss"] for record in records], LEVEL) if records else None
    diverged = [trial.lr for trial, loss in tuning.items() if math.isinf(loss)]
    return {
        "name": arm.name,
        "setting_of": arm.source,
        "code": "" if chosen is None else _code(state, arm.name, chosen),
        "setting": None if chosen is None else plain(chosen),
        "edge": "" if chosen is None or not arm.tuned else at_edge(arm.name, losses),
        "state_bytes": next((r["state_bytes"] for r in records if r["state_bytes"] is not None), None),
        "divergence_edge": min(diverged, default=None),
        "tuning": [_tuning_run(state, trial) for trial in tuning],
        "search": _search(state, arm),
        "refined": [
            _tuning_run(state, trial)
            for trial in state.results
            if trial.arm == arm.name and trial.stage == "refine" and arm.tuned
        ],
        "final": [_run(state, trial) for trial in final],
        "mean": None if mean is None else mean.mean,
        "interval": None if mean is None or mean.low is None else [mean.low, mean.high],
    }


def _tuning_run(state: StudyState, trial: Trial) -> Result:
    return {
        "setting": plain(trial.setting),
        "lr": trial.lr,
        "stage": trial.stage,
        "seed": trial.seed,
        "final_loss": state.results[trial]["final_loss"],
        "stopped_at": state.results[trial]["stopped_at"],
        "folder": place_of(trial),
    }


def _runs(state: StudyState, arm: str, stage: Stage, share: float = 1.0) -> dict[int, Trial]:
    """The runs of an arm's best setting that are done, by seed.

    There may be others, of what was best before another arm was added, and with it trials for all.
    """
    losses = losses_of(state.results)
    setting = state.study.setting(arm, losses)
    if setting is None:
        return {}
    trials = {seed: Trial(arm, stage, setting, seed, share) for seed in state.study.seed_numbers}
    return {seed: trial for seed, trial in trials.items() if trial in losses}


def _run(state: StudyState, trial: Trial) -> Result:
    record, per_step = state.results[trial], state.budget.tokens_per_step
    return {
        "seed": trial.seed,
        "final_loss": record["final_loss"],
        "stopped_at": record["stopped_at"],
        "validation_tokens": [step * per_step for step in record["validation_steps"]],
        "validation_loss": record["validation_loss"],
        "train_tokens": [step * per_step for step in record["train_steps"]],
        "train_loss": record["train_loss"],
        "learning_rate_tokens": [step * per_step for step in record["learning_rate_steps"]],
        "learning_rates": record["learning_rates"],
        "types": record["types"],
        "folder": place_of(trial),
    }


def _search(state: StudyState, arm: Arm) -> Result | None:
    """What the search of an arm has found: its factors, and every step that was tried."""
    found = state.study.search(arm.name, losses_of(state.results))
    if found is None or arm.roles is None:
        return None
    setting, factors = plain(found.setting), {of: dict(own) for of, own in found.factors.items()}
    return {
        "block_lr": setting.get(BLOCK_LR, ""),
        "settings_of": setting.get(SETTINGS_OF, {}),
        "factors": factors.pop(LR, {}),
        "factors_of": factors,
        "left_out": arm.roles.left_out,
        "ended": found.ended,
        "most": arm.roles.most,
        "steps": [_step(step) for step in found.steps],
        "runs": [_tuning_run(state, trial) for trial in found.trials if trial in state.results],
    }


def _step(step: Step) -> Result:
    finite = {
        key: [loss if math.isfinite(loss) else None for loss in getattr(step, key)] for key in ("losses", "against")
    }
    return {**asdict(step), "seeds": list(step.seeds), **finite}


def _code(state: StudyState, arm: str, setting: Setting) -> str:
    trial = Trial(arm, "final", setting, state.study.seed_numbers[0])
    own = make_config(state.study.config(trial, state.budget.steps)).optimizer
    return as_code(own, state.budget.steps)


ByLosses = dict[int, float | None]
"""End losses by seed of runs that are done, None where a run diverged."""


def _losses(state: StudyState, arm: str) -> ByLosses:
    return {seed: state.results[trial]["final_loss"] for seed, trial in _runs(state, arm, "final").items()}


def _horizon(state: StudyState, share: float) -> Result:
    """The runs of the baseline on another number of tokens, in the order of the seeds."""
    runs = _runs(state, state.study.baseline, "horizon", share)
    records = [state.results[trial] for trial in runs.values()]
    steps = max(1, round(state.budget.steps * share))
    return {
        "share": share,
        "tokens": steps * state.budget.tokens_per_step,
        "seeds": list(runs),
        "final_losses": [record["final_loss"] for record in records],
        "stopped_at": [record["stopped_at"] for record in records],
        "folders": [place_of(trial) for trial in runs.values()],
    }


def _compare(state: StudyState, arms: list[Result]) -> None:
    """Difference, verdict, sentence and speed-up of every arm against the baseline."""
    study = state.study
    found = {arm.name: _difference(state, arm.name, study.baseline) for arm in study.arms}
    del found[study.baseline]
    adjusted = _adjusted(found)
    for arm in arms:
        name = arm["name"]
        if name == study.baseline:
            arm |= {"difference": None, "verdict": "baseline", "sentence": "", "speedup": None}
            continue
        difference = found[name]
        gain = _speedup(state, name) if difference and difference.n else None
        arm |= _judged(study, study.baseline, difference, adjusted[name], gain)
        arm["speedup"] = None if gain is None else _plain(gain)


def _ablations(state: StudyState) -> list[Result]:
    """Every arm with a block_lr against its ablations.

    Their p are adjusted among themselves: whether it matters which block has which multiplier is another question than
    whether the arm is better than the baseline, and is asked by other pairs.
    """
    pairs = {(arm.name, other.name): instead(other) for arm, other in ablations(state.study)}
    found = {pair: _difference(state, *pair) for pair in pairs}
    adjusted = _adjusted(found)
    return [
        {"arm": pair[0], "ablation": pair[1], **_judged(state.study, words, found[pair], adjusted[pair])}
        for pair, words in pairs.items()
    ]


def _adjusted(found: Mapping[Any, Difference | None]) -> dict[Any, float | None]:
    """p of each, adjusted for their number."""
    return dict(zip(found, holm([one.p if one else None for one in found.values()]), strict=True))


def _judged(
    study: Study, baseline: str, difference: Difference | None, adjusted_p: float | None, gain: Speedup | None = None
) -> Result:
    """A difference as plain values, with its verdict and sentence; `baseline` is what the sentence calls the other."""
    if difference is None:
        return {"difference": None, "verdict": "undecided", "sentence": ""}
    keys = ("mean", "low", "high", "sd", "n", "p", "diverged")
    said = verdict(difference, study.margin, adjusted_p)
    return {
        "difference": {**{key: getattr(difference, key) for key in keys}, "adjusted_p": adjusted_p},
        "verdict": "diverged" if difference.n == 0 and difference.arm_diverged else str(said),
        "sentence": sentence(baseline, difference, study.margin, gain, adjusted_p) + ".",
    }


def _difference(state: StudyState, arm: str, baseline: str) -> Difference | None:
    """Over the seeds at which both are done; None where there is none yet."""
    mine, other = _losses(state, arm), _losses(state, baseline)
    seeds = [seed for seed in mine if seed in other]
    return paired_difference([mine[s] for s in seeds], [other[s] for s in seeds], LEVEL) if seeds else None


def _speedup(state: StudyState, arm: str) -> Speedup | None:
    """Over the seeds at which all are done; None where there is none yet, or no other horizon."""
    tokens, mine = state.budget.tokens, _losses(state, arm)
    horizons = [_horizon(state, share) for share in state.study.horizons]
    curve: dict[float, ByLosses] = {tokens: _losses(state, state.study.baseline)}
    curve |= {h["tokens"]: dict(zip(h["seeds"], h["final_losses"], strict=True)) for h in horizons}
    seeds = [seed for seed in mine if all(seed in losses for losses in curve.values())]
    if len(curve) < 2 or not seeds:
        return None
    by_tokens = {at: [curve[at][seed] for seed in seeds] for at in sorted(curve)}
    return speedup([mine[seed] for seed in seeds], tokens, by_tokens, LEVEL)


def _plain(gain: Speedup) -> Result:
    values = asdict(gain)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _multipliers(state: StudyState, arm: Arm) -> list[float]:
    """Multiplier of the learning rate of every segment."""
    setting = state.study.setting(arm.name, losses_of(state.results))
    trial = arm.example if setting is None else Trial(arm.name, "tune", setting, 0)
    own = make_config(state.study.config(trial, state.budget.steps)).optimizer
    found = build_optimizer(own, state.first.model, None, state.budget.steps, [torch.zeros(1, 2, dtype=torch.int64)])
    return [float(row["multiplier"]) for row in found.lr_multipliers()]


def _is_measured(arm: Arm) -> bool:
    """Whether multipliers follow from measurements on the way, so that those at the start say nothing."""
    block_lr = block_lr_of(arm)
    return arm.optimizer["name"] in OWN or (block_lr is not None and bool(block_lr.sources))


def _mean_multiplier(state: StudyState, multipliers: list[float]) -> float | None:
    sizes = [segment.numel for segment in state.first.optimizer.blocks.segments]
    return sum(m * size for m, size in zip(multipliers, sizes, strict=True)) / sum(sizes)


def _places(state: StudyState) -> list[Result]:
    """Where each run was made, the latest last."""
    found = []
    for trial, record in state.results.items():
        place = read_environment(state.folder / place_of(trial))
        if place is not None:
            found.append({**place, **({"runs_at_a_time": record["jobs"]} if "jobs" in record else {})})
    return sorted(found, key=lambda place: str(place.get("date")))
