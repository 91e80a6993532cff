"""A GPT-2 small enough for twenty steps in a blink, fixed batches for it, and the plain loop that others must equal."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

STEPS = 20
VOCAB, CONTEXT = 65, 16


def gpt2(**changes: Any) -> transformers.GPT2LMHeadModel:
    """Two layers of HF GPT-2 (Conv1D layout, tied head), no dropout: the same weights at every call."""
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 33, "vocab_size": VOCAB, "n_positions": CONTEXT} | changes
    config = transformers.GPT2Config(
        **sizes, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(config)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """nanoGPT's names and Linear layout. 33 wide with 3 heads of 11: nothing divides evenly among two processes."""

    def __init__(self, layers: int = 2, width: int = 33, heads: int = 3) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, width),
                "wpe": nn.Embedding(CONTEXT, width),
                "h": nn.ModuleList(Block(width, heads) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[1]))
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


def nanogpt(**sizes: int) -> NanoGPT:
    """The same weights at every call."""
    torch.manual_seed(1)
    return NanoGPT(**sizes)


def batches(steps: int = STEPS, size: int = 4) -> list[Tensor]:
    """Tokens [size, CONTEXT] for every step, the same at every call."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB, (size, CONTEXT), generator=generator) for _ in range(steps)]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token loss of a Hugging Face model."""
    return model(tokens, labels=tokens).loss


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    data: Iterable[Tensor] | None = None,
) -> list[float]:
    """The loop of any tutorial; losses of all steps."""
    scheduler = schedule(optimizer) if schedule else None
    losses = []
    for tokens in batches() if data is None else data:
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    """Every parameter of two models is equal to the bit, and was trained at all."""
    others = dict(other.named_parameters())
    assert others.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, others[name]), f"{name} differs by {(parameter - others[name]).abs().max()}"


def assert_trained(model: nn.Module, start: nn.Module) -> None:
    """Every trainable parameter has moved from where it started."""
    before = dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), f"{name} did not move"
