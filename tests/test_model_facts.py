"""What is known about a model, what it returned, and activation checkpointing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sharpwise.model_facts import (
    count_parameters,
    enable_activation_checkpointing,
    flops_per_token,
    logits_of,
    max_context,
    vocabulary_of,
)
from sharpwise.train.models import load_model


@pytest.mark.parametrize(
    ("name", "vocabulary", "context"),
    [("gpt2", 50257, 1024), ("llama-3-8b", 128256, 8192), ("pythia-160m", 50304, 2048), ("gpt2-tiny", 256, 128)],
)
def test_vocabulary_and_context(name: str, vocabulary: int, context: int) -> None:
    model = load_model(name, device="meta")
    assert (vocabulary_of(model), max_context(model)) == (vocabulary, context)


class Own(nn.Module):
    """A model of nobody's family, with a config that is not one of Hugging Face."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=10, block_size=4)
        self.tokens = nn.Embedding(10, 3)
        self.positions = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 10, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


def test_facts_of_a_model_of_ones_own() -> None:
    assert (vocabulary_of(Own(True)), max_context(Own(True))) == (None, None)
    assert count_parameters(Own(True)) == (42, 0)
    assert count_parameters(Own(False)) == (72, 30)
    assert flops_per_token(Own(True), 4) == flops_per_token(Own(False), 4) == 6 * 30  # no positions, the head always
    frozen = Own(False)
    frozen.head.requires_grad_(False)
    assert count_parameters(frozen) == (42, 0)


def test_flops_of_gpt2_by_hand() -> None:
    model = load_model("gpt2", device="meta")
    multiplied = 124_439_808 - 1024 * 768
    assert flops_per_token(model, 1024) == 6 * multiplied + 12 * 12 * 768 * 1024


def test_flops_of_an_untied_head_and_of_heads_with_a_width_of_their_own() -> None:
    model = load_model("llama-tiny", device="meta")
    assert flops_per_token(model, 50) == 6 * (125_248 - 256 * 64) + 12 * 2 * 64 * 50
    model = load_model("llama-tiny", device="meta", settings={"head_dim": 32})
    total, _ = count_parameters(model)
    assert flops_per_token(model, 50) == 6 * (total - 256 * 64) + 12 * 2 * (4 * 32) * 50


INPUTS = torch.zeros(2, 5, dtype=torch.int64)
LOGITS = torch.zeros(2, 5, 7)


@pytest.mark.parametrize("output", [LOGITS, (LOGITS, None), [LOGITS], SimpleNamespace(logits=LOGITS)])
def test_logits_in_what_a_model_returned(output: object) -> None:
    assert logits_of(output, INPUTS) is LOGITS


def test_logits_of_hugging_face() -> None:
    model = load_model("gpt2-tiny")
    assert logits_of(model(INPUTS), INPUTS).shape == (2, 5, 256)
    assert logits_of(model(INPUTS, return_dict=False), INPUTS).shape == (2, 5, 256)
    assert logits_of(torch.zeros(2, 1, 7), INPUTS[:, :1]).shape == (2, 1, 7)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (None, TypeError, r"returned a NoneType, expected logits \[2, 5, vocabulary\]: as a tensor, as the first of"),
        ({"loss": LOGITS}, TypeError, r"returned a dict, expected logits"),
        ((), TypeError, r"returned a tuple, expected logits"),
        ((None, LOGITS), TypeError, r"returned a tuple, expected logits"),
        (SimpleNamespace(logits=None), TypeError, r"returned a SimpleNamespace, expected logits"),
        (INPUTS, TypeError, r"returned int64 values, expected logits \[2, 5, vocabulary\]"),
        ((LOGITS.sum(), LOGITS), ValueError, r"tensor of shape \[\], expected logits \[2, 5, vocabulary\]$"),
        ((LOGITS[:, -1:], None), ValueError, r"shape \[2, 1, 7\], expected .*; were they of the last position alone"),
        (LOGITS[:, -1], ValueError, r"shape \[2, 7\], expected .*nanoGPT.*Return those of every position"),
        (LOGITS.transpose(0, 1), ValueError, r"shape \[5, 2, 7\], expected logits \[2, 5, vocabulary\]$"),
        (LOGITS.flatten(), ValueError, r"shape \[70\], expected"),
    ],
)
def test_what_are_no_logits(output: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        logits_of(output, INPUTS)


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
def test_activation_checkpointing_changes_no_number(name: str) -> None:
    torch.manual_seed(0)
    model = load_model(name)
    tokens = torch.randint(256, (2, 16))

    def loss_gradients_and_kept_elements() -> tuple[torch.Tensor, list[torch.Tensor], int]:
        kept: list[int] = []
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            logits = logits_of(model(tokens), tokens)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()], sum(kept)

    loss, gradients, kept = loss_gradients_and_kept_elements()
    enable_activation_checkpointing(model)
    loss_again, gradients_again, kept_again = loss_gradients_and_kept_elements()
    assert torch.equal(loss, loss_again)
    assert all(map(torch.equal, gradients, gradients_again))
    assert kept_again < kept / 2  # it is on
    assert model.config.use_cache is False


def test_models_without_activation_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"Own has no switch for activation checkpointing, which models of transform"):
        enable_activation_checkpointing(Own(True))
    model = load_model("gpt2-tiny", device="meta")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no activation checkpointing in transformers: .*leave"):
        enable_activation_checkpointing(model)
