"""What `sharpwise compare` prints: before it starts what a study takes, in the end what came out."""

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sharpwise.compare.budget import Budget
    from sharpwise.compare.study import Study


def announce(log: Console, study: "Study", budget: "Budget", jobs: int) -> None:
    """What the study takes, before it starts."""
    from sharpwise.train.environment import slow_bf16

    least, most = budget.runs
    log.print(
        f"{len(study.arms)} arms, {least} to {most} runs of {budget.tokens:,} tokens ({budget.steps:,} steps), "
        f"{jobs} at a time" + (f"; {budget.done} are done" if budget.done else "")
    )
    for name, roles in study.roles.items():
        log.print(
            f"{roles.least} to {roles.most} of them search {roles.said} in {name}",
            soft_wrap=True,
        )
    log.print(
        f"{budget.tokens_per_parameter:.2g} tokens per parameter outside the embeddings, where 20 are usual",
        soft_wrap=True,
    )
    compute = study.run.get("compute", {})
    if slow := slow_bf16(compute.get("precision"), compute.get("device")):
        log.print(slow, style="yellow", soft_wrap=True)
    if budget.seconds is not None:
        rest = " of the others" if budget.done else ""
        least_time, most_time = (duration(seconds) for seconds in budget.seconds)
        span = least_time if least_time == most_time else f"{least_time} to {most_time}"
        log.print(f"estimated time{rest}: {span}")
    log.print(
        f"{study.seeds} seeds see a difference of about {budget.detectable:.3f} nats (80% of the time, if seeds differ "
        "as those of AdamW at 0.4M parameters)",
        soft_wrap=True,
    )


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return str(datetime.timedelta(seconds=round(seconds))) if seconds >= 5400 else f"{seconds / 60:.0f} min"


def print_result(console: Console, result: Mapping[str, Any]) -> None:
    """The verdict, what to know before believing it, and what to do next: as on the page."""
    from sharpwise.compare.report.text import headline

    console.print(headline(result), style="bold")
    console.print()
    console.print(_table(result))
    console.print()
    _print_searches(console, result)
    for arm in result["arms"]:
        if arm["name"] != result["baseline"] and arm["sentence"]:
            console.print(f"{arm['name']}: {arm['sentence']}")
    for pair in result["ablations"]:
        if pair["sentence"]:
            console.print(f"{pair['arm']}, against {pair['ablation']}: {pair['sentence']}")
    if result["caveats"]:
        console.print("\nBefore you believe it", style="bold")
    for note in result["caveats"]:
        console.print(f"- {note}")
    console.print("\nWhat to do next", style="bold")
    console.print(result["next"]["reason"])
    console.print(f"  {result['next']['command']}\n", soft_wrap=True)


def _table(result: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("arm", "lr", "final loss", "against " + result["baseline"], "state"):
        table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
    for arm in result["arms"]:
        lr = "-" if arm["setting"] is None else f"{arm['setting']['optimizer.lr']:g}{' (edge)' if arm['edge'] else ''}"
        mean = ("diverged" if arm["final"] else "-") if arm["mean"] is None else f"{arm['mean']:.4f}"
        difference = arm["difference"]
        against = "" if difference is None or difference["mean"] is None else f"{difference['mean']:+.4f}"
        if difference and difference["low"] is not None:
            against += f" ({difference['low']:+.4f} to {difference['high']:+.4f})"
        state = "-" if arm["state_bytes"] is None else f"{arm['state_bytes'] / 2**20:.2f} MiB"
        table.add_row(arm["name"], lr, mean, against, state)
    return table


def _print_searches(console: Console, result: Mapping[str, Any]) -> None:
    """The factors of every search, what each gained, and how to write them."""
    from sharpwise.compare.report.search import WORDS, rows, searches, spelled, summary

    for arm, search in searches(result):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for column in ("on", "type", "factor", "gained, nats (each seed)", "steps tried: loss minus that before"):
            table.add_column(column, justify="right" if column == "factor" else "left", overflow="fold")
        for row in rows(search):
            table.add_row(WORDS[row.of], row.type, f"x{row.factor:g}", row.gained, "; ".join(row.tried))
        console.print(f"Factors found by search, {arm['name']}: {summary(search)}")
        console.print(table)
        if lines := spelled(search):
            console.print(f"To write, at lr {arm['setting']['optimizer.lr']:g}:", *lines, sep="\n  ", soft_wrap=True)
        console.print()
