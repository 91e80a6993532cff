"""The controls of the library against their equations, step by step, in float64."""

import math

import numpy as np
import pytest
import torch
from engine.test_control import MATRICES, RULES, VECTORS, built, model_of, units

from sharpwise.controls import L2, Angular, Hyperball, make_control
from sharpwise.rules import Lion
from sharpwise.testing import fill_gradients

LR, DECAY, STEPS = 0.02, 0.1, 5
RULES = RULES | {"lion of one beta": Lion((0.98, 0.98), nesterov=True)}
CONTROLS = {
    "l2": L2(),
    "l2 that begins small": L2(inverse_bias_correction=True),
    "angular": Angular(),
    "angular, sqrt, begins small": Angular(angle="sqrt", inverse_bias_correction=True),
    "angular, lr": Angular(angle="lr"),
    "hyperball": Hyperball(),
}


def momentum(rule):
    """b, and the mean square of the momentum's update in the long run, as methods have them."""
    b = {"adamw": 0.9, "adam-mini": 0.9, "lion": 0.95, "lion of one beta": 0.98, "sgd": 0.9, "muon": 0.95}[rule]
    if rule == "lion":
        return b, 0.1**2 + 0.9**2 * 0.05 / 1.95
    return b, (1 - b) / (1 + b)


def expected(control, rule, p, u, t, lr, held, over):
    """One unit, by the definitions; u: the update at a rate of 1."""
    b, mean_square = momentum(rule)
    begins = 1 - b**t if getattr(control, "inverse_bias_correction", False) else 1.0
    size = begins * math.sqrt(len(p) * mean_square)
    free = p * (1 - lr * DECAY) - lr * size * u / np.linalg.norm(u)
    if control.name == "l2" or (control.name == "angular" and over == "matrix"):
        return free
    if control.name == "hyperball":
        w = p - lr * held * u / np.linalg.norm(u)
        return held * w / np.linalg.norm(w)
    theta = math.sqrt(2 * LR * DECAY * mean_square) * (math.sqrt(math.pi / 2) if rule.startswith("lion") else 1.0)
    theta = {"linear": theta * lr / LR, "sqrt": theta * math.sqrt(lr / LR), "lr": lr}[control.angle] * begins
    e = p / np.linalg.norm(p)
    f = u - (u @ e) * e
    f = f / np.linalg.norm(f)
    return held * (math.cos(theta) * e - math.sin(theta) * f)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_its_definition(name, rule, dtype):
    """Of the updates of the same rule without it, under a schedule, unit by unit."""
    control, model, plain = CONTROLS[name], model_of(dtype), model_of(torch.float64)
    optimizer = built(model, RULES[rule], lr=LR, weight_decay=DECAY, control=control)
    twin = built(plain, RULES[rule], lr=LR, weight_decay=0.0, compile=False)
    begin = {name: p.detach().double().numpy().copy().ravel() for name, p in model.named_parameters()}
    for t in range(1, STEPS + 1):
        lr = LR * t / STEPS
        fill_gradients(model, t)
        before = {}
        for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            before[key] = p.detach().double().numpy().copy().ravel()
            q.data.copy_(p)
            q.grad = p.grad.double()
        for one in (optimizer, twin):
            one.param_groups[0]["lr"] = lr
            one.step()
        for key, p in model.named_parameters():
            u = (before[key] - plain.get_parameter(key).detach().numpy().ravel()) / lr
            hidden = key in MATRICES and key != "narrow"
            if key in VECTORS:
                over = None if name == "hyperball" else "vector"
            elif name.startswith("angular") and hidden:
                over = "row"
            else:
                over = None if name == "hyperball" and not hidden else "matrix"
            want = before[key] * (1 - lr * DECAY) - lr * u
            if over == "vector":
                shape = VECTORS[key][0]
                own = np.arange(math.prod(shape)).reshape(-1, shape[-1])
            else:
                own = [] if over is None else list(units(key, over))
            moved_by = "adamw" if rule == "muon" and not hidden else rule
            for unit in own:
                held = np.linalg.norm(begin[key][unit])
                kind = "matrix" if over == "vector" else over
                want[unit] = expected(control, moved_by, before[key][unit], u[unit], t, lr, held, kind)
            off = np.linalg.norm(p.detach().double().numpy().ravel() - want)
            assert off <= (1e-6 if dtype == torch.float32 else 1e-12) * np.linalg.norm(want), (key, t, off)


