"""Encoders of text."""

import torch
from zoo_transformers import ids, tiny

BERT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
TEXT = {"input_ids": ids()}
TYPED = TEXT | {"token_type_ids": (ids() % 2)}
BOXES = {"bbox": ids(9, 15)[..., None] + torch.tensor([0, 2, 7, 11])}  # left, top, right, bottom

MODELS = {
    "transformers/bert": tiny("BertForMaskedLM", TYPED, **BERT),
    "transformers/bert_cross": tiny(
        "BertLMHeadModel",
        TYPED | {"encoder_hidden_states": ids(5 * 32).view(2, 5, 32) / 50},
        is_decoder=True,
        add_cross_attention=True,
        **BERT,
    ),
    "transformers/roberta": tiny("RobertaForSequenceClassification", TEXT, **BERT),
    "transformers/deberta": tiny(
        "DebertaForMaskedLM", TYPED, type_vocab_size=2, relative_attention=True, pos_att_type=["c2p", "p2c"], **BERT
    ),
    "transformers/deberta_v2": tiny(
        "DebertaV2ForSequenceClassification",
        TEXT,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=False,
        conv_kernel_size=3,
        **BERT,
    ),
    "transformers/mpnet": tiny("MPNetForMaskedLM", TEXT, **BERT),
    "transformers/electra": tiny("ElectraForPreTraining", TYPED, embedding_size=16, **BERT),
    "transformers/albert": tiny("AlbertForMaskedLM", TYPED, embedding_size=16, **BERT),
    "transformers/distilbert": tiny(
        "DistilBertForTokenClassification",
        TEXT,
        vocab_size=99,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=64,
    ),
    "transformers/funnel": tiny(
        "FunnelForMaskedLM",
        TYPED,
        vocab_size=99,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=48,
        attention_type="relative_shift",
    ),
    "transformers/xlnet": tiny("XLNetLMHeadModel", TYPED, vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "transformers/longformer": tiny(
        "LongformerForMaskedLM",
        TEXT | {"global_attention_mask": (ids() * 0).index_fill(1, ids(1, 5)[0] * 0, 1)},
        attention_window=4,
        **BERT,
    ),
    "transformers/big_bird": tiny(
        "BigBirdForMaskedLM",
        {"input_ids": ids(48)},
        attention_type="block_sparse",
        block_size=4,
        num_random_blocks=1,
        **BERT,
    ),
    "transformers/modernbert": tiny("ModernBertForMaskedLM", TEXT, **BERT),
    "transformers/layoutlm": tiny("LayoutLMForMaskedLM", TEXT | BOXES, max_2d_position_embeddings=32, **BERT),
    "transformers/lilt": tiny(
        "LiltForTokenClassification",
        TEXT | BOXES,
        max_2d_position_embeddings=32,
        channel_shrink_ratio=2,
        **BERT | {"hidden_size": 48},
    ),
    "transformers/nomic_bert": tiny("NomicBertForMaskedLM", TEXT, **BERT),
    "transformers/convbert": tiny(
        "ConvBertForMaskedLM", TYPED, embedding_size=16, head_ratio=2, conv_kernel_size=3, **BERT
    ),
    "transformers/mobilebert": tiny(
        "MobileBertForMaskedLM", TYPED, embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2, **BERT
    ),
    "transformers/squeezebert": tiny("SqueezeBertForMaskedLM", TEXT, embedding_size=32, **BERT),
    "transformers/roformer": tiny("RoFormerForMaskedLM", TYPED, embedding_size=16, **BERT),
    "transformers/rembert": tiny(
        "RemBertForMaskedLM", TYPED, input_embedding_size=16, output_embedding_size=24, **BERT
    ),
    "transformers/ibert": tiny("IBertForMaskedLM", TEXT, **BERT),
    "transformers/esm": tiny("EsmForMaskedLM", TEXT, position_embedding_type="rotary", mask_token_id=3, **BERT),
    "transformers/xlm": tiny("XLMWithLMHeadModel", TEXT, vocab_size=99, emb_dim=32, n_layers=2, n_heads=4),
    "transformers/xmod": tiny("XmodForMaskedLM", TEXT, languages=["en_XX"], default_language="en_XX", **BERT),
    "transformers/luke": tiny(
        "LukeForMaskedLM",
        TEXT | {"entity_ids": ids(3, 9), "entity_position_ids": ids(6, 8).view(2, 3, 2)},
        entity_vocab_size=10,
        entity_emb_size=16,
        **BERT,
    ),
    "transformers/markuplm": tiny(
        "MarkupLMForTokenClassification",
        TEXT | {"xpath_tags_seq": ids(9 * 6, 15).view(2, 9, 6), "xpath_subs_seq": ids(9 * 6, 15).view(2, 9, 6)},
        max_depth=6,
        xpath_unit_hidden_size=8,
        max_xpath_tag_unit_embeddings=20,
        max_xpath_subs_unit_embeddings=20,
        tag_pad_id=16,
        subs_pad_id=16,
        **BERT,
    ),
    "transformers/tapas": tiny(
        "TapasForQuestionAnswering",
        TEXT | {"token_type_ids": ids(9 * 7, 9).view(2, 9, 7) % 2},
        type_vocab_sizes=[3, 8, 8, 2, 8, 8, 4],
        num_aggregation_labels=3,
        **BERT,
    ),
    "transformers/reformer": tiny(
        "ReformerForMaskedLM",
        {"input_ids": ids(8)},
        vocab_size=99,
        hidden_size=32,
        attn_layers=["local", "lsh"],
        num_attention_heads=2,
        attention_head_size=8,
        feed_forward_size=48,
        max_position_embeddings=64,
        axial_pos_shape=[4, 2],
        axial_pos_embds_dim=[8, 24],
        local_attn_chunk_length=4,
        lsh_attn_chunk_length=4,
        num_buckets=2,
        num_hashes=1,
        is_decoder=False,
    ),
    "transformers/nystromformer": tiny(
        "NystromformerForMaskedLM", {"input_ids": ids(8)}, num_landmarks=4, segment_means_seq_len=8, **BERT
    ),
    "transformers/yoso": tiny("YosoForMaskedLM", TEXT, use_expectation=True, **BERT),
    "transformers/mra": tiny("MraForMaskedLM", TEXT, **BERT),
    "transformers/fnet": tiny(
        "FNetForMaskedLM",
        TYPED,
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        max_position_embeddings=64,
    ),
    "transformers/canine": tiny(
        "CanineForTokenClassification",
        {"input_ids": ids(16)},
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_hash_functions=2,
        num_hash_buckets=20,
        local_transformer_stride=8,
    ),
}
