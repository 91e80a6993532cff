"""A trace leaves the model and the random numbers as they were, and says what is wrong with what it was given."""

import gc
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn import functional as F

from blocks.hand_made import IDS, SIZE, Attention, two_layers
from sharpwise.blocks.trace import trace

# -- left as it was ----------------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Its forward changes all that a forward can change; it may raise when it has done so."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.embedding, self.attention, self.head = nn.Embedding(40, SIZE), Attention(), nn.Linear(SIZE, 40)
        self.batch_norm, self.dropout = nn.BatchNorm1d(SIZE), nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("unset", None)
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.replaced_attribute = torch.zeros(2)
        self.lengths: list[int] = []
        self.counts = {"calls": 0}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        self.hidden.fill_(7)
        self.replaced, self.unset = torch.ones(2), torch.ones(1)
        self.replaced_attribute, self.cache = torch.ones(2), torch.randn(2)
        self.register_buffer("late", torch.ones(1))
        self.train(not self.training)
        self.dropout.p = 0.1
        x = self.embedding(ids)
        x = self.batch_norm((x + self.attention(x)).mT).mT
        if self.fails:
            raise RuntimeError("half way")
        return F.cross_entropy(self.head(self.dropout(x)).flatten(0, 1), ids.flatten())


def state(model: nn.Module) -> dict[str, Any]:
    """What is compared with ==: identities of tensors and modules, flags, settings."""
    plain = (bool, int, float, str, type(None))
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {
            name: {key: value if isinstance(value, plain) else id(value) for key, value in vars(module).items()}
            for name, module in model.named_modules()
        },
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "saved": list(model.state_dict()),
        "parameters": [(name, id(p), p.dtype, p.requires_grad, id(p.grad)) for name, p in model.named_parameters()],
        "versions": [p._version for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
    }


def tensors(model: nn.Module) -> list[torch.Tensor]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers(), *grads)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails, training):
    model = Restless(fails).train(training)
    model.attention.eval()  # not what its parent is
    model.head.weight.requires_grad_(False)
    model.embedding.weight.grad = torch.rand(40, SIZE)
    before, values, rng = state(model), tensors(model), torch.get_rng_state()
    if fails:
        with pytest.raises(ValueError, match="half way"):
            trace(model)
    else:
        trace(model)
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(tensors(model), values, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.unset is None
    assert not model.replaced.any() and not model.replaced_attribute.any()


class Counting(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []
        self.counts = {"calls": 0}

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        self.lengths.append(x.shape[1])
        self.counts["calls"] += 1
        return super().forward(x, other)


def test_lists_and_dicts_of_the_model_are_left_as_they_were():
    model = Counting()
    lengths = model.lengths
    trace(model, torch.rand(2, 5, SIZE))
    assert model.lengths is lengths == []
    assert model.counts == {"calls": 0}


class DrawsElsewhere(Attention):
    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, other) * random.random() * np.random.rand()


def test_hooks_that_a_first_forward_installs_are_gone():
    """As transformers' do, which note in an attribute that they are there: they would be installed once more."""

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(4, 4), []

        def forward(self, x):
            if not hasattr(self, "installed"):
                self.layer.register_forward_hook(lambda module, args, out: self.seen.append(out))
                self.installed = True
            return self.layer(x)

    model = Watched()
    trace(model, torch.ones(2, 4))
    assert not hasattr(model, "installed") and not model.layer._forward_hooks
    model(torch.ones(2, 4))
    assert len(model.seen) == 1


def test_random_numbers_of_python_and_numpy_are_left_as_they_were():
    plain, of_numpy = random.getstate(), np.random.get_state()[1].tolist()
    trace(DrawsElsewhere(), torch.rand(2, 5, SIZE))
    assert random.getstate() == plain
    assert np.random.get_state()[1].tolist() == of_numpy


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        trace(two_layers())
        with pytest.raises(TypeError, match="example is a str"):
            trace(two_layers(), "no example")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_the_example_is_left_as_it_was():
    x = torch.rand(2, 5, SIZE)
    before = x.clone()
    trace(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(SIZE, 5)), x)
    assert torch.equal(x, before) and not x.requires_grad and x.grad is None


