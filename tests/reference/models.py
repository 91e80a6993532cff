"""Tiny models of the layouts that matter, their sizes different where they can be, for references and tests."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

GPT2 = {"vocab": 17, "positions": 9, "d": 12, "heads": 3, "layers": 2, "ff": 48}
LLAMA = {"vocab": 13, "d": 16, "heads": 4, "kv_heads": 2, "head_dim": 6, "layers": 2, "ff": 20}  # head_dim != d / heads
NEOX = {"vocab": 11, "d": 12, "heads": 3, "layers": 2, "ff": 20}
NANOGPT = {"vocab": 15, "positions": 7, "d": 12, "heads": 3, "layers": 2, "ff": 48}


def _tokens(vocab):
    return {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


def gpt2():
    """HF gpt2: Conv1D (output dimension = columns), fused c_attn, biases, tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    s = GPT2
    config = GPT2Config(
        n_layer=s["layers"], n_head=s["heads"], n_embd=s["d"], n_positions=s["positions"], **_tokens(s["vocab"])
    )
    return GPT2LMHeadModel(config)


def llama(head_dim=LLAMA["head_dim"], kv_heads=LLAMA["kv_heads"]):
    """HF llama: Linear, unfused, grouped-query attention, no biases, untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = LLAMA
    config = LlamaConfig(
        hidden_size=s["d"],
        num_attention_heads=s["heads"],
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=s["ff"],
        num_hidden_layers=s["layers"],
        max_position_embeddings=16,
        tie_word_embeddings=False,
        **_tokens(s["vocab"]),
    )
    return LlamaForCausalLM(config)


def gpt_neox():
    """HF gpt_neox: query_key_value interleaves q, k and v per head; biases; untied head."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    s = NEOX
    config = GPTNeoXConfig(
        hidden_size=s["d"],
        num_attention_heads=s["heads"],
        intermediate_size=s["ff"],
        num_hidden_layers=s["layers"],
        max_position_embeddings=16,
        **_tokens(s["vocab"]),
    )
    return GPTNeoXForCausalLM(config)


class _Config:
    n_layer, n_head, n_embd = NANOGPT["layers"], NANOGPT["heads"], NANOGPT["d"]
    vocab_size, block_size = NANOGPT["vocab"], NANOGPT["positions"]
    dropout, bias = 0.0, True


class LayerNorm(nn.Module):
    """As in nanoGPT."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    """As in nanoGPT: q, k, v are the row thirds of c_attn."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.n_embd = config.n_head, config.n_embd

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = (
            y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for y in self.c_attn(x).split(self.n_embd, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Module):
    """As in nanoGPT."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """As in nanoGPT."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """nanoGPT's model: Linear layers, fused c_attn, tied head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1)))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def nanogpt():
    """A nanoGPT-style module."""
    return GPT(_Config())


BUILD = {"gpt2": gpt2, "llama": llama, "gpt_neox": gpt_neox, "nanogpt": nanogpt}


def build(name, dtype=torch.float32, seed=0):
    """A model whose every parameter is random (norms and biases too: an update of a zero would hide the decay)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = BUILD[name]().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.7)
    return model
