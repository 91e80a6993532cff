"""The reference arm of `recipes/int8`, AdamW in flat blocks with linear codes, against numpy in float64."""

import copy
import importlib
from typing import Any

import numpy as np
import pytest
import torch

from sharpwise.compare.recipes import recipes_folder

HYPER: dict[str, Any] = {"lr": 3e-3, "betas": (0.83, 0.961), "eps": 1e-6, "weight_decay": 0.23}
SHAPES = {"two blocks and a rest": (35, 130), "small": (4095,), "exactly": (2, 2048)}


@pytest.fixture(scope="module")
def recipe() -> Any:
    """The module, imported from where a user of the recipe is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(recipes_folder().parent)
        patch.syspath_prepend("")
        return importlib.import_module("recipes.int8.flat2048")


def gradient(shape: tuple[int, ...], t: int) -> np.ndarray:
    """Rows of different sizes; the first 2,048 elements have none at first."""
    g = np.random.default_rng(t).normal(size=shape) * np.logspace(-4, 0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    if t < 3:
        g.reshape(-1)[:2048] = 0.0
    return g.astype(np.float32).astype(np.float64)


def rounded(x: np.ndarray, levels: int) -> np.ndarray:
    """Through the codes and back, element by element."""
    flat = x.reshape(-1)
    if flat.size < 4096:
        return x
    out = np.zeros_like(flat)
    for start in range(0, flat.size, 2048):
        block = flat[start : start + 2048]
        largest = np.abs(block).max()
        if largest > 0:
            out[start : start + 2048] = np.rint(levels * block / largest) * largest / levels
    return out.reshape(x.shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=[*SHAPES])
def test_steps_are_those_of_the_equations(recipe: Any, shape: tuple[int, ...]) -> None:
    (b1, b2), lr = HYPER["betas"], HYPER["lr"]
    p = np.random.default_rng(0).normal(size=shape).astype(np.float32).astype(np.float64)
    ours = torch.nn.Parameter(torch.tensor(p, dtype=torch.float32))
    optimizer = recipe.FlatLinearAdamW8bit([ours], **HYPER)
    state = {"exp_avg": np.zeros(shape), "exp_avg_sq": np.zeros(shape)}
    for t in range(1, 6):
        g = gradient(shape, t)
        ours.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        m = b1 * state["exp_avg"] + (1 - b1) * g
        v = b2 * state["exp_avg_sq"] + (1 - b2) * g**2
        p = p * (1 - lr * HYPER["weight_decay"])
        p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + HYPER["eps"])
        assert np.abs(ours.detach().numpy() - p).max() <= 2e-5 * np.abs(p).max(), t
        # From what was kept, as a number in the middle of two codes may be rounded to either.
        for name, levels, want in (("exp_avg", 127, m), ("exp_avg_sq", 255, v)):
            kept = recipe._read(optimizer.state[ours], name, ours).double().numpy()
            off = np.abs(kept - rounded(want, levels)) > 1e-6 * np.abs(want).max()
            assert off.mean() < 1e-3, (name, t)
            state[name] = kept
        p = ours.detach().double().numpy()


def test_state_is_codes_and_one_scale_per_block(recipe: Any) -> None:
    p = torch.nn.Parameter(torch.randn(35, 130))
    p.grad = torch.randn(35, 130)
    optimizer = recipe.FlatLinearAdamW8bit([p])
    optimizer.step()
    found = {name: (x.dtype, tuple(x.shape)) for name, x in optimizer.state[p].items() if name != "step"}
    assert found == {
        "exp_avg": (torch.int8, (35, 130)),
        "exp_avg_absmax": (torch.float32, (3,)),
        "exp_avg_sq": (torch.uint8, (35, 130)),
        "exp_avg_sq_absmax": (torch.float32, (3,)),
    }
    with pytest.raises(ValueError, match=r"must be fp32, got torch.bfloat16"):
        recipe.FlatLinearAdamW8bit([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])


def test_a_run_that_goes_on_is_one_that_was_not_stopped(recipe: Any) -> None:
    p = torch.nn.Parameter(torch.randn(3, 2048))
    optimizer = recipe.FlatLinearAdamW8bit([p], **HYPER)
    for t in range(1, 5):
        p.grad = torch.tensor(gradient((3, 2048), t), dtype=torch.float32)
        optimizer.step()
        if t == 2:
            again = torch.nn.Parameter(p.detach().clone())
            other = recipe.FlatLinearAdamW8bit([again], **HYPER)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif t > 2:
            again.grad = p.grad.clone()
            other.step()
    assert torch.equal(p, again)
    for name, x in optimizer.state[p].items():
        mine = other.state[again][name]
        assert mine == x if name == "step" else (mine.dtype == x.dtype and torch.equal(mine, x)), name
