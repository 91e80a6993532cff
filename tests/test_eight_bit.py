"""Steps with 8-bit state end near those in fp32, ours no further away than those of other libraries."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# They warn as they are imported, and where torch.compile meets their tensors.
pytestmark = pytest.mark.filterwarnings("ignore")
PEERS = ("bitsandbytes AdamW8bit", "torchao AdamW8bit compiled")


@pytest.fixture
def eight_bit(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import eight_bit

    yield eight_bit
    for name in ("eight_bit", "environment", "int8", "intervals", "muon", "shapes"):
        sys.modules.pop(name, None)


def built(eight_bit, name):
    (arm,) = (one for one in eight_bit.ARMS if one.name == name)
    if arm.missing:
        pytest.skip(arm.missing)
    return arm


def test_fp32_ends_where_torch_does(eight_bit):
    rows = eight_bit.distance(eight_bit.FP32)
    assert max(row["of_way"] for row in rows.values()) < 1e-6


def test_another_step_shows(eight_bit):
    """Of 2% in the learning rate: about that of the way, in every figure and everywhere."""
    other = eight_bit.Arm("", lambda model: eight_bit.torch_adamw(model, 1.02 * eight_bit.LR))
    for row in eight_bit.distance(other).values():
        assert row["of_way"] == pytest.approx(0.02, rel=0.01)
        assert 0.0 < row["norm"] < row["of_way"] and row["largest"] > 1e-4


def test_gradients_are_those_of_the_seed(eight_bit):
    one, again, other = (
        torch.cat([g.flatten() for found in eight_bit.gradients(eight_bit.Parts(), 2, seed) for g in found])
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_second_moment_that_is_small_is_not_rounded_to_nothing(eight_bit):
    """Rows without gradients for a while: momentum over eps would be a thousand times the step."""
    rows = eight_bit.distance(built(eight_bit, eight_bit.DYNAMIC.name))
    assert max(row["of_way"] for row in rows.values()) < 0.05
    assert rows["vector"]["of_way"] < 1e-6


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("figure", ["largest", "norm"])
def test_no_further_than_others(eight_bit, peer, figure):
    theirs = eight_bit.distance(built(eight_bit, peer))
    ours = eight_bit.distance(built(eight_bit, eight_bit.DYNAMIC.name))
    for name in ("wide", "narrow", "table"):
        assert ours[name][figure] <= 1.1 * theirs[name][figure], name


@pytest.mark.parametrize("peer", PEERS)
def test_what_others_end_at(eight_bit, peer):
    """One row to a block is 1.4% of the way from fp32 for both, which have the same codes."""
    rows = eight_bit.distance(built(eight_bit, peer))
    assert rows["wide"]["of_way"] == pytest.approx(0.014, rel=0.05)
    assert rows["narrow"]["of_way"] > 5 * rows["wide"]["of_way"]


def test_targets_are_held_against_whole_intervals(eight_bit):
    import int8

    for target, low, high, want in [
        (3.0, 3.1, 4.0, "holds"), (3.0, 2.9, 4.0, "undecided"), (3.0, 2.0, 2.9, "MISSED"),
        (-1.3, 1.0, 1.2, "holds"), (-1.3, 1.2, 1.4, "undecided"), (-1.3, 1.4, 1.5, "MISSED"),
    ]:  # fmt: skip
        assert int8.said({"ratio_95": (low, high)}, target).endswith(want)
    rounds = {"seconds": {eight_bit.DYNAMIC.name: [1.2, 2.4, 2.4, 4.8], eight_bit.FP32.name: [1.0, 2.0, 4.0, 4.0]}}
    (one,) = int8.summary(int8.SUBJECTS["gpt2"], rounds, 2)["ratios"].values()
    assert one["ratio_by_process"] == pytest.approx([1.2, 0.9]) and one["ratio"] == pytest.approx(1.05)
