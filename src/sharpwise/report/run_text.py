"""What a run came to, in sentences and in a table of facts."""

import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sharpwise.report.reading import METRICS
from sharpwise.report.run import RunData
from sharpwise.report.text import USUAL_TOKENS_PER_PARAMETER, duration, mebibytes, number, perplexity, short

Items = list[tuple[str, str]]


def last_name(value: Any) -> str:
    """The last part of a path or a name, "" for nothing.

    >>> last_name("data/stdlib/"), last_name("gpt2"), last_name(None)
    ('stdlib', 'gpt2', '')
    """
    return "" if value is None else str(value).rstrip("/").rpartition("/")[2]


def optimizer_name(config: Mapping[str, Any]) -> str:
    """The optimizer and its per-block learning rate, as in `adamw + blockwise`."""
    optimizer = config.get("optimizer")
    optimizer = optimizer if isinstance(optimizer, Mapping) else {}
    block_lr = optimizer.get("block_lr")
    if isinstance(block_lr, Mapping):
        block_lr = block_lr.get("name")
    return f"{optimizer.get('name', '?')} + {block_lr}" if block_lr else str(optimizer.get("name", "?"))


def headline(run: RunData) -> str:
    """What was trained on what, how far it is, and its loss."""
    model, data = last_name(run.setting("model", "name")) or "a model", last_name(run.setting("data", "path"))
    subject = f"{model} on {data}" if data else model
    if run.status.state == "diverged":
        return f"{subject}: diverged at step {run.status.step or run.last_step:,}{_of_steps(run)}"
    if not run.last_step:
        return f"{subject}: no step yet" if run.status.state == "running" else f"{subject}: ended before its first step"
    where = f"step {run.last_step:,}{_of_steps(run)}"
    result = _loss_words(run)
    if run.status.state == "finished":
        return f"{subject}: {result} after {run.last_step:,} steps"
    return f"{subject}: {where}, {result}"


def _of_steps(run: RunData) -> str:
    return f" of {run.steps:,}" if run.steps else ""


def _loss_words(run: RunData) -> str:
    if len(run.validation_loss):
        value, step = float(run.validation_loss[-1]), int(run.validation_step[-1])
        where = "" if step == run.last_step else f" at step {step:,}"
        return f"validation loss {value:.3f}, perplexity {perplexity(value)}{where}"
    value = training_loss(run)
    return "no loss yet" if math.isnan(value) else f"training loss {value:.3f}, perplexity {perplexity(value)}"


