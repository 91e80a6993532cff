"""The same map whatever a model is wrapped in, and PEFT's adapters."""

import os
import warnings
from typing import Any

import lightning
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from blocks.models import NanoGPT, causal, gpt2_config, headless, llama_config, neox_config, roles, rows
from sharpwise.blocks import BlockMap, Role, canonical_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wte.weight", "wte.weight"),
        ("weight", "weight"),
        ("_orig_mod.wte.weight", "wte.weight"),
        ("module.wte.weight", "wte.weight"),
        ("_orig_mod.module.wte.weight", "wte.weight"),
        ("module._orig_mod.wte.weight", "wte.weight"),
        ("_fsdp_wrapped_module.h.0._fsdp_wrapped_module.ln.bias", "h.0.ln.bias"),
        ("h.0._checkpoint_wrapped_module._orig_mod.ln.bias", "h.0.ln.bias"),
        ("model.module.weight", "model.module.weight"),  # deeper down it is a name like any other
        ("module.weight", "weight"),
        ("module", "module"),
        ("_orig_mod.module", "module"),
        ("base_model.model.wte.weight", "base_model.model.wte.weight"),
    ],
)
def test_canonical_name(name: str, expected: str) -> None:
    assert canonical_name(name) == expected
    assert canonical_name(expected) == expected or expected == "module.weight"


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")  # the wrapper alone, no compiler to load


def test_compiled() -> None:
    for model in (causal(gpt2_config()), causal(llama_config()), NanoGPT()):
        plain = BlockMap.of(model, strict=True)
        assert BlockMap.of(compiled(model), strict=True) == plain


def test_compiled_layers() -> None:
    model, plain = causal(neox_config()), BlockMap.of(causal(neox_config()))
    model.gpt_neox.layers[0] = compiled(model.gpt_neox.layers[0])
    model.gpt_neox.layers[1].compile(backend="eager")
    assert BlockMap.of(model, strict=True) == plain
    nano, plain = NanoGPT(), BlockMap.of(NanoGPT())
    nano.transformer["h"][0] = compiled(nano.transformer["h"][0])
    nano.transformer["h"][1].mlp = compiled(nano.transformer["h"][1].mlp)
    nano.transformer["h"][1].attn.c_attn = compiled(nano.transformer["h"][1].attn.c_attn)
    assert BlockMap.of(nano, strict=True) == plain


def test_compiled_backbone() -> None:
    model, plain = causal(llama_config()), BlockMap.of(causal(llama_config()))
    model.model = compiled(model.model)
    assert BlockMap.of(model, strict=True) == plain


def test_checkpointed_layers() -> None:
    for make in (lambda: NanoGPT().transformer, lambda: headless(gpt2_config())):
        model, plain = make(), BlockMap.of(make())
        for i, block in enumerate(model["h"] if isinstance(model, nn.ModuleDict) else model.h):
            (model["h"] if isinstance(model, nn.ModuleDict) else model.h)[i] = checkpoint_wrapper(block)
        assert BlockMap.of(model, strict=True) == plain


