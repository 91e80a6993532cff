"""The factor by gradient SNR: its equations at every step in float64, what is estimated, and where it is refused."""

import math

import numpy as np
import pytest
import torch
from engine.test_control import MATRICES, RULES, built, model_of, units

import sharpwise
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.controls import Angular, make_control
from sharpwise.controls.snr import snr_of, with_draw
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.options import Options
from sharpwise.rules import SGD, AdaPM
from sharpwise.rules.muon import Muon
from sharpwise.testing import fill_gradients, tiny_model

BATCH, LR, DECAY = 48, 0.02, 0.1
CONTROL = Angular(snr=True, batch_size=BATCH)
MOMENTA = {  # rule: (m, w) of the step before, gradient g with factor c, t -> those after it, by the definitions
    "lion": lambda m, g, t: 0.95 * m + 0.05 * g,
    "adamw": lambda m, g, t: 0.9 * m + 0.1 * g,
    "adam-mini": lambda m, g, t: 0.9 * m + 0.1 * g,
    "sgd": lambda m, g, t: g if t == 1 else 0.9 * m + g,
    "sum": lambda m, g, t: 0.95 * m + g,
    "muon": lambda m, g, t: 0.95 * m + 0.05 * g,
}
ALL = RULES | {"sum": Muon(heavy_ball=True)}
NO_MOMENTUM = AdaPM(momentum=(("up", "none"),))
HELD = [name for name in MATRICES if name != "narrow"]


def factor(signal, noise, inputs):
    """f of the running means, literally; the smallest where there are none."""
    least = 1e-6
    if signal == noise == 0:
        phi = 1 / least / BATCH
    elif signal <= 0:
        phi = 0.0
    else:
        phi = signal / max(noise, least * signal) / BATCH

    def square(phi):
        b, c = 1 / BATCH, inputs
        k = (phi + b) ** 2 + phi / c * ((1 + b) ** 2 + (BATCH - 1) * b * b)
        return (k + (BATCH - 1) * b * b / c + 2 * b * b / c) / ((1 + phi) * (phi + b))

    return math.sqrt(square(0.0) / square(phi))


def gradients(model, t, shared=0.7):
    """Gradients with a part that does not change: their SNR is well above 0."""
    fill_gradients(model, t)
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        p.grad += shared * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


@pytest.mark.parametrize("clips", [None, 3.0], ids=["", "clipped"])
@pytest.mark.parametrize("rule", ALL)
def test_state_and_factor_are_their_equations(rule, clips):
    """Every step, every matrix: signal, noise and weight, and by how much the angle of rows is smaller."""
    model, plain = model_of(torch.float64), model_of(torch.float64)
    how = {"lr": LR, "weight_decay": DECAY, "max_grad_norm": clips}
    optimizer = built(model, ALL[rule], control=CONTROL, **how)
    twin = built(plain, ALL[rule], control=Angular(), **how)
    known = {name: [np.zeros(3) for _ in units(name, "matrix")] for name in HELD}
    m = {name: np.zeros(math.prod(MATRICES[name][0])) for name in HELD}
    for t in range(1, 6):
        gradients(model, t)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.data.copy_(p)
            q.grad = p.grad.clone()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
        clip = 1.0 if clips is None else min(1.0, clips / (norm + 1e-6))
        before = {name: model.get_parameter(name).detach().clone().numpy() for name in HELD}
        optimizer.step()
        twin.step()
        for name in HELD:
            g = model.get_parameter(name).grad.numpy().ravel()
            moved = [model.get_parameter(name), plain.get_parameter(name)]
            moved = [p.detach().numpy().ravel() for p in moved]
            for i, (own, unit) in enumerate(zip(known[name], units(name, "matrix"), strict=True)):
                signal, noise, weight = own
                if weight:
                    draw = g[unit] @ m[name][unit] / weight
                    signal = 0.98 * signal + 0.02 * draw
                    noise = 0.98 * noise + 0.02 * (g[unit] @ g[unit] - draw)
                own[:] = signal, noise, MOMENTA[rule](weight, clip, t)
                found = optimizer.state[model.get_parameter(name)]["gradient_snr"][i].numpy()
                assert np.allclose(found, own, rtol=1e-11, atol=1e-13), (name, t, found, own)
                shape, dim, stacked, _ = MATRICES[name]
                inputs = shape[-1] if dim == stacked else shape[-2]
                f = factor(signal, noise, inputs)
                rows = [row for row in units(name, "row") if set(row) <= set(unit)]
                assert rows
                for row in rows:
                    turned = [_angle(before[name].ravel()[row], after[row]) for after in moved]
                    assert turned[0] == pytest.approx(f * turned[1], rel=1e-9), (name, t)
            m[name] = MOMENTA[rule](m[name], clip * g, t)
    factors = [row["snr_factor"] for row in optimizer.explain() if row["name"] in HELD]
    assert all(0 < f < 0.9 for f in factors) and len({round(f, 6) for f in factors}) > 3
    assert {row["snr_factor"] for row in optimizer.explain() if row["name"] not in HELD} == {None}


