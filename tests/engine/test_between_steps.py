"""What programs do to parameters, state, settings and the process between two steps, on every path."""

import types

import pytest
import torch
from torch import nn

import sharpwise
from sharpwise import testing
from sharpwise.engine import checks
from sharpwise.engine.backends import cpp

PATHS = pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
MAKE = {"adamw": sharpwise.AdamW, "adam-mini": sharpwise.AdamMini, "lion": sharpwise.Lion}
BLOCKS = {"wide": [{"role": "up", "length": 260}, {"role": "gate", "start": 260, "length": 260}], "small": "o",
          "norm": "norm"}  # fmt: skip


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("wide", (520, 256)), ("small", (6, 8)), ("norm", (9,))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def gradients(model, t, missing=()):
    generator = torch.Generator().manual_seed(t)
    for name, p in model.named_parameters():
        g = torch.randn(p.shape, generator=generator)
        p.grad = None if name in missing else g


def near(model, twin, tolerance=1e-5):
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        p, q = p.detach(), q.detach()
        assert (p - q).norm() <= tolerance * q.norm(), (name, float((p - q).norm()))


def run(name, compiled, between=None, steps=5, missing=lambda t: (), **options):
    """Model and optimizer after some steps, with something done between two of them."""
    model = Model()
    optimizer = MAKE[name](model, lr=1e-2, blocks=BLOCKS, compile=compiled, **options)
    for t in range(steps):
        if between is not None:
            between(t, model, optimizer)
        gradients(model, t, missing(t))
        optimizer.step()
    return model, optimizer


