"""Folders of tokens: what is in them, stopping at any moment, and what is refused."""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from sharpwise import files
from sharpwise.train.data import Document, Prepared, manifest, open_tokens, prepare_tokens, shards
from sharpwise.train.data.split import split_chunk

MARK = "\n<|endoftext|>\n"
DOCUMENTS = [f"text {i} about {i * i} größe\n\n  and 'more' of it, {'word ' * (i % 7)}end" for i in range(120)]
SETTINGS: dict[str, Any] = {"vocabulary": 320, "validation": 0.1, "chunk_bytes": 1500}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text(MARK.join(DOCUMENTS))
    return path


def documents(prepared: Prepared, part: str) -> list[str]:
    tokens = getattr(prepared, part)
    ids = np.concatenate(tokens.shards).tolist()
    assert ids[-1] == prepared.end_of_text
    decoded = prepared.tokenizer().decode(ids, skip_special_tokens=False)
    return decoded.split("<|endoftext|>")[:-1]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is in them -------------------------------------------------------------------------------------------------


def test_every_document_is_in_one_part_whole(text: Path, tmp_path: Path) -> None:
    prepared = prepare_tokens([text], tmp_path / "out", **SETTINGS)
    train, validation = documents(prepared, "train"), documents(prepared, "validation")
    assert sorted(train + validation) == sorted(DOCUMENTS)
    share = sum(map(len, validation)) / sum(map(len, DOCUMENTS))
    assert 0.09 < share < 0.13
    counts = prepared.manifest["counts"]
    assert counts["documents"] == 120
    assert counts["validation_documents"] == len(validation)
    assert counts["bytes"] == sum(len(document.encode()) for document in DOCUMENTS)
    assert counts["train_tokens"] == len(prepared.train) == prepared.about["train_tokens"]
    assert prepared.about["source"] == "some.txt"
    for shard in prepared.manifest["shards"]:
        raw = (prepared.folder / shard["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == shard["sha256"]
    assert not any(path.name.startswith(".") for path in prepared.folder.iterdir())
    assert not (prepared.folder / "progress.jsonl").exists()


def test_bytes_do_not_depend_on_the_jobs(text: Path, tmp_path: Path) -> None:
    for name, jobs in (("one", 1), ("many", 2)):
        prepare_tokens([text], tmp_path / name, jobs=jobs, **SETTINGS)
    assert content(tmp_path / "one") == content(tmp_path / "many")


def test_a_single_document_is_cut_at_a_line(tmp_path: Path) -> None:
    lines = "".join(f"line {i} of it\n" for i in range(300)).strip("\n")
    (tmp_path / "a.txt").write_text(lines)
    prepared = prepare_tokens([tmp_path / "a.txt"], tmp_path / "out", **SETTINGS | {"chunk_bytes": 10**6})
    (train,), (validation,) = documents(prepared, "train"), documents(prepared, "validation")
    assert train + validation == lines
    assert validation.startswith("line ")
    assert 0.08 < len(validation) / len(lines) < 0.12


def test_validation_data_of_its_own(text: Path, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"text": "held out"}\n{"text": "also"}\n')
    prepared = prepare_tokens([text], tmp_path / "out", validation_data=tmp_path / "held.jsonl", **SETTINGS)
    assert documents(prepared, "validation") == ["held out", "also"]
    assert documents(prepared, "train") == DOCUMENTS


def test_several_sources_and_a_limit(text: Path, tmp_path: Path) -> None:
    (tmp_path / "second.jsonl").write_text('{"body": "from the second"}\n' * 50)
    sources = [text, tmp_path / "second.jsonl"]
    prepared = prepare_tokens(sources, tmp_path / "out", field="body", **SETTINGS)
    assert prepared.about["source"] == "some.txt + second.jsonl"
    assert prepared.about["documents"] == 170
    limited = prepare_tokens([text], tmp_path / "limited", max_bytes=2000, **SETTINGS)
    assert 1900 < limited.manifest["counts"]["bytes"] <= 2000


def test_the_text_is_described_where_somebody_says_what_it_is(text: Path, tmp_path: Path) -> None:
    """At once or later; tokens, and what tells them from others, stay as they are."""
    plain = prepare_tokens([text], tmp_path / "out", **SETTINGS)
    assert "description" not in plain.about
    described = prepare_tokens([text], tmp_path / "out", description="120 made-up documents", **SETTINGS)
    assert described.about["description"] == "120 made-up documents" and described.sha256 == plain.sha256
    assert prepare_tokens([text], tmp_path / "out", **SETTINGS).about == described.about
    at_once = prepare_tokens([text], tmp_path / "again", description="120 made-up documents", **SETTINGS)
    assert at_once.about == described.about


def test_progress_reaches_the_whole(text: Path, tmp_path: Path) -> None:
    news = []
    prepare_tokens([text], tmp_path / "out", on_progress=news.append, **SETTINGS)
    assert news[-1].fraction == 1
    assert news[-1].text_bytes == sum(len(document.encode()) for document in DOCUMENTS)
    assert [n.fraction for n in news] == sorted(n.fraction for n in news)


def test_the_share_is_kept_over_chunks_with_large_documents() -> None:
    seen = held = 0
    for i in range(40):
        chunk = [Document(f"{i}-{j}", "x" * (3000 if j == 0 else 40)) for j in range(4)]
        train, validation = split_chunk(chunk, 0.05, seen=seen, held=held, last=i == 39)
        assert sorted([*train, *validation], key=lambda d: d.name) == chunk
        seen += sum(len(d.text) for d in chunk)
        held += sum(len(d.text) for d in validation)
    assert 0.03 < held / seen < 0.08


def test_large_documents_stay_whole_and_parts_of_one_do_not() -> None:
    whole, part = Document("a", "line\n" * 100), Document("a", "line\n" * 100, whole=False)
    assert split_chunk([whole], 0.1, seen=0, held=0, last=False) == ([whole], [])
    assert split_chunk([whole], 0.1, seen=5000, held=600, last=True) == ([whole], [])
    train, validation = split_chunk([part], 0.1, seen=0, held=0, last=False)
    assert (len(train[0].text), len(validation[0].text)) == (450, 50)
    assert split_chunk([part], 0.1, seen=5000, held=600, last=False) == ([part], [])


# --- stopping and going on -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends: nothing after it runs but what an operating system does."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    (folder / "some.txt").write_text(MARK.join(DOCUMENTS))
    prepare_tokens([folder / "some.txt"], folder / "out", **SETTINGS)
    return folder


@pytest.mark.parametrize("at", [0, 1, 2, 4])
@pytest.mark.parametrize("moment", ["in the middle of a file", "before a file is in place", "before a record"])
def test_killed_at_any_moment_the_same_call_goes_on(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, at: int
) -> None:
    out, before, count = tmp_path / "out", {}, [0]
    owner, name = {
        "in the middle of a file": (shards, "replacing"),
        "before a file is in place": (files.os, "replace"),
        "before a record": (manifest.Journal, "add"),
    }[moment]
    real = getattr(owner, name)

    def die(*args: Any) -> Any:
        count[0] += 1
        if count[0] <= at:
            return real(*args)
        # Nothing tidies up after a process that is killed: what lies there now is put there again below.
        before.update(content(out))
        if moment == "in the middle of a file":
            before[f".writing-{args[0].name}.123"] = b"half of a sha"
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(Killed):
            prepare_tokens([reference / "some.txt"], out, **SETTINGS)
    shutil.rmtree(out, ignore_errors=True)  # it is gone where nothing was worth keeping
    out.mkdir()
    for file, raw in before.items():
        (out / file).write_bytes(raw)
    done = (out / "progress.jsonl").read_text().count("\n") - 1
    with pytest.raises(ValueError, match="prepare was not finished"):
        open_tokens(out)
    news: list[Any] = []
    prepare_tokens([reference / "some.txt"], out, on_progress=news.append, **SETTINGS)
    assert sum(n.kept_bytes == n.text_bytes for n in news) == max(done, 0)
    assert content(out) == content(reference / "out")


def test_a_record_that_was_half_written_does_not_count(reference: Path, tmp_path: Path) -> None:
    out = _stopped_after(reference / "some.txt", tmp_path / "out", 3)
    with (out / "progress.jsonl").open("ab") as file:
        file.write(b'{"part": "train", "text_sha')
    prepare_tokens([reference / "some.txt"], out, **SETTINGS)
    assert content(out) == content(reference / "out")


def test_a_source_that_changed_meanwhile_is_done_again_from_there(reference: Path, text: Path, tmp_path: Path) -> None:
    out = _stopped_after(text, tmp_path / "out", 4)
    changed = MARK.join([*DOCUMENTS[:-30], "another", *DOCUMENTS[-29:]])
    text.write_text(changed)
    news: list[Any] = []
    prepare_tokens([text], out, on_progress=news.append, **SETTINGS)
    assert news[3].kept_bytes > 0
    prepare_tokens([text], tmp_path / "fresh", **SETTINGS)
    assert {k: v for k, v in content(out).items() if k != "manifest.json"} == {
        k: v for k, v in content(tmp_path / "fresh").items() if k != "manifest.json"
    }


def test_a_source_that_changed_at_its_beginning_is_done_again_whole(text: Path, tmp_path: Path) -> None:
    out = _stopped_after(text, tmp_path / "out", 4)
    text.write_text("entirely other words\n" * 300)
    prepare_tokens([text], out, **SETTINGS)
    fresh = prepare_tokens([text], tmp_path / "fresh", **SETTINGS)
    assert open_tokens(out).sha256 == fresh.sha256


def test_a_second_call_touches_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = prepare_tokens([text], out, **SETTINGS)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in [out, *out.iterdir()]}
    monkeypatch.chdir(tmp_path)
    again = prepare_tokens(["some.txt"], out, on_progress=pytest.fail, jobs=3, **SETTINGS)
    assert again.sha256 == first.sha256
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in [out, *out.iterdir()]} == before