def _angle(a, b):
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return 2 * math.asin(np.linalg.norm(a - b) / 2)


@pytest.mark.parametrize("clips", [None, 20.0], ids=["", "clipped"])
@pytest.mark.parametrize("rule", ["lion", "sgd", "sum"])
def test_the_estimate_is_unbiased(rule, clips):
    """The mean over independent matrices is the true signal and noise, within four standard errors; clipped too."""
    torch.manual_seed(0)
    runs, steps = 100, 40
    mean = 0.1 * torch.randn(12, 40, dtype=torch.float64)
    model = torch.nn.Module()
    model.register_parameter("rows", torch.nn.Parameter(torch.ones(runs, 12, 40, dtype=torch.float64)))
    segment = Segment("rows", (runs, 12, 40), Role.UP, dim=1, stacked=True, source="said")
    options = Options(control=CONTROL, max_grad_norm=clips, compile=False)
    how = {"lr": 1e-3, "weight_decay": 0.1, "options": options, "blocks": BlockMap((segment,))}
    optimizer = BlockOptimizer(model, ALL[rule], **how)
    for _ in range(steps):
        model.rows.grad = mean + torch.randn_like(model.rows)
        optimizer.step()
    found = optimizer.state[model.rows]["gradient_snr"][:, :2] / (1 - 0.98 ** (steps - 1))
    error = found.std(0) / math.sqrt(runs)
    true = torch.tensor([float((mean**2).sum()), 12 * 40.0], dtype=torch.float64)
    assert ((found.mean(0) - true).abs() < 4 * error).all(), (found.mean(0), true, error)
    assert error[0] < 0.1 * true[0], "sharp enough to tell |M|^2, which is several times as large, from the signal"


def test_the_first_step_is_the_smallest_and_noise_alone_is_free():
    kept = torch.zeros(3, 3, dtype=torch.float64)
    assert snr_of(kept, 8.0).tolist() == [1e6 / 8] * 3
    assert torch.equal(with_draw(kept, torch.ones(3), torch.ones(3)), kept), "no momentum, no draw"
    kept[:, 2] = 0.5
    moved = with_draw(kept, torch.tensor([-1.0, 1.0, torch.inf]).double(), torch.tensor([4.0, 4.0, 4.0]).double())
    assert moved[:, 0].tolist() == pytest.approx([-0.04, 0.04, 0.0]) and moved[2].tolist() == [0.0, 0.0, 0.5]
    assert snr_of(moved, 8.0).tolist() == pytest.approx([0.0, 1 / 8, 1e6 / 8])


