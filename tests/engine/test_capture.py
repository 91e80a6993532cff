"""A step that becomes part of a CUDA graph, on the device that computes nothing: what it asks for, and refuses."""

import pytest
import torch
from engine.simulated import fake_device

import sharpwise
from sharpwise.engine.backends import triton_launch
from sharpwise.testing import tiny_model

pytestmark = pytest.mark.skipif(bool(triton_launch.absent()), reason=triton_launch.absent() or "triton is here")


@pytest.fixture
def cuda(monkeypatch):
    with fake_device(monkeypatch) as module, module.FakeCuda() as device:
        yield device


@pytest.fixture
def capture(monkeypatch):
    """Begins a capture; ends it if told so."""
    state = {"on": False}
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: state["on"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["on"])
    return lambda on=True: state.update(on=on)


def tables_of(optimizer):
    kept = [tables for view in optimizer._stepper.views for tables in view.kept.get("tables", [])]
    return kept, optimizer._backends.by_name["triton"]._captured


@pytest.mark.parametrize("name", ["adamw", "adam-mini", "lion", "sgd"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0, "on_nonfinite": "skip", "block_lr": "blockwise"},
        {"storage": "bf16", "stochastic_rounding": True},
    ],
    ids=["plain", "everything", "stochastic"],
)
def test_a_captured_step_asks_the_host_for_nothing(cuda, capture, name, options):
    model, blocks = cuda.model(tiny_model)
    lr = torch.tensor(1e-3, device="cuda")
    optimizer = sharpwise.create_optimizer(model, name, lr=lr, weight_decay=0.1, blocks=blocks, **options)
    before = [cuda.step(model, optimizer) for _ in range(2)][-1]
    capture()
    counts = cuda.step(model, optimizer)
    capture(False)
    assert counts.launches == before.launches
    assert counts.uploads.total() <= 1, counts.uploads  # where gradients lie now, from memory that was set aside
    assert not counts.reads + counts.blocking + counts.downloads
    for row in optimizer.explain():
        fixed = row["why"].removeprefix("captured: gradients stay where they are, ").split(" as in")[0].split(", ")
        assert "weight_decay" in fixed and "lr" not in fixed
    # The graph has its tables for itself, and later steps go on: what the device counts is what they count by.
    kept, captured = tables_of(optimizer)
    assert len(captured) == 1 and captured[0] not in kept
    cuda.step(model, optimizer)
    assert tables_of(optimizer)[1] == captured and len(tables_of(optimizer)[0]) == 1
    assert {float(own["step"]) for own in optimizer.state_dict()["state"].values()} == {4.0}


def test_frozen_floats_where_the_device_counts(cuda, capture):
    model, blocks = cuda.model(tiny_model)
    optimizer = sharpwise.AdamW(model, lr=1e-3, blocks=blocks, on_nonfinite="skip")
    cuda.step(model, optimizer)
    capture()
    cuda.step(model, optimizer)
    assert "are, lr, weight_decay, betas, eps as in" in optimizer.explain()[0]["why"]


TENSOR = "a tensor"
REFUSED = {
    "a float": ({"lr": 1e-3}, 1, "give lr as a tensor on the device"),
    "no step before": ({}, 0, "take one with the same gradients before the capture"),
    "raise": ({"on_nonfinite": "raise"}, 1, "reads the gradients' norm on the host"),
    "sharpness": (
        {"block_lr": "sharpness(start=1,every=50,soft=0,by=module)"},
        1,
        "'sharpness' changes multipliers on the host",
    ),
    "fp64": ({"dtype": torch.float64}, 1, "is moved by the back end"),
    "reference": ({"compile": False}, 1, "is moved by the back end 'reference'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_captured(cuda, capture, kind):
    options, steps, message = REFUSED[kind]
    options = {"lr": TENSOR, **options}
    model, blocks = cuda.model(tiny_model, options.pop("dtype", None))
    if options["lr"] == TENSOR:
        options["lr"] = torch.tensor(1e-3, device="cuda")
    optimizer = sharpwise.AdamW(model, blocks=blocks, **options)
    for _ in range(steps):
        cuda.step(model, optimizer)
    capture()
    with pytest.raises(RuntimeError, match=f"cannot be captured in a CUDA graph: .*{message}"):
        cuda.step(model, optimizer)
    capture(False)
    assert {float(own["step"]) for own in optimizer.state_dict()["state"].values()} == {float(steps)}
    assert not any("captured" in row["why"] for row in optimizer.explain())
