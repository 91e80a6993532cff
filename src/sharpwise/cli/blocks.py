"""`sharpwise blocks MODEL`: what each parameter of a model is."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sharpwise.blocks import BlockMap, Segment
from sharpwise.blocks.names import IN_LAYER, number_ranges
from sharpwise.blocks.overrides import Override
from sharpwise.blocks.unclear import COMMAND, Unclear
from sharpwise.cli.blocks_why import dataflow_line, print_differences, print_explanations, read_sources
from sharpwise.cli.errors import user_errors
from sharpwise.train.models import load_model


def blocks(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A preset (gpt2, llama-3-8b, ...), a folder or .json file with a Hugging Face config, "
            "or module:function.",
        ),
    ],
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            "-o",
            metavar="GLOB=ROLE",
            help="Say what parameters are, as '*.fc.weight=up' or "
            """'*.q.weight={"role":"q","heads":4}'. Repeatable, the last match wins.""",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the block map as JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a parameter has no known role.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Print every segment, layers not collapsed.")] = False,
    trace: Annotated[
        bool | None,
        typer.Option(
            "--trace/--no-trace",
            help="Verify by dataflow: run the model, without weights, on a made-up example, and fail where it does not "
            "do what the names say. By default where that is cheap or names do not suffice.",
            show_default=False,
        ),
    ] = None,
    explain: Annotated[
        list[str] | None,
        typer.Option(
            "--explain",
            "-e",
            metavar="PARAMETER",
            help="Say why parameters are what they are, by name or glob. Repeatable.",
        ),
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="List where names and dataflow differ; exit code 1 if they do.")
    ] = False,
) -> None:
    """Show the block map of MODEL: the role of every parameter, its heads, and how much each block type holds.

    The model is built without memory, whatever its size. No weights are loaded.
    """
    console = Console(highlight=False)
    with user_errors(), _in_words_of_the_command():
        _refuse(as_json=as_json, strict=strict, no_trace=trace is False, explain=bool(explain), diff=diff)
        overrides = _parse_overrides(override or [])
        module = load_model(model, device="meta")
        if explain:
            print_explanations(console, read_sources(module, trace, implied=True), explain, overrides, every)
            return
        sources = read_sources(module, True if diff else trace)
        if diff:
            raise typer.Exit(int(print_differences(console, sources, overrides, every, as_json)))
        block_map = BlockMap.of_sources(sources, overrides=overrides, strict=strict)
        seen = dataflow_line(sources) if trace else ""
    if as_json:
        typer.echo(block_map.to_json(), nl=False)
    elif every:
        console.print(Text(str(block_map.table())), soft_wrap=True)
    else:
        _print(console, model, block_map)
    if seen:
        typer.echo(seen, err=as_json)


@contextmanager
def _in_words_of_the_command() -> Iterator[None]:
    try:
        yield
    except Unclear as error:
        raise error.by(COMMAND) from None


def _refuse(*, as_json: bool, strict: bool, no_trace: bool, explain: bool, diff: bool) -> None:
    """Raise ValueError for options that mean nothing together."""
    if explain and diff:
        raise ValueError("--explain and --diff are two views; give one of them")
    if diff and no_trace:
        raise ValueError("--diff compares names with dataflow; leave out --no-trace")
    if explain and as_json:
        raise ValueError("--explain has no JSON; leave out --json, or use it with --diff or alone")
    if strict and (explain or diff):
        raise ValueError("--strict fails where the map does, and --explain and --diff make none; leave it out")


def _parse_overrides(options: Iterable[str]) -> dict[str, Override]:
    overrides: dict[str, Override] = {}
    for option in options:
        glob, equals, value = option.partition("=")
        if not (glob and equals and value):
            raise ValueError(f"--override {option!r}: expected GLOB=ROLE, for instance '*.mlp.fc.weight=up'")
        overrides.pop(glob, None)  # given twice, the later place counts
        overrides[glob] = _parse_fields(value, option) if value[0] in "{[" else value
    return overrides


def _parse_fields(value: str, option: str) -> Override:
    try:
        fields: Override = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"--override {option!r}: not JSON ({error}); expected a role or a segment's fields") from None
    return fields


class _Line(NamedTuple):
    """What one line of the collapsed table shows, without the numbers of the layers that share it."""

    stem: str  # before the number of the layer, empty outside a stack
    rest: str
    shape: str
    role: str
    rows: str
    heads: str
    tied: tuple[str, ...]
    known: bool


def _print(console: Console, title: str, block_map: BlockMap) -> None:
    total = sum(segment.numel for segment in block_map)
    tensors = len(block_map.names())
    console.print(Text(f"{title}: {total:,} trainable parameters in {tensors} tensors, {len(block_map)} segments"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("name", overflow="fold")
    for column in ("shape", "role", "rows"):
        table.add_column(column, overflow="fold")
    table.add_column("heads", justify="right")
    section, last = "", ""
    for heading, line in _collapsed(block_map.segments):
        if heading != section:
            if heading:
                table.add_row(Text(heading, style="bold"))
            section = heading
        full = f"{heading}.{line.rest}"
        name = "" if full == last and line.rows != "all" else ("  " if heading else "") + line.rest
        last = full
        style = "" if line.known else "yellow"
        cells = (name, line.shape if name else "", line.role, line.rows, line.heads)
        table.add_row(*(Text(cell, style=style) for cell in cells))
        for alias in line.tied:
            table.add_row(Text(f"  = {alias}", style="dim"))
    console.print(table)
    console.print()
    console.print(_summary(block_map.segments, total))
    if block_map.unexplained:
        console.print(
            Text(
                f"{len(block_map.unexplained)} of {tensors} tensors have no known role and count as 'other'; "
                "say what they are with --override GLOB=ROLE.",
                style="yellow",
            )
        )


def _collapsed(segments: Sequence[Segment]) -> list[tuple[str, _Line]]:
    """Lines under their headings (`transformer.h.{0..11}`), one for all layers that are alike, in order."""
    numbers: dict[_Line, list[int]] = {}
    for s in segments:
        found = IN_LAYER.fullmatch(s.name)
        stem, number, rest = (found[1] or "", int(found[2]), found[3]) if found else ("", -1, s.name)
        if found is not None:
            stem = f"{stem}." if stem else "."
        shape = s.describe_shape()
        heads = "" if s.heads is None else str(s.heads)
        line = _Line(stem, rest, shape, str(s.role), _rows(s), heads, s.tied, bool(s.source))
        numbers.setdefault(line, []).append(number)
    headings: dict[str, list[_Line]] = {}
    for line, found_in in numbers.items():
        heading = f"{line.stem}{number_ranges(found_in)}".lstrip(".") if line.stem else ""
        # What lies outside the stacks keeps its place before or after them.
        key = heading or ("before" if len(headings) == 0 or list(headings) == ["before"] else "after")
        headings.setdefault(key, []).append(line)
    return [("" if key in ("before", "after") else key, line) for key, lines in headings.items() for line in lines]


def _rows(segment: "Segment") -> str:
    """The rows in few letters; interleaved ones as `64:128 per 192`."""
    if segment.count == 1:
        return segment.describe_rows()
    return f"{segment.start}:{segment.start + segment.length} per {segment.stride}"


def _summary(segments: Sequence[Segment], total: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for column in ("block type", "roles"):
        table.add_column(column)
    for column in ("parameters", "share"):
        table.add_column(column, justify="right")
    for kind in dict.fromkeys(segment.block_type for segment in segments):
        mine = [segment for segment in segments if segment.block_type is kind]
        roles = ", ".join(dict.fromkeys(str(segment.role) for segment in mine))
        count = sum(segment.numel for segment in mine)
        table.add_row(str(kind), roles, f"{count:,}", f"{count / max(total, 1):.1%}")
    return table
