"""Tiny models of each family, nanoGPT as nanoGPT writes it, and a vision transformer with timm's names."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
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

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = Attention(width, heads, bias)
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = MLP(width, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """The modules of nanoGPT's model.py."""

    def __init__(
        self, layers: int = 2, width: int = 8, heads: int = 2, vocab: int = 11, bias: bool = True, positions: int = 5
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_layer=layers, n_embd=width, n_head=heads)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(positions, width),
                "h": nn.ModuleList([Block(width, heads, bias) for _ in range(layers)]),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[-1], device=tokens.device))
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), VisionAttention(width, heads), LayerScale(width)
        self.norm2, self.ls2 = nn.LayerNorm(width), LayerScale(width)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """The modules of timm's VisionTransformer: images [batch, 3, 8, 8] in patches of 4 x 4, to 5 classes."""

    def __init__(self, layers: int = 2, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(VisionBlock(width, heads) for _ in range(layers)))
        self.norm, self.fc_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.fc_norm(self.norm(self.blocks(x))[:, 0]))


def rows(block_map: BlockMap, name: str) -> list[tuple[str, str, int | None]]:
    """(role, rows, heads) of each segment of a parameter."""
    return [(str(s.role), s.describe_rows(), s.heads) for s in block_map[name]]


def roles(block_map: BlockMap) -> dict[str, str]:
    """Role by name, several joined by a space."""
    return {name: " ".join(str(s.role) for s in block_map[name]) for name in block_map.names()}


def _hf(name: str, of: str = "ForCausalLM", config: str = "Config", **options: Any) -> nn.Module:
    return getattr(transformers, name + of)(getattr(transformers, name + config)(**_SMALL, **options))


_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 97,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_SIZED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}  # not width / heads = 8
_ROUTED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
}
_OPT: dict[str, Any] = {"ffn_dim": 48, "max_position_embeddings": 16}
_T5: dict[str, Any] = {"d_kv": 16, "d_ff": 48}
_VIT: dict[str, Any] = {"image_size": 8, "patch_size": 4, "encoder_stride": 4}


def _torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: _hf("GPT2", "LMHeadModel", n_positions=16),
    "llama": lambda: _hf("Llama", **_SIZED),
    "gpt_neox": lambda: _hf("GPTNeoX"),
    "nanogpt": lambda: NanoGPT(width=32, heads=4, vocab=97, positions=16),
    "mistral": lambda: _hf("Mistral", **_SIZED),
    "qwen2": lambda: _hf("Qwen2", **_GROUPED),
    "qwen3": lambda: _hf("Qwen3", **_SIZED),
    "falcon-new": lambda: _hf("Falcon", num_kv_heads=2, new_decoder_architecture=True, bias=True),
    "falcon-new-one-norm": lambda: _hf(
        "Falcon", num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1
    ),
    "falcon-multi-query": lambda: _hf("Falcon"),
    "falcon-interleaved": lambda: _hf("Falcon", multi_query=False, parallel_attn=False, bias=True),
    "phi3": lambda: _hf("Phi3", **_SIZED),
    "gemma2": lambda: _hf("Gemma2", **_SIZED),
    "gemma3": lambda: _hf("Gemma3", config="TextConfig", **_SIZED),
    "opt": lambda: _hf("OPT", **_OPT),
    "opt-projected": lambda: _hf("OPT", word_embed_proj_dim=16, **_OPT),
    "bloom": lambda: _hf("Bloom"),
    "olmo2": lambda: _hf("Olmo2", **_GROUPED),
    "mixtral": lambda: _hf("Mixtral", num_local_experts=4, **_SIZED),
    "qwen2_moe": lambda: _hf("Qwen2Moe", shared_expert_intermediate_size=40, **_GROUPED, **_ROUTED),
    "qwen3_moe": lambda: _hf("Qwen3Moe", **_SIZED, **_ROUTED),
    "deepseek_v3": lambda: _hf("DeepseekV3", num_key_value_heads=4, q_lora_rank=48, **_LATENT),
    "deepseek_v3-no-q-lora": lambda: _hf("DeepseekV3", num_key_value_heads=4, q_lora_rank=None, **_LATENT),
    "starcoder2": lambda: _hf("Starcoder2", **_GROUPED),
    "granite": lambda: _hf("Granite", **_GROUPED),
    "cohere": lambda: _hf("Cohere", use_qk_norm=True, **_GROUPED),
    "stablelm": lambda: _hf("StableLm", **_GROUPED),
    "stablelm-qk-norm": lambda: _hf("StableLm", qk_layernorm=True, **_GROUPED),
    "glm4": lambda: _hf("Glm4", attention_bias=True, **_SIZED),
    "t5": lambda: _hf("T5", "ForConditionalGeneration", **_T5),
    "t5-gated": lambda: _hf("T5", "ForConditionalGeneration", feed_forward_proj="gated-gelu", **_T5),
    "bert": lambda: _hf("Bert", "Model"),
    "bert-mlm": lambda: _hf("Bert", "ForMaskedLM"),
    "bert-pretraining": lambda: _hf("Bert", "ForPreTraining"),
    "vit": lambda: _hf("ViT", "ForImageClassification", **_VIT),
    "vit-masked": lambda: _hf("ViT", "ForMaskedImageModeling", **_VIT),
    "timm": VisionTransformer,
    "transformer_encoder": _torch_encoder,
}


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build().eval()

    return make


# One builder for each family, and for each layout that a family has: about 32 wide, 2 layers, 4 heads (2 of them for k
# and v, where the family allows it), 97 tokens, random weights under a fixed seed, in eval mode.
TINY: dict[str, Callable[[], nn.Module]] = {name: _seeded(build) for name, build in _BUILDERS.items()}
