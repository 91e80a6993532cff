"""What a reader has to know before believing a study, in sentences."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sharpwise.compare.runner import StudyState
from sharpwise.compare.study import TOKENS_PER_PARAMETER

FAR_APART = 0.2
"""Nats between seeds of one arm; runs of this kind end 0.01 to 0.05 apart."""
LARGER = 1.05
"""A mean multiplier from which on a larger step is a reason to suspect."""
Arm = Mapping[str, Any]


def caveats(state: StudyState, arms: Sequence[Arm]) -> list[str]:
    """What there is to say of the budget and of every arm."""
    budget = state.budget
    notes = []
    if budget.tokens_per_parameter < TOKENS_PER_PARAMETER:
        notes.append(
            f"Short runs: {budget.tokens_per_parameter:.2g} tokens per parameter outside the embeddings, where "
            f"{TOKENS_PER_PARAMETER} are usual. What is better in a short run may be worse in a long one, and the "
            "other way round: the published curves of blockwise learning rates cross those of AdamW late."
        )
    for arm in arms:
        notes += _of_arm(arm)
    far = {arm["name"]: spread(run["final_loss"] for run in arm["final"]) for arm in arms}
    if told := [f"{name} by {apart:.3f} nats" for name, apart in far.items() if apart > FAR_APART]:
        notes.append(
            f"Seeds of one arm ended far apart: {', '.join(told)}. A learning rate that was best with the one seed of "
            "the tuning may be at the edge of what is stable: learning rates closer together (lrs in the study file), "
            "or a longer budget, would tell."
        )
    if any((arm["mean_multiplier"] or 0) > LARGER and not arm["setting_of"] for arm in arms):
        notes.append(
            "Multipliers above 1 make larger steps at the same lr. The lr of an arm that has trials is tuned for it, "
            "so that this is no advantage: compare 'lr x mean factor' under Settings and costs."
        )
    if (count := len(arms) - 1) > 2:
        notes.append(
            f"Each interval is for one candidate by itself. Of {count} candidates, the one that came out best looks a "
            "little better than it is."
        )
    return notes


def _of_arm(arm: Arm) -> list[str]:
    notes = []
    if arm.get("search"):
        notes += _of_search(arm)
    elif arm["setting_of"]:
        notes.append(
            f"{arm['name']} was not tuned: its runs have the setting that was best for {arm['setting_of']}. With one "
            "of its own it might be better."
            + " Its multipliers make larger steps at that lr, and what it gains may come from these."
            * ((arm["mean_multiplier"] or 0) > LARGER)
        )
    if arm["edge"]:
        other = "smaller" if arm["edge"] == "smallest" else "larger"
        notes.append(
            f"{arm['name']} was best at the {arm['edge']} learning rate that was tried: a {other} one might be "
            "better still, so this arm is not tuned."
        )
    if lost := [run for run in arm["final"] if run["final_loss"] is None]:
        at = ", ".join(f"seed {run['seed']} at step {run['stopped_at']:,}" for run in lost if run["stopped_at"])
        notes.append(
            f"{arm['name']} diverged in {len(lost)} of {len(arm['final'])} final runs{f' ({at})' if at else ''}: its "
            "loss was not a finite number any more."
        )
    if arm["tuning"] and arm["setting"] is None:
        notes.append(f"{arm['name']} diverged at every learning rate that was tried.")
    return notes


def _of_search(arm: Arm) -> list[str]:
    """Of an arm whose factors were searched."""
    search, notes = arm["search"], []
    if arm["setting_of"]:
        notes.append(
            f"{arm['name']} had a search of {len(search['runs'])} runs on top of the tuning of {arm['setting_of']}, "
            "which did not get as many: some of what it gains may be what so many trials gain by themselves. In a "
            'study file, tune = "roles" without setting_of gives every arm as many.'
        )
    if search["ended"] == "runs":
        notes.append(
            f"The search of {arm['name']} ended for its number of runs, {search['most']}: more of them (--runs, or "
            "runs in the study file) may find better factors, and go on from these."
        )
    if search["left_out"]:
        notes.append(f"The search of {arm['name']}: {search['left_out']}.")
    if search["block_lr"] or search["settings_of"]:
        notes.append(
            f"The factors of {arm['name']} belong to this model, text, batch, and length of a run, and to its learning "
            "rate, which was not tuned again: elsewhere they are a guess."
        )
    return notes


def spread(losses: Iterable[float | None]) -> float:
    """How far apart runs ended, nats; those that diverged are left out.

    >>> spread([4.0, None, 4.5]), spread([None])
    (0.5, 0.0)
    """
    ends = [loss for loss in losses if loss is not None]
    return max(ends) - min(ends) if ends else 0.0


def of_horizons(state: StudyState, arms: Sequence[Arm], horizons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the curve that speed-ups are read off has holes, or rests on points that are unsure."""
    study = state.study
    found = []
    for horizon in horizons:
        pairs = zip(horizon["seeds"], horizon["final_losses"], strict=True)
        if lost := [str(seed) for seed, loss in pairs if loss is None]:
            rest = "are those of the other seeds" if len(lost) < study.seeds else "cannot be given"
            found.append(
                f"On {horizon['share']:g} times the tokens {study.baseline} diverged with seed"
                f"{'s' * (len(lost) > 1)} {', '.join(lost)}: speed-ups {rest}."
            )
    if not any(arm["speedup"] for arm in arms):
        return found
    base = next(arm for arm in arms if arm["name"] == study.baseline)
    points = {1.0: spread(run["final_loss"] for run in base["final"])}
    points |= {horizon["share"]: spread(horizon["final_losses"]) for horizon in horizons}
    found += [
        f"Speed-ups rest on {study.baseline} with {share:g} times the tokens, where its seeds ended {far:.3f} nats "
        "apart: they are no surer than that point."
        for share, far in sorted(points.items())
        if far > FAR_APART
    ]
    return found


def of_places(places: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs from run to run in where they were made; of a library, among those that it has a part in."""
    keys = dict.fromkeys(key for place in places for key in place if key != "date")
    differ = [key.replace("_", " ") for key in keys if len({str(place[key]) for place in places if key in place}) > 1]
    if not differ:
        return []
    return [f"Not all runs were made alike: they differ in {', '.join(differ)}. Times can be compared with care only."]


def not_tested(state: StudyState) -> list[str]:
    """What a reader might take for granted, and nobody looked at."""
    built, arms = state.first, state.study.arms
    notes = [
        f"Other models than {built.config.model.name}, other data, other batch sizes and contexts, longer schedules.",
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
    if state.study.horizons:
        notes.append("The baseline's setting was tuned at the full budget, not again for its other numbers of tokens.")
    return notes