def training_loss(run: RunData) -> float:
    """Mean of the last hundredth of the steps, NaN where there is none."""
    known = run.loss[-max(1, len(run.loss) // 100) :]
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else math.nan


def lead(run: RunData) -> str:
    """How it was trained, in a sentence or two."""
    parameters, tokens = run.facts.get("parameters"), run.tokens_seen
    size = f"{parameters:,} parameters, trained" if isinstance(parameters, int) else "Trained"
    rate = run.setting("optimizer", "lr")
    at = f" at learning rate {rate:g}" if isinstance(rate, (int, float)) else ""
    seen = f" on {tokens:,} tokens" if tokens else ""
    ratio = _tokens_per_parameter(run)
    each = f", {ratio:.2g} per parameter" if ratio else ""
    return f"{size} by {optimizer_name(run.config)}{at}{seen}{each}. Losses are in nats per token."


def status_words(run: RunData) -> str:
    """What the run says of its end, or what its files say where it says nothing."""
    if message := run.status.message.strip():
        return message[0].upper() + message[1:] + ("" if message[-1] in ".!?" else ".")
    step = run.status.step if run.status.step is not None else run.last_step
    return {
        "finished": f"All {step:,} steps are done.",
        "running": f"A process trains here; this shows it up to step {run.last_step:,}.",
        "interrupted": f"Stopped after step {step:,}.",
        "killed": f"Ended without a word after step {run.last_step:,}: no process trains here, and none said why.",
        "diverged": f"Something was not a finite number at step {step:,}.",
        "failed": f"Failed after step {step:,}.",
    }[run.status.state]


def caveats(run: RunData) -> list[str]:
    """What a reader has to know before concluding anything."""
    found = []
    seen, planned = _tokens_per_parameter(run), _tokens_per_parameter(run, whole=True)
    if seen is not None and seen < USUAL_TOKENS_PER_PARAMETER:
        later = f" so far and {planned:.2g} when it is done" if _unfinished(run) and planned else ""
        found.append(
            f"A short run: {seen:.2g} tokens per parameter{later}, where {USUAL_TOKENS_PER_PARAMETER} are usual. "
            "What is better in a short run may be worse in a long one."
        )
    seed = run.setting("seed")
    found.append(
        f"One run, one seed{'' if seed is None else f' ({seed})'}: without other seeds nobody can say how much of a "
        "difference to another run is chance."
    )
    if _unfinished(run) and run.last_step:
        found.append("The schedule has not ended: losses before its end are not to be compared with losses at an end.")
    vocabulary = run.facts.get("vocabulary")
    if len(run.validation_loss) and isinstance(vocabulary, int) and run.validation_loss[-1] >= math.log(vocabulary):
        found.append("It has learned nothing: the validation loss is no better than naming all tokens equally likely.")
    if len(run.skipped):
        steps = ", ".join(f"{int(step):,}" for step in run.skipped[:5]) + (" and more" if len(run.skipped) > 5 else "")
        found.append(f"{_count(len(run.skipped), 'step was', 'steps were')} skipped, not being finite: {steps}.")
    return [*found, *run.problems]


def _unfinished(run: RunData) -> bool:
    return run.status.state != "finished"


def _tokens_per_parameter(run: RunData, *, whole: bool = False) -> float | None:
    """Tokens per parameter, so far or in the whole run."""
    parameters, tokens = run.facts.get("parameters"), run.tokens_seen
    if whole and run.steps and run.tokens_per_step:
        tokens = run.steps * run.tokens_per_step
    return tokens / parameters if tokens and isinstance(parameters, int) and parameters > 0 else None


def _count(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"


# --- tables ----------------------------------------------------------------------------------------------------------


def results(run: RunData) -> Items:
    """What came out."""
    items: Items = [("steps", f"{run.last_step:,}{_of_steps(run)}")]
    if run.tokens_seen:
        items.append(("tokens", f"{run.tokens_seen:,}"))
    if len(run.validation_loss):
        last, best = float(run.validation_loss[-1]), int(np.argmin(run.validation_loss))
        items.append(("validation loss", f"{last:.4f}, perplexity {perplexity(last)}"))
        if best != len(run.validation_loss) - 1:
            items.append(("lowest", f"{run.validation_loss[best]:.4f} at step {int(run.validation_step[best]):,}"))
    if not math.isnan(training_loss(run)):
        items.append(("training loss", f"{training_loss(run):.4f}, mean of the last hundredth of the steps"))
    seconds = run.seconds[run.seconds > 0]
    if len(seconds):
        if run.tokens_per_step:
            items.append(("throughput", f"{run.tokens_per_step / np.median(seconds):,.0f} tokens/s, median"))
        items.append(("time in steps", duration(float(seconds.sum()))))
        own = run.optimizer_seconds[run.optimizer_seconds > 0]
        if len(own):
            share = np.median(own) / np.median(seconds)
            items.append(("optimizer step", f"{np.median(own) * 1e3:,.3g} ms, {share:.1%} of a step"))
    memory = run.memory[run.memory > 0]
    if len(memory):
        items.append(("peak memory", mebibytes(float(memory.max()))))
    state, parameters = run.facts.get("state_bytes"), run.facts.get("parameters")
    if isinstance(state, int):
        each = f", {state / parameters:.3g} bytes per parameter" if isinstance(parameters, int) and parameters else ""
        items.append(("optimizer state", f"{mebibytes(state)}{each}"))
    return items


def setup(run: RunData) -> Items:
    """What was run; the optimizer as code."""
    facts = run.facts
    items: Items = [("model", str(run.setting("model", "name") or "-"))]
    if isinstance(facts.get("parameters"), int):
        rest = facts.get("non_embedding_parameters")
        without = f" ({rest:,} without embeddings)" if isinstance(rest, int) else ""
        items.append(("parameters", f"{facts['parameters']:,}{without}"))
    for key, name in (("vocabulary", "vocabulary"), ("context", "context"), ("tokens_per_step", "tokens per step")):
        if isinstance(facts.get(key), int):
            items.append((name, f"{facts[key]:,}"))
    items.append(("optimizer", str(facts.get("optimizer") or optimizer_name(run.config))))
    rate, seed = run.setting("optimizer", "lr"), run.setting("seed")
    items.append(("learning rate", number(rate if isinstance(rate, (int, float)) else None, "g")))
    items.append(("seed", "-" if seed is None else str(seed)))
    items.append(("data", str(run.setting("data", "path") or "-")))
    data = facts.get("data")
    if isinstance(data, Mapping):
        items += [(f"data: {str(key).replace('_', ' ')}", _plain(value)) for key, value in data.items()]
    return items


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def footer(run: RunData) -> str:
    """Where the numbers are, and how old the page is."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    steps = f"{short(run.last_step)} steps"
    return f"Written {now}, {steps} on record in {METRICS}. `sharpwise page` writes this page again."
