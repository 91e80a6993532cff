"""A plain torch loop with a torch scheduler: nothing but the constructor differs."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from first_contact.tiny import assert_same_weights, assert_trained, batches, gpt2, loss_of, plain_loop

import sharpwise


def warmup_then_cosine(optimizer: torch.optim.Optimizer) -> Any:
    schedulers = torch.optim.lr_scheduler
    warmup = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    cosine = schedulers.CosineAnnealingLR(optimizer, T_max=15, eta_min=1e-4)
    return schedulers.SequentialLR(optimizer, [warmup, cosine], milestones=[5])


def test_adamw_in_a_plain_loop_equals_torchs() -> None:
    ours, theirs = gpt2(), gpt2()
    losses = plain_loop(ours, sharpwise.AdamW(ours, lr=1e-2, compile=False), warmup_then_cosine)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False)
    assert losses == plain_loop(theirs, reference, warmup_then_cosine)
    assert_same_weights(ours, theirs)
    assert_trained(ours, gpt2())


def test_adam_mini_follows_a_scheduler_as_it_follows_an_lr_set_by_hand() -> None:
    scheduled, by_hand = gpt2(), gpt2()
    optimizer = sharpwise.AdamMini(scheduled, lr=1e-2, block_lr="blockwise")
    learning_rates: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, *_: learning_rates.append(float(opt.param_groups[0]["lr"])))
    losses = plain_loop(scheduled, optimizer, warmup_then_cosine)
    assert len(set(learning_rates)) == 20

    optimizer = sharpwise.AdamMini(by_hand, lr=1e-2, block_lr="blockwise")
    for tokens, lr, expected in zip(batches(), learning_rates, losses, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(by_hand, tokens)
        assert loss.item() == expected
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(scheduled, by_hand)
    assert_trained(scheduled, gpt2())


def test_the_line_of_torch_works_as_it_is() -> None:
    """`model.parameters()` says whose parameters they are: Adam-mini finds the blocks of the model."""
    line, model = gpt2(), gpt2()
    optimizer = sharpwise.AdamMini(line.parameters(), lr=1e-2, block_lr="blockwise")
    other = sharpwise.AdamMini(model, lr=1e-2, block_lr="blockwise")
    assert optimizer.blocks == other.blocks
    assert plain_loop(line, optimizer) == plain_loop(model, other)
    assert_same_weights(line, model)


def test_the_line_of_torch_takes_frozen_parameters_too() -> None:
    model = gpt2()
    model.transformer.wte.requires_grad_(False)
    optimizer = sharpwise.AdamMini(model.parameters())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    "parameters",
    [
        lambda model: list(model.parameters()),
        lambda model: (p for p in model.parameters()),
        lambda model: filter(lambda p: p.requires_grad, model.parameters()),
    ],
    ids=["list", "generator", "filter"],
)
def test_tensors_of_no_known_model_are_refused(parameters: Callable[[Any], Iterable[Any]]) -> None:
    with pytest.raises(TypeError, match=r"tensors have no names.*model=model"):
        sharpwise.AdamMini(parameters(gpt2()))


def test_a_generator_that_was_read_is_refused() -> None:
    read = gpt2().parameters()
    next(read)
    with pytest.raises(TypeError, match="tensors have no names"):
        sharpwise.AdamMini(read)