def test_resumed_is_uninterrupted(tmp_path):
    how = {"control": CONTROL, "max_grad_norm": 1.0}
    models = [model_of(), model_of(), model_of()]
    one, two = (built(m, RULES["lion"], **how) for m in models[:2])
    for t in range(4):
        for model, optimizer in zip(models[:2], (one, two), strict=True):
            if model is models[0] or t < 2:
                gradients(model, t)
                optimizer.step()
        if t == 1:
            torch.save([two.state_dict(), models[1].state_dict()], tmp_path / "file")
    state, weights = torch.load(tmp_path / "file", weights_only=True)
    models[2].load_state_dict(weights)
    three = built(models[2], RULES["lion"], **how)
    three.load_state_dict(state)
    for t in (2, 3):
        gradients(models[2], t)
        three.step()
    for p, q in zip(models[0].parameters(), models[2].parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in one.state[p].items():
            assert torch.equal(value, three.state[q][key]), key


def test_state_without_it_loads_and_is_measured_from_the_next_step_on():
    """The weight of the momentum is then that of gradients that were never clipped."""
    model, other = model_of(torch.float64), model_of(torch.float64)
    plain, measured = built(model, RULES["lion"]), built(other, RULES["lion"], control=CONTROL)
    for t in range(3):
        gradients(model, t)
        plain.step()
    measured.load_state_dict(plain.state_dict())
    m = plain.state[model.rows]["exp_avg"].clone()
    gradients(other, 3)
    measured.step()
    signal, noise, weight = measured.state[other.rows]["gradient_snr"][0].tolist()
    g = other.rows.grad
    assert signal == pytest.approx(0.02 * float((g * m).sum()) / (1 - 0.95**3), rel=1e-12)
    assert noise == pytest.approx(0.02 * float((g * g).sum()) - signal, rel=1e-12)
    assert weight == pytest.approx(1 - 0.95**4, rel=1e-12)


def test_a_loss_scale_makes_no_difference():
    """A GradScaler's, that halves on the way: powers of two, so to the bit."""
    models = [model_of(torch.float64), model_of(torch.float64)]
    plain, scaled = (built(m, RULES["lion"], control=CONTROL, max_grad_norm=3.0) for m in models)
    for t, scale in enumerate((1024.0, 1024.0, 512.0, 512.0)):
        gradients(models[0], t)
        plain.step()
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            q.grad = p.grad * scale
        scaled.grad_scale, scaled.found_inf = torch.tensor(scale), torch.tensor(0.0)
        scaled.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=0)
        if "gradient_snr" in plain.state[p]:
            assert torch.allclose(plain.state[p]["gradient_snr"], scaled.state[q]["gradient_snr"], rtol=1e-11)


def test_a_step_that_is_left_out_measures_nothing():
    model = model_of()
    optimizer = built(model, RULES["adamw"], control=CONTROL, on_nonfinite="skip")
    for t in range(2):
        gradients(model, t)
        optimizer.step()
    before = optimizer.state[model.rows]["gradient_snr"].clone()
    model.rows.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1 and torch.equal(optimizer.state[model.rows]["gradient_snr"], before)


def test_lionar_takes_it():
    """As `LionAR(snr=True)`, as text, and in a preset: the same optimizer."""
    model = tiny_model()
    optimizer = sharpwise.LionAR(model, snr=True, batch_size=BATCH)
    assert optimizer.options.control == CONTROL == make_control(f"angular(snr=True, batch_size={BATCH})")
    assert str(CONTROL) == f"angular(snr=True, batch_size={BATCH})" == optimizer.param_groups[0]["control"]
    own = sharpwise.create_optimizer(tiny_model(), "lionar", control=str(CONTROL))
    assert own.options.control == CONTROL
    for t in range(2):
        fill_gradients(model, t)
        optimizer.step()
    rows = optimizer.explain(verbose=True)
    assert all((row["snr_factor"] is None) == (row["decay"] != "held") for row in rows if row["name"])
    assert 0 < min(row["snr_factor"] for row in rows if row["snr_factor"] is not None) <= 1
    assert "snr_factor" in str(rows)
    assert "snr_factor" not in sharpwise.LionAR(tiny_model()).explain().columns


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: Angular(snr=True), ValueError, "snr=True needs batch_size, the sequences of a step"),
        (lambda: Angular(snr=1, batch_size=8), TypeError, "snr must be True or False"),
        (lambda: Angular(batch_size=8), ValueError, "batch_size=8 is for snr=True"),
        (lambda: Angular(snr=True, batch_size=0), ValueError, "whole number >= 1, got 0"),
        (lambda: Angular(snr=True, batch_size=2.5), ValueError, "whole number >= 1, got 2.5"),
        (lambda: make_control("l2(snr=True)"), ValueError, "l2 has no argument 'snr'.*angular has it"),
        (lambda: make_control("hyperball(snr=True)"), ValueError, "it has none; angular has it"),
        (lambda: sharpwise.LionAR(tiny_model(), snr=True), ValueError, "needs batch_size"),
        (lambda: built(model_of(), SGD(0.0), control=CONTROL), ValueError, "rows has none by element under 'sgd'"),
        (lambda: built(model_of(), NO_MOMENTUM, control=CONTROL), ValueError, "has none by element under 'adapm-"),
    ],
)  # fmt: skip
def test_bad_input(build, error, says):
    with pytest.raises(error, match=says):
        build()


def test_a_momentum_that_a_schedule_takes_away_is_refused_before_a_step():
    model = model_of()
    optimizer = built(model, SGD(0.9), control=CONTROL)
    gradients(model, 0)
    optimizer.step()
    before = model.rows.detach().clone()
    optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(ValueError, match="has none by element"):
        optimizer.step()
    assert torch.equal(model.rows, before)
