"""Overrides by glob: what they keep, what they replace, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import nn

from blocks.models import NanoGPT, causal, gpt2_config, llama_config, neox_config, rows
from sharpwise.blocks import BlockMap, Role


class Custom(nn.Module):
    """One layer of an architecture that no family knows: kv fused, 4 heads of 3 for q, 2 for k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"query": nn.Linear(8, 12), "kv": nn.Linear(8, 12)})])
        self.experts = nn.Parameter(torch.zeros(4, 6, 8))


KV = [
    {"role": "k", "length": 3, "stride": 6, "count": 2, "heads": 2},
    {"role": "v", "start": 3, "length": 3, "stride": 6, "count": 2, "heads": 2},
]


def test_a_whole_model_by_overrides() -> None:
    block_map = BlockMap.of(
        Custom(),
        strict=True,
        overrides={
            "embed.*": "tok_emb",
            "layers.*.query.*": {"role": "q", "heads": 4, "layer": 0},
            "layers.*.kv.*": KV,
            "experts": {"role": "up", "dim": 1, "stacked": True},
        },
    )
    assert rows(block_map, "embed.weight") == [("tok_emb", "all", None)]
    assert rows(block_map, "layers.0.query.weight") == [("q", "all", 4)]
    assert block_map["layers.0.query.bias"][0].layer == 0
    assert block_map["layers.0.query.bias"][0].bias
    interleaved = [("k", "2 x 3 from 0 every 6", 2), ("v", "2 x 3 from 3 every 6", 2)]
    assert rows(block_map, "layers.0.kv.weight") == rows(block_map, "layers.0.kv.bias") == interleaved
    (experts,) = block_map["experts"]
    assert (experts.copies, experts.rows, experts.numel) == (4, 6, 192)
    assert {s.source for s in block_map} == {"override"}
    assert BlockMap.from_json(block_map.to_json()) == block_map


def test_a_role_alone_keeps_what_the_family_found() -> None:
    model = causal(llama_config())
    name = "model.layers.1.self_attn.k_proj.weight"
    (was,) = BlockMap.of(model)[name]
    (now,) = BlockMap.of(model, overrides={"*.k_proj.*": "v"})[name]
    assert (now.role, now.heads, now.layer, now.source) == (Role.V, 2, 1, "override")
    assert (was.role, was.source) == (Role.K, "llama")
    assert BlockMap.of(model, overrides={"*.k_proj.*": "up"})[name][0].heads is None  # an MLP has no heads
    fused = BlockMap.of(causal(gpt2_config()), overrides={"*.attn.c_attn.*": "q"})
    assert rows(fused, "transformer.h.0.attn.c_attn.weight") == [("q", "all", None)]  # those of a third of it
    conv1d = BlockMap.of(causal(gpt2_config()), overrides={"*.mlp.c_fc.*": "gate"})
    assert conv1d["transformer.h.0.mlp.c_fc.weight"][0].dim == 1
    assert conv1d["transformer.h.0.mlp.c_fc.bias"][0].bias


def test_a_role_alone_makes_a_fused_matrix_one_piece() -> None:
    block_map = BlockMap.of(causal(neox_config()), overrides={"*.query_key_value.weight": "other"})
    assert rows(block_map, "gpt_neox.layers.0.attention.query_key_value.weight") == [("other", "all", None)]
    assert len(block_map["gpt_neox.layers.0.attention.query_key_value.bias"]) == 3
    assert block_map.unexplained == ()  # said by the user


def test_the_last_match_wins() -> None:
    overrides = {"*": "other", "*.weight": "up", "2.*": "head"}
    block_map = BlockMap.of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), overrides=overrides)
    assert [str(s.role) for s in block_map] == ["up", "other", "head", "head"]


def test_a_conv1d_of_an_unknown_model_keeps_its_dimension() -> None:
    model = nn.Sequential(causal(gpt2_config()).transformer.h[0].mlp.c_fc)
    (segment,) = BlockMap.of(model, overrides={"0.weight": {"role": "q", "heads": 4}})["0.weight"]
    assert (segment.dim, segment.rows) == (1, 32)


def test_tied_names_match_too() -> None:
    (segment,) = BlockMap.of(NanoGPT(), overrides={"lm_head.*": "head"})["transformer.wte.weight"]
    assert (segment.role, segment.tied) == (Role.HEAD, ("lm_head.weight",))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"layer.*.query.*": "q"},
            r"override 'layer\.\*\.query\.\*' matches none of 6 parameters; closest: layers\.0\.query\.",
        ),
        ({"LAYERS.*": "q"}, r"'LAYERS\.\*' matches none of 6 parameters; .*Globs match whole names"),
        ({"zzz": "q"}, r"names are experts, embed\.weight, layers\.0\.query\.weight, .*"),
        (
            {"embed.weight": "embedding"},
            r"override 'embed.weight': unknown role 'embedding' \(did you mean 'tok_emb'\?\); roles are tok_emb,",
        ),
        ({"embed.weight": {"heads": 2}}, r"got \{'heads': 2\} without a role; roles are tok_emb"),
        ({"embed.weight": {"role": "Q"}}, r"unknown role 'Q' \(did you mean 'q'\?\); roles are"),
        ({"embed.weight": {"role": 3}}, r"role=3 is not a string"),
        (
            {"embed.weight": {"role": "q", "head": 2}},
            r"unknown field 'head' \(did you mean 'heads'\?\); fields are role, layer, dim, .*heads",
        ),
        ({"embed.weight": {"role": "q", "name": "x"}}, r"unknown field 'name'"),
        ({"embed.weight": {"role": "q", "heads": "2"}}, r"heads='2' is not a whole number or None"),
        ({"embed.weight": {"role": "q", "heads": True}}, r"heads=True is not a whole number or None"),
        (
            {"embed.weight": {"role": "q", "heads": 3}},
            r"'embed.weight': embed.weight: 10 q rows do not divide into 3 heads",
        ),
        ({"embed.weight": {"role": "q", "dim": 2}}, r"dim=2 is not a dimension of shape \(10, 8\)"),
        ({"embed.weight": {"role": "q", "start": 5, "length": 6}}, r"start=5 length=6 .* do not fit 10 output rows"),
        ({"embed.weight": {"role": "q", "length": 5}}, r"embed.weight: rows 5:10 of 10 belong to no segment"),
        ({"embed.weight": [{"role": "q"}, {"role": "k"}]}, r"embed.weight: rows 0:10 belong to two segments"),
        (
            {"experts": {"role": "up", "stacked": True}},
            r"a stacked parameter has its copies along dimension 0, got dim=0",
        ),
        ({"embed.weight": []}, r"got \[\], expected a role such as 'up', a mapping such as"),
        ({"embed.weight": ["q", "k"]}, r"got \['q', 'k'\], expected a role"),
        ({"embed.weight": None}, r"got None, expected a role"),
    ],
)
def test_what_overrides_refuse(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockMap.of(Custom(), overrides=overrides)


def test_overrides_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"overrides: got list, expected a mapping from glob to role"):
        BlockMap.of(Custom(), overrides=["embed"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"overrides: got the glob 3, expected a string"):
        BlockMap.of(Custom(), overrides={3: "up"})  # type: ignore[dict-item]


def test_a_glob_that_matches_frozen_parameters_only() -> None:
    model = Custom()
    model.embed.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'embed.\*' matches frozen parameters only.*include_frozen=True"):
        BlockMap.of(model, overrides={"embed.*": "tok_emb"})
    assert "embed.weight" in BlockMap.of(model, overrides={"embed.*": "tok_emb"}, include_frozen=True)
