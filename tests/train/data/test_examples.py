"""Examples of one length: every window is one of them, each as often as the others, and what is none is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train.run_rig import lines

from sharpwise.train.data import even_starts, open_tokens, prepare_tokens, window_starts, write_examples
from sharpwise.train.data.tokens import Examples
from sharpwise.train.run import run


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 30), st.integers(1, 3), st.integers(1, 40))
def test_every_window_is_an_example(length: int, count: int, cuts: int, sequences: int) -> None:
    whole = np.arange(length * count)
    tokens = Examples(np.array_split(whole, cuts), length=length)
    starts = window_starts(len(tokens), seed=1, step=2, sequences=sequences, context=length - 1)
    windows = tokens.windows(starts, length)
    assert (windows[:, 0] % length == 0).all()
    assert (windows == windows[:, :1] + np.arange(length)).all()
    for start, window in zip(starts, windows, strict=True):
        name, place = tokens.where(int(start))
        assert tokens.shards[int(name.split()[1])][place] == window[0]
    # Validation sees different ones, and all where it asks for as many.
    even = tokens.windows(even_starts(len(tokens), sequences, length - 1), length)
    assert len({*even[:, 0].tolist()}) == len(even) == min(sequences, count)


def test_examples_are_drawn_equally_often() -> None:
    tokens = Examples([np.arange(5 * 4)], length=4)
    starts = window_starts(len(tokens), seed=0, step=0, sequences=50_000, context=3)
    drawn = np.bincount(tokens.windows(starts, 4)[:, 0] // 4)
    assert np.abs(drawn - 10_000).max() < 400  # 4.5 standard deviations


@pytest.mark.parametrize("highest", [9, 70_000])
def test_what_is_written_is_read(highest: int, tmp_path: Path) -> None:
    train, validation = np.arange(30).reshape(10, 3) % 7, np.full((6, 3), highest)
    found = write_examples(tmp_path / "a", train, validation)
    assert (found.context, found.vocabulary) == (2, highest + 1)
    assert found.train.windows(np.arange(10) * 2, 3).tolist() == train.tolist()
    assert found.validation.windows(np.arange(6) * 2, 3).tolist() == validation.tolist()
    assert found.about["documents"] == 16
    assert (found.about["train_tokens"], found.about["validation_tokens"]) == (30, 18)
    assert found.tokenizer().encode("3 1 2").ids == [3, 1, 2]
    # The same tokens in examples of another length are other data; written again, the same.
    other = write_examples(tmp_path / "b", train.reshape(15, 2), validation.reshape(9, 2))
    assert other.sha256 != found.sha256 == write_examples(tmp_path / "a", train, validation).sha256


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (np.zeros((20, 1), int), r"train: expected integers \[examples, 2 or more\], 16 or more in all, got int64"),
        (np.zeros(20, int), r"got int64 \[20\]"),
        (np.zeros((20, 2)), r"got float64 \[20, 2\]"),
        (np.zeros((7, 2), int), r"got int64 \[7, 2\]"),
        (np.full((20, 2), -1), r"train: tokens are 0 to 2\^32 - 1, got -1 to -1"),
        (np.zeros((20, 3), int), "train has examples of 3 tokens, and validation of 2"),
    ],
)
def test_what_is_none_is_refused(train: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_examples(tmp_path / "a", train, np.zeros((20, 2), int))
    assert not list(tmp_path.iterdir())


def test_text_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"The fox {i} jumps. " * 20 for i in range(40)))
    before = prepare_tokens([tmp_path / "text.txt"], tmp_path / "a", vocabulary=300, validation=0.1)
    with pytest.raises(ValueError, match="holds prepared text; name another folder"):
        write_examples(tmp_path / "a", np.zeros((20, 2), int), np.zeros((20, 2), int))
    assert open_tokens(tmp_path / "a").sha256 == before.sha256


def test_a_model_learns_sums(tmp_path: Path) -> None:
    pairs = np.stack(np.meshgrid(np.arange(5), np.arange(5)), -1).reshape(-1, 2)
    sums = np.concatenate([pairs, pairs.sum(1, keepdims=True)], axis=1)
    write_examples(tmp_path / "sums", sums, sums)
    config: dict[str, Any] = {
        "model": {"name": "gpt2-0.4m", "settings": {"n_layer": 1, "n_embd": 32, "n_head": 2}},
        "data": {"path": str(tmp_path / "sums")},
        "batch": {"sequences": 32},
        "optimizer": {"lr": 1e-2},
        "schedule": {"steps": 200},
        "compute": {"device": "cpu", "threads": 1, "precision": "fp32"},
        "validation": {"every": 0},
        "log": {"tensorboard": False, "diagnostics": 100},
    }
    outcome = run(config, tmp_path / "run")
    # The second number is anyone's guess, ln 5, and the sum is not.
    guessing = np.log(5) / 2
    assert outcome.validation_loss is not None and guessing < outcome.validation_loss < guessing + 0.1
    assert lines(tmp_path / "run")[0]["tokens"] == 32 * 2
    config["data"]["context"] = 3
    with pytest.raises(ValueError, match=r"data.context=3, and .* holds examples that need 2; leave it out"):
        run(config, tmp_path / "other")