def test_data_parallel(tmp_path: Any) -> None:
    store = torch.distributed.FileStore(os.fspath(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = AutoModelForCausalLM.from_config(gpt2_config())
        plain = BlockMap.of(model, strict=True)
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert BlockMap.of(wrapped, strict=True) == plain
        assert BlockMap.of(compiled(wrapped), strict=True) == plain
        # FSDP2 replaces the classes of the modules, Conv1D's too, and the parameters by DTensors.
        sharded = AutoModelForCausalLM.from_config(gpt2_config())
        for block in sharded.transformer.h:
            fully_shard(block.attn.c_attn)
            fully_shard(block)
        fully_shard(sharded)
        assert BlockMap.of(sharded, strict=True) == plain
    finally:
        torch.distributed.destroy_process_group()


def test_lightning_module_with_a_model_inside() -> None:
    class Lit(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.temperature = nn.Parameter(torch.ones(()))

    for model in (causal(gpt2_config()), causal(llama_config()), NanoGPT(), compiled(causal(neox_config()))):
        inner, block_map = BlockMap.of(model), BlockMap.of(Lit(model))
        assert block_map.unexplained == ("temperature",)
        assert {n.removeprefix("model."): r for n, r in roles(block_map).items() if n != "temperature"} == roles(inner)
        assert [s.heads for s in block_map][1:] == [s.heads for s in inner]


def test_names_that_meet_once_wrappers_are_off() -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"two parameters are called 'weight' once wrapper prefixes are off"):
        BlockMap.of(model)


def peft(model: Any, targets: list[str], **options: Any) -> Any:
    with warnings.catch_warnings():
        # PEFT asks transformers for a name that is on its way out.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return get_peft_model(model, LoraConfig(r=3, target_modules=targets, **options))


def test_lora_has_the_role_of_its_matrix() -> None:
    block_map = BlockMap.of(peft(causal(llama_config()), ["q_proj", "k_proj", "up_proj", "lm_head"]), strict=True)
    layer = "base_model.model.model.layers.0."
    assert rows(block_map, layer + "self_attn.q_proj.lora_A.default.weight") == [("q", "all", None)]
    assert rows(block_map, layer + "self_attn.q_proj.lora_B.default.weight") == [("q", "all", 4)]
    assert rows(block_map, layer + "self_attn.k_proj.lora_B.default.weight") == [("k", "all", 2)]
    assert rows(block_map, layer + "mlp.up_proj.lora_A.default.weight") == [("up", "all", None)]
    assert rows(block_map, "base_model.model.lm_head.lora_B.default.weight") == [("head", "all", None)]
    assert {s.source for s in block_map} == {"llama+lora"}
    assert {s.layer for s in block_map} == {0, 1, None}


def test_lora_of_a_fused_matrix_is_cut_like_its_output() -> None:
    gpt2 = BlockMap.of(peft(causal(gpt2_config()), ["c_attn"], fan_in_fan_out=True), strict=True)
    site = "base_model.model.transformer.h.1.attn.c_attn."
    assert rows(gpt2, site + "lora_A.default.weight") == [("q", "all", None)]
    assert rows(gpt2, site + "lora_B.default.weight") == [("q", "0:8", 2), ("k", "8:16", 2), ("v", "16:24", 2)]
    # The adapted matrix is a Conv1D, its adapters are Linear.
    assert {s.dim for s in gpt2} == {0}
    neox = BlockMap.of(peft(causal(neox_config()), ["query_key_value"], lora_bias=True), strict=True)
    site = "base_model.model.gpt_neox.layers.0.attention.query_key_value."
    interleaved = [(r, f"3 x 4 from {i} every 12", 3) for r, i in (("q", 0), ("k", 4), ("v", 8))]
    assert rows(neox, site + "lora_B.default.weight") == interleaved
    assert rows(neox, site + "lora_B.default.bias") == interleaved
    assert all(s.bias for s in neox[site + "lora_B.default.bias"])
    nano = BlockMap.of(peft(NanoGPT(), ["c_attn"]), strict=True)
    site = "base_model.model.transformer.h.1.attn.c_attn."
    assert rows(nano, site + "lora_B.default.weight") == [("q", "0:8", 2), ("k", "8:16", 2), ("v", "16:24", 2)]


def test_frozen_weights_below_adapters() -> None:
    model = peft(causal(gpt2_config()), ["c_attn"], fan_in_fan_out=True, bias="all")
    site = "base_model.model.transformer.h.0.attn.c_attn.base_layer."
    trained = BlockMap.of(model, strict=True)
    assert site + "weight" not in trained
    assert [s.source for s in trained[site + "bias"]] == ["gpt2"] * 3
    everything = BlockMap.of(model, strict=True, include_frozen=True)
    assert [s.dim for s in everything[site + "weight"]] == [1, 1, 1]
    assert rows(everything, site + "weight") == [("q", "0:8", 2), ("k", "8:16", 2), ("v", "16:24", 2)]


def test_dora_and_embedding_adapters() -> None:
    block_map = BlockMap.of(
        peft(AutoModelForCausalLM.from_config(llama_config()), ["q_proj", "embed_tokens"], use_dora=True), strict=True
    )
    site = "base_model.model.model.layers.0.self_attn.q_proj."
    assert rows(block_map, site + "lora_magnitude_vector.default.weight") == [("q", "all", 4)]
    site = "base_model.model.model.embed_tokens."
    (tokens,) = block_map[site + "lora_embedding_A.default"]
    assert (tokens.role, tokens.dim, tokens.shape) == (Role.TOK_EMB, 1, (3, 11))  # its columns are the tokens
    assert rows(block_map, site + "lora_embedding_B.default") == [("tok_emb", "all", None)]


def test_modules_that_peft_trains_whole() -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(llama_config(num_labels=2, pad_token_id=0))
    block_map = BlockMap.of(peft(model, ["q_proj"], task_type="SEQ_CLS"), strict=True)
    (head,) = block_map["base_model.model.score.modules_to_save.default.weight"]
    assert (head.role, head.source) == (Role.HEAD, "llama")
    lm = AutoModelForCausalLM.from_config(llama_config())
    block_map = BlockMap.of(peft(lm, ["q_proj"], trainable_token_indices=[1, 2]), strict=True)
    delta = [name for name in block_map.names() if "trainable_tokens_delta" in name]
    assert [rows(block_map, name) for name in delta] == [[("tok_emb", "all", None)]]


def test_two_adapters() -> None:
    model = peft(causal(llama_config()), ["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    found = roles(BlockMap.of(model, strict=True))
    assert found["base_model.model.model.layers.0.self_attn.v_proj.lora_B.second.weight"] == "v"
    assert found["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] == "q"


def test_adapters_of_an_unknown_model_stay_unknown() -> None:
    model = peft(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0"])
    block_map = BlockMap.of(model)
    assert set(block_map.unexplained) == set(block_map.names())
