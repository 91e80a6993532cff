"""Windows across shards, the sampler's purity, and folders that are not prepared tokens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwise.train.data import (
    Tokens,
    even_starts,
    open_tokens,
    prepare_tokens,
    window_starts,
)

# --- windows ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 20), st.data())
def test_windows_are_those_of_one_long_array(sizes: list[int], length: int, data: st.DataObject) -> None:
    whole = np.arange(sum(sizes), dtype=np.uint16)
    tokens = Tokens(np.split(whole, np.cumsum(sizes)[:-1]))
    assert len(tokens) == len(whole)
    room = len(whole) - length
    starts = data.draw(st.lists(st.integers(0, room), max_size=6)) if room >= 0 else []
    windows = tokens.windows(np.array(starts, dtype=np.int64), length)
    assert windows.dtype == np.int64
    assert windows.shape == (len(starts), length)
    assert windows.tolist() == [list(range(start, start + length)) for start in starts]
    for start in starts:
        name, offset = tokens.where(start)
        assert tokens.shards[int(name.split()[1])][offset] == start


def test_windows_outside_are_refused() -> None:
    tokens = Tokens([np.arange(5), np.arange(5)])
    for starts in ([-1], [8], [0, 9]):
        with pytest.raises(IndexError, match=r"windows of 3 tokens .* do not lie within 10 tokens"):
            tokens.windows(np.array(starts), 3)
    with pytest.raises(IndexError, match="there are 10 tokens, got 10"):
        tokens.where(10)


# --- sampler ---------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_sampler_are_frozen() -> None:
    """A change of these changes every run."""
    assert window_starts(10_000, seed=3, step=7, sequences=5, context=32).tolist() == [568, 1603, 9033, 8203, 8591]
    assert even_starts(10_000, 4, 100).tolist() == [0, 2400, 4800, 7200]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_slices_of_any_micro_batch_and_world_size_make_the_same_batch(world: int, micro: int) -> None:
    draw = {"seed": 1, "step": 9, "sequences": 24, "context": 16}
    whole = window_starts(5000, **draw)
    parts = []
    for rank in range(world):
        mine = window_starts(5000, **draw)[rank * 24 // world : (rank + 1) * 24 // world]
        parts += [mine[i : i + micro] for i in range(0, len(mine), micro)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_windows_of_one_array_and_of_shards_are_alike() -> None:
    whole = np.arange(1000, dtype=np.uint16)
    shards = Tokens([whole[:300], whole[300:310], whole[310:]])
    for starts in (window_starts(1000, seed=0, step=1, sequences=50, context=32), even_starts(1000, 9, 32)):
        np.testing.assert_array_equal(Tokens([whole]).windows(starts, 33), shards.windows(starts, 33))


def test_too_few_tokens_for_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 tokens hold no window of 8 \+ 1; prepare more text"):
        window_starts(8, seed=0, step=0, sequences=1, context=8)
    with pytest.raises(ValueError, match=r"8 tokens hold no window of 8 \+ 1"):
        even_starts(8, 2, 8)
    assert window_starts(9, seed=0, step=0, sequences=2, context=8).tolist() == [0, 0]


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    text = "\n<|endoftext|>\n".join(f"text {i} about {i * i}\nand more" for i in range(60))
    (folder / "a.txt").write_text(text)
    prepare_tokens([folder / "a.txt"], folder / "out", vocabulary=300, validation=0.1, chunk_bytes=400)
    return folder / "out"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_shards_are_mapped_and_named(folder: Path) -> None:
    prepared = open_tokens(str(folder))
    names = [file["file"] for file in prepared.manifest["shards"] if file["part"] == "train"]
    assert len(names) > 2
    assert prepared.train.where(0) == ("train-00000.bin", 0)
    assert prepared.train.where(len(prepared.train) - 1)[0] == names[-1]
    assert isinstance(prepared.train.shards[0].base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        prepared.train.shards[0][0] = 1
    windows = prepared.train.windows(np.arange(len(prepared.train) - 40), 41)
    assert (windows[1:, :-1] == windows[:-1, 1:]).all()
    assert prepared.tokenizer().get_vocab_size() == prepared.vocabulary == 300


def test_the_identity_is_of_the_tokens_not_of_the_place(folder: Path, made: Path) -> None:
    here, there = open_tokens(folder), open_tokens(made)
    assert here.sha256 == there.sha256 == here.about["sha256"]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert open_tokens(folder).sha256 != there.sha256


def test_folders_that_are_not_prepared_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such folder: .*nowhere; make it with: sharpwise prepare"):
        open_tokens(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no manifest.json: it is no folder that sharpwise prepare wrote"):
        open_tokens(tmp_path / "empty")
    (tmp_path / "empty" / "progress.jsonl").touch()
    with pytest.raises(
        ValueError, match=r"has no manifest.json: prepare was not finished; run sharpwise prepare .* again"
    ):
        open_tokens(tmp_path / "empty")
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a manifest of prepared tokens"):
        open_tokens(folder)
    (folder / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99, and this version reads 1"):
        open_tokens(folder)


def test_shards_that_are_missing_or_cut_are_refused(folder: Path) -> None:
    path = folder / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train-00001.bin has [\d,]+ bytes, and the manifest says [\d,]+; remove"):
        open_tokens(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*train-00001.bin: No such file .* --out .* again"):
        open_tokens(folder)
    shutil.copy(folder / "train-00000.bin", path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError):
        open_tokens(folder)
