"""Adam-mini in one pass over memory and in two, as on a mesh: the same bits."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers

import sharpwise
from sharpwise.engine.backends.base import compiler_present

pytestmark = pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    """Weights whose output rows are columns, q and k by heads among them."""
    config = transformers.GPT2Config(n_embd=256, n_layer=2, n_head=8, vocab_size=512, n_positions=512)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    "block_lr", [None, "blockwise", "layer_decay(rate=0.7)", "sharpness(start=1, every=2, by=module)"]
)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_one_pass_and_two_give_the_same_bits(
    build: Callable[[], torch.nn.Module], block_lr: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build()
    two = copy.deepcopy(one)
    options = {"lr": 1e-3, "weight_decay": 0.1, "block_lr": block_lr, "compile": True}
    optimizers = (
        sharpwise.AdamMini(one, **options),
        sharpwise.AdamMini(two, **options),
    )
    monkeypatch.setattr(optimizers[1]._backends.cpp, "_one_pass", lambda spec: ())  # as of views that a mesh cuts
    for _ in range(4):
        for mine, other in zip(one.parameters(), two.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = [[row["backend"] for row in optimizer.explain()] for optimizer in optimizers]
    assert moved[0].count("cpp (one pass)") > 5
    assert "cpp" in moved[1]
    assert "cpp (one pass)" not in moved[1]
    for (name, mine), other in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, other), name
        for key, value in optimizers[0].state[mine].items():
            assert torch.equal(value, optimizers[1].state[other][key]), (name, key)
