"""Warm-up and cosine against the closed form, and through a torch scheduler."""

import math

import pytest
import torch

from sharpwise.train.schedule import warmup_cosine, warmup_cosine_factor


@pytest.mark.parametrize(("warmup", "total", "floor"), [(0, 10, 0.1), (3, 10, 0.0), (10, 10, 0.5), (1, 2, 1.0)])
def test_learning_rates_of_a_torch_scheduler(warmup: int, total: int, floor: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.2)
    scheduler = warmup_cosine(optimizer, warmup=warmup, total=total, floor=floor)
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
    factors = [warmup_cosine_factor(step, warmup=5, total=50, floor=0.1) for step in range(60)]
    assert max(factors) == factors[4] == factors[5] == 1.0
    assert factors[50:] == [0.1] * 10
    assert factors[5:51] == sorted(factors[5:51], reverse=True)


@pytest.mark.parametrize(
    "arguments",
    [{"warmup": -1, "total": 5}, {"warmup": 6, "total": 5}, {"warmup": 0, "total": 0}],
)
def test_a_warmup_outside_the_run_is_refused(arguments: dict[str, int]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="warmup"):
        warmup_cosine(optimizer, **arguments)


def test_a_floor_that_is_no_fraction_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=r"fraction.*got 1\.5"):
        warmup_cosine(optimizer, warmup=1, total=5, floor=1.5)
