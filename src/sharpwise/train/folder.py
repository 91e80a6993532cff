"""The folder of a run: what is in it, who may write to it, and metrics without gaps or doubles.

    config.toml     the resolved configuration          facts.json        the model and the data in numbers
    blocks.json     the block map                       environment.json  every start: versions, machine, first step
    metrics.jsonl   a line per step                     timing.jsonl      how long each took: not repeatable
    checkpoints/    see `checkpoint.py`                 status.json       how it ended; absent while it runs
    final/          the model, as Hugging Face saves    sample.txt        a text that it wrote
    tensorboard/    event files                         index.html        the page

`metrics.jsonl` holds only what is the same whenever the run is repeated. A checkpoint notes how long the file was; to
go on from it is to cut the file there. So it is, byte for byte, that of a run which was never stopped.
"""

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharpwise.files import check_name, held, no_link, parse_json, remove_leftovers, sync, write_whole
from sharpwise.train.config import Config
from sharpwise.train.config_file import make_config, read_given, to_toml

_LONGEST_LINE = 1 << 22


class RunFolder:
    """A run's folder, held by this process alone while it is open.

    Raises:
        ValueError: another process is training in it, or it is no folder, or holds something else than a run, or its
            name is not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        check_name(path)
        self.path = path
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; name another folder for the run")
        own = {"config.toml", "run.lock"}
        is_empty = not path.exists() or not any(path.iterdir())
        if not is_empty and not any((path / name).exists() for name in own):
            raise ValueError(f"{path} holds something else than a run; name an empty or new folder")
        self._is_new = is_empty
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        self._hold = contextlib.ExitStack()
        taken = f"another process is training in {path}; wait for it or name another folder"
        self._hold.enter_context(held(path / "run.lock", taken))
        remove_leftovers(path)

    def close(self) -> None:
        """Let others write to it; if nothing came about in a new folder, all is as it was before."""
        if self._is_new and [p.name for p in self.path.iterdir()] == ["run.lock"]:
            (self.path / "run.lock").unlink()
            with contextlib.suppress(OSError):  # somebody else has put something there
                for folder in self._made:
                    folder.rmdir()
        self._hold.close()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """Where the trained model is, once the run has ended."""
        return self.path / "final"

    @property
    def has_begun(self) -> bool:
        """Whether a step was taken here."""
        metrics = self.path / "metrics.jsonl"
        return self.checkpoints.exists() or (metrics.exists() and metrics.stat().st_size > 0)

    def read_config(self) -> Config | None:
        """The stored configuration, None in a new folder. Raises ValueError if it is damaged."""
        path = self.path / "config.toml"
        if not path.exists():
            return None
        try:
            return make_config(read_given(path))
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from None

    def write_config(self, config: Config) -> None:
        """Store the configuration, whole or not at all."""
        write_whole(self.path / "config.toml", to_toml(config))

    def read_json(self, name: str) -> Any:
        """A file of plain values, None if it is missing or damaged."""
        return _read_json(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Write plain values, whole or not at all."""
        write_whole(self.path / name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def add_start(self, start: Mapping[str, Any]) -> None:
        """Note where and with what a process has begun to train here."""
        self.write_json("environment.json", [*read_starts(self.path), dict(start)])

    def lines(self, name: str, size: int) -> "Lines":
        """A file of lines, cut to so many bytes."""
        return Lines(self.path / name, size)

    def set_status(self, state: str, step: int, message: str) -> None:
        """Say how a run ended."""
        self.write_json("status.json", {"state": state, "step": step, "message": message})

    def clear_status(self) -> None:
        """The run goes on."""
        (self.path / "status.json").unlink(missing_ok=True)


class Bystander(RunFolder):
    """The folder for a process that leaves it to rank 0: what is written here comes to nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def close(self) -> None:
        """Nothing."""

    def write_config(self, config: Config) -> None:
        """Nothing."""

    def write_json(self, name: str, value: Any) -> None:
        """Nothing."""

    def clear_status(self) -> None:
        """Nothing."""

    def lines(self, name: str, size: int) -> "Lines":
        """Lines that go nowhere."""
        return NoLines()


def read_starts(run: Path) -> list[dict[str, Any]]:
    """Where and with what a run was begun and gone on with; what a file holds that is none is left out."""
    found = _read_json(run / "environment.json")
    return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def changed_lines(run: Path, about: Mapping[str, Any]) -> str:
    """What is wrong with the metrics and times beside a checkpoint with these notes, "" if nothing is."""
    for name in ("metrics", "timing"):
        path, wanted = run / f"{name}.jsonl", about[f"{name}_bytes"]
        size = path.stat().st_size if path.exists() else 0
        if size < wanted:
            return f"{path.name} has {size:,} bytes, and had {wanted:,} when it was written"
        if _last_step(path, wanted) != about["step"]:
            return f"{path.name} is not that of this run: its step {about['step']} does not end where it did"
    return ""


def _last_step(path: Path, size: int) -> int | None:
    """The step in the last of the lines that are the first `size` bytes of a file; None where there is no such line."""
    if size <= 0:
        return None
    with path.open("rb") as file:
        start = file.seek(max(0, size - _LONGEST_LINE))
        lines = file.read(size - start).split(b"\n")
    try:
        return None if len(lines) < 2 or lines[-1] else parse_json(lines[-2])["step"]
    except (ValueError, LookupError, TypeError):
        return None


class Lines:
    """A file of one JSON object per line that is appended to, and cut where a checkpoint was.

    Args:
        path: of the file.
        size: bytes that stay of what is there.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._file = open(path, "ab", buffering=0, opener=no_link)  # noqa: SIM115  # until `close`
        os.ftruncate(self._file.fileno(), size)
        self.size = size

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line; numbers that are not finite become null.

        Raises:
            OSError: it could not be written whole, for instance on a full disk.
        """
        data = (json.dumps(_finite(values), separators=(",", ":"), allow_nan=False) + "\n").encode()
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += len(data)

    def sync(self) -> int:
        """Flush what was written to the disk; returns the bytes that the file has."""
        sync(self._file)
        return self.size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NoLines(Lines):
    """Lines that nobody keeps."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> int:
        """No bytes."""
        return 0

    def close(self) -> None:
        """Nothing."""


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