# -- settings ----------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("values", [(0.0, 5.0), (5.0, 0.0, 5.0)], ids=str)
@pytest.mark.parametrize("no_decay", [("norm",), ("up",)], ids=str)
def test_decay_from_nothing(compiled, values, no_decay):
    """What does not decay keeps on not doing so, whatever the decay was when the step was laid out."""

    def schedule(t, model, optimizer):
        optimizer.param_groups[0]["weight_decay"] = values[min(t // 2, len(values) - 1)]

    for name in MAKE:
        models = [run(name, c, schedule, no_decay=no_decay)[0] for c in (compiled, False)]
        near(*models)
        still = run(name, False, weight_decay=0.0, no_decay=no_decay)[0]
        rows = slice(0, 260)
        same = torch.equal(models[1].norm, still.norm) if no_decay == ("norm",) else None
        same = torch.equal(models[1].wide[rows], still.wide[rows]) if same is None else same
        assert same
        assert not torch.equal(models[1].small, still.small)


@PATHS
def test_types_of_gradients_change(compiled):
    """bf16 gradients at some steps, of some parameters."""
    if not hasattr(nn.Parameter(torch.ones(1)), "grad_dtype"):
        pytest.skip("this torch has gradients of their parameter's type alone")

    def narrow(model, t):
        for name, p in model.named_parameters():
            if t in (1, 2, 4) and name != "norm":
                g = p.grad.bfloat16()
                p.grad, p.grad_dtype = None, None
                p.grad = g

    for name in MAKE:
        models = []
        for c in (compiled, False):
            model = Model()
            optimizer = MAKE[name](model, lr=1e-2, blocks=BLOCKS, compile=c)
            for t in range(6):
                gradients(model, t)
                narrow(model, t)
                optimizer.step()
            models.append(model)
        near(*models)


# -- parameters --------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clip"])
def test_memory_of_parameters_is_exchanged(compiled, name, options):
    """By torch's vector_to_parameters; and swapped with an average and back, as is done to validate."""

    def exchange(t, model, optimizer):
        if t == 2:
            vector = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
            nn.utils.vector_to_parameters(vector, model.parameters())
        if t == 4:
            for p in model.parameters():
                p.data = p.data.clone()

    near(run(name, compiled, exchange, **options)[0], run(name, False, **options)[0])


# -- state -------------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("name", MAKE)
def test_state_that_lies_otherwise_in_memory(compiled, name):
    """It is moved where it lies, and is what is saved."""

    def turn(t, model, optimizer):
        if t == 2:
            for own in optimizer.state.values():
                own |= {k: v.t().contiguous().t() for k, v in own.items() if v.dim() == 2}

    (model, optimizer), (twin, steady) = run(name, compiled, turn), run(name, False)
    near(model, twin)
    for own, theirs in zip(
        optimizer.state_dict()["state"].values(), steady.state_dict()["state"].values(), strict=True
    ):
        for key, value in own.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-7)


def _inference(value):
    with torch.inference_mode():
        return torch.tensor(value)


STEPS = {
    "fp64": lambda own, t: own.update(step=torch.tensor(t, dtype=torch.float64)),
    "bf16": lambda own, t: own.update(step=torch.tensor(t, dtype=torch.bfloat16)),
    "of a matrix": lambda own, t: own.update(step=torch.full((2, 3), t)[1, 2]),
    "inference": lambda own, t: own.update(step=_inference(t)),
    "in place": lambda own, t: own["step"].fill_(t),
}


def _third_missing(t):
    return ("small",) if t == 3 else ()


@PATHS
@pytest.mark.parametrize("how", STEPS)
def test_counts_that_somebody_wrote(compiled, how):
    """A count of 300 beside others: bf16 has no 301, and would stand still."""
    for name in ("adamw", "adam-mini"):

        def write(t, model, optimizer):
            if t == 2:
                STEPS[how](optimizer.state[model.wide], 300.0)

        def plain(t, model, optimizer):
            if t == 2:
                optimizer.state[model.wide]["step"] = torch.tensor(300.0)

        runs = [run(name, c, w, missing=_third_missing) for c, w in ((compiled, write), (False, plain))]
        (model, optimizer), (twin, _) = runs
        near(model, twin)
        counts = {n: float(optimizer.state[p]["step"]) for n, p in model.named_parameters()}
        assert counts == {"wide": 303.0, "small": 4.0, "norm": 5.0}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, r"state 'step' of wide must be a floating point tensor, got int"),
        (torch.tensor(7), r"state 'step' of wide must be a floating point tensor, got torch\.int64"),
        (torch.ones(1), r"state 'step' of wide must be 0-d, got shape \(1,\)"),
        (torch.ones(3), r"state 'step' of wide must be 0-d, got shape \(3,\)"),
    ],
    ids=str,
)
def test_counts_that_are_none(value, message):
    model, optimizer = run("adamw", None, steps=2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.state[model.wide]["step"] = value
    gradients(model, 3)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_state_dict_that_is_held_shows_the_counts_of_now():
    """As torch's; also after a group has come, and a parameter was frozen, which binds all anew."""
    model = Model()
    optimizer = sharpwise.AdamW([model.wide, model.norm], model=model, blocks=BLOCKS, lr=1e-2)
    gradients(model, 0)
    optimizer.step()
    held = optimizer.state_dict()["state"]
    optimizer.add_param_group({"params": [model.small]})
    gradients(model, 1)
    optimizer.step()
    model.norm.requires_grad_(False)
    gradients(model, 2, missing=("norm",))
    optimizer.step()
    assert {i: float(own["step"]) for i, own in held.items()} == {0: 3.0, 1: 2.0}
    assert float(optimizer.state[model.small]["step"]) == 2.0


# -- the process -------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_another_number_of_threads(threads, monkeypatch):
    """A block that no other thread helps with is summed up before it moves; nothing is built for that."""
    monkeypatch.setattr(cpp, "ONE_THREAD", 1 << 10)
    blocks = BLOCKS | {"wide": {"role": "q", "heads": 4}}
    models = [Model() for _ in range(2)]
    optimizer, plain = (
        sharpwise.AdamMini(m, lr=1e-2, blocks=blocks, compile=c) for m, c in zip(models, (None, False), strict=True)
    )
    passes, built = [], []
    for t in range(4):
        torch.set_num_threads(4 if t >= 2 else 1)
        for model, own in zip(models, (optimizer, plain), strict=True):
            gradients(model, t)
            own.step()
        passes.append(next(row["backend"] for row in optimizer.explain() if row["name"] == "wide"))
        built.append(optimizer.compiled_graphs)
    assert passes == ["cpp (one pass)"] * 2 + ["cpp"] * 2
    assert built[:2] == [1, 1] and set(built[2:]) == {2}  # that of sums
    near(*models)


@PATHS
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"block_lr": "blockwise(ffn=3)"}], ids=str)
def test_steps_that_a_device_leaves_out(compiled, name, options):
    """A GradScaler's verdict that is on a device beside parameters on the CPU: nothing moves, nothing is counted."""
    taken = [True, False, True, True, False, True]
    missing = {0: ("small",), 3: ("norm",)}
    model, optimizer = Model(), None
    optimizer = MAKE[name](model, lr=1e-2, blocks=BLOCKS, compile=compiled, **options)
    twin = Model()
    steady = MAKE[name](twin, lr=1e-2, blocks=BLOCKS, compile=False, **options)
    for t, ok in enumerate(taken):
        said = types.SimpleNamespace(factor=None, ok=torch.tensor(ok), decided_by_device=True)
        optimizer._scaling = lambda *_, said=said: said
        for own in (model, twin):
            gradients(own, t, missing.get(t, ()))
        optimizer.step()
        if ok:
            steady.step()
        near(model, twin)
        counts = [[float(o.state[p]["step"]) for p in m.parameters()] for m, o in ((model, optimizer), (twin, steady))]
        assert counts[0] == counts[1], t


# -- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guards", [True, False])
def test_whether_tensors_are_as_before_is_asked_with_and_without_the_guards_of_torch(guards, monkeypatch):
    """These are quick and promised by nobody; under autocast they say no, which binds nothing anew."""
    if not guards:
        monkeypatch.setattr(checks, "TensorGuards", None)
    model = testing.tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-2)
    testing.run(model, optimizer, range(2))
    bound = optimizer._stepper
    with torch.autocast("cpu", torch.bfloat16):
        testing.run(model, optimizer, [2])
    assert optimizer._stepper is bound
    assert bool(optimizer._marks._as_before(*model.parameters())) is guards
    first = next(model.parameters())
    testing.fill_gradients(model, 3)
    first.grad = first.grad.to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    testing.run(model, optimizer, [3])
    assert optimizer._stepper is bound
    first.requires_grad_(False)  # it has state, which stays
    testing.run(model, optimizer, [4], skip=[next(iter(dict(model.named_parameters())))])
    assert optimizer._stepper is bound
