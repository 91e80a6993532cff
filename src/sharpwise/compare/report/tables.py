"""The tables of a comparison's page, as HTML."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from sharpwise.compare.report.arms import (
    Arm,
    Result,
    candidates,
    chosen_lr,
    further,
    html_name,
    looks,
    searched,
    setting_name,
    setting_words,
    trials,
    value_words,
)
from sharpwise.compare.report.runs import STAGES, Run, runs_of
from sharpwise.compare.report.text import VERDICTS, interval, speedup_words
from sharpwise.report.blocks import block_table
from sharpwise.report.html import facts, table
from sharpwise.report.text import mebibytes, moment, number

FACTORS = ("optimizer.block_lr", "optimizer.settings_of")
"""Settings that searched factors are written as."""


def definitions(result: Result) -> str:
    """What each arm is, in a line."""
    look = looks(result)
    lines = [
        f"<dt>{html_name(arm['name'], look[arm['name']])}</dt><dd>{escape(arm['definition'])}</dd>"
        for arm in result["arms"]
    ]
    return f"<dl>{''.join(lines)}</dl>"


def verdicts(result: Result) -> str:
    """The verdict on each candidate in a sentence."""
    look = looks(result)
    lines = [
        f'<tr><th scope="row" class="verdict">{html_name(arm["name"], look[arm["name"]])}<br>{_badge(_kind(arm))}</th>'
        f"<td>{_sentence(arm)}</td></tr>"
        for arm in candidates(result)
    ]
    return table('<th scope="col">candidate</th><th scope="col">what came out</th>', lines, "Verdicts")


def ablations(result: Result) -> str:
    """The verdict on each arm against each of its ablations."""
    look = looks(result)
    lines = [
        f'<tr><th scope="row" class="verdict">{html_name(pair["arm"], look[pair["arm"]])}<br>{_badge(_kind(pair))}</th>'
        f"<td>{html_name(pair['ablation'], look[pair['ablation']])}</td><td>{_sentence(pair)}</td></tr>"
        for pair in result["ablations"]
    ]
    head = "".join(f'<th scope="col">{title}</th>' for title in ("arm", "against", "what came out"))
    return table(head, lines, "Ablations")


def _sentence(judged: Mapping[str, Any]) -> str:
    text = judged["sentence"] or "No pair of final runs yet."
    return escape(text[0].upper() + text[1:])


def _kind(judged: Mapping[str, Any]) -> str:
    return str(judged["verdict"]) if judged["difference"] else "not yet"


def _badge(kind: str) -> str:
    return f'<span class="badge {escape(kind)}">{escape(VERDICTS.get(kind, kind))}</span>'


def results(result: Result) -> str:
    """What came out of the final runs, an arm per row."""
    arms = result["arms"]
    columns: list[Column] = [
        ("final loss, mean", [(number(arm["mean"], ".4f"), "") for arm in arms]),
        ("95% interval", [(interval(arm["interval"]), "") for arm in arms]),
        (f"minus {result['baseline']}", [_difference(arm) for arm in arms]),
        ("speed-up", [speedup_words(arm["speedup"]) for arm in arms]),
        ("final runs", [(_ended(arm), "") for arm in arms]),
    ]
    best = min((arm["mean"] for arm in arms if arm["mean"] is not None), default=None)
    bold = [arm["mean"] is not None and arm["mean"] == best for arm in arms]
    return _arms_table(result, columns, "Results", bold, roomy=("95% interval",))


def costs(result: Result) -> str:
    """What tuning chose and what state it takes, an arm per row."""
    arms = result["arms"]
    columns: list[Column] = [
        ("learning rate", [(_rate(arm), "") for arm in arms]),
        ("further settings", [(_further(arm) or "-", "") for arm in arms]),
        ("tuning runs", [(_tuning_runs(arm), "") for arm in arms]),
        ("diverged from lr", [(number(arm["divergence_edge"], "g"), "") for arm in arms]),
        ("mean lr factor", [(number(arm["mean_multiplier"], ".3g"), "") for arm in arms]),
        ("lr x mean factor", [(number(arm["mean_lr"], ".3g"), "") for arm in arms]),
        ("optimizer state", [(mebibytes(arm["state_bytes"]), "") for arm in arms]),
    ]
    return _arms_table(result, columns, "Settings and costs", [False] * len(arms))


def _further(arm: Arm) -> str:
    """What was tuned besides the learning rate; searched factors have a card of their own."""
    own = {key: value for key, value in further(arm["setting"]).items() if key not in FACTORS}
    return setting_words(own)


def _tuning_runs(arm: Arm) -> str:
    count = len(searched(arm))
    own = f"those of {arm['setting_of']}" if arm["setting_of"] else str(trials(arm) - count)
    return f"{own}, {count} of a search" if count else own


def rates(result: Result) -> str:
    """The final loss at every learning rate that was tried, and how far above the best of the arm it is."""
    look, lines = looks(result), []
    for arm in result["arms"]:
        tuned = sorted(arm["tuning"], key=lambda run: float(run["lr"]))
        best = min((run["final_loss"] for run in tuned if run["final_loss"] is not None), default=None)
        for i, run in enumerate(tuned):
            loss, chosen = run["final_loss"], run["setting"] == arm["setting"]
            above = "" if loss is None else "best" if loss == best else f"{loss - best:+.4f}"
            name = html_name(arm["name"], look[arm["name"]])
            head = f'<th scope="rowgroup" rowspan="{len(tuned)}" class="name">{name}</th>' if i == 0 else ""
            texts = (setting_words(run["setting"]), "diverged" if loss is None else f"{loss:.4f}", above)
            css = ' class="number best"' if chosen else ' class="number"'
            cells = "".join(f"<td{css}>{escape(text)}</td>" for text in texts)
            lines.append(f"<tr>{head}{cells}</tr>")
    titles = ("setting", "final loss", "above the arm's best")
    heads = "".join(f'<th scope="col" class="number">{escape(title)}</th>' for title in titles)
    return table(f'<th scope="col">arm</th>{heads}', lines, "Learning rates") if lines else ""


Column = tuple[str, list[tuple[str, str]]]
"""A title, and for each arm a text and a second line."""


def _arms_table(
    result: Result, columns: list[Column], label: str, bold: Sequence[bool], roomy: Sequence[str] = ()
) -> str:
    """A row per arm; columns of `roomy` are left out where the screen is small."""
    arms, look = result["arms"], looks(result)
    # A column that says nothing is left out.
    columns = [column for column in columns if any(text != "-" for text, _ in column[1])]
    head = '<th scope="col">arm</th>' + "".join(
        f'<th scope="col" class="number arm{" roomy" * (title in roomy)}">{escape(title)}</th>' for title, _ in columns
    )
    lines = []
    for i, arm in enumerate(arms):
        css = ' class="best"' if bold[i] else ""
        cells = ""
        for title, texts in columns:
            (first, second), small = texts[i], " roomy" * (title in roomy)
            cells += f'<td class="number{small}">{escape(first)}{f"<br>{escape(second)}" if second else ""}</td>'
        lines.append(
            f'<tr{css}><th scope="row" class="name">{html_name(arm["name"], look[arm["name"]])}</th>{cells}</tr>'
        )
    return table(head, lines, label)


def _difference(arm: Arm) -> tuple[str, str]:
    found = arm["difference"]
    if not found or found["mean"] is None:
        return "-", ""
    low, high = found["low"], found["high"]
    return f"{found['mean']:+.4f}", "" if low is None or high is None else f"({low:+.4f} to {high:+.4f})"


def _rate(arm: Arm) -> str:
    lr = chosen_lr(arm)
    edge = f" ({arm['edge']} tried)" if arm["edge"] else ""
    return "-" if lr is None else f"{lr:g}{edge}"


def _ended(arm: Arm) -> str:
    lost = sum(run["final_loss"] is None for run in arm["final"])
    return f"{len(arm['final'])}{f', {lost} diverged' if lost else ''}"


# --- every run -------------------------------------------------------------------------------------------------------


def runs(result: Result) -> str:
    """Every run by arm, each with its settings a click away."""
    found, look = runs_of(result), looks(result)
    most = max(trials(arm) for arm in result["arms"])
    parts = []
    for arm in result["arms"]:
        own = [run for run in found if run.arm == arm["name"]]
        lines = "".join(_run(run, most) for run in own) or '<p class="hint">None is done yet.</p>'
        parts.append(f'<div class="runs"><h3>{html_name(arm["name"], look[arm["name"]])}</h3>{lines}</div>')
    return f'<div class="three">{"".join(parts)}</div>'


def _run(run: Run, most: int) -> str:
    end = "diverged" if run.final_loss is None else f"{run.final_loss:.4f}"
    stages = {"roles": "search", "final": "final", "horizon": f"{run.share:g} x tokens"}
    stage = stages.get(run.stage, "tuning")
    what = setting_words(run.setting) or "no setting"
    if run.stage in ("final", "horizon"):
        what = f"seed {run.seed}"
    if run.stage == "refine":
        what += f", seed {run.seed}"
    if run.stage == "roles":
        said = [value_words(run.setting[key]) for key in FACTORS if key in run.setting]
        what = f"{', '.join(said) or 'all factors 1'}, seed {run.seed}"
    mark = " (chosen)" if run.chosen and run.stage in ("tune", "even") else ""
    summary = f"<summary>{escape(f'{stage}, {what}{mark}')}: <b>{end}</b></summary>"
    items = [
        ("stage", STAGES[run.stage].format(most=most)),
        *((setting_name(key), value_words(value)) for key, value in run.setting.items()),
        ("seed", str(run.seed)),
        ("tokens", f"{run.tokens:,}"),
        ("final loss", end if run.stopped_at is None else f"diverged at step {run.stopped_at:,}"),
    ]
    return f"<details>{summary}{facts(items)}{_links(run.folder)}</details>"


def _links(folder: str) -> str:
    if not folder:
        return ""
    # "./" makes it a path, whatever it looks like.
    path = "./" + quote(folder.rstrip("/"))
    return (
        f'<p class="hint">Its folder: <a href="{path}/">{escape(folder)}</a>, and in it the whole configuration: '
        f'<a href="{path}/config.toml">config.toml</a></p>'
    )


# --- what all share --------------------------------------------------------------------------------------------------


def blocks(result: Result) -> str:
    """The block map, with the factors of the arms whose blocks differ; of arms with the same ones, once."""
    alike: dict[tuple[float, ...], list[str]] = {}
    for name in varied_arms(result):
        alike.setdefault(tuple(block["multipliers"].get(name, 1.0) for block in result["blocks"]), []).append(name)
    titles = {names[0]: f"lr factor, {', '.join(names)}" if len(alike) > 1 else "lr factor" for names in alike.values()}
    return block_table(result["blocks"], titles)


def varied_arms(result: Result) -> list[str]:
    """Arms that have a factor other than 1 on the learning rate of some block."""
    names = [arm["name"] for arm in result["arms"]]
    return [name for name in names if any(block["multipliers"].get(name, 1.0) != 1.0 for block in result["blocks"])]


def flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    """Nested values as names and texts.

    >>> list(flat({"batch": {"sequences": 16}, "seed": None, "betas": [0.9, 0.95]}))
    [('batch.sequences', '16'), ('seed', '-'), ('betas', '0.9, 0.95')]
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", _plain(key, value)


def _plain(key: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        # A year or a seed has no thousands; counts have.
        return f"{value:,}" if abs(value) >= 10_000 and "seed" not in key else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(key, item) for item in value) or "-"
    return moment(value) if key == "date" and isinstance(value, str) else str(value)


def readable(items: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The names of plain values, as words."""
    return [(key.replace("_", " "), text) for key, text in items]
