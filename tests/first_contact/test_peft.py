"""PEFT: a LoRA adapter on GPT-2. Adapters are trained with the roles of their matrices, the base is not touched."""

import peft
import pytest
import torch
from first_contact.tiny import assert_same_weights, assert_trained, gpt2, plain_loop
from reference import models

import sharpwise


def lora() -> peft.PeftModel:
    model = gpt2()
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    torch.manual_seed(4)
    return peft.get_peft_model(model, config)


def test_adamw_on_a_lora_model_equals_torchs() -> None:
    ours, theirs = lora(), lora()
    losses = plain_loop(ours, sharpwise.AdamW(ours, lr=1e-2, compile=False))
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    assert losses == plain_loop(theirs, torch.optim.AdamW(trainable, lr=1e-2, foreach=False))
    assert_same_weights(ours, theirs)
    assert_trained(ours, lora())


@pytest.mark.parametrize("block_lr", [None, "blockwise"])
def test_adam_mini_trains_adapters_with_the_roles_of_their_matrices(block_lr: str | None) -> None:
    model, start = lora(), lora()
    optimizer = sharpwise.AdamMini(model, lr=1e-2, block_lr=block_lr)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {segment.name for segment in optimizer.blocks.segments} == trainable

    def roles(end: str) -> list[list[str]]:
        return [[str(s.role) for s in optimizer.blocks[name]] for name in sorted(trainable) if name.endswith(end)]

    assert roles("c_attn.lora_B.default.weight") == [["q", "k", "v"]] * 2
    assert roles("c_fc.lora_B.default.weight") == [["up"]] * 2

    plain_loop(model, optimizer)
    assert_trained(model, start)
    before = dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        assert name in trainable or torch.equal(parameter, before[name])


def test_adam_mini_cuts_the_factors_of_an_adapter() -> None:
    """The rows of B are the matrix's: by head (q, k), by row (v). Those of A belong to no head: q and k are one block.

    Four heads of 6, two of them for keys and values.
    """
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(models.llama(), config)
    optimizer = sharpwise.AdamMini(model, lr=1e-2, betas=(0.9, 0.75))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trainable.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    cuts = {row["name"].rpartition(".lora_")[2][0]: row["cut"] for row in optimizer.explain() if row["role"] == "q"}
    assert cuts == {"A": "tensor", "B": "head"}
    blocks = {"q_proj": {"A": 1, "B": 4}, "k_proj": {"A": 1, "B": 2}, "v_proj": {"A": 3, "B": 12}}
    assert len(trainable) == 2 * 6
    for name, p in trainable.items():
        site, part = next((site, part) for site in blocks for part in "AB" if f"{site}.lora_{part}." in name)
        want = 0.25 * p.grad.view(blocks[site][part], -1).square().mean(1)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], want, msg=lambda m, name=name: f"{name}: {m}")


def test_an_optimizer_built_before_the_adapter_says_so() -> None:
    """`get_peft_model` freezes what the optimizer holds, in place, and what it adds the optimizer lacks."""
    model = gpt2()
    optimizer = sharpwise.AdamW(model, lr=1e-2)
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    peft.get_peft_model(model, config)(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    with pytest.raises(RuntimeError, match=r"AdamW: an adapter was added after.*lacks the 4 that train.*lora_A"):
        optimizer.step()


def test_a_model_frozen_for_a_while_is_no_adapter() -> None:
    """Another optimizer trains the rest: what it holds was there from the beginning."""
    model = gpt2()
    held = list(model.transformer.h[0].parameters())
    optimizer = sharpwise.AdamW(held, model=model)
    for p in held:
        p.requires_grad_(False)
    optimizer.step()
