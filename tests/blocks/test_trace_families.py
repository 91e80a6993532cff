"""Names and dataflow know nothing of each other, and say the same of every family."""

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import sharpwise
from blocks.models import TINY
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.blocks.trace import trace
from sharpwise.probes import UpdateSize, sharpness, spectrum

# Neither has a config that would tell what its forward takes.
EXAMPLES: dict[str, Any] = {"timm": torch.rand(1, 3, 8, 8), "transformer_encoder": torch.rand(2, 5, 32)}


def said(segment: Segment) -> dict[str, Any]:
    fields = ("role", "layer", "dim", "start", "length", "stride", "count", "heads", "stacked", "bias")
    return {field: getattr(segment, field) for field in fields}


@pytest.mark.parametrize("family", TINY)
def test_dataflow_alone_says_what_the_names_say(family: str) -> None:
    model = TINY[family]()
    by_name = BlockMap.of(model, trace=False)
    traced = trace(model, EXAMPLES.get(family))
    assert list(traced.segments) == list(by_name.names())
    for name in by_name.names():
        if name not in traced.unused:
            assert [said(s) for s in traced.segments[name]] == [said(s) for s in by_name[name]], name
    assert set(traced.unused) <= {"vit.embeddings.mask_token"}  # for a task that nothing is trained on here


@pytest.mark.parametrize("family", TINY)
def test_both_together_are_the_map_by_name(family: str) -> None:
    model = TINY[family]()
    assert BlockMap.of(model, example=EXAMPLES.get(family), trace=True) == BlockMap.of(model, trace=False)


def test_gpt2_124m() -> None:
    """The size that the cost is stated for; benchmarks/architectures.py times it."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0))
    traced = trace(model)
    assert traced.attentions == 12
    assert [(s.role, s.heads, s.length) for s in traced.segments["transformer.h.11.attn.c_attn.weight"]] == [
        (Role.Q, 12, 768),
        (Role.K, 12, 768),
        (Role.V, 12, 768),
    ]
    assert traced.segments["transformer.wte.weight"][0].role is Role.TOK_EMB


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", [name for name in TINY if name not in EXAMPLES and name != "nanogpt"])
def test_adapters_over_every_family(family: str, dora: bool) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=dora)
    try:
        with warnings.catch_warnings(action="ignore"):  # of Conv1D, and of patterns that match nothing
            model = get_peft_model(TINY[family](), config)
    except ValueError as error:
        pytest.skip(f"peft: {error}")
    by_name = BlockMap.of(model, trace=False)
    assert BlockMap.of(model, trace=True).names() == by_name.names()
    traced = trace(model).segments
    for name in by_name.names():
        if ".self_attn." in name and ".lora_" in name and "magnitude" not in name:
            said = {s.role for s in traced[name]}
            if (
                ".kv_a_proj_with_mqa." in name or ".kv_b_proj." in name
            ):  # a latent that two factors read: not proven, and nothing else is said
                said = said - {Role.OTHER} or {Role.K}
            assert said == {s.role for s in by_name[name]}, name


class SwappedAttention(nn.Module):
    """Takes its keys for queries, whatever they are called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = inner.q_proj, inner.k_proj, inner.v_proj, inner.o_proj
        self.head_dim = 16

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        made = (f(hidden_states).unflatten(-1, (-1, self.head_dim)) for f in (self.k_proj, self.q_proj, self.v_proj))
        q, k, v = (x.transpose(1, 2) for x in made)
        out = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def honest() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 97, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **sizes))


def deceiving() -> nn.Module:
    model: Any = honest()
    layer = model.model.layers[0]
    layer.self_attn = SwappedAttention(layer.self_attn)
    return model