def _stopped_after(text: Path, out: Path, chunks: int) -> Path:
    """What a run leaves that is stopped while it writes the chunk after."""

    def stop(news: Any) -> None:
        if (out / "progress.jsonl").read_text().count("\n") > chunks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_tokens([text], out, on_progress=stop, **SETTINGS)
    assert (out / "progress.jsonl").read_text().count("\n") == chunks + 1
    return out


# --- what is refused -------------------------------------------------------------------------------------------------


def test_other_settings_into_the_same_folder_are_refused(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_tokens([text], out, **SETTINGS)
    before = content(out)
    with pytest.raises(
        ValueError, match=r"other settings \(validation: 0.1 there, 0.2 now; tokenizer.vocabulary: 320 there, "
    ):
        prepare_tokens([text], out, **SETTINGS | {"validation": 0.2, "vocabulary": 321})
    os.utime(text, (1, 1))
    with pytest.raises(ValueError, match=r"other settings \(state: some.txt \(1 files, .* there, some.txt .* now\)"):
        prepare_tokens([text], out, **SETTINGS)
    assert content(out) == before


def test_unfinished_tokens_of_other_settings_are_refused(text: Path, tmp_path: Path) -> None:
    out = _stopped_after(text, tmp_path / "out", 2)
    with pytest.raises(ValueError, match=r"unfinished tokens of other settings \(validation: 0.1 there, 0.3 now\)"):
        prepare_tokens([text], out, **SETTINGS | {"validation": 0.3})


@pytest.mark.parametrize("raw", [b"what is this\n", b"[1]\n", b'{}\n{"part": "train"}\n'])
def test_a_damaged_journal_is_refused_and_left_alone(text: Path, tmp_path: Path, raw: bytes) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "progress.jsonl").write_bytes(raw)
    with pytest.raises(
        ValueError, match=r"progress.jsonl is damaged; remove .*out, then run sharpwise prepare \.\.\. --"
    ):
        prepare_tokens([text], out, **SETTINGS)
    assert content(out) == {"progress.jsonl": raw}


