"""Noise scale and signal-to-noise ratio: on problems whose answer is known, and against the formulas in numpy."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import models
from torch import nn

from sharpwise.blocks import BlockMap
from sharpwise.probes.noise_scale import GradientSNR, NoiseScale, two_batch, weighted_ratio


class Known:
    """Per-sample gradients G + noise of two matrices, of which |G|^2 and tr Cov are known."""

    def __init__(self, phi=0.02, seed=0):
        self.model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Linear(30, 10, bias=False))
        self.draw = torch.Generator().manual_seed(seed)
        self.mean = {n: torch.randn(p.shape, generator=self.draw) for n, p in self.model.named_parameters()}
        self.sd = {"0.weight": 1.0, "1.weight": 3.0}
        self.signal = {n: float(g.square().sum()) for n, g in self.mean.items()}
        self.noise = {n: self.sd[n] ** 2 * g.numel() for n, g in self.mean.items()}
        shrink = math.sqrt(phi * sum(self.noise.values()) / sum(self.signal.values()))
        self.mean = {n: shrink * g for n, g in self.mean.items()}
        self.signal = {n: shrink**2 * s for n, s in self.signal.items()}
        self.scale = sum(self.noise.values()) / sum(self.signal.values())

    def gradient(self, samples):
        return {
            n: g + self.sd[n] / math.sqrt(samples) * torch.randn(g.shape, generator=self.draw)
            for n, g in self.mean.items()
        }


def test_two_batches():
    """|G|^2 and S back from the two equations that they make, in numbers and in tensors."""
    signal, noise = two_batch(5 + 8 / 2, 5 + 8 / 16, 2, 16)
    assert (signal, noise) == (pytest.approx(5), pytest.approx(8))
    signal, noise = two_batch(torch.tensor([9.0, 0.0]), torch.tensor([5.5, 0.0]), 2, 16)
    assert signal.tolist() == [pytest.approx(5), 0]
    for sizes in ((4, 4), (0, 4), (4, -1)):
        with pytest.raises(ValueError, match="two different numbers of samples"):
            two_batch(1.0, 2.0, *sizes)


def test_the_noise_scale_of_a_known_problem():
    problem = Known()
    noise = NoiseScale(problem.model, by=("model", "segment"), decay=1.0, keep=200)
    for _ in range(200):
        noise.add([problem.gradient(2) for _ in range(4)], samples=2)
    found = noise.measure()
    for quantity, exact in (
        ("gradient signal", sum(problem.signal.values())),
        ("gradient noise", sum(problem.noise.values())),
        ("noise scale", problem.scale),
    ):
        estimate = found.select(quantity=quantity, by="model")[0]
        assert abs(estimate.value - exact) <= 1.5 * estimate.error
        assert estimate.error < 0.2 * exact
        assert estimate.samples == 200
    for name in problem.noise:
        assert found.value(quantity="gradient noise", of=name) == pytest.approx(problem.noise[name], rel=0.02)
    assert found.select(quantity="noise scale", by="model")[0].unit == "sequences"


def test_the_interval_holds_the_truth_as_often_as_it_says():
    hits = {"gradient signal": 0, "gradient noise": 0, "noise scale": 0}
    for seed in range(100):
        problem = Known(phi=0.1, seed=seed)
        exact = [sum(problem.signal.values()), sum(problem.noise.values()), problem.scale]
        noise = NoiseScale(problem.model, BlockMap.of(problem.model), by=("model",), decay=0.95)
        for _ in range(12):
            noise.add([problem.gradient(4) for _ in range(2)], samples=4)
        found = noise.measure()
        for (quantity, value), e in zip(zip(hits, exact, strict=True), found, strict=True):
            assert e.quantity == quantity
            hits[quantity] += abs(e.value - value) <= e.error
    assert all(0.88 <= count / 100 <= 1 for count in hits.values()), hits


def test_the_signal_to_noise_ratio_of_a_known_problem():
    """Unbiased where the ratio of |m|^2 to what it lacks is six times too large."""
    for phi, tolerance in ((0.05, 0.15), (1.0, 0.05)):
        problem = Known(phi=phi)
        snr = GradientSNR(problem.model, batch_size=7, by=("model",), decay=1.0, keep=1000)
        for step in range(400):
            for n, p in problem.model.named_parameters():
                p.grad = problem.gradient(1)[n]
            assert snr.add() == (step > 0)
        found = snr.measure()
        assert found.value(quantity="gradient SNR") == pytest.approx(phi, rel=tolerance)
        assert found.value(quantity="critical batch size") == pytest.approx(7 / phi, rel=tolerance)


def test_momentum_of_an_optimizer_and_clipping():
    """From exp_avg and the weight that clipping has left it, the same draws as from gradients that were not clipped."""
    problem = Known(phi=0.5)
    own, given = (GradientSNR(problem.model, batch_size=1, by=("segment",)) for _ in range(2))
    clipped, weight = {}, 0.0
    for step in range(5):
        for n, p in problem.model.named_parameters():
            p.grad = problem.gradient(1)[n]
        own.add()
        if step:
            assert given.add({n: 0.25 * m for n, m in clipped.items()}, 0.25 * weight)
            assert [x for pair in given.last.values() for x in pair] == pytest.approx(
                [x for pair in own.last.values() for x in pair]
            )
        for n, p in problem.model.named_parameters():
            clipped[n] = 0.9 * clipped.get(n, torch.zeros(())) + 0.1 * p.grad
        weight = 0.9 * weight + 0.1


def test_micro_batches_of_a_loop():
    """Accumulated gradients, of fused matrices too, against gradients of every part on its own."""
    model = models.build("gpt2").eval()
    blocks = BlockMap.of(model)
    tokens = torch.randint(0, models.GPT2["vocab"], (6, 5))
    counts, parts = [1, 2, 3], tokens.split([1, 2, 3])
    noise, from_parts = (NoiseScale(model, blocks, by=("segment", "model")) for _ in range(2))
    singles = []
    for part in parts:
        model.zero_grad()
        model(part, labels=part).loss.backward()
        singles.append({n: p.grad.clone() for n, p in model.named_parameters()})
    from_parts.add(singles, counts)
    model.zero_grad()
    for part in parts:
        (model(part, labels=part).loss * len(part) / 6).backward()
        noise.after_micro_batch(len(part))
    assert noise.after_step()
    assert not noise.after_step()
    expected = {}
    total = {n: sum(c * s[n].double().numpy() for c, s in zip(counts, singles, strict=True)) / 6 for n in singles[0]}
    m = 3 / sum(1 / c for c in counts)
    for s in blocks:

        def square(g, s=s):
            return float((np.take(np.asarray(g, dtype=np.float64), s.row_index().numpy(), s.dim) ** 2).sum())

        small, big = np.mean([square(g[s.name]) for g in singles]), square(total[s.name])
        expected[s.name, str(s.role)] = ((6 * big - m * small) / (6 - m), (small - big) / (1 / m - 1 / 6))
    for one in (noise, from_parts):
        pairs = [one.last[g] for g in one.groups if g.by == "segment"]
        scale = max(abs(x) for pair in expected.values() for x in pair)
        assert np.array(pairs) == pytest.approx(np.array(list(expected.values())), rel=1e-3, abs=1e-5 * scale)
        whole = next(pair for group, pair in one.last.items() if group.by == "model")
        assert whole == pytest.approx(np.sum(list(expected.values()), 0), rel=1e-3)


def test_weights_and_intervals():
    draws = np.random.default_rng(0).standard_normal(20) + 3
    mean, error = weighted_ratio(draws, [1.0] * 20, 1.0)
    assert mean == pytest.approx(draws.mean())
    assert error == pytest.approx(2.093024 * draws.std(ddof=1) / math.sqrt(20), rel=2e-4)
    weights = 0.9 ** np.arange(19, -1, -1)
    assert weighted_ratio(draws, [2.0] * 20, 0.9)[0] == pytest.approx((weights @ draws) / weights.sum() / 2)
    assert weighted_ratio([4.0], [2.0], 0.9) == (2.0, None)


def test_zero_gradients_and_what_is_not_finite():
    problem = Known()
    zero = {n: torch.zeros_like(g) for n, g in problem.mean.items()}
    noise = NoiseScale(problem.model, by=("model",))
    noise.add([zero, zero], samples=1)
    found = noise.measure()
    assert [(e.quantity, e.value) for e in found] == [("gradient signal", 0.0), ("gradient noise", 0.0)]
    assert found.warnings == ("model: no noise scale: all its gradients are zero",)
    noise.add([problem.gradient(1), {n: g * math.nan for n, g in zero.items()}], samples=1)
    assert len(noise) == 1  # it does not count

    snr = GradientSNR(problem.model, batch_size=2, by=("model",))
    values = [zero, problem.gradient(1), {n: g + math.inf for n, g in zero.items()}, zero, zero, zero]
    for gradient in values:
        for n, p in problem.model.named_parameters():
            p.grad = gradient[n]
        snr.add()
    assert len(snr) == 4
    assert all(math.isfinite(x) for pair in snr.last.values() for x in pair)
    for p in problem.model.parameters():
        p.grad = None
    assert snr.add()
    assert "no signal-to-noise ratio" in snr.measure().warnings[0]


def test_a_signal_below_its_noise_is_said_to_be():
    problem = Known(phi=1e-6)
    noise = NoiseScale(problem.model, by=("model",), decay=1.0)
    for _ in range(10):
        noise.add([problem.gradient(1) for _ in range(2)], samples=1)
    assert len(noise.measure().warnings) == 1


@given(st.lists(st.lists(st.floats(0, 1e100), min_size=2, max_size=2), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_finite_or_listed(draws):
    model = nn.Linear(2, 2, bias=False)
    noise = NoiseScale(model, BlockMap.of(model), by=("model",))
    for small, big in draws:
        noise.add_squares(
            [torch.tensor([small], dtype=torch.float64)], torch.tensor([big], dtype=torch.float64), [1, 1]
        )
    if not len(noise):
        return
    found = noise.measure()
    assert all(math.isfinite(e.value) for e in found)
    assert len(found) == 3 or found.warnings


def test_saved_and_gone_on_with():
    problem = Known()
    noise, other = (NoiseScale(problem.model, decay=0.9) for _ in range(2))
    for _ in range(3):
        noise.add([problem.gradient(1) for _ in range(2)], samples=1)
    other.load_state_dict(json.loads(json.dumps(noise.state_dict())))
    gradients = [problem.gradient(1) for _ in range(2)]
    for one in (noise, other):
        one.add(gradients, samples=1)
    assert list(noise.measure()) == list(other.measure())
    with pytest.raises(ValueError, match="other groups"):
        NoiseScale(problem.model, by=("model",)).load_state_dict(noise.state_dict())


def test_bad_input():
    problem = Known()
    noise = NoiseScale(problem.model)
    with pytest.raises(ValueError, match="nothing was added"):
        noise.measure()
    with pytest.raises(ValueError, match="two micro-batches or more"):
        noise.add([problem.gradient(1)], samples=1)
    with pytest.raises(ValueError, match="decay must be in"):
        NoiseScale(problem.model, decay=0.0)
    with pytest.raises(ValueError, match=r"batch_size must be >= 1 and beta in"):
        GradientSNR(problem.model, batch_size=0)
