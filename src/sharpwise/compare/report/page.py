"""The page of a comparison: one HTML file with everything in it, and its numbers beside it as JSON and CSV."""

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from sharpwise.compare.report import curve_charts, row_charts, search, tables, text
from sharpwise.compare.report.arms import Result, html_name, looks
from sharpwise.compare.report.runs import csv_text
from sharpwise.compare.report.sensitivity import sensitivity
from sharpwise.files import write_whole
from sharpwise.report.html import PAGE_NAME, bullets, card, chart, command, document, facts
from sharpwise.report.plot import Figure
from sharpwise.report.text import moment

JSON_NAME, CSV_NAME = "result.json", "result.csv"
RESULTS_HINT = "Loss in nats per token, on the same held-out tokens for every run. In bold: the lowest mean."
COSTS_HINT = (
    "What tuning chose, and what it costs. The mean lr factor is what an arm multiplies the learning rate of an "
    "average parameter by; lr x mean factor is what that parameter gets. How long steps take is not compared: runs "
    "share the machine, and their times would rank its load."
)


def write_study_page(result: Result, folder: Path) -> Path:
    """Write index.html, result.json and result.csv (a row per run) into `folder`; returns the path of the page.

    Each file is replaced as a whole; if the page cannot be made, none is. What is not finite is null in the JSON.

    Args:
        result: of a comparison, complete or not, as plain values; losses in nats per token.
        folder: made if it is not there; the folders of runs that `result` names are relative to it.
    """
    page, rows = render(result), csv_text(result)
    numbers = json.dumps(_finite(result), allow_nan=False, indent=1, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / JSON_NAME, numbers + "\n")
    write_whole(folder / CSV_NAME, rows)
    write_whole(folder / PAGE_NAME, page)
    return folder / PAGE_NAME


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(result: Result, numbers: str = JSON_NAME, rows: str = CSV_NAME) -> str:
    """The whole page as HTML; `numbers` and `rows` are the files beside it that it links to."""
    result = _whole(result)
    step = result["next"]
    do = f"{step['reason'].rstrip(':.')}." if step else ""  # the command is at the end of the page
    parts = (
        "<header>",
        f'<p class="kicker">Comparison of optimizers: {escape(result["name"])}</p>',
        f"<h1>{escape(text.headline(result))}</h1>",
        ""
        if result["complete"]
        else f'<p class="state running"><strong>unfinished</strong> {escape(text.status(result))}</p>',
        f'<p class="lead"><a href="#next">What to do next</a>: {escape(do)}</p>' if step else "",
        "</header>",
        '<div class="grid">',
        card("Verdicts", _verdict_hint(result), tables.verdicts(result), wide=True),
        _caveats(result),
        *search.cards(result),
        card("What was compared", "", _method(result), wide=True),
        _ablations(result),
        *_charts(result),
        card("Results", RESULTS_HINT, tables.results(result), wide=True),
        card("Settings and costs", COSTS_HINT, tables.costs(result), wide=True),
        _tried(result),
        _rates(result),
        _code(result),
        _blocks(result),
        card(
            "Every run",
            "The number is its final validation loss. Open a run for its settings and its folder; all else is under "
            "what all runs share.",
            tables.runs(result),
            wide=True,
            folded=True,
        ),
        *_setup(result),
        _next(result),
        "</div>",
        f'<p class="hint foot">All numbers: <a href="{numbers}">{numbers}</a>; a row per run: '
        f'<a href="{rows}">{rows}</a></p>',
        f'<p class="hint foot">Written from results of {escape(moment(str(result["environment"].get("date", "-"))))}. '
        "This file needs no network.</p>",
    )
    return document(f"{result['name']}: {text.headline(result)}", "\n".join(part for part in parts if part))


def _whole(result: Result) -> Result:
    """With what results of the first versions lack."""
    arms = [{"setting_of": "", **arm} for arm in result["arms"]]
    return {"next": None, **result, "arms": arms}


def _caveats(result: Result) -> str:
    """All that a reader has to know before believing it, in one box, a click away."""
    said, untested = result["caveats"], result["not_tested"]
    if not said and not untested:
        return ""
    more = f"<h3>What was not tested</h3>{bullets(untested)}" if untested else ""
    title = f"Before you believe it: {len(said)} caveat{'s' * (len(said) != 1)}, and what was not tested"
    return card(title, "", bullets(said) + more, wide=True, folded=True, caution=True)


def _next(result: Result) -> str:
    """The command to give, and until then what to train with."""
    step, best = result["next"], text.best(result)
    content = f'<p class="lead">{escape(step["reason"])}</p>{command(step["command"])}' if step else ""
    if best is not None:
        content += (
            f'<p class="lead">In a training loop of your own, the best that these runs know is '
            f"{escape(best['name'])}:</p>{command(best['code'])}"
        )
    return card("What to do next", "", f'<div id="next">{content}</div>', wide=True) if content else ""


def _method(result: Result) -> str:
    paragraphs = "".join(f'<p class="lead">{escape(paragraph)}</p>' for paragraph in text.method(result))
    return paragraphs + tables.definitions(result)


def _verdict_hint(result: Result) -> str:
    return (
        f"Each candidate against {result['baseline']}, its final losses paired by seed. A 95% interval says how far "
        "other seeds might move the number. Undecided means just that: neither a difference nor its absence was shown."
    )


