"""On a CUDA device: the same numbers as on the CPU, and no step that waits for the device."""

import pytest
import torch

from sharpwise import testing
from sharpwise.optim import COMBINES, create_optimizer

pytestmark = pytest.mark.gpu

OPTIONS = {
    "bare": {},
    "blockwise": {"block_lr": "blockwise"},
    "clip": {"max_grad_norm": 0.5},
    "skip": {"on_nonfinite": "skip", "max_grad_norm": 0.5},
    "cautious": {"cautious_decay": True},
    "eager": {"compile": False},
}


def make(name, model, options):
    extra = {"momentum": 0.9, "decoupled_weight_decay": "cautious_decay" in options} if name == "sgd" else {}
    return create_optimizer(model, name, lr=1e-3, weight_decay=0.1, **extra, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", COMBINES)
def test_cuda_is_cpu(name, options):
    here, there = testing.tiny_model(), testing.tiny_model().cuda()
    on_cpu, on_cuda = make(name, here, {**options, "compile": False}), make(name, there, options)
    for step in range(5):
        testing.fill_gradients(here, step)
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            q.grad = p.grad.cuda()
        on_cpu.step()
        on_cuda.step()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        assert (p - q.cpu()).norm() <= 1e-5 * p.norm()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", COMBINES)
def test_a_step_does_not_wait_for_the_device(name, options):
    model = testing.tiny_model().cuda()
    optimizer = make(name, model, options)
    grads = [torch.randn_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    for _ in range(2):  # allocation and compilation may wait
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nonfinite_gradients_are_skipped_on_the_device():
    model = testing.tiny_model().cuda()
    optimizer = make("adam-mini", model, {"on_nonfinite": "skip"})
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    next(iter(model.parameters())).grad[0, 0] = float("nan")
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.skipped_steps == 1
    assert all(float(own["step"]) == 1 for own in optimizer.state.values())
