"""AdaPM against its equations in float64, every step, every state."""

import numpy as np
import pytest
import torch

import sharpwise
from reference import adapm, cuts, driver, models

CASES = {
    "plain": {},
    "blocks": {"second_moment": "block"},
    "no clip": {"clip": None},
    "tight clip, blocks": {"clip": 0.3, "second_moment": "block"},
    "tight clip": {"clip": 0.3},
    "biased": {"debias": 1.0, "rank": 2},
    "factors alone, blocks": {"debias": 0.0, "rank": 1, "second_moment": "block"},
    "other momentum": {"momentum": {"q": "full", "v": "low_rank", "o": "full", "up": "none", "tok_emb": "low_rank"}},
    "fast, cautious": {"betas": (0.6, 0.8), "cautious_decay": True},
}
LR, RANK = 2.3e-3, 3


def _twin(name, named, options, weight_decay):
    pieces = driver.pieces_of(name, named)
    rank, momentum = options.get("rank", RANK), options.get("momentum", {})
    by_block = options.get("second_moment") == "block"
    parts = {}
    for own, p in named:
        turned = name == "gpt2" and ".h." in own
        parts[own] = adapm.parts_of(pieces[own], tuple(p.shape), turned, momentum, by_block, cuts.mini_blocks), rank
    hyper = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay, "lr": LR}
    hyper |= {k: v for k, v in options.items() if k in ("betas", "debias", "clip", "cautious_decay")}
    return driver.Twin(adapm, named, [(driver.names_of(named), hyper)], blocks=parts)


def _run(name, dtype, case, compile, tolerance, **more):
    model = models.build(name).to(dtype)
    named = list(model.named_parameters())
    options = {"rank": RANK, **CASES[case]}
    optimizer = sharpwise.AdaPM(model, lr=LR, weight_decay=0.21, compile=compile, **options, **more)
    twin = _twin(name, named, options, 0.21)
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(LR, t)], steps=11, tolerance=tolerance)
    for own, p in named:
        assert set(optimizer.state[p]) == set(twin.state[own]), own


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "nanogpt"])
def test_in_float64(name, case):
    _run(name, torch.float64, case, None, 1e-9)


@pytest.mark.parametrize("compile", [None, False])
@pytest.mark.parametrize("case", ["plain", "blocks", "tight clip", "tight clip, blocks"])
@pytest.mark.parametrize("name", ["gpt2", "nanogpt"])
def test_in_fp32(name, case, compile):
    """Factors have the rounding errors of fp32 products, which inverses magnify."""
    _run(name, torch.float32, case, compile, 2e-5)


@pytest.mark.parametrize("case", ["plain", "blocks"])
def test_in_bf16(case):
    """Parameters and state in bf16 are within a unit in the last place of what the equations make of them."""
    _run("gpt_neox", torch.bfloat16, case, None, 2e-5)


def test_the_sketch_is_the_hash_of_its_places():
    from sharpwise.rules.adapm import sketch

    found = sketch(5, 301, torch.device("cpu"))
    assert np.array_equal(driver.as_array(found), adapm.sketch(5, 301))
    assert abs(float(found.mean())) < 0.05 and abs(float(found.std()) - 3**-0.5) < 0.02
