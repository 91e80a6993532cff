"""What a comparison came to, in sentences that need no knowledge of the project."""

from collections.abc import Sequence
from typing import Any

from sharpwise.compare.report.arms import Arm, Result, baseline_of, candidates, diverged, searched, trials
from sharpwise.report.text import short

VERDICTS = {
    "baseline": "baseline",
    "better": "better",
    "worse": "worse",
    "equivalent": "equal",
    "undecided": "undecided",
    "diverged": "diverged",
}


def headline(result: Result) -> str:
    """What came out, whichever way."""
    baseline, others = result["baseline"], candidates(result)
    if not result["complete"]:
        return f"Unfinished: {_done(result)} of this comparison with {baseline} are done"
    if diverged(baseline_of(result)):
        return f"{baseline}, which the others were to be compared with, diverged with every seed"
    if len(others) == 1:
        return _of_one(others[0], baseline)
    better = sorted((arm for arm in others if arm["verdict"] == "better"), key=_difference)
    if not better:
        return f"None of {len(others)} candidates was shown to be better than {baseline}: {_counts(others)}"
    if len(better) == 1:
        return f"{_beats(better[0], baseline)}; {_rest(others, better)}"
    first = f"{len(better)} of {len(others)} candidates trained better than {baseline}"
    return f"{first}; the best, {better[0]['name']}, ended {_by(better[0])}"


def best(result: Result) -> Arm | None:
    """The arm to train with: of the baseline and what was better, the one with the lowest mean; None before the end."""
    ended = [arm for arm in result["arms"] if arm["verdict"] in ("baseline", "better") and arm["mean"] is not None]
    ended = [arm for arm in ended if arm["code"]]
    return min(ended, key=lambda arm: float(arm["mean"])) if result["complete"] and ended else None


def _difference(arm: Arm) -> float:
    found = (arm["difference"] or {}).get("mean")
    return float("inf") if found is None else float(found)


def _of_one(arm: Arm, baseline: str) -> str:
    name, verdict = arm["name"], arm["verdict"]
    if verdict == "better":
        return _beats(arm, baseline)
    if verdict == "worse" and not diverged(arm):
        return f"{name} trained worse than {baseline}: it ended {_by(arm)}"
    if verdict == "equivalent":
        return f"{name} trained as well as {baseline}"
    if verdict == "undecided" and not diverged(arm):
        return f"Undecided: these runs cannot tell whether {name} trains better or worse than {baseline}"
    if not diverged(arm):
        return f"Undecided: with no seed did both {name} and {baseline} reach the end"
    return f"{name} diverged with every seed; {baseline} did not"


def _beats(arm: Arm, baseline: str) -> str:
    return f"{arm['name']} trained better than {baseline}: it ended {_by(arm)}"


def _by(arm: Arm) -> str:
    found = arm["difference"] or {}
    if found.get("mean") is None:  # better than a baseline that diverged
        return "where the other diverged"
    mean = found["mean"]
    text = f"{abs(mean):.3f} nats per token {'lower' if mean < 0 else 'higher'}"
    if found.get("low") is None or found.get("high") is None:
        return text
    if found["low"] <= 0 <= found["high"]:
        return f"{text} (95% interval of the difference {found['low']:+.3f} to {found['high']:+.3f})"
    low, high = sorted((abs(found["low"]), abs(found["high"])))
    return f"{text} (95% interval {low:.3f} to {high:.3f})"


def _rest(others: list[Arm], better: list[Arm]) -> str:
    rest = [arm for arm in others if arm not in better]
    if len(rest) == 1:
        return f"{rest[0]['name']}: {'diverged' if diverged(rest[0]) else VERDICTS[rest[0]['verdict']]}"
    return f"of the other {len(rest)}, {_counts(rest)}"


def _counts(arms: list[Arm]) -> str:
    kinds = ["diverged" if diverged(arm) else arm["verdict"] for arm in arms]
    words = {"equivalent": "equal", "worse": "worse", "undecided": "undecided", "diverged": "diverged"}
    return ", ".join(f"{kinds.count(kind)} {word}" for kind, word in words.items() if kind in kinds)


# --- what was compared, and how --------------------------------------------------------------------------------------


