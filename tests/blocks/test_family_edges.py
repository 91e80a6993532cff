"""Where a family ends: other shapes, likenesses, models inside models, and adapters on fused matrices."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from blocks.models import TINY, VisionBlock, VisionTransformer, rows
from sharpwise.blocks import BlockMap
from sharpwise.blocks.families import Families

by_name = partial(BlockMap.of, trace=False)


def replaced(family: str, site: str, new: nn.Module | nn.Parameter) -> tuple[str, ...]:
    """What stays unexplained where the site is this instead."""
    model = TINY[family]()
    path, _, last = site.rpartition(".")
    setattr(model.get_submodule(path), last, new)
    return by_name(model).unexplained


@pytest.mark.parametrize(
    ("family", "site", "new"),
    [
        ("phi3", "model.layers.1.self_attn.qkv_proj", lambda: nn.Linear(32, 120)),
        ("phi3", "model.layers.1.mlp.gate_up_proj", lambda: nn.Linear(32, 97)),
        ("falcon-new", "transformer.h.1.self_attention.query_key_value", lambda: nn.Linear(32, 96)),
        ("falcon-multi-query", "transformer.h.1.self_attention.query_key_value", lambda: nn.Linear(32, 96)),
        ("falcon-interleaved", "transformer.h.1.self_attention.query_key_value", lambda: nn.Linear(32, 48)),
        ("bloom", "transformer.h.1.self_attention.query_key_value", lambda: nn.Linear(32, 90)),
        ("deepseek_v3", "model.layers.1.self_attn.kv_b_proj", lambda: nn.Linear(28, 64)),
    ],
)
def test_a_fused_matrix_of_another_shape(family: str, site: str, new: Callable[[], nn.Module]) -> None:
    assert replaced(family, site, new()) == (site + ".weight", site + ".bias")


def test_experts_and_in_proj_of_another_shape() -> None:
    site = "model.layers.1.mlp.experts.gate_up_proj"
    assert replaced("mixtral", site, nn.Parameter(torch.ones(4, 95, 32))) == (site,)
    assert replaced("mixtral", site, nn.Parameter(torch.ones(()))) == (site,)
    site = "layers.0.self_attn.in_proj_weight"
    assert replaced("transformer_encoder", site, nn.Parameter(torch.ones(95, 32))) == (site,)


def test_parameters_that_a_family_does_not_have() -> None:
    model = TINY["qwen3"]()
    model.get_submodule("model.layers.0.self_attn").sink = nn.Parameter(torch.ones(4))
    model.get_submodule("model.layers.0.mlp").router = nn.Linear(32, 4, bias=False)
    assert by_name(model).unexplained == ("model.layers.0.self_attn.sink", "model.layers.0.mlp.router.weight")
    encoder = TINY["transformer_encoder"]()
    encoder.get_submodule("layers.0.self_attn").bias_k = nn.Parameter(torch.ones(1, 1, 32))
    assert by_name(encoder).unexplained == ("layers.0.self_attn.bias_k",)


def test_latents_have_no_heads_whatever_their_size() -> None:
    block_map, site = by_name(TINY["deepseek_v3"]()), "model.layers.0.self_attn."
    # 48 = 4 heads of q's 12 and 32 = 4 heads of k's 8 are accidents.
    assert block_map[site + "q_a_proj.weight"][0].shape == (48, 32)
    assert rows(block_map, site + "q_a_proj.weight") == [("q", "all", None)]
    assert block_map[site + "kv_a_proj_with_mqa.weight"][0].shape == (32, 32)
    assert rows(block_map, site + "kv_a_proj_with_mqa.weight") == [("k", "all", None)]
    assert rows(block_map, site + "q_b_proj.weight") == [("q", "all", 4)]


@pytest.mark.parametrize("change", ["gated mlp", "grouped qkv", "no norm2", "patches by linear", "hf config"])
def test_likenesses_of_timm_are_not_guessed(change: str) -> None:
    model: Any = VisionTransformer()
    block = model.blocks[1]
    if change == "gated mlp":
        block.mlp.fc1 = nn.Linear(32, 96)
    elif change == "grouped qkv":
        block.attn.qkv = nn.Linear(32, 64)
    elif change == "no norm2":
        block.other_norm = block.__dict__["_modules"].pop("norm2")
    elif change == "patches by linear":
        model.patch_embed.proj = nn.Linear(48, 32)
    else:
        model.config = transformers.PretrainedConfig()
    block_map = by_name(model)
    assert set(block_map.unexplained) == set(block_map.names())


def test_timm_without_heads_and_with_other_tokens() -> None:
    model: Any = VisionTransformer()
    model.reg_token = nn.Parameter(torch.ones(1, 2, 32))
    model.norm_pre = nn.LayerNorm(32)
    for block in model.blocks:
        del block.attn.num_heads
    block_map = by_name(model, strict=True)
    assert rows(block_map, "reg_token") == [("pos_emb", "all", None)]
    assert rows(block_map, "blocks.0.attn.qkv.bias") == [
        ("q", "0:32", None),
        ("k", "32:64", None),
        ("v", "64:96", None),
    ]


def test_transformer_encoder_is_known_by_type_anywhere() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.PretrainedConfig()
            self.encoder = TINY["transformer_encoder"]()
            self.out = nn.Linear(32, 2)

    model = Classifier()
    block_map = by_name(model)
    assert block_map.unexplained == ("out.weight", "out.bias")
    model.encoder.layers[0] = checkpoint_wrapper(model.encoder.layers[0])
    assert by_name(model) == block_map
    # The layers alone do not say it, nor does the container around layers of another kind.
    assert by_name(nn.ModuleList(model.encoder.layers)).unexplained
    model.encoder.layers[1] = VisionBlock(32, 4)
    assert set(by_name(model).unexplained) == set(by_name(model).names())


def test_language_model_of_a_multimodal_model() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    text = transformers.Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=97)
    vision = transformers.SiglipVisionConfig(**sizes, image_size=8, patch_size=4)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        block_map = by_name(transformers.Gemma3ForConditionalGeneration(config))
    inner = {name for name in block_map.names() if name.startswith("model.language_model.")}
    assert inner
    assert not inner & set(block_map.unexplained)
    assert rows(block_map, "model.language_model.layers.0.self_attn.k_proj.weight") == [("k", "all", 2)]


def test_a_model_inside_a_model_knows_better() -> None:
    """OPT's names for its decoder are llama's too: here it is a llama, with two heads of its own for keys."""
    model = TINY["opt"]()
    assert rows(by_name(model), "model.decoder.layers.0.self_attn.k_proj.weight") == [("k", "all", 4)]
    model.model.decoder = TINY["llama"]().model
    block_map = by_name(model)
    inner = [name for name in block_map.names() if name.startswith("model.decoder.")]
    assert {segment.source for name in inner for segment in block_map[name]} == {"llama"}
    assert rows(block_map, "model.decoder.layers.0.self_attn.k_proj.weight") == [("k", "all", 2)]
    assert rows(block_map, "model.decoder.norm.weight") == [("norm", "all", None)]


def adapted(family: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        # PEFT asks transformers for a name that is on its way out.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return get_peft_model(TINY[family](), LoraConfig(r=3, **options))


def lora(family: str, **options: Any) -> BlockMap:
    return by_name(adapted(family, **options), strict=True)


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("phi3", "model.layers.1.self_attn.qkv_proj"),
        ("phi3", "model.layers.1.mlp.gate_up_proj"),
        ("falcon-new", "transformer.h.1.self_attention.query_key_value"),
        ("bloom", "transformer.h.1.self_attention.query_key_value"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_b_proj"),
        ("bert", "encoder.layer.1.attention.self.query"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.v"),
        ("timm", "blocks.1.attn.qkv"),
        ("vit", "vit.embeddings.patch_embeddings.projection"),
    ],
)
def test_lora_is_cut_like_the_matrix(family: str, site: str) -> None:
    plain = rows(by_name(TINY[family]()), site + ".weight")
    block_map = lora(family, target_modules=[site.rpartition(".")[2]])
    site = f"base_model.model.{site}"
    assert rows(block_map, site + ".lora_B.default.weight") == plain
    assert rows(block_map, site + ".lora_A.default.weight") == [(plain[0][0], "all", None)]
    assert {s.source for s in block_map} == {family.partition("-")[0] + "+lora"}


def test_lora_of_torch_attention() -> None:
    # PEFT makes its frozen weights anew whenever modules are listed, so that a map of the whole cannot be built.
    families = Families(adapted("transformer_encoder", target_modules=["self_attn"]))
    site = "base_model.model.layers.1.self_attn."
    fused = families.segments(site + "lora_B.default.weight", (96, 3))
    assert fused is not None
    assert [(s.role, s.describe_rows(), s.heads) for s in fused] == [
        ("q", "0:32", 4),
        ("k", "32:64", 4),
        ("v", "64:96", 4),
    ]
    out = families.segments(site + "base_layer.out_proj.lora_B.default.weight", (32, 3))
    assert out is not None
    assert [s.role for s in out] == ["o"]


def test_lora_of_experts() -> None:
    """PEFT adapts parameters that are no module's weight: [experts x rank, in], [out, experts x rank]."""
    block_map = lora("mixtral", target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    site = "base_model.model.model.layers.1.mlp.experts."
    found = {tuple(map(tuple, rows(block_map, n))) for n in block_map.names() if n.startswith(site) and "lora_B" in n}
    assert found == {(("gate", "0:48", None), ("up", "48:96", None)), (("down", "all", None),)}
    assert {s.layer for s in block_map} == {0, 1}
