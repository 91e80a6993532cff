"""What a study has found, as plain values: what the page, the JSON and the CSV show."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from sharpwise.compare.arms import OWN, ablations, block_lr_of, definitions, instead
from sharpwise.compare.caveats import caveats, not_tested, of_horizons, of_places
from sharpwise.compare.conduct import Conducted, expected, place_of
from sharpwise.compare.next_step import next_step
from sharpwise.compare.record import read_environment
from sharpwise.compare.speedup import Speedup, speedup
from sharpwise.compare.statistics import Difference, holm, mean_interval, paired_difference
from sharpwise.compare.storage import losses_of
from sharpwise.compare.study import Arm, Study
from sharpwise.compare.tuning import Stage, Trial, at_edge, best, tried
from sharpwise.compare.verdict import sentence, verdict
from sharpwise.report.blocks import describe
from sharpwise.train.build import as_code, build_optimizer
from sharpwise.train.config_file import as_given, make_config
from sharpwise.train.environment import environment

Result = dict[str, Any]
LEVEL = 0.95


def results(conducted: Conducted) -> Result:
    """The result of a study, or what it has found so far, ready for `write_study_page`."""
    study, budget, built = conducted.study, conducted.budget, conducted.first
    arms = [_arm(conducted, arm) for arm in study.arms]
    _compare(conducted, arms)
    multipliers = {arm.name: _multipliers(conducted, arm) for arm in study.arms}
    blocks = [
        {**describe(segment), "multipliers": {name: values[i] for name, values in multipliers.items()}}
        for i, segment in enumerate(built.optimizer.blocks.segments)
    ]
    said = definitions(study, blocks)
    for arm in arms:
        mean = _mean_multiplier(conducted, multipliers[arm["name"]])
        if _is_measured(study.arm(arm["name"])):
            mean = None
        lr = None if arm["setting"] is None or mean is None else arm["setting"]["optimizer.lr"] * mean
        arm |= {"definition": said[arm["name"]], "mean_multiplier": mean, "mean_lr": lr}
    horizons = [_horizon(conducted, share) for share in study.horizons]
    done, places = len(conducted.results), _places(conducted)
    shared = as_given(make_config(study.config(Trial(study.baseline, "tune", (), 0), budget.steps)))
    for name in ("optimizer", "seed"):
        del shared[name]
    result = {
        "format": 1,
        "name": study.name,
        "baseline": study.baseline,
        "margin": study.margin,
        "seeds": list(study.seed_numbers),
        "complete": conducted.complete,
        "progress": {"done": done, "expected": _expected(conducted)},
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
        "environment": places[-1] if places else environment(built.config),
        "config": shared,
        "arms": arms,
        "ablations": _ablations(conducted),
        "horizons": horizons,
        "blocks": blocks,
        "caveats": [*caveats(conducted, arms), *of_places(places), *of_horizons(conducted, arms, horizons)],
        "not_tested": not_tested(conducted),
    }
    return {**result, "next": next_step(study, result, conducted.folder)}


def _expected(conducted: Conducted) -> int:
    """How many runs there will be: those that there are, where none is missing."""
    done = losses_of(conducted.results)
    return len(done) if conducted.complete else max(len(done), sum(expected(conducted.study, done).values()))


def _arm(conducted: Conducted, arm: Arm) -> Result:
    losses = losses_of(conducted.results)
    tuning = tried(arm.name, losses)
    chosen = best(arm.name, losses) if any(math.isfinite(loss) for loss in tuning.values()) else None
    final = list(_runs(conducted, arm.name, "final").values())
    records = [conducted.results[trial] for trial in final]
    mean = mean_interval([record["final_loss"] for record in records], LEVEL) if records else None
    diverged = [trial.lr for trial, loss in tuning.items() if math.isinf(loss)]
    setting = None if chosen is None else dict(chosen.setting)
    return {
        "name": arm.name,
        "code": "" if chosen is None else _code(conducted, chosen),
        "setting": setting,
        "edge": "" if chosen is None else at_edge(arm.name, losses),
        "state_bytes": next((r["state_bytes"] for r in records if r["state_bytes"] is not None), None),
        "divergence_edge": min(diverged, default=None),
        "tuning": [
            {
                "setting": dict(trial.setting),
                "lr": trial.lr,
                "stage": trial.stage,
                "final_loss": conducted.results[trial]["final_loss"],
                "stopped_at": conducted.results[trial]["stopped_at"],
                "folder": place_of(trial),
            }
            for trial in tuning
        ],
        "final": [_run(conducted, trial) for trial in final],
        "mean": None if mean is None else mean.mean,
        "interval": None if mean is None or mean.low is None else [mean.low, mean.high],
    }


def _runs(conducted: Conducted, arm: str, stage: Stage, share: float = 1.0) -> dict[int, Trial]:
    """The runs of an arm's best setting that are done, by seed.

    There may be others, of what was best before another arm was added, and with it trials for all.
    """
    losses = losses_of(conducted.results)
    if not tried(arm, losses):
        return {}
    setting = best(arm, losses).setting
    trials = {seed: Trial(arm, stage, setting, seed, share) for seed in conducted.study.seed_numbers}
    return {seed: trial for seed, trial in trials.items() if trial in losses}


def _run(conducted: Conducted, trial: Trial) -> Result:
    record, per_step = conducted.results[trial], conducted.budget.tokens_per_step
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


def _code(conducted: Conducted, trial: Trial) -> str:
    own = make_config(conducted.study.config(trial, conducted.budget.steps)).optimizer
    return as_code(own, conducted.budget.steps)


ByLosses = dict[int, float | None]
"""End losses by seed of runs that are done, None where a run diverged."""


def _losses(conducted: Conducted, arm: str) -> ByLosses:
    return {seed: conducted.results[trial]["final_loss"] for seed, trial in _runs(conducted, arm, "final").items()}


def _horizon(conducted: Conducted, share: float) -> Result:
    """The runs of the baseline on another number of tokens, in the order of the seeds."""
    runs = _runs(conducted, conducted.study.baseline, "horizon", share)
    records = [conducted.results[trial] for trial in runs.values()]
    steps = max(1, round(conducted.budget.steps * share))
    return {
        "share": share,
        "tokens": steps * conducted.budget.tokens_per_step,
        "seeds": list(runs),
        "final_losses": [record["final_loss"] for record in records],
        "stopped_at": [record["stopped_at"] for record in records],
        "folders": [place_of(trial) for trial in runs.values()],
    }


def _compare(conducted: Conducted, arms: list[Result]) -> None:
    """Difference, verdict, sentence and speed-up of every arm against the baseline."""
    study = conducted.study
    found = {arm.name: _difference(conducted, arm.name, study.baseline) for arm in study.arms}
    del found[study.baseline]
    adjusted = _adjusted(found)
    for arm in arms:
        name = arm["name"]
        if name == study.baseline:
            arm |= {"difference": None, "verdict": "baseline", "sentence": "", "speedup": None}
            continue
        difference = found[name]
        gain = _speedup(conducted, name) if difference and difference.n else None
        arm |= _judged(study, study.baseline, difference, adjusted[name], gain)
        arm["speedup"] = None if gain is None else _plain(gain)


def _ablations(conducted: Conducted) -> list[Result]:
    """Every arm with a block_lr against its ablations.

    Their p are adjusted among themselves: whether it matters which block has which multiplier is another question than
    whether the arm is better than the baseline, and is asked by other pairs.
    """
    pairs = {(arm.name, other.name): instead(other) for arm, other in ablations(conducted.study)}
    found = {pair: _difference(conducted, *pair) for pair in pairs}
    adjusted = _adjusted(found)
    return [
        {"arm": pair[0], "ablation": pair[1], **_judged(conducted.study, words, found[pair], adjusted[pair])}
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


def _difference(conducted: Conducted, arm: str, baseline: str) -> Difference | None:
    """Over the seeds at which both are done; None where there is none yet."""
    mine, other = _losses(conducted, arm), _losses(conducted, baseline)
    seeds = [seed for seed in mine if seed in other]
    return paired_difference([mine[s] for s in seeds], [other[s] for s in seeds], LEVEL) if seeds else None


def _speedup(conducted: Conducted, arm: str) -> Speedup | None:
    """Over the seeds at which all are done; None where there is none yet, or no other horizon."""
    tokens, mine = conducted.budget.tokens, _losses(conducted, arm)
    horizons = [_horizon(conducted, share) for share in conducted.study.horizons]
    curve: dict[float, ByLosses] = {tokens: _losses(conducted, conducted.study.baseline)}
    curve |= {h["tokens"]: dict(zip(h["seeds"], h["final_losses"], strict=True)) for h in horizons}
    seeds = [seed for seed in mine if all(seed in losses for losses in curve.values())]
    if len(curve) < 2 or not seeds:
        return None
    by_tokens = {at: [curve[at][seed] for seed in seeds] for at in sorted(curve)}
    return speedup([mine[seed] for seed in seeds], tokens, by_tokens, LEVEL)


def _plain(gain: Speedup) -> Result:
    values = asdict(gain)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _multipliers(conducted: Conducted, arm: Arm) -> list[float]:
    """Multiplier of the learning rate of every segment."""
    trial = Trial(arm.name, "tune", (("optimizer.lr", arm.space.lrs[0]),), 0)
    own = make_config(conducted.study.config(trial, conducted.budget.steps)).optimizer
    found = build_optimizer(
        own, conducted.first.model, None, conducted.budget.steps, [torch.zeros(1, 2, dtype=torch.int64)]
    )
    return [float(row["multiplier"]) for row in found.lr_multipliers()]


def _is_measured(arm: Arm) -> bool:
    """Whether multipliers follow from measurements on the way, so that those at the start say nothing."""
    block_lr = block_lr_of(arm)
    return arm.optimizer["name"] in OWN or (block_lr is not None and bool(block_lr.sources))


def _mean_multiplier(conducted: Conducted, multipliers: list[float]) -> float | None:
    sizes = [segment.numel for segment in conducted.first.optimizer.blocks.segments]
    return sum(m * size for m, size in zip(multipliers, sizes, strict=True)) / sum(sizes)


def _places(conducted: Conducted) -> list[Result]:
    """Where each run was made, the latest last."""
    found = []
    for trial, record in conducted.results.items():
        place = read_environment(conducted.folder / place_of(trial))
        if place is not None:
            found.append({**place, **({"runs_at_a_time": record["jobs"]} if "jobs" in record else {})})
    return sorted(found, key=lambda place: str(place.get("date")))