def method(result: Result) -> list[str]:
    """What was compared and how: two paragraphs of a few plain sentences."""
    model, data, budget, seeds = (result[key] for key in ("model", "data", "budget", "seeds"))
    source = data.get("source")
    text = f" on the same data ({source})" if source else ""
    what = (
        f"{len(result['arms'])} ways to train the same model ({model['name']}, {short(model['parameters'])} "
        f"parameters){text}: {result['baseline']} is the baseline, the others are candidates. What counts is the loss "
        f"at the end of a run of {budget['tokens']:,} tokens, on data that was not trained on, in nats per token: "
        "lower is better, and 0.01 lower is a perplexity about 1% lower. A difference below "
        f"{result['margin']:g} is taken to make no difference."
    )
    how = (
        f"{_tuning(result)} The best setting of each then trains again {_times(len(seeds))}, with "
        f"{'a seed' if len(seeds) == 1 else 'seeds'} that tuning did not use; runs with the same seed start from the "
        "same weights and read the same data in the same order, so that they are compared in pairs."
    )
    return [what, how]


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _tuning(result: Result) -> str:
    counts = sorted({trials(arm) for arm in result["arms"] if not arm["setting_of"]})
    taken = "".join(
        f" {arm['name']} has no trials, but the best setting of {arm['setting_of']}"
        + (
            f", and from there a search of {len(searched(arm))} runs for a factor per type of block"
            * bool(arm.get("search"))
        )
        + "."
        for arm in result["arms"]
        if arm["setting_of"]
    )
    if not counts:
        return f"None was tuned here.{taken}"
    each = "Each other" if taken else "Each"
    keys = {key for arm in result["arms"] for run in arm["tuning"] for key in run["setting"]}
    what = "learning rate" if len(keys) < 2 else "learning rate and further settings"
    if any(arm.get("search") and not arm["setting_of"] for arm in result["arms"]):
        what += ", or a factor per type of block"
    if len(counts) == 1 and result["complete"]:
        return f"{each} was tuned with the same number of trials: {counts[0]} runs to find its best {what}.{taken}"
    had = f"{counts[0]} each" if len(counts) == 1 else f"between {counts[0]} and {counts[-1]}"
    return f"{each} gets the same number of trials, runs to find its best {what}; so far they had {had}.{taken}"


def together(result: Result) -> str:
    """Whether pairing by seed makes differences surer than the losses of the arms by themselves."""
    base = baseline_of(result)
    widths = {arm["name"]: _width(arm["interval"]) for arm in result["arms"]}
    surer = {}
    for arm in candidates(result):
        found = arm["difference"] or {"low": None, "high": None}
        width, alone = _width((found["low"], found["high"])), (widths[arm["name"]], widths[base["name"]])
        if width is not None and None not in alone:
            surer[arm["name"]] = all(width < (own or 0.0) for own in alone)
    if not surer:
        return ""
    if all(surer.values()):
        return "A seed moves all arms alike, so that differences are surer than these means."
    if not any(surer.values()):
        return (
            f"Here a seed does not move the arms and {base['name']} alike: differences are no surer than these means."
        )
    names = ", ".join((*(name for name, so in surer.items() if so), base["name"]))
    return f"A seed moves {names} alike; differences of the other arms are no surer than these means."


def _width(ends: Sequence[float | None] | None) -> float | None:
    if ends is None or ends[0] is None or ends[1] is None:
        return None
    return ends[1] - ends[0]


def status(result: Result) -> str:
    """What is missing of a study that is not complete."""
    return f"{_done(result)} are done. The page shows what there is; every number may still change."


def _done(result: Result) -> str:
    done, expected = result["progress"]["done"], result["progress"]["expected"]
    # How many an unfinished tuning will take may not be known.
    return f"{done:,} of {expected:,} runs" if expected > done else f"{done:,} runs"


def interval(ends: Sequence[float] | None) -> str:
    """An interval of a loss in a table.

    >>> interval([3.8, 3.91234]), interval(None)
    ('3.8000 to 3.9123', '-')
    """
    return "-" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def speedup_words(found: Any) -> tuple[str, str]:
    """A speed-up in a table, and its interval."""
    if not found or (found["value"] is None and not found["bound"]):
        return "-", ""
    text = found["bound"] or f"{found['value']:.2f}"
    low, high = found["low"], speedup_high(found)
    if low is None or high is None:
        return text, ""
    if low == 0 or high == float("inf"):
        ends = [f"from {low:.2f}"] * (low != 0) + [f"up to {high:.2f}"] * (high != float("inf"))
        return text, f"({' '.join(ends) or 'open on both sides'})"
    return text, f"({low:.2f} to {high:.2f})"


def speedup_high(found: Any) -> float | None:
    """The upper end of a speed-up; what plain values cannot say is infinite: a lower end and no upper one."""
    if found["high"] is None:
        return None if found["low"] is None else float("inf")
    return float(found["high"])
