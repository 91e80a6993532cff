"""Killed at any instant and started again with the same command, a run ends as if it had never been stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharpwise.optim import BLOCK_LRS, COMBINES
from sharpwise.testing import EXAMPLES
from sharpwise.train.data import prepare_tokens
from train import kill_rig
from train.kill_rig import assert_same_run, attempt, killed_often, settings

TEXT = "The quick fox jumps over the lazy dog, and {} other foxes watch. Why {}? Nobody knows, not even fox {}.\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    source = folder / "text.txt"
    documents = [TEXT.format(i, i * 7 % 11, i * i) * 20 for i in range(40)]
    source.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    prepare_tokens([source], folder / "tokens", vocabulary=300, validation=0.1)
    return folder / "tokens"


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """The same run, never stopped; one for every optimizer that is asked for."""
    known: dict[str, Path] = {}

    def of(optimizer: dict[str, Any]) -> Path:
        key = str(sorted(optimizer.items()))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("reference") / "run"
            assert attempt(settings(data, optimizer), known[key])
        return known[key]

    return of


BLOCKWISE = {"name": "adamw", "block_lr": "blockwise"}


def test_twenty_kills(data, reference, tmp_path) -> None:
    """By turns at a random operation on a file of the run, many of them within a checkpoint, and at a random time."""
    killed = 0
    for seed in range(20):
        killed += killed_often(settings(data, BLOCKWISE), tmp_path / str(seed), 20 - killed, seed, timed=True)
        assert_same_run(tmp_path / str(seed), reference(BLOCKWISE))
        if killed == 20:
            break
    assert killed == 20


@pytest.mark.parametrize(
    ("asynchronous", "apart"),
    [(True, 17), (False, 23), *(pytest.param(how, 3, marks=pytest.mark.slow) for how in (True, False))],
)
def test_a_kill_at_operations_on_files(data, reference, tmp_path, asynchronous, apart) -> None:
    """The first operation of a run, and others so far apart, each in a new folder."""
    given = settings(data, BLOCKWISE)
    given["checkpoint"] = {"every": 8, "keep": 1, "asynchronous": asynchronous}
    expected = tmp_path / "expected"
    assert attempt(given, expected)
    for at in range(1, 400, apart):
        folder = tmp_path / str(at)
        ended = attempt(given, folder, die_at=at)
        if ended:
            break
        assert attempt(given, folder)
        assert_same_run(folder, expected)
    assert ended
    assert at > 50  # it is more operations than that


def combinations() -> list[dict[str, Any]]:
    """Every rule with every block_lr and every storage that it combines with."""
    return [
        {"name": name, **({"block_lr": EXAMPLES.get(block_lr, block_lr)} if block_lr else {}), "storage": storage}
        for name, (block_lrs, storages) in COMBINES.items()
        for block_lr in ("", *block_lrs)
        for storage in storages
    ]


def test_every_block_lr_is_among_the_combinations() -> None:
    assert {c.get("block_lr", "").partition("(")[0] for c in combinations()} == {"", *BLOCK_LRS}


@pytest.mark.parametrize("name", ["adam-mini", "adapm", "muon", "sgd-sai"])
def test_three_kills_of_every_other_kind_of_state(data, reference, tmp_path, name) -> None:
    optimizer = {"name": name, "block_lr": "layer_decay", "storage": "bf16", "stochastic_rounding": True}
    assert killed_often(settings(data, optimizer), tmp_path / "run", 3, seed=5) == 3
    assert_same_run(tmp_path / "run", reference(optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", combinations(), ids=lambda c: "-".join(map(str, c.values())))
def test_three_kills_of_every_combination(data, reference, tmp_path, optimizer) -> None:
    assert killed_often(settings(data, optimizer), tmp_path / "run", 3, seed=6) == 3
    assert_same_run(tmp_path / "run", reference(optimizer))


def test_the_rig_sees_a_difference(data, reference, tmp_path) -> None:
    given = settings(data, BLOCKWISE)
    given["seed"] += 1
    assert attempt(given, tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", reference(BLOCKWISE))
    assert kill_rig.STEPS == 24
