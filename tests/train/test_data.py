"""Reading, splitting, tokenizing and sampling."""

import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwise.train.data import END_OF_TEXT, Document, Tokens, even_starts, find_source, split_documents, window_starts
from sharpwise.train.data.documents import limited
from sharpwise.train.data.files import Meter

TEXT = "".join(f"line {i} of a text about {i * i} things\n" for i in range(400))


def read_documents(source: str | Path = "stdlib", *, max_bytes: int | None = None) -> list[Document]:
    return list(limited(find_source(source).documents(Meter()), max_bytes))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_standard_library_is_there_and_has_no_tests() -> None:
    documents = read_documents()
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert not any("test" in name.split("/")[:-1] or "site-packages" in name for name in names)


def test_a_file_an_xz_of_it_and_a_folder_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text(TEXT)
    with lzma.open(tmp_path / "a" / "two.txt.xz", "wt") as file:
        file.write(TEXT)
    (tmp_path / "a" / ".hidden.txt").write_text("no")
    (tmp_path / "a" / "picture.png").write_bytes(b"\x89PNG\0")
    assert [document.text for document in read_documents(tmp_path / "a" / "one.txt")] == [TEXT.strip("\n")]
    documents = read_documents(tmp_path / "a")
    assert [document.name for document in documents] == ["one.txt", "two.txt.xz"]
    assert documents[0].text == documents[1].text


def test_marks_separate_documents(tmp_path: Path) -> None:
    path = tmp_path / "three.txt"
    path.write_text(f"one\ntwo\n{END_OF_TEXT}\nthree\n{END_OF_TEXT}\n\n{END_OF_TEXT}\nfour {END_OF_TEXT} five\n")
    texts = [document.text for document in read_documents(path)]
    assert texts == ["one\ntwo", "three", f"four {END_OF_TEXT} five"]


def test_no_more_than_max_bytes_are_read_and_no_character_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("größe\n" * 1000, encoding="utf-8")
    (document,) = read_documents(path, max_bytes=102)  # the last byte would be the first of an "ö"
    assert document.text == "\n".join(["größe"] * 12)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n ", "is empty"),
        ("zero.txt", b"text\0text", "zero byte at offset 4; give UTF-8"),
        ("latin.txt", "größe".encode("latin-1"), "not UTF-8 text: byte 0xf6 at offset 2"),
        ("broken.xz", b"not xz at all", "not a whole .xz"),
        ("cut.txt.xz", lzma.compress(TEXT.encode())[:-30], "not a whole .xz"),
    ],
)
def test_what_is_not_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_documents(path)
    assert name in str(caught.value)


def test_a_missing_path_and_a_folder_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        read_documents(tmp_path / "nowhere.txt")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"has no file with text that ends in \.json, \.jsonl, \.md, \.ndjson, \.py"):
        read_documents(tmp_path)


# --- splitting -------------------------------------------------------------------------------------------------------

DOCUMENTS = st.lists(st.text(min_size=1, max_size=200), min_size=2, max_size=40).map(
    lambda texts: [Document(f"{i}", text) for i, text in enumerate(texts)]
)


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.randoms(use_true_random=False))
def test_the_split_is_by_whole_documents_and_knows_no_order(documents: list[Document], random) -> None:
    train, validation = split_documents(documents)
    assert train
    assert validation
    assert sorted(train + validation, key=lambda d: int(d.name)) == documents
    shuffled = list(documents)
    random.shuffle(shuffled)
    assert split_documents(shuffled) == (train, validation)


def test_the_share_of_validation_is_kept() -> None:
    documents = [Document(f"{i}", "x" * (50 + 7 * (i % 13))) for i in range(400)]
    _, validation = split_documents(documents, share=0.1)
    total, part = (sum(len(d.text) for d in docs) for docs in (documents, validation))
    assert 0.1 <= part / total <= 0.12


def test_a_single_document_gives_its_end_to_validation() -> None:
    (train,), (validation,) = split_documents([Document("one", TEXT)])
    assert train.text + validation.text == TEXT
    assert validation.text.startswith("line ")
    assert 0.04 <= len(validation.text) / len(TEXT) <= 0.06


# --- batches ---------------------------------------------------------------------------------------------------------


def sample(tokens: np.ndarray, *, seed: int, step: int, sequences: int, context: int) -> np.ndarray:
    starts = window_starts(len(tokens), seed=seed, step=step, sequences=sequences, context=context)
    return Tokens([tokens]).windows(starts, context + 1)


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    tokens = np.arange(10_000, dtype=np.uint16)
    draw = {"sequences": 4, "context": 32}
    windows = sample(tokens, seed=3, step=7, **draw)
    sample(tokens, seed=3, step=8, **draw)
    np.random.default_rng(0).random()
    torch.manual_seed(1)
    np.testing.assert_array_equal(windows, sample(tokens, seed=3, step=7, **draw))
    assert windows.dtype == np.int64
    assert windows.shape == (4, 33)
    assert (np.diff(windows) == 1).all()  # the tokens count up: they are taken as they stand
    others = [sample(tokens, seed=s, step=t, **draw) for s, t in ((3, 8), (4, 7), (7, 3))]
    assert not any(np.array_equal(windows, other) for other in others)


def test_windows_reach_both_ends_of_the_tokens() -> None:
    tokens = np.arange(12, dtype=np.uint16)
    windows = sample(tokens, seed=0, step=0, sequences=200, context=8)
    assert windows.min() == 0
    assert windows.max() == 11


def test_validation_windows_are_fixed_and_do_not_overlap() -> None:
    starts = even_starts(1000, 5, 64)
    assert len(starts) == 5
    assert (np.diff(starts) >= 64).all()
    assert starts.max() + 65 <= 1000
    assert len(even_starts(1000, 500, 64)) == 15
    assert len(even_starts(65, 5, 64)) == 1
