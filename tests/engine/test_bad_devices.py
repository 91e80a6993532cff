"""What is on another device, or of another type, than it may be: refused before anything changes, or it works."""

import copy

import pytest
import torch
from engine.simulated import fake_device
from reference import adamw, driver, lion, sgd
from torch import nn

import sharpwise
from sharpwise.optim import COMBINES, create_optimizer
from sharpwise.testing import TinyGPT, fill_gradients, tiny_model

LAST = "transformer.ln_f.bias"
OPTIONS = {
    "plain": {},
    "guarded": {"max_grad_norm": 1.0, "on_nonfinite": "skip"},
    "measured": {"block_lr": "llr(start=1, every=50, stop=50, soft=0, least=4)"},
}
every_optimizer = pytest.mark.parametrize("name", COMBINES)
every_option = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture
def cuda(monkeypatch):
    with fake_device(monkeypatch) as module, module.FakeCuda(triton=False) as device:
        yield device


@pytest.fixture
def objects_stay():
    """`model.to()` as it will be: parameters are the same objects afterwards, on meta too."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def made(name, model, option="plain", **more):
    options = {**OPTIONS[option], **({"momentum": 0.9} if name == "sgd" else {}), **more}
    if name == "sgd-sai":
        options.pop("block_lr", None)
    return create_optimizer(model, name, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def stepped(name, model, option="plain", steps=1, **more):
    optimizer = made(name, model, option, **more)
    for t in range(steps):
        fill_gradients(model, t)
        optimizer.step()
    return optimizer


def held(optimizer):
    """Groups, and state with its objects and numbers; nothing is allocated for it."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state = {(id(p), k): v for p, own in optimizer.state.items() for k, v in own.items()}
    return copy.deepcopy(groups), state, {key: v.clone() for key, v in state.items() if v.device.type != "meta"}


def weights(model):
    return [p.detach().clone() for p in model.parameters() if p.device.type != "meta"]


def refused(error, match, run, optimizer, model):
    """It raises, and groups, state and weights are as they were."""
    groups, objects, values = held(optimizer)
    before = weights(model)
    for _ in range(2):  # and again
        with pytest.raises(error, match=match):
            run()
        now = held(optimizer)
        assert now[0] == groups
        assert now[1].keys() == objects.keys() and all(now[1][key] is value for key, value in objects.items())
        assert all(torch.equal(now[2][key], value) for key, value in values.items())
        assert all(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))


def on_meta(name, option="plain"):
    with torch.device("meta"):
        model = nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)})
    blocks = {"up.*": {"role": "up", "layer": 0}, "down.*": {"role": "down", "layer": 0}}
    return model, made(name, model, option, blocks=blocks)


# Parameters on meta


@every_optimizer
@every_option
def test_parameters_on_meta_take_no_step(name, option):
    model, optimizer = on_meta(name, option)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.init_state()
    refused(ValueError, r"up\.weight is on the meta device.*to_empty", optimizer.step, optimizer, model)
    assert all(own["step"] == 0 for own in optimizer.state.values())


@every_optimizer
@every_option
def test_parameters_on_meta_have_state_and_tables(name, option):
    model, optimizer = on_meta(name, option)
    saved = optimizer.state_dict()
    assert len(saved["state"]) == len(list(model.parameters()))
    optimizer.init_state()
    optimizer.load_state_dict(saved)
    assert len(optimizer.lr_multipliers()) == len(optimizer.explain())
    assert optimizer.state_bytes() > 0


