"""What a study has found, as plain values: what the page, the JSON and the CSV show."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sharpwise.compare.conduct import Conducted, expected, place_of
from sharpwise.compare.record import read_environment
from sharpwise.compare.speedup import Speedup, speedup
from sharpwise.compare.statistics import Difference, holm, mean_interval, paired_difference
from sharpwise.compare.storage import losses_of
from sharpwise.compare.study import TOKENS_PER_PARAMETER, Arm
from sharpwise.compare.tuning import Stage, Trial, at_edge, best, tried
from sharpwise.compare.verdict import sentence, verdict
from sharpwise.report.blocks import describe
from sharpwise.train.build import as_code, build_optimizer
from sharpwise.train.config_file import as_given, make_config
from sharpwise.train.environment import environment

Result = dict[str, Any]
LEVEL = 0.95
FAR_APART = 0.2
"""Nats between seeds of one arm; runs of this kind end 0.01 to 0.05 apart."""


def results(conducted: Conducted) -> Result:
    """The result of a study, or what it has found so far, ready for `write_study_page`."""
    study, budget, built = conducted.study, conducted.budget, conducted.first
    arms = [_arm(conducted, arm) for arm in study.arms]
    _compare(conducted, arms)
    multipliers = {arm.name: _multipliers(conducted, arm) for arm in study.arms}
    for arm in arms:
        arm["mean_multiplier"] = _mean_multiplier(conducted, multipliers[arm["name"]])
    done, places = len(conducted.results), _places(conducted)
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
        "horizons": [_horizon(conducted, share) for share in study.horizons],
        "blocks": [
            {**describe(segment), "multipliers": {name: values[i] for name, values in multipliers.items()}}
            for i, segment in enumerate(built.optimizer.blocks.segments)
        ],
        "caveats": [*caveats(conducted, arms), *_of_places(places), *_of_horizons(conducted)],
        "not_tested": not_tested(conducted),
    }


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
    ended = [record for record in records if record["final_loss"] is not None]
    mean = mean_interval([record["final_loss"] for record in records], LEVEL) if records else None
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
    return as_code(make_config(conducted.study.config(trial, conducted.budget.steps)).optimizer)


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
    found = {arm.name: _difference(conducted, arm.name) for arm in study.arms if arm.name != study.baseline}
    adjusted = dict(zip(found, holm([one.p if one else None for one in found.values()]), strict=True))
    for arm in arms:
        name = arm["name"]
        arm |= {"difference": None, "verdict": "baseline", "sentence": f"{name} is the baseline.", "speedup": None}
        if name == study.baseline:
            continue
        difference = found[name]
        if difference is None:
            arm |= {"verdict": "undecided", "sentence": ""}
            continue
        gain = _speedup(conducted, name) if difference.n else None
        said = verdict(difference, study.margin, adjusted[name])
        arm["difference"] = {
            key: getattr(difference, key) for key in ("mean", "low", "high", "sd", "n", "p", "diverged")
        } | {"adjusted_p": adjusted[name]}
        arm["verdict"] = "diverged" if difference.n == 0 and difference.arm_diverged else str(said)
        arm["sentence"] = sentence(name, study.baseline, difference, study.margin, gain, adjusted[name]) + "."
        arm["speedup"] = None if gain is None else _plain(gain)


def _difference(conducted: Conducted, arm: str) -> Difference | None:
    """Over the seeds at which both are done; None where there is none yet."""
    mine, other = _losses(conducted, arm), _losses(conducted, conducted.study.baseline)
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
        ends = [run["final_loss"] for run in arm["final"] if run["final_loss"] is not None]
        if len(ends) > 1 and max(ends) - min(ends) > FAR_APART:
            notes.append(
                f"{arm['name']} ended {max(ends) - min(ends):.2f} nats apart with different seeds. A learning rate "
                "that was best with the one seed of the tuning may be at the edge of what is stable: rates closer "
                "together (lrs), or a longer budget, would tell."
            )
        if arm["tuning"] and arm["setting"] is None:
            notes.append(f"{arm['name']} diverged at every learning rate that was tried.")
        if arm["mean_multiplier"] > 1.05 and arm["name"] != study.baseline:
            notes.append(
                f"{arm['name']} multiplies the learning rate of an average parameter by {arm['mean_multiplier']:.1f}; "
                "its own learning rate is tuned, so that this is no advantage by itself."
            )
    return notes


def _of_horizons(conducted: Conducted) -> list[str]:
    """Where the curve that speed-ups are read off has holes."""
    found = []
    for horizon in (_horizon(conducted, share) for share in conducted.study.horizons):
        pairs = zip(horizon["seeds"], horizon["final_losses"], strict=True)
        if lost := [str(seed) for seed, loss in pairs if loss is None]:
            rest = "are those of the other seeds" if len(lost) < conducted.study.seeds else "cannot be given"
            found.append(
                f"On {horizon['share']:g} times the tokens {conducted.study.baseline} diverged with seed"
                f"{'s' * (len(lost) > 1)} {', '.join(lost)}: speed-ups {rest}."
            )
    return found


def _places(conducted: Conducted) -> list[Result]:
    """Where each run was made, the latest last."""
    found = []
    for trial, record in conducted.results.items():
        place = read_environment(conducted.folder / place_of(trial))
        if place is not None:
            found.append({**place, **({"runs_at_a_time": record["jobs"]} if "jobs" in record else {})})
    return sorted(found, key=lambda place: str(place.get("date")))


def _of_places(places: list[Result]) -> list[str]:
    """What differs from run to run in where they were made."""
    keys = dict.fromkeys(key for place in places for key in place if key != "date")
    differ = [key.replace("_", " ") for key in keys if len({str(place.get(key)) for place in places}) > 1]
    if not differ:
        return []
    return [f"Not all runs were made alike: they differ in {', '.join(differ)}. Times can be compared with care only."]


def not_tested(conducted: Conducted) -> list[str]:
    """What a reader might take for granted, and nobody looked at."""
    built, arms = conducted.first, conducted.study.arms
    notes = [
        f"Other models than {built.config.model.name}, other text, other batch sizes and contexts, longer schedules.",
        "Quality beyond the validation loss: nothing was fine-tuned or evaluated on tasks.",
    ]
    fixed = {
        "optimizer.weight_decay": "weight decay",
        "schedule.warmup": "warm-up",
        "optimizer.betas": "momentum and second-moment decay (betas)",
    }
    for key, words in fixed.items():
        tuned = [arm.name for arm in arms if key in arm.space.search]
        if 0 < len(tuned) < len(arms):
            notes.append(f"Tuned for {', '.join(tuned)} alone: {words}.")
    left = [words for key, words in fixed.items() if not any(key in arm.space.search for arm in arms)]
    notes.append(
        f"Not tuned: {', '.join([*left, 'gradient clipping'])} and the shape of the schedule. The arms as code say "
        "what each arm has; where nobody said so, an arm has the defaults of its optimizer."
    )
    if conducted.study.horizons:
        notes.append("The baseline's setting was tuned at the full budget, not again for its other numbers of tokens.")
    return notes
