"""The files of a run's folder, read while somebody may be writing them."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sharpwise.files import parse_json

CONFIG, FACTS, BLOCKS, ENVIRONMENT = "config.toml", "facts.json", "blocks.json", "environment.json"
METRICS, TIMING, STATUS, SAMPLE, LOCK = "metrics.jsonl", "timing.jsonl", "status.json", "sample.txt", "run.lock"


def check_is_run(folder: Path) -> None:
    """Raise ValueError for a folder that no run wrote."""
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; `sharpwise runs` lists the runs there are")
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected the folder of a run")
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in (METRICS, FACTS, STATUS)):
        raise ValueError(
            f"{folder}: is no run, which has at least {CONFIG} and {METRICS}; "
            f"`sharpwise runs {folder}` lists the runs below it"
        )


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The text of the configuration, and what it says. Raises ValueError where it is no TOML."""
    path = folder / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML ({error}); a run's configuration is not to be edited") from None


def read_json(path: Path, kind: type) -> Any:
    """What a JSON file holds; an empty `kind` where there is none. Raises ValueError where it holds something else."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return kind()
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path.name}: not JSON ({error})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path.name}: holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def parse_line(line: bytes) -> dict[str, Any] | None:
    """One line of metrics or timing, None for what is none."""
    try:
        value = parse_json(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    step = value.get("step")
    return value if isinstance(step, int) and not isinstance(step, bool) else None


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All records by step, and how many lines are damaged; the last one, which may be half written, is not counted.

    A step that is there twice was made twice, after a resume: the later one counts.
    """
    by_step: dict[int, dict[str, Any]] = {}
    damaged, last_was_damaged = 0, False
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return [], 0
    with file:
        for line in file:
            if not line.strip():
                continue
            record = parse_line(line)
            last_was_damaged = record is None
            damaged += last_was_damaged
            if record is not None:
                by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)], damaged - last_was_damaged


def last_lines(path: Path, size: int = 1 << 15, containing: bytes = b"") -> Iterator[dict[str, Any]]:
    """Records from the last one back, as far as they lie in the last `size` bytes; damaged lines are left out.

    With `containing` only lines that hold these bytes, which is quick where they are rare.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            start = file.seek(max(end - size, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return
    for line in reversed(lines[1:] if start else lines):
        record = parse_line(line) if line and containing in line else None
        if record is not None:
            yield record


def is_locked(folder: Path) -> bool:
    """Whether a process trains in this folder now."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where nothing can be said
        return False
    try:
        with (folder / LOCK).open("rb") as file:
            # Shared, so that two readers at a time do not take each other for a run; it is gone with the file.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # missing, or a file system without locks
        return False
    return False