def _charts(result: Result) -> list[str]:
    baseline = result["baseline"]
    cards: tuple[tuple[str, str, str, Figure | None], ...] = (
        (
            "difference",
            f"Difference to {baseline}",
            f"Filled: the mean over seeds, with its 95% interval; open: single seeds. The line at 0 is {baseline}, the "
            f"grey band what makes no difference (within {result['margin']:g}).",
            row_charts.differences(result),
        ),
        (
            "final",
            "Final losses",
            f"Filled: the mean over seeds, with its 95% interval; open: single seeds. Dashed: the mean of {baseline}. "
            f"{text.together(result)}",
            row_charts.final_losses(result),
        ),
        (
            "speedup",
            "Speed-up",
            f"The tokens that the tuned {baseline} needs to reach the same loss, over the tokens used, read off runs "
            f"of {baseline} with {_shares(result)} the tokens. An arrow: beyond what was measured.",
            row_charts.speedups(result),
        ),
        (
            "memory",
            "Memory against loss",
            "What the optimizer keeps beside the weights. Lower left is better. The bar is the 95% interval.",
            curve_charts.memory(result),
        ),
        (
            "loss",
            "Loss along the way",
            "Training loss, smoothed, of each arm at its best setting. Thick: the mean over seeds; thin: single seeds. "
            "What counts is the loss on held-out data at the end of the run: see the final losses.",
            curve_charts.loss_curves(result),
        ),
        (
            "gap",
            "Ahead or behind along the way",
            f"Validation loss minus that of {baseline} with the same seed, after the same number of tokens. Below 0 is "
            "ahead. Curves may cross late.",
            curve_charts.gaps(result),
        ),
        (
            "sensitivity",
            "Which learning rate?",
            "Every point is a whole run, all with the same seed. Filled: the one that was chosen.",
            sensitivity(result),
        ),
    )
    shown = [(title, hint, chart(figure, name, f"{title}. {hint}")) for name, title, hint, figure in cards if figure]
    last = len(shown) - 1
    # The last one fills its row.
    return [card(*one, wide=i == last and i % 2 == 0) for i, one in enumerate(shown)]


def _shares(result: Result) -> str:
    shares = sorted({1.0, *(horizon["share"] for horizon in result["horizons"])})
    texts = [f"{share:g}" for share in shares]
    return f"{', '.join(texts[:-1])} and {texts[-1]} times" if len(texts) > 1 else "once"


def _tried(result: Result) -> str:
    drawn = tables.rates(result)
    hint = "What the figure shows: a run for every line, all with the same seed. In bold: the one that was chosen."
    return card("Final loss at every learning rate", hint, drawn, wide=True) if drawn else ""


def _rates(result: Result) -> str:
    figures = curve_charts.learning_rates(result)
    if not figures:
        return ""
    parts = []
    for i, (names, figure) in enumerate(figures.items()):
        title = "<br>".join(html_name(name, looks(result)[name]) for name in names)
        drawn = chart(figure, f"rates-{i}", f"Learning rate of each block type in {' and '.join(names)}")
        parts.append(f"<div><h3>{title}</h3>{drawn}</div>")
    hint = (
        "The scheduled learning rate times the factor of the block, all on one scale; arms that treat all blocks alike "
        "are left out. Emb: embeddings; QK and VO: attention; FFN: feed-forward; Norm: normalization."
    )
    return card("Learning rate of each block type", hint, f'<div class="three">{"".join(parts)}</div>', wide=True)


def _code(result: Result) -> str:
    codes = {arm["name"]: arm["code"] for arm in result["arms"] if arm["code"]}
    code = facts(codes.items(), code=codes)
    return card("The arms as code", "What to write to get the same.", code, wide=True, folded=True)


def _blocks(result: Result) -> str:
    if not result["blocks"]:
        return ""
    varied = tables.varied_arms(result)
    hint = f"What each parameter is taken for, and {'the factor on its learning rate' if varied else 'its size'}"
    return card("Block map", f"{hint}. Equal layers share one row.", tables.blocks(result), wide=True, folded=True)


def _ablations(result: Result) -> str:
    if not result["ablations"]:
        return ""
    hint = (
        "An arm against itself with other multipliers or settings, each at the lr that tuning gave it, paired by seed. "
        "If it ends no lower than a control, what helped is the size of the steps and not which block gets the large "
        "ones. p is adjusted for the number of these pairs, apart from those with the baseline: another question."
    )
    return card("Do the ratios matter?", hint, tables.ablations(result), wide=True)


def _setup(result: Result) -> list[str]:
    budget, model = result["budget"], result["model"]
    items = [
        *((f"model: {key}", value) for key, value in tables.flat(model)),
        *((f"data: {key}", value) for key, value in tables.flat(result["data"])),
        *((f"run: {key}", value) for key, value in tables.flat(budget)),
        ("seeds", ", ".join(map(str, result["seeds"]))),
    ]
    config = facts(tables.flat(result["config"]))
    shared = facts(tables.readable(items)) + (
        f'<details class="more"><summary>The whole configuration</summary>{config}</details>'
        if result["config"]
        else ""
    )
    return [
        card("What all runs share", "", shared),
        card("Where it ran", "", facts(tables.readable(tables.flat(result["environment"])))),
    ]
