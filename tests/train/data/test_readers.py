"""Readers of local files: every format, packed and plain, and what each of them refuses."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwise.train.data import files
from sharpwise.train.data.documents import END_OF_TEXT, Document, encodable, limited, split_at_marks
from sharpwise.train.data.files import Meter
from sharpwise.train.data.sources import LocalFiles, find_source

TEXTS = ["one\ntwo", "größe 東京 🙂", "three"]
MARKED = f"\n{END_OF_TEXT}\n".join(TEXTS) + "\n"
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in LocalFiles(path, field).documents(Meter())]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.unknown", "a.txt.xz", "a.xz", "a.txt.gz"])
def test_text_plain_and_packed(tmp_path: Path, name: str) -> None:
    assert texts(_write(tmp_path / name, MARKED.encode())) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.xz"])
def test_json_lines_plain_and_packed(tmp_path: Path, name: str) -> None:
    assert texts(_write(tmp_path / name, LINES.encode())) == TEXTS


def test_json_lines_with_another_field_blank_lines_and_a_lone_surrogate(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", b'{"body": "one"}\n\n{"body": "\\ud800 two"}\n{"body": " "}\n')
    assert texts(path, "body") == ["one", "\ufffd two"]
    assert encodable("\U0001f642") == "\U0001f642"


def test_parquet_is_read_by_row_groups_and_counts_what_it_read(tmp_path: Path) -> None:
    table = pa.table({"n": range(1000), "text": [f"text {i}" if i % 10 else None for i in range(1000)]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=100)
    meter = Meter()
    documents = LocalFiles(path).documents(meter)
    first = [next(documents) for _ in range(180)]
    assert 0 < meter.consumed < path.stat().st_size / 2
    names = [document.name for document in (*first, *documents)]
    assert len(names) == 900
    assert names[:2] == ["a.parquet#1", "a.parquet#2"]
    assert meter.consumed == path.stat().st_size


def test_a_folder_takes_what_it_can_read_in_order(tmp_path: Path) -> None:
    _write(tmp_path / "b" / "a.txt", b"first")
    _write(tmp_path / "b" / "z.jsonl.gz", b'{"text": "third"}')
    _write(tmp_path / "b" / "c.xz", b"second")
    for name in ("tokenizer.json.xz", "settings.json", "picture.png", ".hidden.txt", "code.tar.gz"):
        _write(tmp_path / "b" / name, b"no")
    assert texts(tmp_path / "b") == ["first", "second", "third"]


def test_big_texts_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 5)  # every character and every mark is cut somewhere
    raw = b"\xef\xbb\xbf" + MARKED.replace("\n", "\r\n").encode()
    path = _write(tmp_path / "a.txt", raw)
    meter = Meter()
    documents = LocalFiles(path).documents(meter)
    next(documents)
    assert meter.consumed < len(raw)
    assert texts(path) == TEXTS


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "\n", END_OF_TEXT, f"{END_OF_TEXT}x", " ", "é"]), max_size=30), st.integers(1, 9))
def test_blocks_make_no_difference_to_the_documents(parts: list[str], size: int) -> None:
    lines = "".join(parts).splitlines(keepends=True)
    blocks = ["".join(lines[i : i + size]) for i in range(0, len(lines), size)]
    whole = list(split_at_marks(["".join(parts)], "a"))
    assert list(split_at_marks(blocks, "a")) == whole
    expected, document = [], []
    for line in [*"".join(parts).split("\n"), END_OF_TEXT]:
        if line == END_OF_TEXT:
            expected.append("\n".join(document).strip("\n"))
            document = []
        else:
            document.append(line)
    assert [d.text for d in whole] == [text for text in expected if text.strip()]


def test_a_long_text_without_marks_is_cut_at_lines() -> None:
    lines = [f"line {i}\n" for i in range(100)]
    documents = list(split_at_marks(lines, "a", longest=100))
    assert "".join(document.text + "\n" for document in documents) == "".join(lines)
    assert all(len(document.text) <= 100 and not document.whole for document in documents)
    assert [document.name for document in documents[:2]] == ["a#0", "a#1"]
    assert max(len(d.text) for d in split_at_marks(["x" * 950], "a", longest=100)) == 100


def test_limited_text_ends_with_a_line_and_reads_no_further() -> None:
    def documents():
        yield Document("a", "one\ntwo")
        yield Document("b", "größe\ngröße")
        raise AssertionError("not asked for")

    assert [d.text for d in limited(documents(), 16)] == ["one\ntwo", "größe"]
    assert [d.text for d in limited(documents(), 7)] == ["one\ntwo"]
    assert [d.text for d in limited([Document("a", "größe")], 3)] == ["gr"]
    assert len(list(limited([Document("a", "b")] * 3, None))) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text\0text", "a.txt is not text: it has a zero byte at offset 4; give UTF-8"),
        ("a.txt", b"x" * 3_000_000 + b"\n\xf6", "a.txt is not UTF-8 text: byte 0xf6 at offset 3000001; convert"),
        ("a.txt", "größe".encode()[:3], "a.txt is not UTF-8 text: byte 0xc3 at offset 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xf6"}', r"a.jsonl, line 2, is not UTF-8 text: byte 0xf6 at offset 10"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{text}',
            r"a.jsonl, line 2 is not JSON \(Expecting property name .* at column 2\)",
        ),
        ("a.jsonl", b'{"body": "a", "id": 1}', r"line 1 has no field 'text'; its fields are 'body', 'id': .*--field"),
        ("a.jsonl", b'{"text": [1, 2]}', r"line 1: field 'text' holds \[1, 2\], not text"),
        ("a.jsonl", b'["text"]', "line 1 is a JSON list; give objects, with the text in .text."),
        ("a.parquet", b"PAR1 not at all", "a.parquet is not a whole parquet file"),
        ("a.jsonl", b"\n\n", "a.jsonl is empty"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        texts(_write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.txt.xz", "a.txt.gz", "a.jsonl.xz", "a.jsonl.gz"])
def test_a_packed_file_that_was_cut_is_refused(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, LINES.encode() * 100)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"is not a whole \.(xz|gz) file"):
        texts(path)
    path.write_bytes(b"not packed at all")
    with pytest.raises(ValueError, match=r"is not a whole \.(xz|gz) file"):
        texts(path)


def test_parquet_columns_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), path)
    with pytest.raises(ValueError, match=r"has no column 'text'; its columns are 'id', 'body': .*--field"):
        texts(path)
    with pytest.raises(ValueError, match="column 'id' holds int64, not strings"):
        texts(path, "id")
    assert texts(path, "body") == ["a"]
    binary = pa.array([b"good", b"\xf6"]).view(pa.string())
    pq.write_table(pa.table({"text": binary}), path)
    with pytest.raises(ValueError, match="row 1, is not UTF-8 text: byte 0xf6 at offset 0"):
        texts(path)


def test_a_misspelt_name_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data set: openwebtxt; did you mean openwebtext\? \(the data sets are stdlib, o"
    ):
        find_source("openwebtxt")
    with pytest.raises(ValueError, match=r"no such file or folder: .*nowhere.txt; give text"):
        find_source(str(tmp_path / "nowhere.txt"))
    with pytest.raises(ValueError, match="'hub:' names no data set"):
        find_source("hub:")


def test_the_state_of_a_source_tells_a_change(tmp_path: Path) -> None:
    path = _write(tmp_path / "a" / "a.txt", b"one")
    before = find_source(tmp_path / "a").state()
    assert find_source(tmp_path / "a").state() == before
    path.write_bytes(b"four")
    assert find_source(tmp_path / "a").state() != before


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content))
    return path
