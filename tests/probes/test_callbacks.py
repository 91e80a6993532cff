"""Probes in a training loop: what they note, when, and that a run goes on with the same values."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import models

import sharpwise
from sharpwise.blocks import BlockMap
from sharpwise.probes.callbacks import Probes, momentum_of
from sharpwise.probes.estimate import Estimate, Measurement
from sharpwise.probes.noise_scale import GradientSNR

SEQUENCES = 4


@pytest.fixture(scope="module")
def blocks():
    return BlockMap.of(models.build("nanogpt"))


def rig(optimizer="adamw", **arguments):
    model = models.build("nanogpt")
    return model, sharpwise.create_optimizer(model, optimizer, lr=1e-2, **arguments)


def probes_of(model, optimizer, blocks, **arguments):
    given = {"sequences": SEQUENCES, "updates_every": 3, "noise_every": 2, "sharpness_every": 0, "last": 7}
    return Probes(model, optimizer, blocks, **(given | arguments))


def train(model, optimizer, probes, start=1, last=7, micro=2):
    """What was noted, by step."""
    noted = {}
    for step in range(start, last + 1):
        draw = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, models.NANOGPT["vocab"], (SEQUENCES, 7), generator=draw)
        for part in tokens.split(micro):
            loss = torch.nn.functional.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
            (loss * len(part) / SEQUENCES).backward()
            probes.after_micro_batch(step, len(part))
        probes.before_step(step)
        optimizer.step()
        noted[step] = probes.after_step(step)
        optimizer.zero_grad()
    return noted


UPDATES = {"update_rms", "update_relative", "update_angle"}
NOISE = {"gradient_signal", "gradient_noise", "noise_scale", "gradient_snr", "critical_batch"}


def test_what_is_noted_and_when(blocks):
    model, optimizer = rig()
    noted = train(model, optimizer, probes_of(model, optimizer, blocks))
    assert [step for step, notes in noted.items() if set(notes) >= UPDATES] == [1, 2, 3, 6, 7]
    assert not any(set(noted[step]) & UPDATES for step in (4, 5))
    for step in (3, 5):
        assert not set(noted[step]) & NOISE
    for step in (1, 2, 4, 6, 7):
        assert {"gradient_signal", "gradient_noise"} <= set(noted[step]) - UPDATES <= NOISE
        assert "model" in noted[step]["gradient_noise"]
        assert {"Emb", "QK", "VO", "FFN", "Norm"} <= set(noted[step]["gradient_signal"])
    json.dumps(noted, allow_nan=False)
    assert noted[7]["gradient_noise"]["model"] > 0


def test_update_sizes_by_role_against_numpy(blocks):
    model, optimizer = rig()
    train(model, optimizer, probes_of(model, optimizer, blocks, updates_every=0, noise_every=0), last=2)
    probes = probes_of(model, optimizer, blocks, updates_every=1)
    model(torch.zeros(2, 5, dtype=torch.long)).square().mean().backward()
    before = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    probes.before_step(3)
    optimizer.step()
    notes = probes.after_step(3)
    name = "transformer.wte.weight"
    moved = dict(model.named_parameters())[name].detach().double().numpy() - before[name]
    assert notes["update_rms"]["tok_emb"] == pytest.approx(np.sqrt(np.mean(moved**2)), rel=1e-5)
    expected = np.linalg.norm(moved) / np.linalg.norm(before[name])
    assert notes["update_relative"]["tok_emb"] == pytest.approx(expected, rel=1e-5)
    up = [
        np.arccos((w * v).sum(1) / np.linalg.norm(w, axis=1) / np.linalg.norm(v, axis=1))
        for n, w in before.items()
        if n.endswith("c_fc.weight")
        for v in [dict(model.named_parameters())[n].detach().double().numpy()]
    ]
    assert notes["update_angle"]["up"] == pytest.approx(np.mean(up), rel=1e-5)
    assert "norm" not in notes["update_angle"]
    assert not probes._sizes.before_state  # the copy is gone


def test_the_momentum_of_the_optimizer(blocks):
    """One pass per step, so that the optimizer's momentum alone tells: as one of the probe's own does."""
    model, optimizer = rig()
    probes = probes_of(model, optimizer, blocks, updates_every=0, noise_every=1)
    own = GradientSNR(model, blocks, batch_size=SEQUENCES)
    noted = {}
    for step in range(1, 6):
        tokens = torch.randint(0, models.NANOGPT["vocab"], (SEQUENCES, 7))
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        own.add()
        probes.before_step(step)
        optimizer.step()
        noted[step] = probes.after_step(step)
        optimizer.zero_grad()
    assert noted[1] == {}
    for group, (signal, noise) in own.last.items():
        assert noted[5]["gradient_signal"][group.of] == pytest.approx(signal, rel=1e-3, abs=1e-5)
        assert noted[5]["gradient_noise"][group.of] == pytest.approx(SEQUENCES * noise, rel=1e-3, abs=1e-5)
    assert "noise_scale" not in noted[5]  # there were no micro-batches


@pytest.mark.parametrize("clip", [0.0, 2.0])
def test_the_signal_is_unbiased_with_and_without_clipping(clip, blocks):
    """Gradients of a known mean, most of them clipped before they reach the momentum."""
    model, optimizer = rig(**({"max_grad_norm": clip} if clip else {}))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    probes = probes_of(model, optimizer, blocks, updates_every=0, noise_every=1, last=0)
    named = dict(model.named_parameters())
    total = sum(p.numel() for p in named.values())
    mean = {n: torch.randn_like(p) for n, p in named.items()}
    exact = float(sum(g.square().sum() for g in mean.values()))
    drawn = []
    for step in range(1, 121):
        for n, p in named.items():
            p.grad = (mean[n] + 3 * torch.randn_like(p)) / total**0.5 * 3
        probes.before_step(step)
        optimizer.step()
        notes = probes.after_step(step)
        if step > 1:
            drawn.append(notes["gradient_signal"]["model"])
    expected = exact * 9 / total
    assert np.mean(drawn) == pytest.approx(expected, rel=0.05)
    if clip:
        assert probes._weight == pytest.approx(2.0 / (9 * (exact / total + 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(("name", "beta"), [("adamw", 0.9), ("adam-mini", 0.9), ("lion", 0.99)])
def test_which_average_an_optimizer_keeps(name, beta, blocks):
    model, optimizer = rig(name)
    assert momentum_of(model, optimizer) == ({}, 0.0)
    train(model, optimizer, probes_of(model, optimizer, blocks, noise_every=0), last=1)
    momentum, weight = momentum_of(model, optimizer)
    assert momentum.keys() == set(blocks.names())
    assert weight == pytest.approx(1 - beta)


def test_an_optimizer_without_momentum(blocks):
    model, optimizer = rig("sgd", momentum=0.0)
    noted = train(model, optimizer, probes_of(model, optimizer, blocks))
    assert set(noted[7]) <= UPDATES | {"gradient_signal", "gradient_noise", "noise_scale"}
    assert "gradient_signal" in noted[7]
    noted = train(model, optimizer, probes_of(model, optimizer, blocks, micro_batches=False))
    assert set(noted[7]) == UPDATES


def test_torch_optimizers_too(blocks):
    model, _ = rig()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    noted = train(model, optimizer, probes_of(model, optimizer, blocks))
    assert {"update_angle", "gradient_signal"} <= set(noted[7])


def test_sharpness_of_an_optimizer(blocks):
    from sharpwise.probes.fisher import sharpness_from_optimizer

    model, optimizer = rig()
    probes = probes_of(model, optimizer, blocks, sharpness_every=5, tokens=SEQUENCES * 6, noise_every=0)
    noted = train(model, optimizer, probes)
    assert [step for step, notes in noted.items() if "sharpness" in notes] == [1, 2, 4, 5, 7]
    found = sharpness_from_optimizer(optimizer, tokens=SEQUENCES * 6).select(by="type", quantity="sharpness")
    assert noted[7]["sharpness"] == {e.of: e.value for e in found}
    assert len(found) > 3


def test_gone_on_with(blocks):
    whole_run = train(*(lambda m, o: (m, o, probes_of(m, o, blocks)))(*rig(max_grad_norm=0.1)))
    model, optimizer = rig(max_grad_norm=0.1)
    first = probes_of(model, optimizer, blocks)
    train(model, optimizer, first, last=4)
    second = probes_of(model, optimizer, blocks)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert train(model, optimizer, second, start=5) == {step: whole_run[step] for step in (5, 6, 7)}


def test_a_skipped_step_does_not_count(blocks):
    model, optimizer = rig(max_grad_norm=1.0, on_nonfinite="skip")
    probes = probes_of(model, optimizer, blocks, noise_every=1, updates_every=1)
    train(model, optimizer, probes, last=2)
    before = json.dumps(probes.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    probes.before_step(3)
    optimizer.step()
    notes = probes.after_step(3)
    assert set(notes) == UPDATES
    assert set(notes["update_rms"].values()) == {0.0}
    assert json.dumps(probes.state_dict()) == before


def test_zero_gradients(blocks):
    model, optimizer = rig()
    probes = probes_of(model, optimizer, blocks, noise_every=1, updates_every=1)
    for step in (1, 2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        probes.before_step(step)
        optimizer.step()
        notes = probes.after_step(step)
    json.dumps(notes, allow_nan=False)
    assert set(notes["gradient_signal"].values()) == {0.0}
    assert "gradient_snr" not in notes


def test_sharpness_from_the_second_moment(blocks, monkeypatch):
    found = Measurement(
        "sharpness",
        [
            Estimate("sharpness", "type", "VO", 3.0),
            Estimate("sharpness", "type", "QK", math.inf),
            Estimate("sharpness", "model", "model", 2.0),
        ],
    )
    stub = SimpleNamespace(sharpness_from_optimizer=lambda optimizer, tokens: found)
    monkeypatch.setitem(sys.modules, "sharpwise.probes.fisher", stub)
    model, optimizer = rig()
    probes = probes_of(model, optimizer, blocks, updates_every=0, noise_every=0, sharpness_every=3, last=4)
    noted = train(model, optimizer, probes, last=4)
    assert noted == {step: {"sharpness": {"VO": 3.0}} for step in (1, 2, 3, 4)}
    probes.last = 0
    assert [step for step in range(1, 13) if probes.due(6, step)] == [1, 2, 4, 6, 12]

    def refuse(optimizer, tokens):
        raise TypeError("no second moment")

    stub.sharpness_from_optimizer = refuse
    assert probes.after_step(3) == {}
