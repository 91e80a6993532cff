"""GPT-2 in the two layouts that it is met in, with random gradients: what the optimizers are timed on."""

from dataclasses import dataclass, replace

import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT-2; the defaults are those of GPT-2 124M."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    block_size: int = 1024


FULL = Shape()
QUICK = Shape(n_layer=2, n_head=4, n_embd=256, vocab_size=4096, block_size=256)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head, self.n_embd = shape.n_head, shape.n_embd
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd)


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.n_embd, 4 * shape.n_embd)
        self.c_proj = nn.Linear(4 * shape.n_embd, shape.n_embd)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.n_embd)
        self.mlp = MLP(shape)


class NanoGPT(nn.Module):
    """nanoGPT's tree of modules and names (Linear layout, biases, tied head). It is never run, so it has no forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.config = replace(shape)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(shape.vocab_size, shape.n_embd),
                "wpe": nn.Embedding(shape.block_size, shape.n_embd),
                "h": nn.ModuleList(Block(shape) for _ in range(shape.n_layer)),
                "ln_f": nn.LayerNorm(shape.n_embd),
            }
        )
        self.lm_head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight


def conv1d_model(shape: Shape) -> nn.Module:
    """Hugging Face GPT-2: weights are stored input by output, as the transpose of a Linear."""
    config = transformers.GPT2Config(
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        vocab_size=shape.vocab_size,
        n_positions=shape.block_size,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


LAYOUTS = {"conv1d": conv1d_model, "linear": NanoGPT}


def model_with_gradients(layout: str, shape: Shape) -> nn.Module:
    """The model with gradients of global norm 2, so that clipping at 1 has something to do."""
    torch.manual_seed(0)
    model = LAYOUTS[layout](shape)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    torch._foreach_mul_([p.grad for p in parameters], 2.0 / norm.item())
    return model