def test_gradients_stay_none_when_the_forward_goes_backward():
    class Backward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = two_layers()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out = self.inner(ids)
            out.sum().backward(retain_graph=True)
            return out

    model = Backward()
    trace(model, IDS)
    assert all(p.grad is None for p in model.parameters())


def test_no_weight_is_read():
    model = two_layers()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    assert trace(model).segments == trace(two_layers()).segments


# -- what cannot be traced ---------------------------------------------------------------------------------------------


class Needs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, 5)

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.linear(features) * mask


class Refuses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] != 3:
            raise RuntimeError("give me three")
        return self.embedding(ids)


class Spread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(SIZE, 5), nn.Linear(5, 5, device="meta")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(features)).flip(9)


META = torch.zeros(1, 3, dtype=torch.long, device="meta")

BAD = {
    "an argument that cannot be guessed": (
        Needs,
        None,
        ValueError,
        r"(?s)'features'.*it takes example=\(features, mask\)",
    ),
    "a model on two devices": (
        Spread,
        torch.ones(1, SIZE),
        ValueError,
        r"Spread raises.*on several devices, cpu, meta",
    ),
    "a forward that raises": (Refuses, None, ValueError, r"(?s)Refuses raises.*give me three.*example="),
    "a forward that raises with the example": (Refuses, IDS, ValueError, r"the example: RuntimeError: give me three"),
    "an unknown keyword": (Refuses, {"tokens": IDS}, ValueError, r"Refuses raises with the example.*'tokens'"),
    "an example on another device": (Refuses, META, ValueError, r"example lies on meta, the model on cpu; move it"),
    "no module": (lambda: [1], None, TypeError, r"got list, expected a torch\.nn\.Module"),
    "no example": (Refuses, 3, TypeError, r"example is a int, expected a tensor, a tuple or a mapping"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    build, example, error, message = BAD[case]
    with pytest.raises(error, match=message):
        trace(build(), example)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forward_that_branches_on_values_is_told(device, caplog):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (nn.Linear(SIZE, SIZE, device=device) for _ in range(2))
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.one(x) * self.scale.item()
            return self.other(y) if y.sum() > 0 else y

    trace(Branches(), torch.ones(2, SIZE))
    assert "the forward of Branches reads values that it computes" in caplog.text
    caplog.clear()
    trace(two_layers(), IDS)
    assert caplog.text == ""


def test_the_error_of_the_forward_is_its_cause():
    with pytest.raises(ValueError) as caught:
        trace(Refuses())
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert trace(Refuses(), torch.tensor([[1, 5, 2]])).segments["embedding.weight"][0].role == "tok_emb"


def test_nothing_attended_and_nothing_to_trace():
    assert trace(nn.Linear(SIZE, 5), torch.rand(2, SIZE)).attentions == 0
    empty = trace(nn.ReLU(), torch.rand(2, SIZE))
    assert (empty.segments, empty.unused, empty.attentions) == ({}, (), 0)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_parameters_are_refused(mesh):
    model = two_layers()
    model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh))
    with pytest.raises(ValueError, match=r"head\.weight is sharded; build the map before sharding"):
        trace(model)


def test_under_inference_mode():
    expected = trace(two_layers()).segments
    with torch.inference_mode():
        assert trace(two_layers(), IDS).segments == expected


def test_a_parameter_without_elements():
    with warnings.catch_warnings(action="ignore"):  # torch warns of such layers
        model = nn.Sequential(nn.Linear(SIZE, 0), nn.Linear(0, SIZE))
    traced = trace(model, torch.rand(2, SIZE))
    assert list(traced.segments) == ["0.weight", "0.bias", "1.weight", "1.bias"]
