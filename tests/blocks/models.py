"""Tiny models of each family, and a nanoGPT written as nanoGPT writes it."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from sharpwise.blocks import BlockMap

_TOKENS = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}


def gpt2_config(**changes: Any) -> GPT2Config:
    return GPT2Config(**{"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 5, **_TOKENS, **changes})


def llama_config(**changes: Any) -> LlamaConfig:
    """Head size 6, which is not width / heads = 2, and half as many heads for k and v."""
    shape = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**shape, "head_dim": 6, "intermediate_size": 12, **_TOKENS, **changes})


def neox_config(**changes: Any) -> GPTNeoXConfig:
    shape = {"num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 16}
    return GPTNeoXConfig(**{**shape, **_TOKENS, **changes})


def causal(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def headless(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModel.from_config(config)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.n_head = heads


class MLP(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = Attention(width, heads, bias)
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = MLP(width, bias)


class NanoGPT(nn.Module):
    """The modules of nanoGPT's model.py, without forward."""

    def __init__(self, layers: int = 2, width: int = 8, heads: int = 2, vocab: int = 11, bias: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_layer=layers, n_embd=width, n_head=heads)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(5, width),
                "h": nn.ModuleList([Block(width, heads, bias) for _ in range(layers)]),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight


def rows(block_map: BlockMap, name: str) -> list[tuple[str, str, int | None]]:
    """(role, rows, heads) of each segment of a parameter."""
    return [(str(s.role), s.describe_rows(), s.heads) for s in block_map[name]]


def roles(block_map: BlockMap) -> dict[str, str]:
    """Role by name, several joined by a space."""
    return {name: " ".join(str(s.role) for s in block_map[name]) for name in block_map.names()}
