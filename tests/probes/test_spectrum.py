"""PL_Alpha_Hill and its company against numpy, on Pareto samples, random and degenerate matrices, and fused ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from reference import models
from torch import nn

from sharpwise.block_lr import tail
from sharpwise.blocks import BlockMap, Segment
from sharpwise.probes.estimate import Measurement
from sharpwise.probes.spectrum import alpha_hill, alpha_of_random, gram_eigenvalues, marchenko_pastur, spectrum


def hill(eigenvalues, convention="hill"):
    """Written out with the sums of the two formulas, indices from 1 and from 0 as they have them."""
    values = np.asarray(eigenvalues, dtype=np.float64)
    n = len(values)
    k = n // 2
    if convention == "published":
        i = int(n / 2)
        count = n - i
        return 1 + count / (sum(math.log(x) for x in values[i:]) - count * math.log(values[i]))
    one_based = dict(enumerate(values, 1))
    return 1 + k / sum(math.log(one_based[n - i + 1] / one_based[n - k]) for i in range(1, k + 1))


def gaussian(rows, columns, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(weight):
    """A model of one matrix."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return nn.Sequential(layer)


def by_quantity(found: Measurement, of: str = "0.weight"):
    return {e.quantity: e.value for e in found if e.of == of}


@pytest.mark.parametrize("n", [2, 3, 50, 51, 200])
@pytest.mark.parametrize("convention", ["hill", "published"])
def test_alpha_is_the_formula(n, convention):
    values = np.sort(np.random.default_rng(n).pareto(1.5, n)) + 1e-3
    if convention == "published" and n == 2:
        return  # its sum has no term but the zero one
    assert alpha_hill(torch.from_numpy(values), convention) == pytest.approx(hill(values, convention), rel=1e-12)


@pytest.mark.parametrize("tail", [1.5, 2.0, 3.5])
def test_alpha_of_a_power_law(tail):
    """The density x^-tail has the exponent that Hill's estimator finds in the upper half of the samples."""
    draws = np.random.default_rng(0).pareto(tail - 1, (200, 500)) + 1
    found = [alpha_hill(torch.from_numpy(np.sort(x))) for x in draws]
    # Its standard error is (alpha - 1)/sqrt(k); its bias of first order in 1/k.
    assert np.mean(found) == pytest.approx(tail, abs=4 * (tail - 1) / math.sqrt(250 * 200) + (tail - 1) / 250)


@pytest.mark.parametrize(("rows", "columns", "alpha"), [(768, 768, 2.12), (384, 1024, 3.00), (1536, 384, 3.45)])
def test_alpha_of_gaussian_matrices(rows, columns, alpha):
    found = by_quantity(spectrum(linear(gaussian(rows, columns))))
    assert found["alpha"] == pytest.approx(alpha, abs=0.03)
    assert found["alpha of a random matrix"] == pytest.approx(alpha, abs=0.02)
    assert found["alpha"] == pytest.approx(found["alpha of a random matrix"], abs=3 * 2.8 * (alpha - 1) / 384)


@pytest.mark.parametrize("shape", [(64, 64), (50, 133), (64, 256)])
@pytest.mark.parametrize("convention", ["hill", "published"])
def test_what_random_matrices_are_compared_with(shape, convention):
    """The mean over many draws; nothing is drawn for the baseline itself."""
    draws = [alpha_hill(gram_eigenvalues(gaussian(*shape, seed=i)), convention) for i in range(100)]
    error = np.std(draws) / math.sqrt(len(draws))
    assert alpha_of_random(*shape, convention) == pytest.approx(np.mean(draws), abs=3 * error + 0.01)
    assert alpha_of_random(*shape, convention) == alpha_of_random(*shape[::-1], convention)
    assert np.std(draws) == pytest.approx(2.8 * (np.mean(draws) - 1) / shape[0], rel=0.3)


def test_the_random_law_has_the_right_moments():
    for rows, columns in ((300, 300), (300, 800), (800, 300)):
        y = min(rows, columns) / max(rows, columns)
        values = marchenko_pastur(rows, columns)
        assert values.mean() == pytest.approx(1, rel=2e-3)
        assert (values**2).mean() == pytest.approx(1 + y, rel=5e-3)


