"""Encoders with decoders, of text and of time series."""

import torch
from zoo_transformers import ids, noise, tiny

BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BOTH = {"input_ids": ids(), "decoder_input_ids": ids(7, 80)}
SERIES = {
    "prediction_length": 3,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 2,
    "num_static_categorical_features": 1,
    "cardinality": [5],
    "embedding_dimension": [4],
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
PAST = {
    "past_values": noise(2, 10),
    "past_time_features": noise(2, 10, 2),
    "past_observed_mask": torch.ones(2, 10),
    "static_categorical_features": ids(1, 5),
    "future_values": noise(2, 3),
    "future_time_features": noise(2, 3, 2),
}

MODELS = {
    "transformers/t5": tiny("T5ForConditionalGeneration", BOTH, **T5),
    "transformers/t5_gated": tiny(
        "T5ForConditionalGeneration", BOTH, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5
    ),
    "transformers/umt5": tiny("UMT5ForConditionalGeneration", BOTH, **T5),
    "transformers/longt5": tiny(
        "LongT5ForConditionalGeneration",
        BOTH,
        encoder_attention_type="transient-global",
        local_radius=3,
        global_block_size=4,
        **T5,
    ),
    "transformers/switch_transformers": tiny(
        "SwitchTransformersForConditionalGeneration",
        BOTH,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_decoder_layers=2,
        num_experts=4,
        **T5,
    ),
    "transformers/pop2piano": tiny(
        "Pop2PianoForConditionalGeneration",
        {"input_features": noise(2, 9, 32), "decoder_input_ids": ids(7, 80)},
        composer_vocab_size=5,
        **T5,
    ),
    "transformers/udop": tiny(
        "UdopForConditionalGeneration",
        BOTH
        | {
            "bbox": torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(0)),
            "pixel_values": noise(2, 3, 32, 32),
        },
        image_size=32,
        patch_size=16,
        max_2d_position_embeddings=32,
        **T5,
    ),
    "transformers/bart": tiny("BartForConditionalGeneration", BOTH, **BART),
    "transformers/mbart": tiny("MBartForConditionalGeneration", BOTH, **BART),
    "transformers/pegasus": tiny("PegasusForConditionalGeneration", BOTH, **BART),
    "transformers/pegasus_x": tiny(
        "PegasusXForConditionalGeneration",
        {"input_ids": ids(16), "decoder_input_ids": ids(7)},
        block_size=4,
        num_global_tokens=3,
        **BART,
    ),
    "transformers/bigbird_pegasus": tiny(
        "BigBirdPegasusForConditionalGeneration",
        {"input_ids": ids(48), "decoder_input_ids": ids(7)},
        block_size=4,
        num_random_blocks=1,
        **BART,
    ),
    "transformers/m2m_100": tiny("M2M100ForConditionalGeneration", BOTH, **BART),
    "transformers/nllb_moe": tiny(
        "NllbMoeForConditionalGeneration",
        BOTH,
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        expert_capacity=16,
        **BART,
    ),
    "transformers/prophetnet": tiny(
        "ProphetNetForConditionalGeneration",
        BOTH,
        vocab_size=99,
        hidden_size=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    ),
    "transformers/led": tiny(
        "LEDForConditionalGeneration",
        BOTH | {"global_attention_mask": torch.eye(9, dtype=torch.long)[:2]},
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        **{key: value for key, value in BART.items() if key != "max_position_embeddings"},
    ),
    "transformers/marian": tiny("MarianMTModel", BOTH, pad_token_id=1, decoder_start_token_id=1, **BART),
    "transformers/blenderbot": tiny("BlenderbotForConditionalGeneration", BOTH, **BART),
    "transformers/plbart": tiny("PLBartForConditionalGeneration", BOTH, **BART),
    "transformers/mvp": tiny(
        "MvpForConditionalGeneration", BOTH, use_prompt=True, prompt_length=5, prompt_mid_dim=24, **BART
    ),
    "transformers/fsmt": tiny(
        "FSMTForConditionalGeneration",
        BOTH,
        langs=["en", "de"],
        src_vocab_size=99,
        tgt_vocab_size=99,
        **{key: value for key, value in BART.items() if key != "vocab_size"},
    ),
    "transformers/time_series_transformer": tiny("TimeSeriesTransformerForPrediction", PAST, **SERIES),
    "transformers/informer": tiny("InformerForPrediction", PAST, sampling_factor=2, **SERIES),
    "transformers/autoformer": tiny(
        "AutoformerForPrediction", PAST, label_length=2, moving_average=3, autocorrelation_factor=1, **SERIES
    ),
}
