"""The page of one run: one HTML file in its folder, readable without a network."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sharpwise.files import write_whole
from sharpwise.report import run_charts, run_text
from sharpwise.report.blocks import block_table, describe, moving
from sharpwise.report.html import PAGE_NAME, card, chart, document, facts, notes, table
from sharpwise.report.plot import Figure
from sharpwise.report.reading import METRICS, TIMING
from sharpwise.report.run import RunData, read_run
from sharpwise.report.run_blocks import explained, factors
from sharpwise.report.text import moment
from sharpwise.report.warmup import advice


def write_run_page(folder: str | Path) -> Path:
    """Write `index.html` into the folder of a run, whether it has ended or not; returns the page's path.

    Raises:
        ValueError: the folder holds no run.
    """
    run = read_run(folder)
    path = run.folder / PAGE_NAME
    write_whole(path, render(run).encode("utf-8", "replace"))  # a message may hold what UTF-8 cannot
    return path


def render(run: RunData) -> str:
    """The whole page as HTML."""
    body = "\n".join(
        part
        for part in (
            "<header>",
            f'<p class="kicker">sharpwise run {escape(_name(run))}</p>',
            f"<h1>{escape(run_text.headline(run))}</h1>",
            f'<p class="lead">{escape(run_text.lead(run))}</p>',
            f'<p class="state {run.status.state}"><strong>{run.status.state}</strong> '
            f"{escape(run_text.status_words(run))}</p>",
            _warmup(run),
            notes(run_text.caveats(run)),
            "</header>",
            '<div class="grid">',
            *_charts(run),
            '<div class="stack">',
            card("What came out", "", facts(run_text.results(run)) + _links(run)),
            _starts(run.starts),
            "</div>",
            card("What was run", "", facts(run_text.setup(run), code=("optimizer",))),
            _blocks(run),
            _sample(run),
            _config(run),
            "</div>",
            f'<p class="hint foot">{escape(run_text.footer(run))}</p>',
        )
        if part
    )
    return document(f"{_name(run)}: {run_text.headline(run)}", body)


def _warmup(run: RunData) -> str:
    said = advice(run)
    return f'<p class="lead">{escape(said)}</p>' if said else ""


def _name(run: RunData) -> str:
    return run.folder.resolve().name


def _charts(run: RunData) -> list[str]:
    marks = " Dotted: resumed." if run_charts.resumed_at(run) else ""
    marks += " Red: diverged." if run.status.state == "diverged" else ""
    smoothed = run.last_step >= 200  # below, a hundredth of the run is one step
    updates_hint = "Norm of one update over the norm of the parameters, by block type."
    cards: tuple[tuple[str, str, str, Figure | None], ...] = (
        (
            "loss",
            "Loss",
            f"{'Faint: every step. Strong: averaged over a hundredth of the run. ' if smoothed else ''}"
            f"Diamonds: validation.{marks}",
            run_charts.loss(run),
        ),
        (
            "rates",
            "Learning rate of each block type",
            "The scheduled learning rate times the factor of the block, at its latest measurement. "
            "A band where layers differ.",
            run_charts.learning_rates(run),
        ),
        (
            "multipliers",
            "Factor of each block type on the learning rate",
            "As it follows from what is measured on the way. A band where layers differ.",
            run_charts.multipliers(run),
        ),
        (
            "gradient",
            "Gradient norm",
            "Of all parameters together, before clipping.",
            run_charts.gradient_norm(run),
        ),
        ("updates", "Update size of each block type", updates_hint, run_charts.update_sizes(run)),
        (
            "throughput",
            "Throughput",
            f"Whole steps, without evaluations and checkpoints.{marks}",
            run_charts.throughput(run),
        ),
        ("memory", "Memory", "The peak, as the process or the device reports it.", run_charts.memory(run)),
    )
    return [
        card(title, hint, chart(figure, name, f"{title} of the run against steps"))
        for name, title, hint, figure in cards
        if figure is not None
    ]


def _links(run: RunData) -> str:
    names = [name for name in (METRICS, TIMING) if (run.folder / name).is_file()]
    links = ", ".join(f'<a href="{name}">{name}</a>' for name in names)
    return f'<p class="hint">All numbers: {links}</p>' if links else ""


def _starts(starts: Sequence[Mapping[str, Any]]) -> str:
    """What all starts share as facts, and what differs as a table."""
    if not starts:
        return ""
    keys = list(dict.fromkeys(key for start in starts for key in start))
    own = [key for key in keys if any(start.get(key) != starts[0].get(key) for start in starts)]
    common = [(_words(key), _cell(key, starts[0][key])) for key in keys if key not in own]
    content = facts(common)
    if own:
        head = "".join(f'<th scope="col">{escape(_words(key))}</th>' for key in own)
        lines = ["".join(f"<td>{escape(_cell(key, start.get(key)))}</td>" for key in own) for start in starts]
        content += table(head, [f"<tr>{line}</tr>" for line in lines], "Starts of the run")
    times = {1: "", 2: "Resumed once."}.get(len(starts), f"Resumed {len(starts) - 1} times.")
    return card("Where it ran", times, content)


def _words(key: object) -> str:
    return {"step": "first step"}.get(str(key), str(key).replace("_", " "))


def _cell(key: object, value: Any) -> str:
    return "-" if value is None else moment(str(value)) if key == "date" else str(value)


def _blocks(run: RunData) -> str:
    if run.blocks is None:
        return ""
    found, moved, peak = factors(run), explained(run), run.setting("optimizer", "lr")
    varied = any(factor["now"] not in (None, 1.0) for factor in found)
    found = found if varied else [{"now": 1.0}] * len(found)
    rows = [
        {**describe(s), **moving(moved.get((s.name, s.describe_rows()), {})), "multipliers": _rates(factor, peak)}
        for s, factor in zip(run.blocks, found, strict=True)
    ]
    hint = "What each parameter is taken for, " + ("how it is moved, " if moved else "")
    hint += (
        "the latest mean factor on the lr of its role in its layer, and their product" if varied else "its size, its lr"
    )
    shown = {"now": "lr factor", "peak": "peak lr"} if varied else {"peak": "peak lr"} if moved else {}
    content = block_table(rows, shown)
    return card("Block map", f"{hint}. Equal layers share one row.", content, wide=True)


def _rates(factor: Mapping[str, float | None], peak: Any) -> dict[str, float | None]:
    now = factor["now"]
    known = now is not None and isinstance(peak, (int, float))
    return {"now": now, "peak": peak * now if known else None}


def _sample(run: RunData) -> str:
    if not run.sample:
        return ""
    text = f'<blockquote class="text" tabindex="0">{escape(run.sample)}</blockquote>'
    return card("A sample", "Written by the model at the end of the run.", text, wide=True)


def _config(run: RunData) -> str:
    text = f'<pre tabindex="0" role="region" aria-label="Configuration">{escape(run.config_text)}</pre>'
    return (
        f'<section class="card wide"><details><summary>Configuration (config.toml)</summary>{text}</details></section>'
    )
