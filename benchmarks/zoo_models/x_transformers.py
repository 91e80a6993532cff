"""x-transformers with its options, two layers of width 32 and two heads."""

from collections.abc import Callable
from typing import Any

import torch
import x_transformers as zoo
from torch import nn

Built = tuple[nn.Module, Any]

TINY: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16}


def _tokens(stack: type[nn.Module], *, wrapper: dict[str, Any] | None = None, **options: Any) -> Callable[[], Built]:
    """A language model over 20 tokens with these options, and two sequences of eight."""

    def build() -> Built:
        layers = stack(**TINY, **options)
        model = zoo.TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers, **(wrapper or {}))
        return model, torch.randint(20, (2, 8))

    return build


def _encoder_decoder() -> Built:
    sides = {
        f"{side}_{name}": value
        for side in ("enc", "dec")
        for name, value in {"num_tokens": 20, "depth": 1, "heads": 2, "attn_dim_head": 16, "max_seq_len": 16}.items()
    }
    model = zoo.XTransformer(dim=32, **sides)
    return model, (torch.randint(20, (2, 8)), torch.randint(20, (2, 6)))


def _vit() -> Built:
    layers = zoo.Encoder(**TINY)
    model = zoo.ViTransformerWrapper(
        image_size=32, patch_size=8, num_classes=10, num_register_tokens=2, attn_layers=layers
    )
    return model, torch.randn(2, 3, 32, 32)


def _continuous() -> Built:
    layers = zoo.Encoder(**TINY, use_scalenorm=True, alibi_pos_bias=True)
    model = zoo.ContinuousTransformerWrapper(dim_in=6, dim_out=5, max_seq_len=16, attn_layers=layers)
    return model, torch.randn(2, 8, 6)


MODELS: dict[str, Callable[[], Built]] = {
    "x-transformers/plain": _tokens(zoo.Decoder),
    "x-transformers/talking-heads": _tokens(
        zoo.Encoder, attn_pre_talking_heads=True, attn_post_talking_heads=True, ff_glu=True
    ),
    "x-transformers/relative": _tokens(zoo.Decoder, rel_pos_bias=True),
    "x-transformers/dynamic-relative": _tokens(zoo.Encoder, dynamic_pos_bias=True, dynamic_pos_bias_norm=True),
    "x-transformers/gated": _tokens(
        zoo.Decoder,
        attn_gate_values=True,
        attn_gate_value_heads=True,
        ff_glu=True,
        ff_swish=True,
        ff_glu_mult_bias=True,
    ),
    "x-transformers/gru-residual": _tokens(zoo.Decoder, gate_residual=True, scale_residual=True),
    "x-transformers/memory": _tokens(zoo.Encoder, wrapper={"num_memory_tokens": 3}, attn_num_mem_kv=2),
    "x-transformers/rotary": _tokens(
        zoo.Decoder, rotary_pos_emb=True, use_rmsnorm=True, attn_kv_heads=1, attn_qk_rmsnorm=True, ff_no_bias=True
    ),
    "x-transformers/cosine": _tokens(
        zoo.Decoder,
        attn_qk_norm=True,
        attn_qk_norm_dim_scale=True,
        attn_head_scale=True,
        ff_post_act_ln=True,
        wrapper={"tie_embedding": True},
    ),
    "x-transformers/latent": _tokens(
        zoo.Decoder,
        attn_use_latent_q=True,
        attn_dim_latent_q=12,
        attn_use_latent_kv=True,
        attn_dim_latent_kv=12,
    ),
    "x-transformers/cross": _encoder_decoder,
    "x-transformers/vit": _vit,
    "x-transformers/continuous": _continuous,
}