def test_one_parameter_on_meta():
    """Those before it would have moved."""
    model = tiny_model()
    model.transformer["ln_f"].to("meta")
    optimizer = made("adamw", model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    refused(ValueError, r"ln_f\.weight is on the meta device", optimizer.step, held_first(optimizer), model)


def held_first(optimizer):
    optimizer.init_state()
    return optimizer


# Models that are moved


@every_optimizer
@every_option
def test_a_model_moved_after_the_first_step(name, option, objects_stay):
    model = tiny_model()
    optimizer = stepped(name, model, option, steps=2)
    state = [t for own in optimizer.state.values() for t in own.values()]
    p = model.get_parameter(LAST)
    model.to("meta")
    assert model.get_parameter(LAST) is p and p.device.type == "meta"
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    says = r"is on cpu, the parameter on meta.*moved after the first step.*take optimizer\.state_dict\(\) before"
    refused(ValueError, says, optimizer.step, optimizer, model)
    assert all(
        a is b for a, b in zip(state, [t for own in optimizer.state.values() for t in own.values()], strict=True)
    )


def test_what_it_says_to_do_works():
    model, whole = tiny_model(), tiny_model()
    optimizer, steady = stepped("adamw", model, steps=3), stepped("adamw", whole, steps=6)
    saved = optimizer.state_dict()
    moved = copy.deepcopy(model)
    again = made("adamw", moved)
    again.load_state_dict(saved)
    for t in range(3, 6):
        fill_gradients(moved, t)
        again.step()
    assert all(torch.equal(p, q) for p, q in zip(moved.parameters(), whole.parameters(), strict=True))
    assert steady.state_dict()["state"][0]["step"] == 6


def test_moved_and_moved_back(objects_stay):
    """Nothing is lost: state was left where it is."""
    model, other = tiny_model(), tiny_model()
    optimizer, reference = stepped("adamw", model, steps=2), stepped("adamw", other, steps=2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.to("meta")
    with pytest.raises(ValueError, match="moved after the first step"):
        optimizer.state_dict()
    model.to_empty(device="cpu")
    model.load_state_dict(before, strict=False)
    for own, opt in ((model, optimizer), (other, reference)):
        fill_gradients(own, 2)
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@every_optimizer
@every_option
@pytest.mark.parametrize("allocated", [False, True], ids=["", "state allocated"])
def test_moved_before_the_first_step(name, option, allocated, objects_stay):
    """State that is allocated, and empty, is allocated anew."""
    model, other = tiny_model(), tiny_model()
    optimizer, reference = made(name, model, option), made(name, other, option)
    if allocated:
        optimizer.init_state()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.to("meta")
    optimizer.state_dict()
    model.to_empty(device="cpu")
    model.load_state_dict(before, strict=False)
    for t in range(3):
        for own, opt in ((model, optimizer), (other, reference)):
            fill_gradients(own, t)
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_whose_parameters_were_exchanged_by_the_move(steps):
    """As `to("meta")` and `to_empty` do it today: the optimizer holds tensors that get no gradient any more."""
    model = tiny_model()
    optimizer = stepped("adamw", model, steps=steps)
    optimizer.zero_grad()
    model.to("meta")
    says = r"the model was moved after this optimizer was built: transformer\.wte\.weight is on meta there"
    with pytest.raises(RuntimeError, match=says):
        optimizer.step()


@every_optimizer
@every_option
@pytest.mark.parametrize("compile", [False, None], ids=["reference", "default"])
def test_parameters_that_are_given_other_data(name, option, compile):
    """As by averages of weights, and by offloading: they are the same objects, and what they hold now is moved."""
    build = tiny_model if compile is False else large
    model, other = build(), build()
    optimizer = stepped(name, model, option, steps=2, compile=compile)
    reference = stepped(name, other, option, steps=2, compile=compile)
    left = [p.data for p in model.parameters()]
    before = [t.clone() for t in left]
    for p in model.parameters():
        p.data = p.data.clone()
    for t in range(2, 4):
        for own, opt in ((model, optimizer), (other, reference)):
            fill_gradients(own, t)
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(left, before, strict=True))


def large():
    """Matrices that compiled kernels take."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyGPT(width=256, heads=4, vocabulary=300)


def move(p, device):
    """As `.data = ` does on a device that is there."""
    p.grad = None
    p.data = torch.empty_like(p, device=device)
    p.fake_device = torch.device(device)


@every_optimizer
@every_option
@pytest.mark.parametrize("everything", [True, False], ids=["all", "one"])
def test_moved_to_another_cuda_device(cuda, name, option, everything):
    model, blocks = cuda.model(tiny_model)
    optimizer = made(name, model, option, blocks=blocks)
    optimizer.init_state()
    for p in model.parameters():  # before the first step: as if it had been built there
        move(p, "cuda:1")
    cuda.step(model, optimizer)
    assert {t.device for own in optimizer.state.values() for t in own.values()} == {torch.device("cuda:1")}
    cuda.step(model, optimizer)
    for p in list(model.parameters())[:: 1 if everything else 5]:
        move(p, "cuda:0")
    state = [t for own in optimizer.state.values() for t in own.values()]
    with pytest.raises(ValueError, match=r"is on cuda:1, the parameter on cuda:0.*moved after the first step"):
        cuda.step(model, optimizer)
    assert all(
        a is b for a, b in zip(state, [t for own in optimizer.state.values() for t in own.values()], strict=True)
    )
    assert {float(own["step"]) for own in optimizer.state.values()} == {2.0}


# Gradients

BAD_GRADIENTS = {
    "int64": (lambda g: g.long(), TypeError, r"ln_f\.bias.*floating point, got torch\.int64"),
    "bool": (lambda g: g > 0, TypeError, r"ln_f\.bias.*floating point, got torch\.bool"),
    "complex": (lambda g: g.to(torch.complex64), TypeError, r"ln_f\.bias: complex gradients are not supported"),
}


@every_optimizer
@every_option
@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_gradients_that_no_step_can_use(name, option, bad):
    change, error, says = BAD_GRADIENTS[bad]
    model = tiny_model()
    optimizer = stepped(name, model, option)
    fill_gradients(model, 1)
    p = model.get_parameter(LAST)
    set_gradient(p, change(p.grad))
    refused(error, says, optimizer.step, optimizer, model)


def set_gradient(p, g):
    """Past torch's own checks, as far as this version lets us."""
    if hasattr(p, "grad_dtype"):
        p.grad = None
        p.grad_dtype = None
    try:
        p.grad = g
    except (RuntimeError, TypeError):
        p.grad = torch.zeros_like(p)
        p.grad.data = g


@every_optimizer
@every_option
def test_a_gradient_on_another_device(cuda, name, option):
    model, blocks = cuda.model(tiny_model)
    optimizer = made(name, model, option, blocks=blocks)
    cuda.step(model, optimizer)
    g = model.get_parameter(LAST).grad
    g.data = torch.empty_like(g, device="cuda:1")
    g.fake_device = torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"ln_f\.bias.*on cuda:1, the parameter.*on cuda:0"):
        optimizer.step()
    assert {float(own["step"]) for own in optimizer.state.values()} == {1.0}


