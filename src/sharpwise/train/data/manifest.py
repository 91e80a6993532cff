"""What a folder of prepared tokens says of itself: the journal while it is made, the manifest when it is finished."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from sharpwise.files import held, sync, write_whole

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
JOURNAL = "progress.jsonl"
TYPES = {"uint16": "<u2", "uint32": "<u4"}


@dataclass(frozen=True)
class Shard:
    """A file of tokens: little-endian, of the manifest's `token_type`."""

    file: str
    part: str
    tokens: int
    sha256: str
    documents: int
    bytes: int
    characters: int


@dataclass(frozen=True)
class Record:
    """A finished chunk of the source: the SHA-256 of its documents' names and texts, and the shards made of it."""

    part: str
    text_sha256: str
    shards: tuple[Shard, ...]

    def characters(self, part: str | None = None) -> int:
        """Characters of text, of one part or of all."""
        return sum(shard.characters for shard in self.shards if part in (None, shard.part))

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of text."""
        return sum(shard.bytes for shard in self.shards)


def again(folder: Path, manifest: dict[str, Any] | None = None) -> str:
    """What to type to make a folder anew."""
    sources = " ".join(manifest["settings"]["sources"]) if manifest and "settings" in manifest else "..."
    return f"run sharpwise prepare {sources} --out {folder} again"


@contextmanager
def journal(folder: Path) -> Iterator["Journal"]:
    """The journal of a folder, made where missing, locked against a second process.

    Raises:
        ValueError: another process writes into the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = f"another process prepares tokens in {folder}; wait for it, or name another --out"
    with held(folder / JOURNAL, taken) as file:
        yield Journal(file)


class Journal:
    """A file with the settings in its first line and a `Record` in each other; a line counts when it is whole."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]  # what comes after the last newline was not finished
        self._ends = [0]  # of the lines
        for line in lines:
            self._ends.append(self._ends[-1] + len(line) + 1)
        try:
            self.settings: dict[str, Any] | None = dict(json.loads(lines[0])) if lines else None
            self.records = [_record(json.loads(line)) for line in lines[1:]]
        except (ValueError, KeyError, TypeError) as error:
            folder = Path(file.name).parent
            raise ValueError(f"{file.name} is damaged; remove {folder}, then {again(folder)}") from error
        file.truncate(self._ends[-1])

    def start(self, settings: dict[str, Any]) -> None:
        """Forget everything and begin with these settings."""
        self._file.truncate(0)
        self._ends = [0]
        self.settings, self.records = settings, []
        self._append(settings)

    def add(self, record: Record) -> None:
        """Note a chunk whose shards are in place."""
        self._append(asdict(record))
        self.records.append(record)

    def drop_from(self, index: int) -> None:
        """Forget the records from `index` on."""
        self._ends = self._ends[: index + 2]
        self._file.truncate(self._ends[-1])
        self.records = self.records[:index]

    def _append(self, values: dict[str, Any]) -> None:
        line = json.dumps(values).encode() + b"\n"
        self._file.write(line)
        sync(self._file)
        self._ends.append(self._ends[-1] + len(line))


def _record(values: dict[str, Any]) -> Record:
    return Record(values["part"], values["text_sha256"], tuple(Shard(**shard) for shard in values["shards"]))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """The last file that is written: a folder with it is finished."""
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings in which two calls differ, as `name: found there, now wanted`.

    >>> differences({"validation": 0.1, "field": "text"}, {"validation": 0.2, "field": "text"})
    ['validation: 0.1 there, 0.2 now']
    """
    lines = []
    for key in {**found, **wanted}:
        old, new = found.get(key), wanted.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"{key}.{line}" for line in differences(old, new)]
        else:
            lines.append(f"{key}: {_plain(old)} there, {_plain(new)} now")
    return lines


def _plain(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
