"""`sharpwise prepare`: text to tokens in memory-mapped shards, once, for every run that follows."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sharpwise.cli.errors import user_errors

if TYPE_CHECKING:
    from sharpwise.train.data import Prepared, PrepareProgress

MB = 1e6


def prepare(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE]...",
            help="Text, JSON (.jsonl, .ndjson, .json) or parquet, plain or packed (.gz, .xz, .bz2, .zst), or folders "
            "of them; openwebtext, minipile, c4, fineweb or hub:owner/name[:config] from the Hugging Face hub; stdlib "
            "(the default), the source text of this Python's standard library.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the tokens.", show_default="data/ and the source's name"),
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer",
            "-t",
            help="bpe trains a byte-level BPE on the text; or a tokenizer.json (or an .xz of one), a folder with a "
            "tokenizer, a name on the Hugging Face hub.",
        ),
    ] = "bpe",
    vocabulary: Annotated[int, typer.Option("--vocab-size", help="Entries of the BPE, from 257.")] = 4096,
    validation: Annotated[
        float, typer.Option("--validation", help="Share of the text for validation, by whole documents.")
    ] = 0.01,
    validation_data: Annotated[
        str | None,
        typer.Option("--validation-data", help="A source of its own for validation.", show_default=False),
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Of JSON and parquet: the field with the text.")] = "text",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Processes; 0 takes all CPUs.")] = 0,
    max_mb: Annotated[
        float | None,
        typer.Option("--max-mb", help="Take only this much text, in MB (10^6 bytes).", show_default=False),
    ] = None,
    token_type: Annotated[
        str, typer.Option("--token-type", help="auto, uint16 or uint32; auto takes uint16 up to 65,536 entries.")
    ] = "auto",
    end_of_text: Annotated[
        str | None,
        typer.Option("--end-of-text", help="The token after every document, where it is unusual.", show_default=False),
    ] = None,
    description: Annotated[
        str | None,
        typer.Option("--description", help="What the text is, in words: results say it.", show_default=False),
    ] = None,
) -> None:
    """Turn text into tokens on the disk, split into training and validation by whole documents.

    Stopped or killed, the same command goes on where it was; a second call does nothing.
    """
    log = Console(stderr=True, highlight=False, markup=False)
    console = Console(highlight=False, markup=False)
    began = time.perf_counter()
    try:
        with user_errors():
            names = sources or ["stdlib"]
            out = out or Path("data") / default_name(names)
            max_bytes = None if max_mb is None else round(max_mb * MB)
            from sharpwise.train.data import prepare_tokens, told

            with _Bar(log) as bar:
                prepared = prepare_tokens(
                    names,
                    out,
                    tokenizer=tokenizer,
                    vocabulary=vocabulary,
                    validation=validation,
                    validation_data=validation_data,
                    field=field,
                    jobs=jobs or _cpus(),
                    max_bytes=max_bytes,
                    token_type=token_type,
                    end_of_text=end_of_text,
                    description=description,
                    on_progress=bar.show,
                )
    except KeyboardInterrupt:
        log.print("Stopped; the same command goes on from here.")
        raise typer.Exit(130) from None
    if not bar.shown:
        console.print(f"{out} is prepared already; nothing to do.", soft_wrap=True)
    _summary(console, prepared)
    if bar.shown:
        console.print(f"{time.perf_counter() - began:.0f} s. Folder: {out}", soft_wrap=True)
    if left_out := told(prepared.manifest.get("left_out", ())):  # folders of before have no such list
        console.print(left_out, soft_wrap=True)


def default_name(sources: list[str]) -> str:
    """The folder's name for a source: its own, without folders and endings. Raises ValueError for several sources."""
    if len(sources) > 1:
        raise ValueError(f"{len(sources)} sources have no one name; name the folder with --out")
    name = sources[0].removeprefix("hub:").rstrip("/").replace(":", "-")
    return Path(name).resolve().name.split(".")[0] or "text"


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Bar:
    """MB of text, MB/s and, where the whole is known, how much is done and the time to go."""

    def __init__(self, log: Console) -> None:
        self.shown = False
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=log,
            transient=True,
            disable=not sys.stderr.isatty(),
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task("reading", total=None, rate="")
        self._began: tuple[float, int] | None = None

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, news: "PrepareProgress") -> None:
        self.shown = True
        now = time.perf_counter()
        if self._began is None or news.text_bytes == news.kept_bytes:
            self._began = (now, news.text_bytes)
        since, before = self._began
        rate = (news.text_bytes - before) / MB / max(now - since, 1e-9)
        self._progress.update(
            self._task,
            description=f"{news.text_bytes / MB:,.0f} MB" + (" (kept)" if news.text_bytes == news.kept_bytes else ""),
            completed=1000 * (news.fraction or 0),
            total=None if news.fraction is None else 1000,
            rate=f"{rate:.1f} MB/s" if news.text_bytes > before else "",
        )


def _summary(console: Console, prepared: "Prepared") -> None:
    about, manifest = prepared.about, prepared.manifest
    counts, end = manifest["counts"], manifest["end_of_text"]
    rest = counts["documents"] - counts["validation_documents"]
    lines = [
        f"{about['source']}: {counts['bytes'] / MB:,.1f} MB of text, {about['bytes_per_token']:.2f} bytes per token",
        f"training    {len(prepared.train):>14,} tokens, {rest:,} documents",
        f"validation  {len(prepared.validation):>14,} tokens, {counts['validation_documents']:,} documents",
        f"vocabulary  {prepared.vocabulary:>14,} ({manifest['token_type']}), end of text {end['token']} = {end['id']}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
