"""What a study takes, before anything starts: runs, tokens, time, and the difference that it could see."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from sharpwise.compare.statistics import detectable
from sharpwise.compare.study import FEWEST_STEPS, TOKENS_PER_PARAMETER, Arm, Study
from sharpwise.compare.trial import Losses
from sharpwise.compare.tuning import tried
from sharpwise.model_facts import count_parameters
from sharpwise.train.build import Built, validation_every
from sharpwise.train.steps import train_steps

# Standard deviation over seeds of the end loss: AdamW, 0.4M parameters, 4.1M tokens of mixed text, three seeds. What a
# study can see is worked out from its own runs once there are some.
SEED_NOISE = 0.012


@dataclass(frozen=True)
class Budget:
    """What a study takes: `runs` at least and at most, `done` of them, `seconds` of the others (None if not timed)."""

    runs: tuple[int, int]
    done: int
    tokens: int
    steps: int
    tokens_per_step: int
    parameters: int
    non_embedding_parameters: int
    seconds: tuple[float, float] | None
    detectable: float

    @property
    def tokens_per_parameter(self) -> float:
        """Of a run, by parameters outside the embeddings."""
        return self.tokens / self.non_embedding_parameters


def tokens_of(study: Study, parameters: int) -> int:
    """Those of a run, of a model with so many parameters outside the embeddings."""
    return study.tokens or round((study.ratio or 0) * TOKENS_PER_PARAMETER * parameters)


def work_out(study: Study, built: Built, done: Losses, jobs: int = 1, *, timed: bool = False) -> Budget:
    """Runs, tokens and, if it is to be `timed` by a few steps of the baseline, time that a study takes.

    Raises:
        ValueError: fewer than `FEWEST_STEPS` steps a run.
    """
    total, without_embedding = count_parameters(built.model)
    per_step = built.plan.tokens_per_step
    tokens = tokens_of(study, without_embedding)
    steps = tokens // per_step
    if steps < FEWEST_STEPS:
        raise ValueError(
            f"a run of {tokens:,} tokens has {steps} steps of {per_step:,}: too few to say anything about an "
            f"optimizer; {FEWEST_STEPS * per_step:,} tokens are the least"
        )
    tuning = _tuning(study)
    seconds = None
    if timed and (per_token := _seconds_per_token(study, built, steps)) is not None:
        left = study.seeds * (len(study.arms) + sum(study.horizons)) - sum(trial.horizon for trial in done)
        least, most = (
            # A search has two runs at a time, and sometimes one.
            per_token * tokens * max(0.0, (alone + left) / jobs + in_search * (1 / min(jobs, 2)))
            for alone, in_search in tuning
        )
        seconds = (least, most)
    count = study.seeds * (len(study.arms) + len(study.horizons))
    least_runs, most_runs = (sum(part) + count for part in tuning)
    return Budget(
        runs=(least_runs, most_runs),
        done=len(done),
        tokens=steps * per_step,
        steps=steps,
        tokens_per_step=per_step,
        parameters=total,
        non_embedding_parameters=without_embedding,
        seconds=seconds,
        detectable=detectable(SEED_NOISE * 2**0.5, study.seeds),
    )


def _tuning(study: Study) -> tuple[tuple[int, int], tuple[int, int]]:
    """Runs of tuning at least and at most, each as those of learning rates and other settings, and those of searches.

    An arm that another one leaves behind gets as many trials; a search from the setting of another is on top of that.
    """
    tuned = [arm for arm in study.arms if arm.tuned]
    found = []
    for lrs, runs in ((lambda a: len(a.space.lrs), "least"), (lambda a: a.space.most, "most")):
        own = {arm.name: getattr(arm.roles, runs) if arm.roles else 0 for arm in study.arms}
        trials = [lrs(arm) + sum(len(values) for values in arm.space.search.values()) + own[arm.name] for arm in tuned]
        searches = sum(own.values())
        further = sum(own[arm.name] for arm in study.arms if not arm.tuned)
        found.append((max(trials, default=0) * len(tuned) + further - searches, searches))
    return found[0], found[1]


def _seconds_per_token(study: Study, built: Built, steps: int) -> float | None:
    """Of a run of so many steps, validation included: a forward pass is a third of a step's work."""
    running = train_steps(built.model, built.optimizer, built.data.train, built.data.validation, built.plan)
    seconds = [step.seconds for step in islice(running, 4)][1:]
    running.close()
    every = validation_every(study.run.get("validation", {}).get("every"), steps)
    validations = math.ceil(steps / every) if every else 1  # the last step has one too
    validated = validations * built.plan.validation_sequences / (steps * built.plan.sequences)
    return statistics.median(seconds) / built.plan.tokens_per_step * (1 + validated / 3) if seconds else None


def expected(study: Study, done: Losses) -> Mapping[float, int]:
    """How many runs a study has in the end, as far as is known, by their share of the tokens."""
    searches = {arm.name: _in_search(study, arm, done) for arm in study.arms}
    trials = [max(len(tried(arm, done)), len(space.lrs)) + searches[arm] for arm, space in study.spaces.items()]
    tuning = max(trials, default=0)
    further = sum(searches[arm.name] for arm in study.arms if not arm.tuned)
    runs = Counter(dict.fromkeys(study.horizons, study.seeds))
    runs[1.0] += tuning * len(study.spaces) + further + study.seeds * len(study.arms)
    return runs


def _in_search(study: Study, arm: Arm, done: Losses) -> int:
    """Runs that the search of an arm will have: those that it had, or on the way half of what may come."""
    if arm.roles is None:
        return 0
    found = study.search(arm.name, done)
    if found is not None and found.ended:
        return len(found.trials)
    return max(len(found.trials) if found else 0, (arm.roles.least + arm.roles.most) // 2)
