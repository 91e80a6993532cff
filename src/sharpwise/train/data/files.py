"""Readers of local files: text, JSON and parquet, plain or packed, in a streaming manner.

No reader holds more than a part of a file, of a size that is bounded whatever the file says: a block of text, an object
of JSON, some rows of parquet. So `--max-mb` is kept even where a file unpacks to a thousand times its size.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from sharpwise.installing import needs
from sharpwise.train.data.documents import LONGEST, Document, encodable, split_at_marks
from sharpwise.train.data.packing import kind_of, unpacked

TEXT = (".md", ".py", ".rst", ".text", ".txt")
LINES = (".jsonl", ".ndjson")
BLOCK = 2**20
LARGEST = LONGEST  # bytes of a line or a value of parquet, characters of an object in an array
# Rows of a parquet file that are in memory at a time: so many that they have LARGE bytes if each is as large as the
# whole column of its row group (with a dictionary each may be), but at least FEWEST, since single rows take long.
ROWS, FEWEST, LARGE = 256, 16, 2**28
UNPACKING = 250  # times as large as on the disk may a column be in memory; text is up to 10 times, and seldom 50


@dataclass
class Meter:
    """How many bytes of the source files have been read; packed files count as they lie on the disk."""

    consumed: int = 0


def read_file(path: Path, name: str, *, field: str, meter: Meter) -> Iterator[Document]:
    """The documents of one file, by its suffix; an unknown suffix is taken for text.

    Args:
        path: the file.
        name: what its documents are called in reports.
        field: of JSON and parquet: the one that holds the text.
        meter: is moved on as the file is read.

    Raises:
        ValueError: not the format that the suffix says, not UTF-8, the field is missing, or a single text is larger
            than `LARGEST`; the message says where.
    """
    kind, _ = kind_of(path)
    if kind == ".parquet":
        yield from _read_parquet(path, name, field, meter)
    elif kind == ".json" and _is_array(path):
        yield from _read_array(path, name, field, meter)
    elif kind in LINES or kind == ".json":
        yield from _read_lines(path, name, field, meter)
    else:
        yield from split_at_marks(_newlines(_blocks(path, meter)), name)


# --- text ------------------------------------------------------------------------------------------------------------


def _blocks(path: Path, meter: Meter) -> Iterator[str]:
    """The text of a file in blocks of about a MB."""
    before = meter.consumed
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with unpacked(path) as (file, raw):
        while True:
            block = file.read(BLOCK)
            if (zero := block.find(b"\0")) >= 0:
                raise ValueError(f"{path} is not text: it has a zero byte at offset {offset + zero}; give UTF-8 text")
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, offset - pending + error.start) from error
            if offset == pending:  # the first characters
                text = text.removeprefix("\ufeff")
            offset += len(block)
            meter.consumed = before + raw.tell()
            yield text
            if not block:
                return


def _newlines(blocks: Iterator[str]) -> Iterator[str]:
    """The blocks with newlines in place of carriage returns and newlines."""
    held = ""
    for block in blocks:
        text = held + block
        held = "\r" if text.endswith("\r") else ""
        yield text.removesuffix("\r").replace("\r\n", "\n")
    yield held


def _not_utf8(path: Path, error: UnicodeDecodeError, offset: int, where: str = "") -> ValueError:
    byte = error.object[error.start]
    return ValueError(f"{path}{where} is not UTF-8 text: byte 0x{byte:02x} at offset {offset}; convert it to UTF-8")


# --- JSON ------------------------------------------------------------------------------------------------------------


def _read_lines(path: Path, name: str, field: str, meter: Meter) -> Iterator[Document]:
    before = meter.consumed
    with unpacked(path) as (file, raw):
        for number in count(1):
            line = file.readline(LARGEST + 1)
            if not line:
                break
            if len(line) > LARGEST:
                raise _too_large(f"{path}, line {number}")
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, error.start, f", line {number},") from error
            except (ValueError, RecursionError) as error:
                fault = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                hint = "give one object a line" + (", or an array of objects" if kind_of(path)[0] == ".json" else "")
                raise ValueError(f"{path}, line {number} is not JSON ({fault}); {hint}") from error
            text = _field(row, field, f"{path}, line {number}")
            if number % 64 == 0:
                meter.consumed = before + raw.tell()
            if text.strip():
                yield Document(f"{name}#{number - 1}", encodable(text))
        meter.consumed = before + raw.tell()


_GAP = re.compile(r"[ \t\n\r]*")


def _is_array(path: Path) -> bool:
    with unpacked(path) as (file, _):
        return file.read(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _read_array(path: Path, name: str, field: str, meter: Meter) -> Iterator[Document]:
    for number, row in enumerate(_elements(path, _blocks(path, meter))):
        text = _field(row, field, f"{path}, object {number}")
        if text.strip():
            yield Document(f"{name}#{number}", encodable(text))


def _elements(path: Path, blocks: Iterator[str]) -> Iterator[Any]:
    """The elements of an array; only the one that is being read is held, and what came in the same block."""
    decode = json.JSONDecoder().raw_decode
    held, at = next(blocks).lstrip()[1:], 0  # the next element begins at `at`
    for number in count():
        while True:
            try:
                value, end = decode(held, _blank(held, at))
                end = _blank(held, end)
                fault = "neither , nor ] follows"
                if held.startswith((",", "]"), end):  # else there may be more of the element
                    break
            except (ValueError, RecursionError) as error:
                fault = getattr(error, "msg", str(error))
            if len(held) - at > LARGEST:
                raise _too_large(f"{path}, object {number}")
            if not (more := _at_least(len(held) - at, blocks)):
                raise ValueError(f"{path}, object {number} is not JSON ({fault}); give an array of objects")
            held, at = held[at:] + more, 0
        yield value
        at = end + 1
        if held[end] == "]":
            if held[at:].strip() or any(block.strip() for block in blocks):
                raise ValueError(f"{path} goes on after its array; give one array, or one object a line")
            return


def _blank(text: str, at: int) -> int:
    """Where the white space ends that begins at `at`."""
    found = _GAP.match(text, at)
    assert found is not None  # it may be empty
    return found.end()


def _at_least(size: int, blocks: Iterator[str]) -> str:
    """The next blocks, of so many characters in all: an element is tried again when twice as much of it is there."""
    parts = []
    while size >= 0 and (part := next(blocks, "")):
        parts.append(part)
        size -= len(part)
    return "".join(parts)


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a JSON {type(row).__name__}; give objects, with the text in {field!r}")
    if field not in row:
        raise ValueError(
            f"{where} has no field {field!r}; its fields are {_some(row)}: name the one of the text with --field"
        )
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: field {field!r} holds {json.dumps(value)[:40]}, not text; name another with --field"
        )
    return value


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return (", ".join(map(repr, shown[:20])) or "none") + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _too_large(where: str) -> ValueError:
    return ValueError(f"{where} is larger than {LARGEST >> 20} MiB; cut its text into several, or leave it out")


# --- parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, name: str, field: str, meter: Meter) -> Iterator[Document]:
    with needs(f"reading {path}", "train"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    before = meter.consumed
    try:
        size = path.stat().st_size
        # Opened here, because pyarrow does not take every name; and read in pieces, not by row groups.
        with path.open("rb") as raw, pq.ParquetFile(raw, buffer_size=BLOCK, pre_buffer=False) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise ValueError(
                    f"{path} has no column {field!r}; its columns are {_some(schema.names)}: name the one of the text "
                    "with --field"
                )
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"{path}: column {field!r} holds {kind}, not strings; name another one with --field")
            number = 0
            for group in range(file.num_row_groups):
                rows = _rows(file.metadata.row_group(group), field, f"{path}, row group {group}")
                for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=[field]):
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


def _rows(group: Any, field: str, where: str) -> int:
    """How many rows of a group to read at a time, from its metadata."""
    columns = (group.column(i) for i in range(group.num_columns))
    column = next(column for column in columns if column.path_in_schema == field)
    inside, packed = column.total_uncompressed_size, column.total_compressed_size
    if inside > max(LARGEST, UNPACKING * packed):
        raise ValueError(
            f"{where}: column {field!r} has {inside / 1e6:,.0f} MB in {packed / 1e6:,.2f} MB on the disk, too many to "
            "unpack at once; write it in smaller row groups, or as JSON lines"
        )
    return min(ROWS, max(FEWEST, LARGE // max(inside, 1)))


def _strings(column: Any, path: Path, first: int) -> Iterator[str | None]:
    import pyarrow.compute as pc

    sizes = pc.fill_null(pc.binary_length(column), 0).to_pylist()
    for i, (size, value) in enumerate(zip(sizes, column, strict=True)):
        if size > LARGEST:
            raise _too_large(f"{path}, row {first + i}")
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error, error.start, f", row {first + i},") from error