def rows_model(rows=6, columns=64, scale=1.0):
    model = torch.nn.Module()
    model.register_parameter("w", torch.nn.Parameter(scale * torch.randn(rows, columns)))
    return model


def on_rows(model, rule, control, **more):
    from sharpwise.blocks import BlockMap, Role, Segment
    from sharpwise.engine import BlockOptimizer
    from sharpwise.engine.options import Options

    blocks = BlockMap((Segment("w", tuple(model.w.shape), Role.UP, dim=0, source="said"),))
    options = Options(control=control, **{k: more.pop(k) for k in ("storage", "stochastic_rounding") if k in more})
    return BlockOptimizer(model, rule, options=options, blocks=blocks, **{"lr": 0.01, "weight_decay": 0.1, **more})


def angle_between(a, b):
    a, b = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (a, b))
    return 2 * torch.asin((a - b).norm(dim=1) / 2)


@pytest.mark.parametrize("angle", [1e-3, 0.1, 1.5])
def test_rows_turn_by_the_angle(angle):
    torch.manual_seed(0)
    model = rows_model(columns=256)
    optimizer = on_rows(model, Lion((0.9, 0.99)), Angular(angle="lr"), lr=angle)
    for _ in range(4):
        before = model.w.detach().clone()
        model.w.grad = torch.randn_like(model.w)
        optimizer.step()
        assert (angle_between(before, model.w.detach()) / angle - 1).abs().max() <= 1e-4


@pytest.mark.parametrize("control", [Angular(angle="lr"), Hyperball()], ids=["angular", "hyperball"])
def test_norms_are_held(control):
    torch.manual_seed(0)
    model = rows_model()
    optimizer = on_rows(model, RULES["adamw"], control)
    dim = 1 if control.name == "angular" else None
    begin = torch.linalg.vector_norm(model.w.detach().double(), dim=dim)
    for _ in range(1000):
        model.w.grad = torch.randn_like(model.w)
        optimizer.step()
    now = torch.linalg.vector_norm(model.w.detach().double(), dim=dim)
    assert ((now / begin - 1).abs() < 1e-6).all()
    assert torch.allclose(optimizer.state[model.w]["held_norm"].double(), begin.view(-1), rtol=1e-6)


def test_norms_are_held_in_bf16_on_average():
    torch.manual_seed(0)
    model = rows_model(rows=64, columns=256)
    model.to(torch.bfloat16)
    optimizer = on_rows(model, RULES["adamw"], Angular(angle="lr"), stochastic_rounding=True)
    begin = model.w.detach().double().norm(dim=1)
    for _ in range(300):
        model.w.grad = torch.randn_like(model.w)
        optimizer.step()
    assert abs((model.w.detach().double().norm(dim=1) / begin - 1).mean()) < 1e-4


@pytest.mark.parametrize("control", [Angular(), Hyperball()], ids=["angular", "hyperball"])
def test_what_begins_at_zero_learns_and_is_held_then(control):
    """As LoRA's B does, and output projections that begin at zero."""
    torch.manual_seed(0)
    model = rows_model(scale=0.0)
    optimizer = on_rows(model, RULES["adamw"], control, lr=1e-4)
    gradient, sizes = torch.randn_like(model.w), []
    for _ in range(60):
        model.w.grad = gradient + 0.1 * torch.randn_like(gradient)
        optimizer.step()
        sizes.append(float(model.w.detach().square().mean().sqrt()))
    assert sizes[0] > 0 and sizes[-1] == pytest.approx(float(np.median(sizes[50:])), rel=1e-3)
    assert 1e-3 < sizes[-1] < 1.3e-3


def test_an_update_along_a_row_does_not_turn_it():
    model = rows_model()
    optimizer = on_rows(model, RULES["sgd"], Angular(angle="lr"))
    before = model.w.detach().clone()
    model.w.grad = before.clone()
    optimizer.step()
    assert torch.allclose(model.w, before, rtol=1e-6)


