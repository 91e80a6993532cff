"""What of a folder is read, what is said of the rest, and names that are not UTF-8."""

import bz2
import gzip
import json
import lzma
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharpwise.train.data import find_source, open_tokens, prepare_tokens, told, write_examples
from sharpwise.train.data.files import Meter

ROW = b'{"text": "%s"}\n'
ARRAY = b' [ {"text": "%s"},\n  {"text": "\\u00e9", "more": [1, {"a": "]"}]} ]\n'
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACK[".zst"] = lambda raw: bytes(pa.Codec("zstd").compress(raw))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "texts"
    path.mkdir()
    return path


def texts(path: Path) -> list[str]:
    return [document.text for document in find_source(path).documents(Meter())]


def left_out(path: Path) -> dict[str, list[str]]:
    groups = prepare_tokens([path], path.parent / "out", vocabulary=300, validation=0.3).manifest["left_out"]
    return {group["why"]: [str(Path(name).relative_to(path)) for name in group["names"]] for group in groups}


def test_every_format_that_is_read_is_read_in_a_folder(folder: Path) -> None:
    names = [f"a{kind}{packing}" for kind in (".txt", ".md", ".jsonl", ".ndjson", ".json") for packing in ("", *PACK)]
    for name in names:
        path = folder / name
        raw = (ROW % name.encode()) if "json" in name else name.encode()
        path.write_bytes(PACK.get(path.suffix, bytes)(raw))
    (folder / "b.gz").write_bytes(gzip.compress(b"b.gz"))
    pq.write_table(pa.table({"text": ["c.parquet"]}), folder / "c.parquet")
    assert texts(folder) == sorted([*names, "b.gz", "c.parquet"])
    assert left_out(folder) == {}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_json_is_an_array_or_lines(folder: Path, packing: str) -> None:
    for name, raw in (("a", ARRAY % b"one"), ("b", ROW % b"two" * 2), ("c", b"\xef\xbb\xbf" + ARRAY % b"three")):
        (folder / f"{name}.json{packing}").write_bytes(PACK.get(packing, bytes)(raw))
    assert texts(folder) == ["one", "é", "two", "two", "three", "é"]


def test_arrays_are_the_same_wherever_blocks_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f'größe {i} " ] [ {{ , 🙂', "more": [i / 7, None, {"a": []}]} for i in range(20)]
    for indent in (None, 2):
        (folder / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=bool(indent)), encoding="utf-8")
        for size in (5, 64, 1000):
            monkeypatch.setattr("sharpwise.train.data.files.BLOCK", size)
            assert texts(folder / "a.json") == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'[{"text": "a"}, {"text": }]', r"a.json, object 1 is not JSON \(Expecting value\)"),
        (b'[{"text": "a"}, {"text": "b"', r"a.json, object 1 is not JSON \(Expecting ',' delimiter\)"),
        (b'[{"text": "a"} {"text": "b"}]', r"a.json, object 0 is not JSON \(neither , nor ] follows\)"),
        (b'[{"text": "a"}] {"text": "b"}', "a.json goes on after its array"),
        (b'[{"text": "a"}, "b"]', "a.json, object 1 is a JSON str; give objects, with the text in 'text'"),
        (b'[{"text": "a"}, {"body": "b"}]', "a.json, object 1 has no field 'text'; its fields are 'body': .*--field"),
        (b'{\n "text": "a"\n}', r"a.json, line 1 is not JSON \(.*give one object a line, or an array of objects"),
        (b'[{"text": "\xf6"}]', "a.json is not UTF-8 text: byte 0xf6 at offset 11"),
    ],
)
def test_json_that_cannot_be_read_is_refused_where_it_is_named(folder: Path, raw: bytes, message: str) -> None:
    (folder / "a.json").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        texts(folder / "a.json")


def test_what_is_left_out_is_said_with_the_reason(folder: Path) -> None:
    (folder / "a.txt").write_text("one\ntwo\n" * 20)
    for name in ("settings.json", "tokenizer.json.xz", "p.png", "q.png", "code.tar.gz", "Makefile", ".hidden.txt"):
        raw = b'{\n "text": 3\n}'
        (folder / name).write_bytes(PACK.get(Path(name).suffix, bytes)(raw))
    (folder / ".git" / "deep").mkdir(parents=True)
    (folder / ".git" / "deep" / "a.txt").write_text("no")
    (folder / "elsewhere").symlink_to(folder.parent)
    (folder / "gone.txt").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.txt")
    assert left_out(folder) == {
        ".png is not read": ["p.png", "q.png"],
        ".tar.gz is not read": ["code.tar.gz"],
        "a link to a folder": ["elsewhere"],
        "a link to nothing": ["gone.txt"],
        "hidden": [".git", ".hidden.txt"],
        "no objects with a text in 'text'": ["settings.json", "tokenizer.json.xz"],
        "no suffix": ["Makefile"],
        "not a regular file": ["pipe.txt"],
    }