def test_a_disagreement_raises_and_shows_both_sides() -> None:
    BlockMap.of(honest())  # of the same class, config and shapes: it does not speak for the other
    model = deceiving()
    with pytest.raises(ValueError, match=r"names and dataflow disagree about 2 parameters") as caught:
        BlockMap.of(model)
    said = str(caught.value)
    assert "q_proj.weight: by name (llama) q all (4 heads); by dataflow k all (4 heads)" in said
    assert "k_proj.weight: by name (llama) k all (4 heads); by dataflow q all (4 heads)" in said
    assert "overrides" in said and "trace=False" in said


@pytest.mark.parametrize(
    ("call", "who"),
    [
        (lambda model: sharpwise.AdamMini(model), "AdamMini"),
        (lambda model: spectrum(model), "spectrum"),
        (lambda model: UpdateSize(model), "UpdateSize"),
        (lambda model: sharpness(model, torch.arange(8).view(1, 8)), "sharpness"),
    ],
)
def test_what_takes_blocks_names_its_own_options(call: Any, who: str) -> None:
    """What `BlockMap.of` calls overrides and trace are no arguments of these."""
    model = deceiving()
    with pytest.raises(ValueError, match=rf"{who}: names and dataflow disagree about 2 parameters") as caught:
        call(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    last = str(caught.value).splitlines()[-1]
    assert last == (
        f"Say which is right, by name or glob: blocks={{'{name}': 'q'}}; or go by names alone: "
        "blocks=BlockMap.of(model, trace=False)"
    )
    if who == "AdamMini":
        sharpwise.AdamMini(model, blocks=BlockMap.of(model, trace=False))
        sharpwise.AdamMini(model, blocks={name: "q", name.replace("q_proj", "k_proj"): "k"})
    elif who == "spectrum":
        spectrum(model, blocks=BlockMap.of(model, trace=False))
        spectrum(model, blocks={name: "q", name.replace("q_proj", "k_proj"): "k"})


def test_who_decides_in_a_disagreement() -> None:
    model = deceiving()
    q = "model.layers.0.self_attn.q_proj.weight"
    assert BlockMap.of(model, trace=False)[q][0].role is Role.Q
    decided = BlockMap.of(model, overrides={"*.q_proj.*": "k", "*.k_proj.*": "q"})
    assert (decided[q][0].role, decided[q][0].source) == (Role.K, "override")


class Unheard(nn.Module):
    """Of no family, and no name says anything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(50, 16), nn.Linear(16, 48)
        self.c, self.d, self.e, self.f = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 50)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        x = self.a(numbers)
        k, v, q = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.b(x).chunk(3, -1))
        x = x + self.c(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.f(x + self.e(self.d(x).relu()))


def test_dataflow_alone_where_no_family_knows_the_model() -> None:
    block_map = BlockMap.of(Unheard(), strict=True)
    assert {s.source for s in block_map} == {"trace"}
    assert [(s.role, s.describe_rows(), s.heads) for s in block_map["b.bias"]] == [
        (Role.K, "0:16", 4),
        (Role.V, "16:32", 4),
        (Role.Q, "32:48", 4),
    ]
    assert [block_map[f"{name}.weight"][0].role for name in "acdef"] == ["tok_emb", "o", "up", "down", "head"]
    assert BlockMap.from_json(block_map.to_json()) == block_map
    assert set(BlockMap.of(Unheard(), trace=False).unexplained) == set(block_map.names())


def test_a_model_known_by_name_that_cannot_be_run_is_mapped_by_name(caplog: pytest.LogCaptureFixture) -> None:
    model = TINY["llama"]()
    model.model.layers[0].mlp.forward = None  # type: ignore[assignment]
    assert BlockMap.of(model) == BlockMap.of(TINY["llama"](), trace=False)
    with pytest.raises(ValueError, match=r"trace: the forward of LlamaForCausalLM raises with a made-up example"):
        BlockMap.of(model, trace=True)


def test_a_model_without_attention_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with caplog.at_level("WARNING", "sharpwise.blocks"):
        assert BlockMap.of(model, trace=True)["0.weight"][0].role is Role.TOK_EMB
    assert [r.getMessage()[:46] for r in caplog.records] == ["Sequential computes no attention with this inp"]
