"""accelerate with accumulation, and torch's GradScaler with a step that it skips."""

import accelerate
import torch
from first_contact.tiny import assert_same_weights, assert_trained, batches, gpt2, loss_of

import sharpwise


def test_accelerate_with_accumulation_equals_torchs() -> None:
    models = gpt2(), gpt2()
    ours = sharpwise.AdamW(models[0], lr=1e-2, compile=False)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1e-2, foreach=False)
    for plain_model, plain_optimizer in zip(models, (ours, theirs), strict=True):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer = accelerator.prepare(plain_model, plain_optimizer)
        for tokens in batches(40):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, tokens))
                optimizer.step()
                optimizer.zero_grad()
    assert {float(state["step"]) for state in ours.state.values()} == {20.0}
    assert_same_weights(*models)
    assert_trained(models[0], gpt2())


def test_grad_scaler_skips_an_infinite_step_and_equals_torchs() -> None:
    models = gpt2(), gpt2()
    ours = sharpwise.AdamW(models[0], lr=1e-2, compile=False)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1e-2, foreach=False)
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for number, tokens in enumerate(batches()):
            loss = loss_of(model, tokens) * (float("inf") if number == 7 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**9
    assert {float(state["step"]) for state in ours.state.values()} == {19.0}
    assert_same_weights(*models)
    assert_trained(models[0], gpt2())