def test_folders_and_files_of_others_are_left_alone(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds other files and no prepared tokens"):
        prepare_tokens([text], tmp_path)
    with pytest.raises(ValueError, match=r"some.txt is a file; name a folder"):
        prepare_tokens([text], text)


def test_two_processes_at_once_are_refused(text: Path, tmp_path: Path) -> None:
    def second(news: Any) -> None:
        prepare_tokens([text], tmp_path / "out", **SETTINGS)

    with pytest.raises(ValueError, match="another process prepares tokens in"):
        prepare_tokens([text], tmp_path / "out", on_progress=second, **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 0.0}, "validation must be a share between 0 and 1, got 0.0"),
        ({"vocabulary": 256}, r"vocabulary must be from 257 \(bytes and <|endoftext|>\) .* got 256"),
        (
            {"vocabulary": 70_000, "token_type": "uint16"},
            "vocabulary of 70000 is too large for uint16 tokens, which hold 65536",
        ),
        ({"token_type": "int8"}, "token type must be one of auto, uint16, uint32, got 'int8'"),
        ({"jobs": 0}, "must be at least 1, got 0"),
        ({"end_of_text": "<|endoftxt|>"}, r"has no token '<\|endoftxt\|>'; did you mean '<\|endoftext\|>'"),
    ],
)
def test_settings_out_of_range_are_refused(text: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_tokens([text], tmp_path / "out", **SETTINGS | settings)
    prepare_tokens([text], tmp_path / "out", **SETTINGS)  # and nothing is in the way of another try


def test_an_empty_part_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"the training part is empty: the text has 1 bytes in .* documents, and validation"
    ):
        prepare_tokens([tmp_path / "tiny.txt"], tmp_path / "out", **SETTINGS)
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"none.txt is empty"):
        prepare_tokens([text], tmp_path / "out", validation_data=tmp_path / "none.txt", **SETTINGS)
    with pytest.raises(ValueError, match="no source; name a file"):
        prepare_tokens([], tmp_path / "out")


