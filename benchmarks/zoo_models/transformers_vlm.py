"""Models that read images and write text."""

import torch
from zoo_transformers import ids, noise, tiny

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LLAMA = TEXT | {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 8}
IMAGE_TOKEN = 98
IMAGE_TOKENS = {"image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN}


def with_image(tokens: int, begin: int = 1, batch: int = 1) -> torch.Tensor:
    """Token numbers with as many places for an image in them."""
    text = ids(tokens + 5, 90, batch)
    text[:, begin : begin + tokens] = IMAGE_TOKEN
    return text


LLAVA = {"input_ids": with_image(16, batch=2), "pixel_values": noise(2, 3, 32, 32)}
GRID = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
QWEN = {
    "input_ids": torch.tensor([[10, 95, 98, 98, 98, 98, 96, 11, 12, 7]]),
    "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]),
    "pixel_values": noise(16, 3 * 2 * 4 * 4),
} | GRID
QWEN_TOKENS = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 95, "vision_end_token_id": 96}
QWEN_TEXT = LLAMA | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}

MODELS = {
    "transformers/blip_2": tiny(
        "Blip2ForConditionalGeneration",
        {"pixel_values": noise(1, 3, 32, 32), "input_ids": with_image(3)},
        vision_config=VISION,
        qformer_config=TEXT | {"encoder_hidden_size": 32, "cross_attention_frequency": 2},
        text_config={
            "model_type": "opt",
            "vocab_size": 99,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "ffn_dim": 40,
            "word_embed_proj_dim": 24,
            "max_position_embeddings": 64,
        },
        num_query_tokens=3,
        **IMAGE_TOKENS,
    ),
    "transformers/instructblip": tiny(
        "InstructBlipForConditionalGeneration",
        {"pixel_values": noise(1, 3, 32, 32), "input_ids": with_image(3), "qformer_input_ids": ids(6, 90, 1)},
        vision_config=VISION,
        qformer_config=TEXT | {"encoder_hidden_size": 32, "cross_attention_frequency": 2},
        text_config=LLAMA,
        num_query_tokens=3,
        **IMAGE_TOKENS,
    ),
    "transformers/llava": tiny(
        "LlavaForConditionalGeneration",
        LLAVA,
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config=LLAMA,
        **IMAGE_TOKENS,
    ),
    "transformers/paligemma": tiny(
        "PaliGemmaForConditionalGeneration",
        LLAVA | {"token_type_ids": torch.zeros(2, 21, dtype=torch.long)},
        vision_config=VISION | {"model_type": "siglip_vision_model", "projection_dim": 32},
        text_config=LLAMA | {"model_type": "gemma", "num_image_tokens": 16},
        projection_dim=32,
        hidden_size=32,
        **IMAGE_TOKENS,
    ),
    "transformers/gemma3": tiny(
        "Gemma3ForConditionalGeneration",
        {
            "input_ids": with_image(4),
            "pixel_values": noise(1, 3, 32, 32),
            "token_type_ids": (with_image(4) == IMAGE_TOKEN).long(),
        },
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        text_config=LLAMA | {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 8},
        mm_tokens_per_image=4,
        **IMAGE_TOKENS,
    ),
    "transformers/qwen2_vl": tiny(
        "Qwen2VLForConditionalGeneration",
        QWEN,
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config=QWEN_TEXT | {"model_type": "qwen2_vl_text"},
        **QWEN_TOKENS,
    ),
    "transformers/qwen2_5_vl": tiny(
        "Qwen2_5_VLForConditionalGeneration",
        QWEN,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "num_heads": 4,
            "intermediate_size": 48,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        text_config=QWEN_TEXT | {"model_type": "qwen2_5_vl_text"},
        **QWEN_TOKENS,
    ),
    "transformers/idefics": tiny(
        "IdeficsForVisionText2Text",
        {
            "input_ids": ids(9, 90, 1),
            "pixel_values": noise(1, 1, 3, 32, 32),
            "image_attention_mask": torch.ones(1, 9, 1, dtype=torch.long),
        },
        vocab_size=99,
        additional_vocab_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        cross_layer_interval=1,
        qk_layer_norms=True,
        use_resampler=True,
        vision_config={
            "embed_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
        },
        perceiver_config={
            "resampler_depth": 1,
            "resampler_n_latents": 3,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
        },
    ),
    "transformers/idefics2": tiny(
        "Idefics2ForConditionalGeneration",
        {"input_ids": with_image(3), "pixel_values": noise(1, 1, 3, 32, 32)},
        vision_config=VISION,
        perceiver_config={
            "hidden_size": 32,
            "resampler_depth": 1,
            "resampler_n_latents": 3,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        text_config=LLAMA | {"model_type": "mistral"},
        image_token_id=IMAGE_TOKEN,
    ),
    "transformers/idefics3": tiny(
        "Idefics3ForConditionalGeneration",
        {"input_ids": with_image(4), "pixel_values": noise(1, 1, 3, 32, 32)},
        vision_config=VISION,
        text_config=LLAMA,
        scale_factor=2,
        image_token_id=IMAGE_TOKEN,
    ),
    "transformers/mllama": tiny(
        "MllamaForConditionalGeneration",
        {
            "input_ids": ids(9, 90, 1),
            "pixel_values": noise(1, 1, 2, 3, 32, 32),
            "aspect_ratio_ids": torch.tensor([[2]]),
            "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
            "cross_attention_mask": torch.ones(1, 9, 1, 2, dtype=torch.long),
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        text_config=LLAMA | {"model_type": "mllama_text_model", "cross_attention_layers": [1], "pad_token_id": 1},
        image_token_index=IMAGE_TOKEN,
    ),
    "transformers/kosmos2": tiny(
        "Kosmos2ForConditionalGeneration",
        {
            "input_ids": ids(12, 90, 1),
            "pixel_values": noise(1, 3, 32, 32),
            "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1] + [0] * 8]),
        },
        vision_config=VISION,
        text_config={
            "vocab_size": 99,
            "embed_dim": 32,
            "layers": 2,
            "ffn_dim": 48,
            "attention_heads": 4,
            "max_position_embeddings": 64,
        },
        latent_query_num=3,
    ),
    "transformers/chameleon": tiny(
        "ChameleonForConditionalGeneration",
        {"input_ids": ids()},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "latent_channels": 8,
            "resolution": 8,
        },
        vocabulary_map={"<image>": IMAGE_TOKEN},
        num_key_value_heads=2,
        **TEXT,
    ),
    "transformers/florence2": tiny(
        "Florence2ForConditionalGeneration",
        {"input_ids": with_image(5), "pixel_values": noise(1, 3, 64, 64), "decoder_input_ids": ids(4, 90, 1)},
        vision_config={
            "depths": [1, 1],
            "embed_dim": [16, 32],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "patch_size": [7, 3],
            "patch_stride": [8, 4],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "window_size": 4,
            "projection_dim": 32,
            "max_position_embeddings": 8,
            "max_temporal_embeddings": 4,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
        image_token_id=IMAGE_TOKEN,
    ),
}
