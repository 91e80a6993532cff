"""`sharpwise blocks MODEL` with `--trace`, `--explain` or `--diff`: why a parameter is what it is."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from sharpwise.blocks import BlockMap, Segment
from sharpwise.blocks.names import IN_LAYER, collapse, number_ranges
from sharpwise.blocks.overrides import Override
from sharpwise.blocks.sources import Sources, describe, in_words

MOST = 20
"""So many parameters `--explain` explains, unless it is told to explain all."""


def read_sources(model: nn.Module, trace: bool | None, *, implied: bool = False) -> Sources:
    """What names and dataflow say about a model.

    Args:
        trace: as for `BlockMap.of`.
        implied: trace even where `trace` is None; then a model that cannot be run is known by its names alone.

    Raises:
        ValueError: a trace that was asked for cannot be made.
    """
    try:
        return Sources.of(model, ask=True if implied and trace is None else trace)
    except ValueError as error:
        problem = str(error)
        if trace or not implied or not problem.startswith("trace: "):
            raise
    sources = Sources.of(model, ask=False)
    sources.problem = problem
    return sources


def dataflow_line(sources: Sources) -> str:
    """What a trace found, in one line."""
    assert sources.traced is not None
    standing = sources.standing()
    unused = [name for name in sources.traced.unused if name in sources.shapes]
    parts = [
        f"Dataflow, seen in {_count(sources.traced.attentions, 'attention')}, agrees with the names about "
        f"{len(standing['agree'])} of {_count(len(sources.shapes), 'parameter')}"
    ]
    if alone := standing["dataflow"]:
        parts.append(f"{len(alone)} known by dataflow alone")
    if standing["differ"]:
        parts.append(f"{len(standing['differ'])} differ and are overridden: {_listed(standing['differ'])}")
    for key, words in (("names", "known by names alone"), ("neither", "known by neither")):
        if names := [name for name in standing[key] if name not in unused]:  # type: ignore[index]
            parts.append(f"{len(names)} {words}: {_listed(names)}")
    if unused:
        parts.append(f"{len(unused)} unused by the forward: {_listed(unused)}")
    return "; ".join(parts) + "."


def print_explanations(
    console: Console, sources: Sources, patterns: Sequence[str], overrides: Mapping[str, Override], every: bool
) -> None:
    """Per parameter that a name or glob matches: what it is, and what names, dataflow and overrides say.

    Args:
        every: all of them, instead of the first `MOST`.

    Raises:
        ValueError: a pattern matches nothing, or an override is not one.
    """
    names = _matching(sources, patterns)
    resolved, differences = sources.resolve(overrides), sources.differences()
    if sources.problem:
        console.print(Text(f"Not traced: {' '.join(sources.problem.removeprefix('trace: ').split())}\n", "yellow"))
    shown = names if every else names[:MOST]
    for name in shown:
        parts = resolved[name]
        named = sources.by_name[name]
        overridden = parts[0].source == "override"
        if name in differences and not overridden:
            holds = "nothing: names and dataflow differ; say which is right with --override GLOB=ROLE"
        else:
            holds = "\n".join(_holds(part) for part in parts)
        console.print(Text.assemble((name, "bold"), f"  {_about(parts[0])}"))
        lines = Table.grid(padding=(0, 2, 0, 0))
        lines.add_column(no_wrap=True)
        lines.add_column(overflow="fold")
        by_name = f"{named[0].source} says {describe(named)}" if named else "no family knows it"
        lines.add_row("  by name:", Text(by_name))
        lines.add_row("  by dataflow:", Text(_by_dataflow(sources, name)))
        if overridden:
            lines.add_row("  override:", Text(_override(parts, overrides)))
        lines.add_row("  holds:", Text(holds, "" if parts[0].source and not holds.startswith("nothing") else "yellow"))
        console.print(lines)
    if len(shown) < len(names):
        console.print(Text(f"and {len(names) - len(shown)} more; --all explains them too"))


def _matching(sources: Sources, patterns: Iterable[str]) -> list[str]:
    """The parameters that these names and globs match, in the order of the model."""
    found = set()
    for pattern in patterns:
        hits = [
            name
            for name in sources.shapes
            if any(n == pattern or fnmatchcase(n, pattern) for n in (name, *sources.tied[name]))
        ]
        if hits:
            found.update(hits)
        elif any(n == pattern or fnmatchcase(n, pattern) for n in sources.frozen):
            raise ValueError(f"--explain {pattern!r}: frozen, and frozen parameters have no blocks")
        else:
            names = [*sources.shapes, *(alias for tied in sources.tied.values() for alias in tied)]
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            hint = f"closest: {', '.join(close)}" if close else f"names are {_listed(names)}"
            raise ValueError(f"--explain {pattern!r}: no such parameter among {len(sources.shapes)}; {hint}")
    return [name for name in sources.shapes if name in found]


def _about(segment: Segment) -> str:
    """What all segments of a parameter share."""
    words = [segment.describe_shape()]
    if segment.layer is not None:
        words.append(f"layer {segment.layer}")
    if segment.bias:
        words.append("a bias")
    if segment.dim:
        words.append(segment.describe_dims())
    if segment.stacked:
        words.append(f"{segment.copies} stacked copies")
    if segment.tied:
        words.append(f"tied to {', '.join(segment.tied)}")
    return ", ".join(words)


def _holds(segment: Segment) -> str:
    what = f"{describe([segment])}, block type {segment.block_type}"
    return what if segment.source else f"{what}; nothing explains it, say what it is with --override GLOB=ROLE"


def _by_dataflow(sources: Sources, name: str) -> str:
    if sources.traced is None:
        return "the model was not traced"
    why = sources.traced.why.get(name, "not seen")
    seen = sources.seen(name)
    if seen:
        return f"{why}, {describe(seen, sources.by_name[name])}"
    return why if name in sources.traced.unused else f"no role: {why}"


def _override(parts: Sequence[Segment], overrides: Mapping[str, Override]) -> str:
    names = (parts[0].name, *parts[0].tied)
    glob = [glob for glob in overrides if any(fnmatchcase(name, glob) for name in names)][-1]
    return f"{glob!r} says {describe(list(parts))}"


def print_differences(
    console: Console, sources: Sources, overrides: Mapping[str, Override], every: bool, as_json: bool
) -> bool:
    """Where names and dataflow differ, as a table or JSON; parameters that an override decides are only counted.

    Args:
        every: a row per parameter, instead of one for all layers that are alike.

    Returns:
        Whether they differ about a parameter that no override decides.
    """
    assert sources.traced is not None
    resolved, standing = sources.resolve(overrides), sources.standing()
    decided = [name for name in standing["differ"] if resolved[name][0].source == "override"]
    differences = {name: pair for name, pair in sources.differences().items() if name not in decided}
    unused = [name for name in sources.traced.unused if name in sources.shapes]
    if as_json:
        found = {
            "agree": standing["agree"],
            "differ": [
                {
                    "name": name,
                    "shape": sources.shapes[name],
                    "by_name": _plain(named),
                    "by_dataflow": _plain(seen),
                    "why": sources.traced.why[name],
                }
                for name, (named, seen) in differences.items()
            ],
            "overridden": decided,
            "names_alone": standing["names"],
            "dataflow_alone": standing["dataflow"],
            "neither": standing["neither"],
            "unused": unused,
        }
        typer.echo(
            "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()) + "\n}"
        )
        return bool(differences)
    both = len(standing["agree"]) + len(standing["differ"])
    if differences:
        console.print(Text(f"Names and dataflow differ about {len(differences)} of {_count(both, 'parameter')}:\n"))
        console.print(_table(console, sources, differences, every))
        console.print()
    elif standing["agree"]:
        rest = "the other" if decided else "all"
        console.print(Text(f"Names and dataflow agree about {rest} {_count(len(standing['agree']), 'parameter')}."))
    elif not decided:
        console.print(Text("No parameter is known both by name and by dataflow."))
    if decided:
        console.print(Text(f"They differ about {len(decided)} that an override decides: {_listed(decided)}."))
    line = f"Known by names alone: {len(standing['names'])}; by dataflow alone: {len(standing['dataflow'])}"
    line += f"; by neither: {len(standing['neither'])}" if standing["neither"] else ""
    line += f"; unused by the forward: {_listed(unused)}" if unused else ""
    console.print(Text(f"{line}."))
    return bool(differences)


def _table(
    console: Console, sources: Sources, differences: Mapping[str, tuple[list[Segment], list[Segment]]], every: bool
) -> Table:
    assert sources.traced is not None
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, (named, seen) in differences.items():
        found = IN_LAYER.fullmatch(name)
        stem, rest = (f"{found['stem'] or ''}.", found["rest"]) if found and not every else ("", name)
        sides = ("\n".join(in_words(named, seen)), "\n".join(in_words(seen, named)))
        # Sentences count as equal where they differ in numbers only: "attention 0", "attention 1".
        key = (stem, rest, named[0].source, *sides, re.sub(r"\d+", "#", sources.traced.why[name]))
        rows.setdefault(key, []).append(name)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    longest = max(len(rest) + 2 for _, rest, *_ in rows)
    # Names are kept whole where they leave room for the words beside them, which wrap better.
    table.add_column("name", overflow="fold", min_width=min(longest, console.width * 2 // 5))
    for column in ("by name", "by dataflow", "why"):
        table.add_column(column, overflow="fold")
    section = ""
    for (stem, rest, source, by_name, by_dataflow, _), names in rows.items():
        numbers = [int(found["number"]) for name in names if (found := IN_LAYER.fullmatch(name))]
        heading = f"{stem}{number_ranges(numbers)}".lstrip(".") if stem else ""
        if heading and heading != section:
            table.add_row(Text(heading, style="bold"))
        section = heading
        why = _merged([sources.traced.why[name] for name in names])
        cells = (("  " if heading else "") + rest, f"{by_name}\n({source})", by_dataflow, why)
        table.add_row(*map(Text, cells))
    return table


def _merged(sentences: Sequence[str]) -> str:
    """Sentences that differ in numbers only as one: `attention {0..3}`."""
    words = [re.split(r"(\d+)", sentence) for sentence in sentences]
    columns = zip(*words, strict=True)
    return "".join(number_ranges(map(int, column)) if column[0].isdigit() else column[0] for column in columns)


def _plain(parts: list[Segment]) -> object:
    """As in the JSON of a block map, without what all segments of a parameter share with it."""
    segments = json.loads(BlockMap(parts).to_json())["segments"]
    return [{key: value for key, value in segment.items() if key not in ("name", "shape")} for segment in segments]


def _listed(names: Sequence[str], most: int = 8) -> str:
    found = collapse(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
