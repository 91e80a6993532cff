"""Sizes of updates against numpy, and multipliers, by role."""

from typing import Any

import numpy as np
import pytest
import torch

import sharpwise
from sharpwise.block_lr import BlockwiseLR, LayerDecay
from sharpwise.probes.callbacks import Probes
from sharpwise.train.diagnostics import multipliers_by_role
from sharpwise.train.models import load_model

WIDTH = 64


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return load_model("gpt2-tiny")


def step(model: torch.nn.Module, optimizer: Any) -> None:
    tokens = torch.randint(0, 256, (2, 8))
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def sizes(model: torch.nn.Module, optimizer: Any, do: Any) -> tuple[dict[str, float], dict[str, float]]:
    """By role: root mean square and relative size of what `do` changes."""
    probes = Probes(model, optimizer, optimizer.blocks, updates_every=1, noise_every=0, sharpness_every=0)
    probes.before_step(1)
    do()
    notes = probes.after_step(1)
    return notes["update_rms"], notes.get("update_relative", {})


def parts_of(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(role, part) of one parameter of GPT-2, written out by hand."""
    if "c_attn" in name:  # the last axis: queries, keys, values
        return [(role, array[..., i * WIDTH : (i + 1) * WIDTH]) for i, role in enumerate(("q", "k", "v"))]
    if "wte" in name:
        return [("tok_emb", array)]
    if "wpe" in name:
        return [("pos_emb", array)]
    if "ln_" in name:
        return [("norm", array)]
    if "attn.c_proj" in name:
        return [("o", array)]
    assert "mlp" in name
    return [("up" if "c_fc" in name else "down", array)]


def test_sizes_of_a_fused_model_against_numpy() -> None:
    model = gpt2()
    optimizer = sharpwise.AdamW(model, lr=1e-2, block_lr="blockwise")
    step(model, optimizer)  # so that the sizes differ
    before = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    rms, relative = sizes(model, optimizer, lambda: step(model, optimizer))
    moved: dict[str, list[np.ndarray]] = {}
    was: dict[str, list[np.ndarray]] = {}
    for name, p in model.named_parameters():
        for role, part in parts_of(name, p.detach().numpy().astype(np.float64) - before[name]):
            moved.setdefault(role, []).append(part.ravel())
        for role, part in parts_of(name, before[name]):
            was.setdefault(role, []).append(part.ravel())
    assert rms.keys() == relative.keys() == moved.keys()
    assert len(rms) == 9
    for role in moved:
        update, old = np.concatenate(moved[role]), np.concatenate(was[role])
        assert rms[role] == pytest.approx(np.sqrt(np.mean(update**2)), rel=1e-4), role
        assert relative[role] == pytest.approx(np.linalg.norm(update) / np.linalg.norm(old), rel=1e-4), role
    assert rms["q"] != rms["k"] != rms["v"]


def test_lion_moves_every_element_by_lr_times_its_multiplier() -> None:
    model = gpt2()
    optimizer = sharpwise.Lion(model, lr=1e-3, block_lr="blockwise")
    rms, _ = sizes(model, optimizer, lambda: step(model, optimizer))
    multipliers = multipliers_by_role(optimizer)
    for role in rms:
        if role not in ("tok_emb", "pos_emb", "k"):  # rows without a gradient; a bias of keys has none
            assert rms[role] == pytest.approx(1e-3 * multipliers[role], rel=2e-3)


def test_nothing_that_moves_or_was_nothing() -> None:
    model = torch.nn.Linear(3, 3)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = sharpwise.AdamW(model)
    rms, relative = sizes(model, optimizer, lambda: None)
    assert set(rms.values()) == {0.0}
    assert relative == {}  # of nothing


def test_in_bf16_and_with_frozen_parameters() -> None:
    model = gpt2().to(torch.bfloat16)
    model.get_parameter("transformer.wte.weight").requires_grad_(False)
    optimizer = sharpwise.AdamW(model, lr=1e-1)
    rms, _ = sizes(model, optimizer, lambda: step(model, optimizer))
    assert rms.get("tok_emb", 0.0) == 0.0
    assert all(0.05 < rms[role] < 0.15 for role in ("q", "v", "o", "up", "down"))


def test_multipliers_of_block_types_are_one_number_per_role() -> None:
    found = multipliers_by_role(sharpwise.AdamW(gpt2(), block_lr=BlockwiseLR(emb=12.0)))
    assert found == {
        "tok_emb": 12.0,
        "pos_emb": 1.0,
        "q": 8.0,
        "k": 8.0,
        "v": 4.0,
        "o": 4.0,
        "up": 6.0,
        "down": 6.0,
        "norm": 1.0,
    }


def test_multipliers_of_layers_are_lists_in_their_order() -> None:
    found = multipliers_by_role(sharpwise.AdamW(gpt2(), block_lr=LayerDecay(rate=0.5)))
    assert found.pop("norm") == [0.25, 0.5, 1.0]  # the final one last
    assert found.pop("tok_emb") == 0.125
    assert found.pop("pos_emb") == 0.125
    assert found == {role: [0.25, 0.5] for role in ("q", "k", "v", "o", "up", "down")}


def test_without_multipliers_all_are_one() -> None:
    assert set(multipliers_by_role(sharpwise.SGD(gpt2())).values()) == {1.0}
