"""Parameters on several devices: the run on one, and the host waits for none of them in a steady step.

The devices are fake (`benchmarks/fake_device.py`): they raise where an operation mixes two, and the tensors of a tiny
model are small enough to have values.
"""

import pytest
import torch
from engine.simulated import fake_device
from reference import driver
from torch import nn

from sharpwise.blocks import BlockMap
from sharpwise.optim import COMBINES, create_optimizer
from sharpwise.testing import tiny_model

PLACES = {"two": ("cuda:0", "cuda:1"), "with the CPU": ("cpu", "cuda:1", "cuda:0")}
OPTIONS = {
    "plain": {},
    "eager": {"compile": False},
    "clip": {"max_grad_norm": 1.0},
    "clip, skip": {"max_grad_norm": 1.0, "on_nonfinite": "skip"},
    "raise": {"on_nonfinite": "raise"},
    "stochastic": {"storage": "bf16", "stochastic_rounding": True},
    "blockwise": {"block_lr": "blockwise"},
    "blockwise, clip": {"block_lr": "blockwise", "max_grad_norm": 1.0},
    "sharpness, moving": {"block_lr": "sharpness(start=1,every=50,soft=50,by=module)"},
    "llr": {"block_lr": "llr(start=1,every=50,stop=50,soft=50,least=4)"},
    "gradient_snr": {"block_lr": "gradient_snr"},
}
CASES = [
    (name, option)
    for name, (block_lrs, _) in COMBINES.items()
    for option, settings in OPTIONS.items()
    if settings.get("block_lr", "blockwise").split("(")[0] in block_lrs
]
STEPS = 3


@pytest.fixture
def cuda(monkeypatch):
    with fake_device(monkeypatch) as module:
        monkeypatch.setattr(module, "SMALL_FLOAT", 1 << 22)  # all have values
        with module.FakeCuda(triton=False) as device:
            yield device


def spread(places, dtype=torch.float32):
    """A tiny model of one layer, whose parameters lie on these devices in turn, and its blocks."""
    from fake_device import _disable_current_modes, _faked

    with _disable_current_modes():
        model = tiny_model(dtype)
        del model.transformer["h"][1]
        blocks = BlockMap.of(model)
    moved = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in moved:
                device = places[len(moved) % len(places)]
                value = p.detach().clone()
                moved[id(p)] = nn.Parameter(value if device == "cpu" else _faked(value, device))
            module._parameters[name] = moved[id(p)]
    return model, blocks


def value(tensor):
    """The numbers of a tensor, wherever it is."""
    return tensor.detach() if tensor.device.type == "cpu" else tensor.twin.detach()


def made(name, option, model, blocks, **more):
    own = {"sgd": {"momentum": 0.9}, "muon": {"precision": "fp32"}}  # on a CPU products are in fp32 anyway
    options = {**OPTIONS[option], **own.get(name, {}), **more}
    return create_optimizer(model, name, **{"lr": 1e-2, "weight_decay": 0.1, "blocks": blocks, **options})


def step(cuda, model, optimizer, bad=None):
    """One step on gradients that differ by row, and what it asks for."""
    for i, p in enumerate(model.parameters(), start=1):
        g = torch.arange(p.numel(), dtype=torch.float32).remainder(2 * i + 3).sub(i).div(i).view(p.shape).to(p.dtype)
        if i == bad:
            g.view(-1)[0] = float("inf")
        p.grad = g.to(p.device)
    cuda.counts = asked = type(cuda.counts)()
    optimizer.step()
    cuda.counts = type(cuda.counts)()
    return asked


def assert_near(model, optimizer, other, reference, tolerance=1e-6):
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert driver.error(value(p), driver.as_array(q)) <= tolerance, name
        mine, theirs = optimizer.state[p], reference.state[q]
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert mine[key].device == p.device
            assert driver.error(value(mine[key]), driver.as_array(theirs[key])) <= tolerance, (name, key)


def reads_allowed(places, option, name=""):
    """Where some are on the CPU, it has to know the sum over all; else only what is raised is read."""
    guarded = OPTIONS[option].keys() & {"max_grad_norm", "on_nonfinite"}
    spans = name == "adasgd" and "cpu" in places  # its one block does
    return spans + (1 if guarded and ("cpu" in places or option == "raise") else 0)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("name", "option"), CASES)
