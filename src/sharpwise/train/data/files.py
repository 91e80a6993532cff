"""Readers of local files: text, JSON lines and parquet, plain or packed, in a streaming manner."""

import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sharpwise.installing import needs
from sharpwise.train.data.documents import Document, encodable, split_at_marks

TEXT = (".md", ".py", ".rst", ".text", ".txt")
LINES = (".jsonl", ".ndjson")
PACKED = (".gz", ".xz")
SUFFIXES = (".jsonl", ".md", ".parquet", ".py", ".rst", ".text", ".txt")  # each but .parquet also packed
BLOCK = 2**20
ROWS = 256  # of a parquet file in memory at a time, of the columns read; a row group is read as it is needed


@dataclass
class Meter:
    """How many bytes of the source files have been read; packed files count as they lie on the disk."""

    consumed: int = 0


def text_files(folder: Path) -> Iterator[Path]:
    """The files of a folder that can be read, in a fixed order; hidden ones and those in hidden folders left out."""
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and _readable(path) and path.is_file():
            yield path


def _readable(path: Path) -> bool:
    kind, packing = _kind(path)
    return kind in SUFFIXES or (not kind and packing == ".xz")


def _kind(path: Path) -> tuple[str, str]:
    """Suffix of what is inside, and of the packing ("" for none)."""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def read_file(path: Path, name: str, *, field: str, meter: Meter) -> Iterator[Document]:
    """The documents of one file, by its suffix; an unknown suffix is taken for text.

    Args:
        path: the file.
        name: what its documents are called in reports.
        field: of JSON lines and parquet: the one that holds the text.
        meter: is moved on as the file is read.

    Raises:
        ValueError: not the format that the suffix says, not UTF-8, or the field is missing; the message says where.
    """
    kind, _ = _kind(path)
    if kind == ".parquet":
        return _read_parquet(path, name, field, meter)
    if kind in LINES or kind == ".json":
        return _read_lines(path, name, field, meter)
    return split_at_marks(_decoded(path, meter), name)


# --- text ------------------------------------------------------------------------------------------------------------


@contextmanager
def _unpacked(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The bytes inside the file, and the file itself, whose position tells how far the reading is."""
    _, packing = _kind(path)
    try:
        with path.open("rb") as raw:
            if packing == ".xz":
                with lzma.open(raw) as file:
                    yield file, raw
            elif packing == ".gz":
                with gzip.open(raw) as packed:
                    yield packed, raw  # type: ignore[misc]
            else:
                yield raw, raw
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path} is not a whole {packing} file ({error}); pack it again, or give the text itself"
        ) from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _decoded(path: Path, meter: Meter) -> Iterator[str]:
    """The text of a file in blocks of whole lines."""
    before = meter.consumed
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, offset = "", 0
    with _unpacked(path) as (file, raw):
        while True:
            block = file.read(BLOCK)
            if (zero := block.find(b"\0")) >= 0:
                raise ValueError(f"{path} is not text: it has a zero byte at offset {offset + zero}; give UTF-8 text")
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, offset - pending + error.start) from error
            if not offset:
                text = text.removeprefix("\ufeff")
            offset += len(block)
            meter.consumed = before + raw.tell()
            if not block:
                break
            end = text.rfind("\n") + 1
            if end or len(held) > 16 * BLOCK:  # one line of 16 MB: no lines at all
                end = end or len(text)
                yield (held + text[:end]).replace("\r\n", "\n")
                held = text[end:]
            else:
                held += text
    if held + text:
        yield (held + text).replace("\r\n", "\n")


def _not_utf8(path: Path, error: UnicodeDecodeError, offset: int, where: str = "") -> ValueError:
    byte = error.object[error.start]
    return ValueError(f"{path}{where} is not UTF-8 text: byte 0x{byte:02x} at offset {offset}; convert it to UTF-8")


# --- JSON lines ------------------------------------------------------------------------------------------------------


def _read_lines(path: Path, name: str, field: str, meter: Meter) -> Iterator[Document]:
    before = meter.consumed
    with _unpacked(path) as (file, raw):
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, error.start, f", line {number},") from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}); give one object a line"
                ) from error
            text = _field(row, field, f"{path}, line {number}")
            if number % 64 == 0:
                meter.consumed = before + raw.tell()
            if text.strip():
                yield Document(f"{name}#{number - 1}", encodable(text))
        meter.consumed = before + raw.tell()


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a JSON {type(row).__name__}; give one object a line, with the text in {field!r}")
    if field not in row:
        names = ", ".join(map(repr, row)) or "none"
        raise ValueError(
            f"{where} has no field {field!r}; its fields are {names}: name the one of the text with --field"
        )
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field {field!r} holds {json.dumps(value)[:40]}, not text; name another with --field"
        )
    return value


# --- parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, name: str, field: str, meter: Meter) -> Iterator[Document]:
    with needs(f"reading {path}", "train"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    before = meter.consumed
    try:
        size = path.stat().st_size
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                names = ", ".join(map(repr, schema.names)) or "none"
                raise ValueError(
                    f"{path} has no column {field!r}; its columns are {names}: name the one of the text with --field"
                )
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"{path}: column {field!r} holds {kind}, not strings; name another one with --field")
            number = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=[field]):
                    for text in _strings(batch.column(0), path, number):
                        if text and text.strip():
                            yield Document(f"{name}#{number}", text)
                        number += 1
                meter.consumed = before + size * (group + 1) // file.num_row_groups
    except pa.ArrowException as error:
        raise ValueError(
            f"{path} is not a whole parquet file ({str(error).splitlines()[0]}); write it again"
        ) from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or str(error).splitlines()[0]}") from error


def _strings(column: Any, path: Path, first: int) -> list[str | None]:
    try:
        strings: list[str | None] = column.to_pylist()
        return strings
    except UnicodeDecodeError:
        for i, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, error.start, f", row {first + i},") from error
        raise
