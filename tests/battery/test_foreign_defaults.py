"""Whatever default type and device a program has set: the same numbers, of the same types, in the same places."""

import io
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from sharpwise import BlockMap, probes, testing
from sharpwise.optim import COMBINES, create_optimizer


@contextmanager
def as_context(dtype, device):
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


@contextmanager
def as_setting(dtype, device):
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


FOREIGN = {
    "bf16, and meta in a context": lambda: as_context(torch.bfloat16, "meta"),
    "fp64, and meta for good": lambda: as_setting(torch.float64, "meta"),
}
foreign = pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)

SETTINGS = {
    "adam-mini": {"block_lr": "blockwise"},
    "adapm": {"rank": 2},
    "adasgd": {"block_lr": "layer_decay"},
    "blockwise-adam": {"cut": "layer"},
    "adamw": {"block_lr": testing.EXAMPLES["sharpness"]},
    "lion": {"storage": "bf16", "stochastic_rounding": True},
    "muon": {"normalize_rows": True, "storage": "bf16", "stochastic_rounding": True},
    "sgd": {"block_lr": testing.EXAMPLES["llr"], "momentum": 0.9},
    "sgd-sai": {},
}


@foreign
@pytest.mark.parametrize("name", COMBINES)
def test_the_battery(name, foreign):
    with foreign():
        testing.check_rule(name, lr=1e-3, weight_decay=0.1, **SETTINGS[name])


@foreign
def test_storage(foreign):
    with foreign():
        testing.check_storage(testing.STORAGES["bf16"])


def wide_model(dtype):
    """With a matrix that threads share, its rows in ranges of their own."""
    model = testing.tiny_model(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        wide = nn.Linear(256, 384, dtype=dtype, device="cpu")
    model.get_submodule("transformer").add_module("wide", wide)
    return model


GUARD = {"max_grad_norm": 0.3, "on_nonfinite": "skip"}
PATHS = {"default": {}, "default, guarded": GUARD, "eager": {"compile": False}}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", COMBINES)
def test_every_path_gives_the_same_bits(name, path):
    """Built, stepped, saved, loaded, stepped: parameters and state."""
    options = {"blocks": {"transformer.wide.*": "up"}, **SETTINGS[name], **path}
    ends = []
    for around in (nullcontext, *FOREIGN.values()):
        tensors = []
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            with around():
                model = wide_model(dtype)
                optimizer = create_optimizer(model, name, lr=1e-2, weight_decay=0.1, **options)
                testing.run(model, optimizer, range(2))
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), "cpu", weights_only=True))
                testing.run(model, optimizer, range(2, 4))
            tensors += [t for p in model.parameters() for t in (p.detach(), *optimizer.state[p].values())]
        ends.append(tensors)
    for other in ends[1:]:
        for mine, its in zip(ends[0], other, strict=True):
            assert (mine.dtype, mine.device) == (its.dtype, its.device)
            assert torch.equal(mine, its)


@foreign
def test_steps_are_counted_beyond_256(foreign):
    """As far as bf16 counts."""
    with foreign():
        model = nn.Linear(2, 2, dtype=torch.float32, device="cpu")
        optimizer = create_optimizer(model, "adamw", lr=1e-3)
        for _ in range(260):
            testing.run(model, optimizer, [0])
        assert all(own["step"] == 260 and own["step"].dtype == torch.float32 for own in optimizer.state.values())


class Attention(nn.Module):
    """Roles that only a look at the computation tells."""

    def __init__(self):
        super().__init__()
        for name, out in {"a": 16, "b": 16, "c": 16, "d": 16}.items():
            self.add_module(name, nn.Linear(16, out, dtype=torch.float32, device="cpu"))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.a, self.b, self.c))
        mixed = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        return x + self.d(mixed.transpose(1, 2).flatten(2))


@foreign
def test_roles(foreign):
    model, x = Attention(), torch.randn(2, 5, 16)
    expected = BlockMap.of(model, example=x)
    assert {str(s.role) for s in expected.segments} >= {"q", "k", "v", "o"}
    with foreign():
        assert BlockMap.of(model, example=x).segments == expected.segments


def language_model():
    sizes = {"dtype": torch.float32, "device": "cpu"}
    model = nn.Sequential(
        nn.Embedding(7, 12, **sizes), nn.Linear(12, 12, **sizes), nn.Tanh(), nn.Linear(12, 7, **sizes)
    )
    for i, p in enumerate(model.parameters()):
        numbers = torch.randn(p.shape, generator=torch.Generator("cpu").manual_seed(i), **sizes)
        p.data = numbers / p.shape[-1] ** 0.5
    return model


def seen_by_probes():
    """What every probe finds, as rows without their times."""
    model, batch = language_model(), torch.arange(54, device="cpu").view(6, 9) ** 2 % 7
    matrix = probes.Curvature(model, [batch], select="1.*")
    yield probes.trace(matrix, samples=4)
    yield probes.frobenius(matrix, samples=4)
    yield probes.diagonal(matrix, samples=4)
    yield probes.norm_11(matrix, samples=20)
    yield probes.eigenvalues(matrix, k=2)
    yield probes.density(matrix, samples=2, steps=5)
    yield probes.sharpness(model, [batch, batch.flip(0)])
    yield probes.spectrum(model, least=4)
    optimizer = create_optimizer(model, "adamw", lr=1e-2)
    noise, ratio = probes.NoiseScale(model), probes.GradientSNR(model, batch_size=2)
    sizes = probes.UpdateSize(model)
    for _ in range(3):
        grads = [{n: i * torch.ones_like(p) for n, p in model.named_parameters()} for i in range(2)]
        noise.add(grads, samples=2)
        for n, p in model.named_parameters():
            p.grad = grads[1][n]
        ratio.add()
        sizes.before()
        optimizer.step()
    yield sizes.rrc(batch[:, :-1])
    yield sizes.after()
    yield noise.measure()
    yield ratio.measure()
    yield probes.sharpness_from_optimizer(optimizer)


@foreign
def test_probes(foreign):
    expected = [m.rows() for m in seen_by_probes()]
    with foreign():
        assert [m.rows() for m in seen_by_probes()] == expected