def test_many_files_are_counted_and_some_named(folder: Path) -> None:
    (folder / "a.txt").write_text("one\ntwo\n" * 20)
    for i in range(12):
        (folder / f"{i:02}.png").write_bytes(b"")
    names = ", ".join(str(folder / f"{i:02}.png") for i in range(5))
    prepared = prepare_tokens([folder], folder.parent / "out", vocabulary=300)
    assert told(prepared.manifest["left_out"]) == f"left out: {names} and 7 more (.png is not read)"


def test_a_folder_of_which_all_is_left_out_is_refused_with_the_reasons(folder: Path) -> None:
    (folder / "a.json").write_bytes(ROW % b"one")
    (folder / "b.docx").write_bytes(b"two")
    with pytest.raises(
        ValueError, match=r"has no file with text that ends in \.json, .*left out: .*b\.docx \(\.docx is"
    ):
        prepare_tokens([folder], folder.parent / "out", field="body")
    with pytest.raises(ValueError, match=r"a\.json \(no objects with a text in 'body'\)"):
        prepare_tokens([folder], folder.parent / "out", field="body")


# --- names that are not UTF-8 ----------------------------------------------------------------------------------------

posix = pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")


def foreign(folder: Path, name: bytes) -> Path:
    return folder / os.fsdecode(name)


@posix
def test_files_and_folders_of_any_name_are_read(tmp_path: Path) -> None:
    folder = foreign(tmp_path, b"caf\xe9")
    inner = foreign(folder, b"\xff\xfe")
    inner.mkdir(parents=True)
    for name in (b"a\xe9.txt", b"b\xe9.jsonl.gz", b"d\xe9.json"):
        path = foreign(inner, name)
        path.write_bytes(PACK.get(path.suffix, bytes)(ROW % b"one and two"))
    pq.write_table(pa.table({"text": ["three"]}), tmp_path / "c.parquet")
    (tmp_path / "c.parquet").rename(foreign(inner, b"c\xe9.parquet"))
    foreign(inner, b"\xe9.png").write_bytes(b"")
    settings: dict[str, Any] = {"vocabulary": 300, "validation": 0.3}
    prepared = prepare_tokens([folder], tmp_path / "out", **settings)
    assert prepared.manifest["counts"]["documents"] == 4
    assert prepared.about["source"] == "caf\\xe9"
    assert prepared.manifest["left_out"][0]["names"] == [rf"{tmp_path}/caf\xe9/\xff\xfe/\xe9.png"]
    assert prepare_tokens([folder], tmp_path / "out", **settings).sha256 == prepared.sha256
    one = prepare_tokens([foreign(inner, b"a\xe9.txt")], tmp_path / "one", **settings)
    assert one.about["source"] == "a\\xe9.txt"


@posix
def test_a_tokenizer_of_any_name_is_read(folder: Path) -> None:
    (folder / "a.txt").write_text("one\ntwo\n" * 20)
    first = prepare_tokens([folder], folder.parent / "out", vocabulary=300)
    own = foreign(folder.parent, b"\xe9")
    own.mkdir()
    path = foreign(own, b"\xe9.json")
    path.write_text(first.tokenizer().to_str())
    (own / "tokenizer.json").write_text(first.tokenizer().to_str())
    for i, spec in enumerate((path, own)):
        again = prepare_tokens([folder], folder.parent / f"again{i}", tokenizer=spec)
        assert again.sha256 == first.sha256


@posix
def test_tokens_do_not_go_into_a_folder_whose_name_is_not_utf8(folder: Path) -> None:
    (folder / "a.txt").write_text("one\ntwo\n" * 20)
    out = foreign(folder.parent, b"\xe9")
    with pytest.raises(
        ValueError, match=r"/\\xe9/tokens: the name is not UTF-8, and .* name another folder with --out"
    ):
        prepare_tokens([folder], out / "tokens")
    with pytest.raises(ValueError, match="the name is not UTF-8"):
        write_examples(out, [[1, 2]] * 9, [[1, 2]] * 9)
    assert not out.exists()
    prepare_tokens([folder], folder.parent / "tokens")
    (folder.parent / "tokens").rename(out)
    with pytest.raises(ValueError, match="the name is not UTF-8"):
        open_tokens(out)
