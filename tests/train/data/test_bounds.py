"""Files that unpack to hundreds of times their size: a limit on the text is a limit on the memory too."""

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharpwise.train.data import find_source, open_tokens, prepare_tokens
from sharpwise.train.data.files import Meter

MB = 10**6
PARTS, PART = 100, 4 * MB  # of what a file unpacks to: 400 MB
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: bytes(pa.Codec("zstd").compress(raw)),
}


def packed(path: Path, part: bytes, *, begin: bytes = b"", end: bytes = b"") -> Path:
    """A file of `begin`, 400 MB of repeated `part`, and `end`; each format takes packed pieces one after the other."""
    pack = PACK[path.suffix]
    piece = pack(part * (PART // len(part)))
    with path.open("wb") as file:
        file.write(pack(begin) if begin else b"")
        for _ in range(PARTS):
            file.write(piece)
        file.write(pack(end) if end else b"")
    assert path.stat().st_size < 2 * MB
    return path


def prepare(path: Path) -> int:
    """Prepare 1 MB of a file in less than half the memory of what it unpacks to; the bytes of text that were taken."""
    tracemalloc.start()
    try:
        prepare_tokens([path], path.parent / "out", max_bytes=MB, vocabulary=300)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200 * MB
    return int(open_tokens(path.parent / "out").manifest["counts"]["bytes"])


@pytest.mark.parametrize("packing", list(PACK))
def test_a_packed_text_of_one_line_is_cut(tmp_path: Path, packing: str) -> None:
    assert prepare(packed(tmp_path / f"a.txt{packing}", b"abc ")) == pytest.approx(MB, abs=2)


def test_a_packed_array_is_read_object_by_object(tmp_path: Path) -> None:
    row = json.dumps({"text": "some text, " * 100}).encode()
    path = packed(tmp_path / "a.json.gz", row + b",\n", begin=b"[", end=row + b"]")
    assert prepare(path) == pytest.approx(MB, abs=2)


@pytest.mark.parametrize(
    ("name", "begin", "part", "end", "message"),
    [
        ("a.jsonl.gz", b'{"text": "', b"abc ", b'"}', r"a.jsonl.gz, line 1 is larger than 32 MiB; cut its text into"),
        ("a.ndjson.xz", b'{"text": "a"}\n{"x": [', b"[],", b'0], "text": "b"}', "ndjson.xz, line 2 is larger than"),
        ("a.json.bz2", b'[{"text": "a"}, {"text": "', b"abc ", b'"}]', "a.json.bz2, object 1 is larger than 32 MiB"),
        ("a.json.gz", b"[ ", b"\n", b"]", "a.json.gz, object 0 is larger than 32 MiB"),
    ],
)
def test_a_line_or_an_object_without_end_is_refused(
    tmp_path: Path, name: str, begin: bytes, part: bytes, end: bytes, message: str
) -> None:
    path = packed(tmp_path / name, part, begin=begin, end=end)
    with pytest.raises(ValueError, match=message):
        prepare(path)
    assert not (tmp_path / "out").exists()


def test_a_parquet_column_that_unpacks_to_hundreds_of_times_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["abc " * 250_000] * 40}), path, compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match=r"row group 0: column 'text' has 40 MB in 0\.\d\d MB on the disk, too many"):
        prepare(path)


def test_parquet_rows_that_share_one_value_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), ["abc " * 5_000_000])
    pq.write_table(pa.table({"text": rows}), path, compression="zstd", store_schema=False)
    assert prepare(path) == pytest.approx(MB, abs=2)
    assert pa.default_memory_pool().max_memory() < 800 * MB  # of 2,000


def test_a_parquet_value_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "abc " * 9_000_000]}), path)
    with pytest.raises(ValueError, match=r"a.parquet, row 2 is larger than 32 MiB; cut"):
        prepare(path)


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5_000])
def test_json_that_python_does_not_read_is_refused_by_its_line(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "other": ' + value)
    with pytest.raises(ValueError, match=r"a.jsonl, line 2 is not JSON \("):
        prepare(tmp_path / "a.jsonl")


def test_a_long_line_of_text_stays_as_it_is(tmp_path: Path) -> None:
    text = "x " * 12_500_000 + "\r\nthe end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (document,) = find_source(tmp_path / "a.txt").documents(Meter())
    assert document.text == text.replace("\r", "")
