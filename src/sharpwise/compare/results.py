"""What a study has found, as plain values: what the page, the JSON and the CSV show."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sharpwise.compare.conduct import Conducted, place_of
from sharpwise.compare.speedup import Speedup, speedup
from sharpwise.compare.statistics import holm, mean_interval, paired_difference
from sharpwise.compare.storage import losses_of
from sharpwise.compare.study import TOKENS_PER_PARAMETER, Arm
from sharpwise.compare.tuning import Trial, at_edge, best, tried
from sharpwise.compare.verdict import sentence, verdict
from sharpwise.report.blocks import describe
from sharpwise.train.build import as_code, build_optimizer
from sharpwise.train.config_file import as_given, make_config
from sharpwise.train.environment import environment

Result = dict[str, Any]
LEVEL = 0.95


def results(conducted: Conducted, *, jobs: int) -> Result:
    """The result of a study, ready for `write_study_page`.

    Args:
        conducted: from `conduct`.
        jobs: how many runs were made at a time, for the environment.
    """
    study, budget, built = conducted.study, conducted.budget, conducted.first
    arms = [_arm(conducted, arm) for arm in study.arms]
    _compare(conducted, arms)
    multipliers = {arm.name: _multipliers(conducted, arm) for arm in study.arms}
    for arm in arms:
        arm["mean_multiplier"] = _mean_multiplier(conducted, multipliers[arm["name"]])
    done = len(conducted.results)
    shared = as_given(make_config(study.config(Trial(study.baseline, "tune", (), 0), budget.steps)))
    for name in ("optimizer", "seed"):
        del shared[name]
    return {
        "format": 1,
        "name": study.name,
        "baseline": study.baseline,
        "margin": study.margin,
        "seeds": list(study.seed_numbers),
        "complete": conducted.complete,
        "progress": {"done": done, "expected": done},
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
        "environment": {**environment(built.config), "processes": jobs, "threads_per_process": study.threads},
        "config": shared,
        "arms": arms,
        "horizons": [_horizon(conducted, share) for share in study.horizons],
        "blocks": [
            {**describe(segment), "multipliers": {name: values[i] for name, values in multipliers.items()}}
            for i, segment in enumerate(built.optimizer.blocks.segments)
        ],
        "caveats": caveats(conducted, arms),
        "not_tested": not_tested(conducted),
    }


def _arm(conducted: Conducted, arm: Arm) -> Result:
    losses = losses_of(conducted.results)
    tuning = tried(arm.name, losses)
    chosen = best(arm.name, losses) if any(math.isfinite(loss) for loss in tuning.values()) else None
    final = _final(conducted, arm.name)
    records = [conducted.results[trial] for trial in final]
    ended = [record for record in records if record["final_loss"] is not None]
    mean = mean_interval([record["final_loss"] for record in records], LEVEL)
    diverged = [trial.lr for trial, loss in tuning.items() if math.isinf(loss)]
    setting = None if chosen is None else dict(chosen.setting)
    return {
        "name": arm.name,
        "code": "" if chosen is None else _code(conducted, chosen),
        "setting": setting,
        "edge": "" if chosen is None else at_edge(arm.name, losses),
        "state_bytes": next((r["state_bytes"] for r in records if r["state_bytes"] is not None), None),
        "step_ms": min((r["step_ms"] for r in ended if r["step_ms"] is not None), default=None),
        "tokens_per_second": max((r["tokens_per_second"] for r in ended if r["tokens_per_second"]), default=None),
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
        "mean": mean.mean,
        "interval": None if mean.low is None else [mean.low, mean.high],
    }


def _final(conducted: Conducted, arm: str) -> list[Trial]:
    found = [t for t in conducted.results if t.arm == arm and t.stage == "final"]
    return sorted((t for t in found if t.seed in conducted.study.seed_numbers), key=lambda t: t.seed)


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
    return as_code(make_config(conducted.study.config(trial, conducted.budget.steps)).optimizer)


def _losses(conducted: Conducted, arm: str) -> list[float | None]:
    by_seed = {trial.seed: conducted.results[trial]["final_loss"] for trial in _final(conducted, arm)}
    return [by_seed.get(seed) for seed in conducted.study.seed_numbers]


def _horizon(conducted: Conducted, share: float) -> Result:
    found = {t.seed: r for t, r in conducted.results.items() if t.stage == "horizon" and t.horizon == share}
    steps = max(1, round(conducted.budget.steps * share))
    losses = [found[seed]["final_loss"] if seed in found else None for seed in conducted.study.seed_numbers]
    return {"share": share, "tokens": steps * conducted.budget.tokens_per_step, "final_losses": losses}


def _compare(conducted: Conducted, arms: list[Result]) -> None:
    """Difference, verdict, sentence and speed-up of every arm against the baseline."""
    study = conducted.study
    baseline = _losses(conducted, study.baseline)
    others = [arm for arm in arms if arm["name"] != study.baseline]
    found = {arm["name"]: paired_difference(_losses(conducted, arm["name"]), baseline, LEVEL) for arm in others}
    adjusted = dict(zip(found, holm([difference.p for difference in found.values()]), strict=True))
    curve = {float(h["tokens"]): h["final_losses"] for h in (_horizon(conducted, share) for share in study.horizons)}
    curve[float(conducted.budget.tokens)] = baseline
    for arm in arms:
        name = arm["name"]
        if name not in found:
            arm |= {"difference": None, "verdict": "baseline", "sentence": f"{name} is the baseline.", "speedup": None}
            continue
        difference, gain = found[name], None
        if difference.n and study.horizons:
            gain = speedup(_losses(conducted, name), conducted.budget.tokens, dict(sorted(curve.items())), LEVEL)
        said = verdict(difference, study.margin, adjusted[name])
        arm["difference"] = {
            key: getattr(difference, key) for key in ("mean", "low", "high", "sd", "n", "p", "diverged")
        } | {"adjusted_p": adjusted[name]}
        arm["verdict"] = "diverged" if difference.n == 0 and difference.arm_diverged else str(said)
        arm["sentence"] = sentence(name, study.baseline, difference, study.margin, gain, adjusted[name]) + "."
        arm["speedup"] = None if gain is None else _plain(gain)


def _plain(gain: Speedup) -> Result:
    values = asdict(gain)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _multipliers(conducted: Conducted, arm: Arm) -> list[float]:
    """Multiplier of the learning rate of every segment."""
    trial = Trial(arm.name, "tune", (("optimizer.lr", arm.space.lrs[0]),), 0)
    own = make_config(conducted.study.config(trial, conducted.budget.steps)).optimizer
    return [float(row["multiplier"]) for row in build_optimizer(own, conducted.first.model).lr_multipliers()]


def _mean_multiplier(conducted: Conducted, multipliers: list[float]) -> float:
    sizes = [segment.numel for segment in conducted.first.optimizer.blocks.segments]
    return sum(m * size for m, size in zip(multipliers, sizes, strict=True)) / sum(sizes)


# --- sentences -------------------------------------------------------------------------------------------------------


def caveats(conducted: Conducted, arms: list[Mapping[str, Any]] | list[Result]) -> list[str]:
    """What a reader has to know before believing any of it."""
    budget, study = conducted.budget, conducted.study
    notes = []
    if budget.tokens_per_parameter < TOKENS_PER_PARAMETER:
        notes.append(
            f"Short runs: {budget.tokens_per_parameter:.2g} tokens per parameter outside the embeddings, where "
            f"{TOKENS_PER_PARAMETER} are usual. What is better in a short run may be worse in a long one, and the "
            "other way round: the published curves of blockwise learning rates cross those of AdamW late."
        )
    for arm in arms:
        if arm["edge"]:
            other = "smaller" if arm["edge"] == "smallest" else "larger"
            notes.append(
                f"{arm['name']} was best at the {arm['edge']} learning rate that was tried: a {other} one might be "
                "better still, so this arm is not tuned."
            )
        if arm["setting"] is None:
            notes.append(f"{arm['name']} diverged at every learning rate that was tried.")
        elif arm["mean_multiplier"] > 1.05 and arm["name"] != study.baseline:
            notes.append(
                f"{arm['name']} multiplies the learning rate of an average parameter by {arm['mean_multiplier']:.1f}; "
                "its own learning rate is tuned, so that this is no advantage by itself."
            )
    return notes


def not_tested(conducted: Conducted) -> list[str]:
    """What a reader might take for granted, and nobody looked at."""
    built, searched = conducted.first, {key for arm in conducted.study.arms for key in arm.space.search}
    notes = [
        f"Other models than {built.config.model.name}, other text, other batch sizes and contexts, longer schedules.",
        "Quality beyond the validation loss: nothing was fine-tuned or evaluated on tasks.",
    ]
    fixed = {
        "optimizer.weight_decay": "weight decay",
        "schedule.warmup": "warm-up",
        "optimizer.betas": "momentum and second-moment decay (betas)",
    }
    if left := [words for key, words in fixed.items() if key not in searched]:
        notes.append(
            f"Not tuned, the same for all arms: {', '.join(left)}, gradient clipping, the shape of the schedule."
        )
    notes.append(
        "The baseline's learning rate was tuned at the full budget, not again for its half and double budgets."
    )
    return notes