RULES = {
    "adamw": (adamw, sharpwise.AdamW, {"lr": 3e-3, "betas": (0.83, 0.961), "eps": 1e-4, "weight_decay": 0.23}),
    "lion": (lion, sharpwise.Lion, {"lr": 7e-4, "betas": (0.8837, 0.9713), "weight_decay": 0.9}),
    "sgd": (sgd, sharpwise.SGD, {"lr": 0.02, "momentum": 0.83, "dampening": 0.37, "weight_decay": 0.21}),
}


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch before 2.10 refuses such gradients")
@pytest.mark.parametrize("clip", [None, 5.0], ids=["", "clipped"])
@pytest.mark.parametrize("compile", [False, None], ids=["reference", "default"])
@pytest.mark.parametrize(
    ("param", "grad"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_another_floating_type(rule, param, grad, compile, clip):
    """Against the equations in float64; the gradient counts as it is, not rounded to the type of the parameter."""
    reference, constructor, hyper = RULES[rule]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = {"large": torch.randn(300, 301), "small": torch.randn(7, 5), "bias": torch.randn(9)}
    model = nn.ParameterDict({n: t.to(param) for n, t in tensors.items()})
    named = list(model.named_parameters())
    blocks = {"large": "up", "small": "down", "bias": "norm"}
    optimizer = constructor(model, compile=compile, blocks=blocks, max_grad_norm=clip, **hyper)
    twin = driver.Twin(reference, named, [(driver.names_of(named), hyper)])
    for p in model.values():
        p.grad_dtype = None
    for t in range(4):
        made = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(grad) for n, p in named}
        for name, p in named:
            if param == torch.bfloat16:
                twin.p[name] = driver.as_array(p)
            p.grad = made[name]
            assert p.grad.dtype == grad
        optimizer.step()
        twin.step(made if clip is None else driver.clipped(made, clip), [hyper["lr"]])
        # Sums of squares of an fp32 gradient are good to seven digits, whatever the parameter is.
        driver.compare(optimizer, named, twin, f"step {t + 1}", 1e-6 if clip or param != torch.float64 else 1e-12)


# Hyperparameters


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # of fake tensors, which deepcopy asks for
@pytest.mark.parametrize("what", ["lr", "weight_decay", "betas"])
def test_hyperparameters_where_no_parameter_is(cuda, what):
    def there(device):
        tensors = tuple(torch.tensor(n).to(device) for n in (0.5, 0.9))
        return tensors if what == "betas" else tensors[0]

    model, blocks = cuda.model(tiny_model)
    says = rf"{what} is a tensor on cuda:1, and its parameters are on cuda:0; give a number"
    with pytest.raises(ValueError, match=says):
        made("adamw", model, blocks=blocks, **{what: there("cuda:1")})
    optimizer = made("adamw", model, blocks=blocks)
    cuda.step(model, optimizer)
    before = optimizer.param_groups[0][what]
    optimizer.param_groups[0][what] = there("cuda:1")
    with pytest.raises(ValueError, match=says):
        cuda.step(model, optimizer)
    assert {float(own["step"]) for own in optimizer.state.values()} == {1.0}
    optimizer.param_groups[0][what] = before
    saved = optimizer.state_dict()
    saved["param_groups"][0][what] = there("cuda:1")
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][what] == before
    for value in (there("cuda:0"), there("cpu")):  # a schedule may bring them
        optimizer.param_groups[0][what] = value
        cuda.step(model, optimizer)
        asked = cuda.step(model, optimizer)
        assert not asked.reads and not asked.blocking
    with pytest.raises(ValueError, match=r"is a tensor on cuda:0, and its parameters are on cpu"):
        made("adamw", tiny_model(), **{what: there("cuda:0")})


@pytest.mark.parametrize("what", ["lr", "weight_decay"])
def test_hyperparameters_on_meta(what):
    model = tiny_model()
    says = rf"{what} is a tensor on meta, and its parameters are on cpu"
    with pytest.raises(ValueError, match=says):
        made("adamw", model, **{what: torch.tensor(0.1, device="meta")})
    optimizer = stepped("adamw", model)
    fill_gradients(model, 1)
    optimizer.param_groups[0][what] = torch.tensor(0.1, device="meta")
    before, state = weights(model), held(optimizer)[2]
    with pytest.raises(ValueError, match=says):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))
    assert all(torch.equal(held(optimizer)[2][key], value) for key, value in state.items())
