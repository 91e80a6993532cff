"""Reading, splitting, tokenizing and sampling."""

import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwise.train.data import (
    END_OF_TEXT,
    Document,
    prepare,
    read_documents,
    sample_batch,
    split_documents,
    validation_batch,
)

TEXT = "".join(f"line {i} of a text about {i * i} things\n" for i in range(400))


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
    with pytest.raises(ValueError, match=r"has no file with text that ends in \.md, \.py"):
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


# --- tokens ----------------------------------------------------------------------------------------------------------


def _corpus():
    return prepare([Document(f"{i}", TEXT + str(i)) for i in range(30)], vocabulary=300, context=16, source="test")


def test_tokens_are_in_the_vocabulary_and_documents_end() -> None:
    corpus = _corpus()
    assert corpus.vocabulary == corpus.about["vocabulary"] == 300
    assert corpus.train.dtype == np.uint16
    assert corpus.train.max() < 300
    assert int((corpus.train == 0).sum()) + int((corpus.validation == 0).sum()) == 30  # the mark is token 0
    assert corpus.train[-1] == corpus.validation[-1] == 0


def test_the_same_text_gives_the_same_corpus() -> None:
    first, second = _corpus(), _corpus()
    assert first.about == second.about
    np.testing.assert_array_equal(first.train, second.train)


def test_a_text_too_short_for_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"too short: its validation part has \d+ tokens.*needs at least 129"):
        prepare([Document("one", TEXT[:3000])], vocabulary=300, context=128, source="test")


@pytest.mark.parametrize("vocabulary", [256, 65537])
def test_a_vocabulary_out_of_range_is_refused(vocabulary: int) -> None:
    with pytest.raises(ValueError, match=f"from 257 .* to 65536 .*, got {vocabulary}"):
        prepare([Document("one", TEXT)], vocabulary=vocabulary, context=8, source="test")


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    tokens = np.arange(10_000, dtype=np.uint16)
    draw = {"sequences": 4, "context": 32}
    inputs, targets = sample_batch(tokens, seed=3, step=7, **draw)
    sample_batch(tokens, seed=3, step=8, **draw)
    np.random.default_rng(0).random()
    torch.manual_seed(1)
    again, _ = sample_batch(tokens, seed=3, step=7, **draw)
    assert torch.equal(inputs, again)
    assert inputs.dtype == torch.int64
    assert inputs.shape == targets.shape == (4, 32)
    assert torch.equal(inputs + 1, targets)  # the tokens count up: the target is the next one
    others = [sample_batch(tokens, seed=s, step=t, **draw)[0] for s, t in ((3, 8), (4, 7), (7, 3))]
    assert not any(torch.equal(inputs, other) for other in others)


def test_windows_reach_both_ends_of_the_tokens() -> None:
    tokens = np.arange(12, dtype=np.uint16)
    inputs, targets = sample_batch(tokens, seed=0, step=0, sequences=200, context=8)
    assert inputs.min() == 0
    assert targets.max() == 11


def test_validation_windows_are_fixed_and_do_not_overlap() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    inputs, targets = validation_batch(tokens, sequences=5, context=64)
    assert inputs.shape == (5, 64)
    assert torch.equal(inputs + 1, targets)
    assert len(inputs.unique()) == inputs.numel()
    few, _ = validation_batch(tokens, sequences=500, context=64)
    assert few.shape == (15, 64)
    exact, _ = validation_batch(tokens[:65], sequences=5, context=64)
    assert exact.shape == (1, 64)