def test_l2_on_lion_is_lion_at_another_rate():
    models = [model_of(), model_of()]
    scale = math.sqrt(momentum("lion")[1])
    optimizers = [
        built(models[0], RULES["lion"], weight_decay=0.0, lr=LR, control=L2()),
        built(models[1], RULES["lion"], weight_decay=0.0, lr=LR * scale),
    ]
    for t in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            fill_gradients(model, t)
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert (p - q).norm() <= 1e-6 * q.norm()


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_the_angle_is_that_of_the_bare_rule_in_the_long_run(rule):
    """Rows under independent gradients and weight decay turn by the angle that "linear" sets."""
    torch.manual_seed(0)
    model = rows_model(rows=32, columns=512, scale=0.1)
    optimizer = on_rows(model, RULES[rule], None, lr=1e-2, weight_decay=1.0)
    angles = []
    for t in range(900):
        before = model.w.detach().clone()
        model.w.grad = torch.randn_like(model.w)
        optimizer.step()
        if t >= 600:
            angles.append(float(angle_between(before, model.w.detach()).mean()))
    turn = RULES[rule].turn * math.sqrt(2 * 1e-2 * momentum(rule)[1])
    assert np.mean(angles) == pytest.approx(turn, rel=0.05)


def test_resumed_is_uninterrupted(tmp_path):
    models = [model_of(), model_of(), model_of()]
    one, two = (built(m, RULES["adamw"], control=Angular(), max_grad_norm=1.0) for m in models[:2])
    for t in range(4):
        for model, optimizer in zip(models[:2], (one, two), strict=True):
            if model is models[0] or t < 2:
                fill_gradients(model, t)
                optimizer.step()
        if t == 1:
            torch.save([two.state_dict(), models[1].state_dict()], tmp_path / "file")
    state, weights = torch.load(tmp_path / "file", weights_only=True)
    models[2].load_state_dict(weights)
    three = built(models[2], RULES["adamw"], control=Angular(), max_grad_norm=1.0)
    three.load_state_dict(state)
    for t in (2, 3):
        fill_gradients(models[2], t)
        three.step()
    for p, q in zip(models[0].parameters(), models[2].parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_of_the_bare_rule_loads(caplog):
    """Norms are held from the next step on."""
    model, other = model_of(), model_of()
    plain, controlled = built(model, RULES["adamw"]), built(other, RULES["adamw"], control=Angular())
    fill_gradients(model, 0)
    plain.step()
    controlled.load_state_dict(plain.state_dict())
    assert "saved under control None, and goes on under angular" in caplog.text
    fill_gradients(other, 1)
    norms = other.rows.detach().norm(dim=1)
    controlled.step()
    assert torch.allclose(controlled.state[other.rows]["held_norm"], norms)
    assert torch.equal(controlled.state[other.rows]["step"], torch.tensor(2.0))
    assert "held_norm" not in controlled.state[other.norm]
    decays = {row["name"]: row["decay"] for row in controlled.explain()}
    assert decays["rows"] == "held" and decays["norm"] == 0.1


def test_spellings():
    assert make_control("angular( angle = 'sqrt' )") == Angular(angle="sqrt")
    assert make_control("l2(inverse_bias_correction=true)") == make_control("l2(inverse_bias_correction=True)")
    assert make_control({"name": "l2", "inverse_bias_correction": True}) == L2(inverse_bias_correction=True)
    for control in CONTROLS.values():
        assert make_control(str(control)) == control
    assert make_control(None) is None


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("angluar", ValueError, "did you mean 'angular'"),
        ("angular(angel=lr)", ValueError, "no argument 'angel' .*did you mean 'angle'"),
        ("hyperball(lr=1)", ValueError, "no argument 'lr'.*it has none"),
        ("angular(angle=degrees)", ValueError, "angle must be one of linear, sqrt, lr, got 'degrees'"),
        ("angular(lr)", ValueError, "by name"),
        ("angular(", ValueError, "is no control"),
        ("angular(angle=a.b)", ValueError, "is no control"),
        ("l2(inverse_bias_correction=1)", ValueError, "True or False"),
        (3, TypeError, "must be a name, a table"),
    ],
    ids=str,
)
def test_bad_spellings(spec, error, says):
    with pytest.raises(error, match=says):
        make_control(spec)