def test_several_devices_do_what_one_does(cuda, name, option, where):
    places = PLACES[where]
    (model, blocks), (other, _) = spread(places), spread(["cpu"])
    optimizer, reference = made(name, option, model, blocks), made(name, option, other, blocks)
    begin = 2 if option.startswith(("sharpness", "llr")) else 1  # measured in the second step: read there
    for t in range(STEPS):
        asked = step(cuda, model, optimizer)
        step(cuda, other, reference)
        if t >= begin:
            assert asked.reads.total() <= reads_allowed(places, option, name), asked.reads
            assert not asked.blocking, asked.blocking
            assert not asked.downloads
    # Of gradients as regular as these small singular values are made large, and the last bits of a kernel with them.
    tolerance = 1e-2 if "storage" in OPTIONS[option] else 1e-5 if name == "muon" else 1e-6
    assert_near(model, optimizer, other, reference, tolerance)
    if optimizer.grad_norm is not None:
        assert driver.error(value(optimizer.grad_norm), driver.as_array(reference.grad_norm)) <= 1e-6
    for table in (optimizer.lr_multipliers(), reference.lr_multipliers()):
        assert len(table) == len(optimizer.explain())
    for mine, theirs in zip(optimizer.lr_multipliers(), reference.lr_multipliers(), strict=True):
        assert mine["multiplier"] == pytest.approx(theirs["multiplier"], rel=1e-6)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("clip", [None, 1.0], ids=["", "clip"])
@pytest.mark.parametrize("name", COMBINES)
def test_what_is_not_finite_on_one_moves_none(cuda, name, clip, where):
    places = PLACES[where]
    model, blocks = spread(places)
    optimizer = made(name, "plain", model, blocks, on_nonfinite="skip", max_grad_norm=clip)
    step(cuda, model, optimizer)
    for bad in range(1, 1 + len(places)):  # on each of the devices once
        before = [value(p).clone() for p in model.parameters()]
        state = {(p, k): value(v).clone() for p, own in optimizer.state.items() for k, v in own.items()}
        asked = step(cuda, model, optimizer, bad)
        assert asked.reads.total() <= ("cpu" in places)
        assert all(torch.equal(value(p), b) for p, b in zip(model.parameters(), before, strict=True))
        assert all(torch.equal(value(optimizer.state[p][k]), b) for (p, k), b in state.items())
    assert optimizer.skipped_steps == len(places)
    raising = made(name, "raise", *spread(places))
    with pytest.raises(FloatingPointError):
        step(cuda, spread_of(raising), raising, bad=2)


def spread_of(optimizer):
    """The parameters of an optimizer as a model."""
    return nn.ParameterList([p for group in optimizer.param_groups for p in group["params"]])


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("option", ["plain", "clip, skip"])
@pytest.mark.parametrize("name", COMBINES)
def test_what_a_scaler_says_reaches_all(cuda, name, option, where):
    """The scale and the flag are on one device; a step that it leaves out moves nothing on any."""
    places = PLACES[where]
    (model, blocks), (other, _) = spread(places), spread(["cpu"])
    optimizer, reference = made(name, option, model, blocks), made(name, option, other, blocks)
    device = next(place for place in places if place != "cpu")
    for t in range(STEPS):
        bad = t == 1
        optimizer.grad_scale = torch.full((), 1.0).to(device)
        optimizer.found_inf = torch.full((), float(bad)).to(device)
        asked = step(cuda, model, optimizer)
        if not bad:
            step(cuda, other, reference)
        if t:
            assert asked.reads.total() <= (3 + (name == "adasgd") if "cpu" in places else 0), asked.reads
            assert not asked.blocking
    assert_near(model, optimizer, other, reference)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    ("name", "option", "what"),
    [
        *((name, option, "lr") for name in COMBINES for option in ("plain", "clip", "eager")),
        *((name, "plain", "weight_decay") for name in COMBINES),
        *((name, "plain", "betas") for name in ("adamw", "adam-mini", "lion")),
    ],
)
def test_hyperparameters_on_a_device(cuda, name, option, where, what):
    """Not read but where some of the parameters are on the CPU; as numbers and tensors on the CPU."""
    places = PLACES[where]
    device = next(place for place in places if place != "cpu")
    (model, blocks), (other, _) = spread(places), spread(["cpu"])
    number = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99)}[what]
    tensors = [torch.tensor(n, dtype=torch.float64) for n in (number if what == "betas" else (number,))]
    there = [t.to(device) for t in tensors]
    own = {what: tuple(there) if what == "betas" else there[0]}
    optimizer = made(name, option, model, blocks, **own)
    reference = made(name, option, other, blocks, **{what: tuple(tensors) if what == "betas" else tensors[0]})
    for t in range(STEPS):
        asked = step(cuda, model, optimizer)
        step(cuda, other, reference)
        if t:
            extra = reads_allowed(places, option, name)
            assert asked.reads.total() <= extra + (8 if "cpu" in places else 0), asked.reads
            assert not asked.blocking
    assert_near(model, optimizer, other, reference)
    assert len(optimizer.lr_multipliers()) == len(optimizer.explain())
    group = optimizer.state_dict()["param_groups"][0]
    assert group[what] is own[what] or group[what] == own[what]
