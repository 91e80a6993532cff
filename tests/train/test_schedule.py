"""Schedules against closed forms and hand-computed values, and through a torch scheduler."""

import math
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

from sharpwise.train.schedule import KINDS, Schedule


@pytest.mark.parametrize(("warmup", "total", "floor"), [(0, 10, 0.1), (3, 10, 0.0), (10, 10, 0.5), (1, 2, 1.0)])
def test_learning_rates_of_a_torch_scheduler(warmup: int, total: int, floor: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.2)
    scheduler = LambdaLR(optimizer, Schedule("cosine", total, warmup, floor).factor)
    for step in range(total + 3):
        if step < warmup:
            factor = (step + 1) / warmup
        else:
            done = min(1.0, (step - warmup) / (total - warmup)) if total > warmup else 1.0
            factor = floor + (1 - floor) * math.cos(math.pi * done / 2) ** 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * factor, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_the_peak_is_reached_and_the_floor_kept() -> None:
    factors = [Schedule("cosine", 50, 5, 0.1).factor(step) for step in range(60)]
    assert max(factors) == factors[4] == factors[5] == 1.0
    assert factors[50:] == [0.1] * 10
    assert factors[5:51] == sorted(factors[5:51], reverse=True)


@pytest.mark.parametrize(
    "arguments",
    [{"warmup": -1, "total": 5}, {"warmup": 6, "total": 5}, {"warmup": 0, "total": 0}],
)
def test_a_warmup_outside_the_run_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="warmup"):
        Schedule("cosine", **arguments)


def test_a_floor_that_is_no_fraction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fraction.*got 1\.5"):
        Schedule("cosine", total=5, warmup=1, floor=1.5)


# --- all kinds -------------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    total = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, total))
    decay = draw(st.integers(0, total - warmup))
    return Schedule(draw(st.sampled_from(KINDS)), total, warmup, draw(st.floats(0, 1)), decay)


@given(schedules())
def test_limits_and_monotone_parts(schedule: Schedule) -> None:
    factors = [schedule.factor(step) for step in range(schedule.total + 3)]
    assert all(type(factor) is float for factor in factors)
    up, down = factors[: schedule.warmup], factors[schedule.warmup :]
    assert up == [(step + 1) / schedule.warmup for step in range(schedule.warmup)]
    if schedule.warmup:
        assert up[-1] == 1.0
    if schedule.warmup < schedule.total:
        assert down[0] == 1.0
    assert down == sorted(down, reverse=True)
    assert min(down) >= (1.0 if schedule.kind == "constant" else schedule.floor)
    assert factors[schedule.total :] == [1.0 if schedule.kind == "constant" else schedule.floor] * 3


@given(schedules())
def test_no_jump_is_longer_than_the_steepest_slope(schedule: Schedule) -> None:
    fall = schedule.decay if schedule.kind == "wsd" else schedule.total - schedule.warmup
    if fall == 0:  # wsd without decay, or a run that is all warm-up: it ends at the peak, and then is over
        return
    slope = (1 - schedule.floor) / fall * (math.pi / 2 if schedule.kind == "cosine" else 1)
    factors = [schedule.factor(step) for step in range(max(0, schedule.warmup - 1), schedule.total + 2)]
    assert all(abs(b - a) <= slope * (1 + 1e-9) + 1e-15 for a, b in pairwise(factors))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("cosine", 4), [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0, 0]),
        (Schedule("cosine", 5, 2, 0.2), [0.5, 1, 1, 0.8, 0.4, 0.2, 0.2]),
        (Schedule("linear", 4, 0, 0.2), [1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (Schedule("linear", 5, 3), [1 / 3, 2 / 3, 1, 1, 0.5, 0, 0]),
        (Schedule("wsd", 6, 1, 0.0, 4), [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (Schedule("wsd", 4, 2, 0.5, 2), [0.5, 1, 1, 0.75, 0.5, 0.5]),
        (Schedule("wsd", 3), [1, 1, 1, 0, 0]),
        (Schedule("constant", 3, 2, 0.3), [0.5, 1, 1, 1, 1]),
        (Schedule("linear", 1), [1, 0]),
        (Schedule("cosine", 2, 2), [0.5, 1, 0]),
    ],
)
def test_by_hand(schedule: Schedule, expected: list[float]) -> None:
    found = [schedule.factor(step) for step in range(len(expected))]
    assert found == pytest.approx(expected, abs=1e-15)


def test_identities() -> None:
    """A kind with its knob at a limit is another."""
    steps = range(40)
    linear, wsd = Schedule("linear", 40, 10, 0.125), Schedule("wsd", 40, 10, 0.125, decay=30)
    assert [linear.factor(s) for s in steps] == pytest.approx([wsd.factor(s) for s in steps], abs=1e-15)
    constant = [Schedule("constant", 40, 10).factor(s) for s in steps]
    assert [Schedule("wsd", 40, 10).factor(s) for s in steps] == constant
    for kind in KINDS:
        assert [Schedule(kind, 40, 10, floor=1.0, decay=5).factor(s) for s in steps] == constant


def test_precision_is_that_of_float64() -> None:
    """After a million steps the fall of one step is still exact to the last digits."""
    million = 1_000_000
    schedule = Schedule("linear", million, floor=0.5)
    assert schedule.factor(million - 1) - 0.5 == pytest.approx(0.5e-6, rel=1e-9)
    cosine = Schedule("cosine", million)
    assert cosine.factor(million - 1) == pytest.approx((math.pi / million) ** 2 / 4, rel=1e-3)
    assert cosine.factor(1) == pytest.approx(1 - (math.pi / million) ** 2 / 4, abs=2e-16)


@pytest.mark.parametrize("kind", KINDS)
def test_through_a_torch_scheduler(kind: str) -> None:
    schedule = Schedule(kind, 12, 3, 0.1, 4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    for step in range(15):
        assert optimizer.param_groups[0]["lr"] == 0.2 * schedule.factor(step)
        if step == 7:
            state = scheduler.state_dict()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
            scheduler.load_state_dict(state)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosin", 5), r"no schedule is called 'cosin' \(did you mean 'cosine'\?\); there are cosine, linear, wsd, co"),
        (("xyz", 5), r"no schedule is called 'xyz'; there are cosine, linear, wsd, constant$"),
        (("cosine", 0), r"need 0 <= warmup <= total and total >= 1, got warmup=0 and total=0"),
        (("linear", 5, 6), r"need 0 <= warmup <= total and total >= 1, got warmup=6 and total=5"),
        (("constant", 5, -1), r"got warmup=-1 and total=5"),
        (("wsd", 10, 4, 0.0, 7), r"warmup \+ decay <= total, got warmup=4, decay=7 and total=10"),
        (("wsd", 10, 4, 0.0, -1), r"need decay >= 0 .*decay=-1"),
        (("cosine", 5, 0, -0.1), r"0 <= floor <= 1, got -0\.1"),
        (("cosine", 5, 0, math.nan), r"0 <= floor <= 1, got nan"),
    ],
)
def test_schedules_that_are_none(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_a_schedule_does_not_change() -> None:
    schedule = Schedule("linear", 5)
    with pytest.raises(FrozenInstanceError):
        schedule.total = 6
    assert schedule == Schedule("linear", 5, 0, 0.0, 0)