def test_the_published_convention_is_a_little_off():
    for n in (64, 512):
        draws = [gram_eigenvalues(gaussian(n, n, seed=i)) for i in range(5)]
        more = np.mean([alpha_hill(x, "published") - alpha_hill(x) for x in draws])
        assert more == pytest.approx(5 * 1.12 / n, rel=0.5)
        assert alpha_of_random(n, n, "published") - alpha_of_random(n, n) == pytest.approx(5 * 1.12 / n, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_norms_and_eigenvalues(dtype, shape):
    weight = gaussian(*shape, dtype=dtype)
    found = spectrum(linear(weight), eigenvalues=True)
    W = weight.double().numpy()
    values = np.linalg.svd(W, compute_uv=False) ** 2
    expected = {
        "alpha": hill(values[::-1]),
        "stable rank": values.sum() / values[0],
        "spectral norm": np.linalg.norm(W, 2),
        "frobenius norm": np.linalg.norm(W),
    }
    assert {k: v for k, v in by_quantity(found).items() if "random" not in k} == pytest.approx(expected, rel=1e-10)
    assert found.arrays["0.weight"] == pytest.approx(values[::-1].tolist(), rel=1e-9, abs=1e-12)
    assert {(e.kind, e.error, e.elements, e.layer) for e in found} == {("exact", 0.0, weight.numel(), None)}
    assert not found.warnings
    again = Measurement.from_json(found.to_json())
    assert list(again) == list(found)
    assert again.arrays == found.arrays


def test_fp32_beyond_a_size(monkeypatch):
    weight = gaussian(100, 140)
    exact = by_quantity(spectrum(linear(weight)))
    monkeypatch.setattr(tail, "EXACT", 64)
    assert by_quantity(spectrum(linear(weight))) == pytest.approx(exact, rel=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(tail, "CHUNK", 1000)
    assert by_quantity(spectrum(linear(weight))) == pytest.approx(exact, rel=1e-12)


def test_parts_of_fused_matrices_and_experts():
    model = models.gpt2()
    found = spectrum(model, least=4)
    W = model.transformer.h[1].attn.c_attn.weight.detach().double().numpy()
    d = models.GPT2["d"]
    for i, role in enumerate("qkv"):
        part = np.linalg.svd(W[:, i * d : (i + 1) * d], compute_uv=False) ** 2
        label = f"transformer.h.1.attn.c_attn.weight[{role}]"
        assert found.value(quantity="alpha", of=label) == pytest.approx(hill(part[::-1]), rel=1e-9)
        assert found.select(quantity="alpha", of=label)[0].notes == {
            "role": role,
            "type": "VO" if role == "v" else "QK",
        }
    assert not [e for e in found if "ln_" in e.of or "bias" in e.of]

    experts = nn.Module()
    experts.w = nn.Parameter(gaussian(3 * 20, 30).reshape(3, 20, 30))
    blocks = BlockMap([Segment("w", (3, 20, 30), "up", 0, dim=1, stacked=True)])
    found = spectrum(experts, blocks=blocks, least=4)
    for i in range(3):
        values = np.linalg.svd(experts.w[i].detach().double().numpy(), compute_uv=False) ** 2
        assert found.value(quantity="alpha", of=f"w[{i}]") == pytest.approx(hill(values[::-1]), rel=1e-9)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.zeros(60, 60), "zero"),
        (torch.ones(60, 70), "half of its eigenvalues"),
        (gaussian(60, 20) @ gaussian(20, 60), "half of its eigenvalues"),
        (torch.eye(64), "all alike"),
        (gaussian(49, 90), "has 49 eigenvalues, at least 50"),
        (torch.full((60, 60), math.nan), "not finite"),
        (gaussian(60, 60).index_fill(0, torch.tensor(3), math.inf), "not finite"),
    ],
)
def test_matrices_without_an_alpha_are_listed(weight, says):
    found = spectrum(linear(weight))
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("0.weight: ")
    assert says in found.warnings[0]
    assert "alpha" not in by_quantity(found)
    assert all(math.isfinite(e.value) for e in found)


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 7), st.integers(1, 7)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
@settings(max_examples=60, deadline=None)
def test_finite_or_listed(weight):
    found = spectrum(linear(torch.from_numpy(weight)), least=2)
    values = by_quantity(found)
    assert all(math.isfinite(value) for value in values.values())
    assert len(values) >= 3
    assert ("alpha" in values) != bool(found.warnings)
    if weight.any():
        assert 1 - 1e-9 <= values["stable rank"] <= min(weight.shape) + 1e-9


def test_bad_input():
    model = models.gpt2()
    with pytest.raises(ValueError, match=r"select='k_proj' matches nothing; this model has the roles tok_emb, .*up"):
        spectrum(model, select="k_proj")
    with pytest.raises(ValueError, match="matches no matrix"):
        spectrum(model, select="norm")
    with pytest.raises(ValueError, match="allowed: hill, published"):
        spectrum(model, convention="Hill")
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        spectrum({"w": torch.ones(3)}, blocks=BlockMap([]))
    with pytest.raises(ValueError, match="not of this model"):
        spectrum(nn.Linear(2, 2), blocks=BlockMap.of(model))
    with pytest.raises(ValueError, match="meta device"):
        spectrum(nn.Linear(60, 60, device="meta"))
    for bad in (torch.ones(3), torch.ones(0, 3), torch.full((3, 3), math.nan)):
        with pytest.raises(ValueError, match="matrix"):
            gram_eigenvalues(bad)
    assert alpha_hill(torch.tensor([1.0])) is None
    assert alpha_hill(torch.tensor([0.0, 0.0, 1.0])) is None
    assert alpha_hill(torch.tensor([1.0, math.inf])) is None
    assert alpha_hill(torch.ones(8)) == math.inf


def test_the_model_stays_as_it_was():
    model = models.gpt2()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spectrum(model, select=["QK", "*mlp*"], least=2)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
