"""The denoisers and autoencoders of diffusers, two layers and narrow, on two tiny images, videos or sounds."""

from collections.abc import Callable
from typing import Any

import diffusers as zoo
import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
TEXT = 24  # width of what a text encoder gives


def _model(
    kind: Callable[..., nn.Module], inputs: Callable[[], dict[str, Any]], **arguments: Any
) -> Callable[[], Built]:
    """A model of these arguments, and what its forward takes."""

    def build() -> Built:
        return kind(**arguments), inputs()

    return build


def _noisy(*shape: int, text: int = TEXT, name: str = "encoder_hidden_states", **more: Any) -> dict[str, Any]:
    """A noisy sample, its time step, and five tokens of text."""
    given: dict[str, Any] = {"hidden_states": torch.randn(2, *shape), "timestep": torch.tensor([3, 7])}
    if text:
        given[name] = torch.randn(2, 5, text)
    return given | more


def _sample(*shape: int, **more: Any) -> dict[str, Any]:
    return {"sample": torch.randn(2, *shape), "timestep": torch.tensor([3, 7])} | more


def _mask(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


UNET: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}

MODELS: dict[str, Callable[[], Built]] = {
    "diffusers/unet-2d": _model(
        zoo.UNet2DModel,
        lambda: _sample(3, 16, 16),
        **UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ),
    "diffusers/unet-2d-condition": _model(
        zoo.UNet2DConditionModel,
        lambda: _sample(4, 16, 16, encoder_hidden_states=torch.randn(2, 5, TEXT)),
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=8,
    ),
    "diffusers/unet-xl": _model(
        zoo.UNet2DConditionModel,
        lambda: _sample(
            4,
            16,
            16,
            encoder_hidden_states=torch.randn(2, 5, TEXT),
            added_cond_kwargs={"text_embeds": torch.randn(2, 8), "time_ids": torch.randn(2, 6)},
        ),
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
    ),
    "diffusers/dit": _model(
        zoo.DiTTransformer2DModel,
        lambda: _noisy(4, 8, 8, text=0, class_labels=torch.tensor([1, 2])),
        **HEADS,
        sample_size=8,
        num_embeds_ada_norm=20,
    ),
    "diffusers/pixart": _model(
        zoo.PixArtTransformer2DModel,
        lambda: _noisy(4, 8, 8, added_cond_kwargs={"resolution": torch.ones(2, 2), "aspect_ratio": torch.ones(2, 1)}),
        **HEADS,
        sample_size=8,
        cross_attention_dim=32,
        caption_channels=TEXT,
        use_additional_conditions=False,
    ),
    "diffusers/sd3": _model(
        zoo.SD3Transformer2DModel,
        lambda: _noisy(4, 8, 8, pooled_projections=torch.randn(2, 12)),
        **HEADS,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
    "diffusers/flux": _model(
        zoo.FluxTransformer2DModel,
        lambda: _noisy(
            16,
            8,
            pooled_projections=torch.randn(2, 12),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
            guidance=torch.ones(2),
        ),
        **HEADS,
        num_single_layers=2,
        in_channels=8,
        joint_attention_dim=TEXT,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ),
    "diffusers/auraflow": _model(
        zoo.AuraFlowTransformer2DModel,
        lambda: _noisy(4, 8, 8),
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    ),
    "diffusers/sana": _model(
        zoo.SanaTransformer2DModel,
        lambda: _noisy(4, 8, 8),
        **HEADS,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT,
    ),
    "diffusers/lumina2": _model(
        zoo.Lumina2Transformer2DModel,
        lambda: _noisy(4, 8, 8, encoder_attention_mask=_mask(2, 5)),
        sample_size=8,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=TEXT,
    ),
    "diffusers/hunyuan-dit": _model(
        zoo.HunyuanDiT2DModel,
        lambda: (
            _noisy(
                4,
                8,
                8,
                text_embedding_mask=_mask(2, 5),
                encoder_hidden_states_t5=torch.randn(2, 6, 16),
                text_embedding_mask_t5=_mask(2, 6),
                image_meta_size=torch.ones(2, 6),
                style=torch.tensor([0, 0]),
                image_rotary_emb=(torch.ones(16, 16), torch.zeros(16, 16)),
            )
            | {"timestep": torch.tensor([3.0, 7.0])}
        ),
        **HEADS | {"num_layers": 4},
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        cross_attention_dim=TEXT,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=5,
        text_len_t5=6,
    ),
    "diffusers/cogview4": _model(
        zoo.CogView4Transformer2DModel,
        lambda: _noisy(4, 8, 8, **{k: torch.ones(2, 2) for k in ("original_size", "target_size", "crop_coords")}),
        **HEADS,
        in_channels=4,
        out_channels=4,
        text_embed_dim=TEXT,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    ),
    "diffusers/qwen-image": _model(
        zoo.QwenImageTransformer2DModel,
        lambda: _noisy(16, 8, encoder_hidden_states_mask=_mask(2, 5), img_shapes=[[(1, 4, 4)]] * 2),
        **HEADS,
        in_channels=8,
        out_channels=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    ),
    "diffusers/ltx-video": _model(
        zoo.LTXVideoTransformer3DModel,
        lambda: _noisy(16, 8, encoder_attention_mask=_mask(2, 5), num_frames=1, height=4, width=4),
        **HEADS,
        in_channels=8,
        out_channels=8,
        cross_attention_dim=32,
        caption_channels=TEXT,
    ),
    "diffusers/wan": _model(
        zoo.WanTransformer3DModel,
        lambda: _noisy(4, 1, 8, 8),
        **HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=64,
        rope_max_seq_len=32,
    ),
    "diffusers/wan-image": _model(
        zoo.WanTransformer3DModel,
        lambda: _noisy(4, 1, 8, 8, encoder_hidden_states_image=torch.randn(2, 6, 20)),
        **HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=64,
        rope_max_seq_len=32,
        image_dim=20,
        added_kv_proj_dim=32,
    ),
    "diffusers/cogvideox": _model(
        zoo.CogVideoXTransformer3DModel,
        lambda: _noisy(1, 4, 8, 8),
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT,
        sample_width=8,
        sample_height=8,
        sample_frames=1,
        max_text_seq_length=5,
    ),
    "diffusers/mochi": _model(
        zoo.MochiTransformer3DModel,
        lambda: _noisy(4, 2, 8, 8, encoder_attention_mask=_mask(2, 5)),
        **HEADS,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=TEXT,
        time_embed_dim=16,
        max_sequence_length=5,
    ),
    "diffusers/hunyuan-video": _model(
        zoo.HunyuanVideoTransformer3DModel,
        lambda: _noisy(
            4,
            1,
            8,
            8,
            encoder_attention_mask=_mask(2, 5),
            pooled_projections=torch.randn(2, 12),
            guidance=torch.ones(2),
        ),
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
    ),
    "diffusers/stable-audio": _model(
        zoo.StableAudioDiTModel,
        lambda: (
            _noisy(
                8,
                16,
                global_hidden_states=torch.randn(2, 1, 12),
                rotary_embedding=(torch.ones(17, 8), torch.zeros(17, 8)),
            )
            | {"timestep": torch.tensor([0.3, 0.7])}
        ),
        **HEADS,
        sample_size=16,
        in_channels=8,
        out_channels=8,
        num_key_value_attention_heads=1,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=12,
        cross_attention_input_dim=TEXT,
    ),
    "diffusers/prior": _model(
        zoo.PriorTransformer,
        lambda: _noisy(16, text=16, proj_embedding=torch.randn(2, 16)),
        **HEADS,
        embedding_dim=16,
        num_embeddings=5,
    ),
    "diffusers/autoencoder-kl": _model(
        zoo.AutoencoderKL,
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    ),
    "diffusers/autoencoder-dc": _model(
        zoo.AutoencoderDC,
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    ),
    "diffusers/vq": _model(
        zoo.VQModel,
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
        block_out_channels=(8,),
        norm_num_groups=4,
        num_vq_embeddings=16,
    ),
}