UNKNOWN = Tokenizer(models.Unigram([("<eos>", 0.0), ("a", -1.0)], None))
UNKNOWN.add_special_tokens(["<eos>"])
WORDS = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="?"))
WORDS.add_special_tokens(["<eos>"])


def interrupt(news: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["new", "a/b/new", "empty"])
@pytest.mark.parametrize(
    ("name", "raw", "settings", "message"),
    [
        ("a.txt", b"", {}, "a.txt is empty"),
        ("a.txt", b"x", {}, "the training part is empty"),
        ("a.txt", b"x\0", {}, "is not text"),
        ("a.jsonl", b'{"text": "a"}\n{', {}, "line 2 is not JSON"),
        ("a.parquet", b"PAR1", {}, "is not a whole parquet file"),
        ("a.txt.gz", b"no", {}, "is not a whole .gz file"),
        ("a.txt", b"some text", {"validation_data": "nowhere/a.txt"}, "no such file or folder"),
        ("a.txt", b"some text", {"validation_data": "none.txt"}, "none.txt is empty"),
        ("a.txt", b"some text", {"tokenizer": "none.txt"}, "is not a tokenizer.json"),
        (
            "a.txt",
            b"some text",
            {"tokenizer": "unknown.json"},
            r"the tokenizer cannot encode the text \(Enc.*token for",
        ),
        ("a.txt", b"some text", {"tokenizer": "unknown.json", "jobs": 2, "chunk_bytes": 4}, "cannot encode the text"),
        ("a.txt", b"some text", {"tokenizer": "words.json"}, r"the tokenizer cannot encode the text \(WordLevel"),
        ("a.txt", b"some text", {"tokenizer": "empty.json"}, "the tokenizer has no tokens"),
        ("a.txt", b"some text", {"tokenizer": "unknown.json", "end_of_text": "<end>"}, "has no token '<end>'"),
        ("a.txt", b"some text", {"on_progress": interrupt}, None),
    ],
)
def test_what_is_refused_leaves_no_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    name: str,
    raw: bytes,
    settings: dict[str, Any],
    message: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(raw)
    Path("none.txt").write_text("\n")
    Path("unknown.json").write_text(UNKNOWN.to_str())
    Path("words.json").write_text(WORDS.to_str())
    Path("empty.json").write_text(Tokenizer(models.BPE()).to_str())
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError if message else KeyboardInterrupt, match=message):
        prepare_tokens([name], place, **SETTINGS | settings)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_made_leaves_no_part_of_its_path(text: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=r"cannot write into .*; name another folder"):
        prepare_tokens([text], tmp_path / "a" / "b" / ("long" * 100) / "out", **SETTINGS)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_text_in_a_later_chunk_keeps_the_chunks_before(text: Path, tmp_path: Path) -> None:
    (tmp_path / "zbad.txt").write_bytes(b"\xf6")
    with pytest.raises(ValueError, match=r"zbad.txt is not UTF-8 text: byte 0xf6 at offset 0"):
        prepare_tokens([text, tmp_path / "zbad.txt"], tmp_path / "out", **SETTINGS)
    (tmp_path / "zbad.txt").write_text("good")
    news: list[Any] = []
    prepare_tokens([text, tmp_path / "zbad.txt"], tmp_path / "out", on_progress=news.append, **SETTINGS)
    assert news[0].kept_bytes > 0


def test_a_full_disk_leaves_no_half_and_the_call_goes_on(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = files.sync, []

    def full(file: Any) -> None:
        calls.append(file)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    for at in range(1, 14):
        out = tmp_path / str(at)
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(files, "sync", full)
            patch.setattr(manifest, "sync", full)
            with pytest.raises(OSError, match=r"no space is left for .*: make room .* the same command goes on from h"):
                prepare_tokens([reference / "some.txt"], out, **SETTINGS)
        assert out.exists() == (at > 5)  # settings, tokenizer, two shards of the first chunk, its record
        assert not list(out.glob(".*"))
        prepare_tokens([reference / "some.txt"], out, **SETTINGS)
        assert content(out) == content(reference / "out")


def test_tokens_of_a_large_vocabulary_are_wider(text: Path, tmp_path: Path) -> None:
    wide = prepare_tokens([text], tmp_path / "wide", token_type="uint32", **SETTINGS)
    narrow = prepare_tokens([text], tmp_path / "narrow", **SETTINGS)
    assert wide.train.shards[0].dtype == np.uint32
    assert narrow.train.shards[0].dtype == np.uint16
    np.testing.assert_array_equal(np.concatenate(wide.train.shards), np.concatenate(narrow.train.shards))
    assert Tokenizer.from_file(str(tmp_path / "wide" / "tokenizer.json")).get_vocab_size() == 320
