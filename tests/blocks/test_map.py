"""BlockMap: exact partitions, what is left out, the table, JSON, and what it says about bad input."""

import copy
import json
import logging
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blocks.models import NanoGPT, causal, gpt2_config, llama_config, neox_config, rows
from sharpwise.blocks import BlockMap, BlockType, Role, Segment
from sharpwise.blocks.names import collapse, number_ranges


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@st.composite
def segment_lists(draw: st.DrawFn) -> list[Segment]:
    """Segments of one parameter that may or may not partition it."""
    size = draw(st.integers(0, 12))
    dim = draw(st.sampled_from([0, 1]))
    shape = (size, 2) if dim == 0 else (2, size)
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 3))
        length = draw(st.integers(0, max(size // count, 0)))
        # stride 0 means `length` to a Segment, so an empty range cannot repeat in place
        stride = draw(st.integers(max(length, 1), max(length, size, 1)))
        start = draw(st.integers(0, size))
        if start + (count - 1) * stride + length <= size:
            parts.append(Segment("w", shape, dim=dim, start=start, length=length, stride=stride, count=count))
    return parts or [Segment("w", shape, dim=dim)]


@given(segment_lists())
def test_segments_partition_exactly_or_raise(segments: list[Segment]) -> None:
    size = segments[0].output_size
    covered = sorted(row for segment in segments for row in segment.row_index().tolist())
    if covered == list(range(size)):
        block_map = BlockMap(segments)
        assert sum(s.numel for s in block_map) == 2 * size
        assert BlockMap.from_json(block_map.to_json()) == block_map
        assert [s.start for s in block_map] == sorted(s.start for s in segments)
    else:
        with pytest.raises(ValueError, match=r"w: rows \d+:\d+ .*(belong to no segment|belong to two segments)"):
            BlockMap(segments)


@st.composite
def partitions(draw: st.DrawFn) -> list[Segment]:
    """Segments that do partition: heads of interleaved pieces, then contiguous pieces."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    heads = draw(st.integers(1, 4))
    interleaved = heads * sum(sizes)
    tail = draw(st.lists(st.integers(1, 5), max_size=3))
    shape = (interleaved + sum(tail), 3)
    parts, at = [], 0
    for size in sizes:
        parts.append(Segment("w", shape, start=at, length=size, stride=sum(sizes), count=heads, heads=heads))
        at += size
    at = interleaved
    for size in tail:
        parts.append(Segment("w", shape, start=at, length=size))
        at += size
    return draw(st.permutations(parts))


@given(partitions())
def test_interleaved_segments_partition(segments: list[Segment]) -> None:
    block_map = BlockMap(segments)
    assert sum(s.rows for s in block_map) == segments[0].output_size
    assert BlockMap.from_json(block_map.to_json()) == block_map
    if len(segments) > 1:
        with pytest.raises(ValueError, match=r"belong to no segment"):
            BlockMap(segments[1:])
        with pytest.raises(ValueError, match=r"belong to two segments"):
            BlockMap([*segments, segments[0]])


@pytest.mark.parametrize("config", [gpt2_config, llama_config, neox_config])
def test_every_trainable_element_is_in_one_segment(config: Any) -> None:
    model = causal(config())
    block_map = BlockMap.of(model)
    assert sum(s.numel for s in block_map) == sum(p.numel() for p in model.parameters())
    assert block_map.names() == tuple(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        seen = torch.zeros(parameter.shape, dtype=torch.int)
        for segment in block_map[name]:
            seen.index_add_(
                segment.dim, segment.row_index(), torch.ones_like(seen).narrow(segment.dim, 0, segment.rows)
            )
        assert (seen == 1).all()


def test_segments_that_disagree() -> None:
    half = Segment("w", (4, 2), length=2, role=Role.Q)
    with pytest.raises(ValueError, match=r"w: segments disagree: shape \(4, 2\) dim=0 .* shape \(6, 2\)"):
        BlockMap([half, Segment("w", (6, 2), start=2, length=4)])
    with pytest.raises(ValueError, match=r"w: some of its segments have a source and some do not"):
        BlockMap([half, Segment("w", (4, 2), start=2, length=2, source="override")])
    with pytest.raises(ValueError, match=r"w: rows 2:4 of 4 belong to no segment; cover every row"):
        BlockMap([half])
    with pytest.raises(ValueError, match=r"w: rows 1:2 belong to two segments"):
        BlockMap([half, Segment("w", (4, 2), start=1, length=3)])


def test_frozen_parameters_are_left_out() -> None:
    model = causal(gpt2_config())
    model.transformer.wte.requires_grad_(False)
    assert "transformer.wte.weight" not in BlockMap.of(model)
    assert rows(BlockMap.of(model, include_frozen=True), "transformer.wte.weight") == [("tok_emb", "all", None)]
    whole = BlockMap.of(model, include_frozen=True)
    assert {s.name for s in whole if s.frozen} == {"transformer.wte.weight"}
    assert BlockMap.from_json(whole.to_json()) == whole
    assert "frozen" not in BlockMap.of(model).to_json()
    nothing = BlockMap.of(model.requires_grad_(False), strict=True)
    assert (len(nothing), nothing.names(), str(nothing.table()).split()[0]) == (0, (), "name")
    assert BlockMap.from_json(nothing.to_json()) == nothing


def test_empty_and_scalar_parameters() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(()))
    model.none = nn.Parameter(torch.ones(0, 5))
    model.flat = nn.Parameter(torch.ones(5, 0))
    block_map = BlockMap.of(model)
    assert {s.name: (s.shape, s.rows, s.numel) for s in block_map} == {
        "scale": ((), 1, 1),
        "none": ((0, 5), 0, 0),
        "flat": ((5, 0), 5, 0),
    }
    assert BlockMap.from_json(block_map.to_json()) == block_map
    assert next(iter(block_map.table()))["shape"] == "scalar"


def test_unknown_modules_are_other_and_listed_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sharpwise.blocks"):
        block_map = BlockMap.of(mlp())
    assert [r.getMessage() for r in caplog.records] == [
        "4 of 4 parameters have no known role: {0,2}.weight, {0,2}.bias "
        "(trace: no example can be made up for Sequential: its forward needs 'input', which cannot be guessed; "
        "it takes example=input); "
        "BlockMap.of(model, example=batch) takes a batch of yours",
    ]
    assert block_map.unexplained == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert {(s.role, s.source) for s in block_map} == {(Role.OTHER, "")}
    assert [s.bias for s in block_map] == [False, True, False, True]
    caplog.clear()
    with caplog.at_level(logging.INFO, "sharpwise.blocks"):
        assert BlockMap.of(NanoGPT()).unexplained == ()
    assert caplog.records == []


def test_strict() -> None:
    says = r"4 parameters have no known role: \{0,2\}\.weight, .*example=batch; .*"
    message = says + r"overrides=\{'0\.weight': 'up'\}.*strict=False"
    with pytest.raises(ValueError, match=message):
        BlockMap.of(mlp(), strict=True)
    assert BlockMap.of(mlp(), strict=True, overrides={"0.*": "up", "2.*": "down"}).unexplained == ()


def test_unknown_takes_names_alone() -> None:
    named = [("_orig_mod.a.weight", torch.ones(3, 2)), ("a.bias", torch.ones(3))]
    block_map = BlockMap.unknown(named)
    assert block_map.names() == block_map.unexplained == ("a.weight", "a.bias")
    assert [s.block_type for s in block_map] == [BlockType.OTHER] * 2
    with pytest.raises(ValueError, match=r"a.weight: rows 0:3 belong to two segments"):
        BlockMap.unknown([named[0], ("a.weight", torch.ones(3, 2))])


def test_what_is_not_a_model() -> None:
    with pytest.raises(TypeError, match=r"got dict, expected a torch.nn.Module; .*BlockMap.unknown\(named\)"):
        BlockMap.of({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0.weight: a lazy parameter has no shape yet; run the model once on a batch"):
        BlockMap.of(nn.Sequential(nn.LazyLinear(3)))


def test_lookups() -> None:
    block_map = BlockMap.of(causal(gpt2_config()))
    name = "transformer.h.0.attn.c_attn.bias"
    assert name in block_map
    assert "lm_head.weight" not in block_map
    assert block_map[name] == tuple(s for s in block_map if s.name == name)
    assert len(block_map) == len(block_map.segments) == 28 + 2 * 4
    with pytest.raises(
        KeyError, match=r"no parameter 'transformer.h.0.attn.c_atn.bias' .*closest: transformer.h.0.attn"
    ):
        block_map["transformer.h.0.attn.c_atn.bias"]
    part = block_map.subset(["transformer.ln_f.weight", name])
    assert part.names() == (name, "transformer.ln_f.weight")
    with pytest.raises(KeyError, match=r"no parameter 'nope'"):
        block_map.subset([name, "nope"])
    assert repr(part) == "BlockMap(2 parameters, 4 segments: q, k, v, norm)"


@pytest.mark.parametrize(
    ("segment", "expected"),
    [
        (Segment("w", ()), False),
        (Segment("w", (6,)), False),
        (Segment("w", (6, 4)), True),
        (Segment("w", (6, 4, 3)), True),  # a convolution
        (Segment("w", (6, 4), bias=True), False),
        (Segment("w", (2, 6), dim=1, stacked=True), False),  # vectors of two experts
        (Segment("w", (2, 6), dim=1, stacked=True, bias=True), False),
        (Segment("w", (2, 6, 4), dim=1, stacked=True), True),
        (Segment("w", (2, 6, 4), dim=2, stacked=True), True),
    ],
)
def test_what_is_a_matrix(segment: Segment, expected: bool) -> None:
    assert segment.is_matrix == expected


def test_equality_copy_and_pickle() -> None:
    block_map = BlockMap.of(causal(neox_config()))
    assert block_map == BlockMap.of(causal(neox_config()))
    assert block_map == copy.deepcopy(block_map) == pickle.loads(pickle.dumps(block_map))
    assert hash(block_map) == hash(copy.deepcopy(block_map))
    assert block_map != BlockMap.of(causal(neox_config(num_hidden_layers=1)))
    assert block_map != block_map.segments


def test_table() -> None:
    lines = str(BlockMap.of(causal(gpt2_config(n_layer=1))).subset(["transformer.h.0.attn.c_attn.weight"]).table())
    assert [line.split("  ") for line in re.sub(r" {2,}", "  ", lines).splitlines()] == [
        ["name", "shape", "role", "type", "layer", "rows", "heads", "source"],
        ["transformer.h.0.attn.c_attn.weight", "8 x 24", "q", "QK", "0", "0:8", "2", "gpt2"],
        ["transformer.h.0.attn.c_attn.weight", "8 x 24", "k", "QK", "0", "8:16", "2", "gpt2"],
        ["transformer.h.0.attn.c_attn.weight", "8 x 24", "v", "VO", "0", "16:24", "2", "gpt2"],
    ]


@pytest.mark.parametrize("config", [gpt2_config, llama_config, neox_config])
def test_json_round_trip(config: Any, tmp_path: Path) -> None:
    block_map = BlockMap.of(causal(config()))
    assert BlockMap.from_json(block_map.to_json()) == block_map
    block_map.save(tmp_path / "blocks.json")
    assert BlockMap.load(tmp_path / "blocks.json") == block_map
    assert BlockMap.load(str(tmp_path / "blocks.json")) == block_map


def test_json_is_one_segment_per_line_without_defaults() -> None:
    block_map = BlockMap.of(causal(gpt2_config(n_layer=1))).subset(
        ["transformer.wte.weight", "transformer.h.0.attn.c_attn.bias"]
    )
    assert block_map.to_json().splitlines() == [
        '{"version":1,"segments":[',
        '{"name":"transformer.wte.weight","shape":[11,8],"role":"tok_emb","source":"gpt2","tied":["lm_head.weight"]},',
        *(
            f'{{"name":"transformer.h.0.attn.c_attn.bias","shape":[24],"role":"{role}","layer":0,{start}"length":8,'
            f'"heads":2,"bias":true,"source":"gpt2"}}{end}'
            for role, start, end in (("q", "", ","), ("k", '"start":8,', ","), ("v", '"start":16,', ""))
        ),
        "]}",
    ]


def test_json_keeps_stacked_experts() -> None:
    expert = Segment("experts.up", (4, 6, 3), Role.UP, dim=1, stacked=True, source="override")
    assert BlockMap.from_json(BlockMap([expert]).to_json()).segments == (expert,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"block map: not JSON \(.*line 1 column 2.*\); expected what BlockMap.to_json\(\) writes"),
        ("[]", r"expected an object with 'version' and 'segments'"),
        ('{"segments":[]}', r"expected an object with 'version' and 'segments'"),
        ('{"version":2,"segments":[]}', r"version 2, this sharpwise reads version 1; build the map anew"),
        ('{"version":1}', r"'segments' is None, expected a list"),
        ('{"version":1,"segments":[3]}', r"segment 0: got 3, expected an object with a name"),
        ('{"version":1,"segments":[{"shape":[2]}]}', r"segment 0: got .* expected an object with a name"),
        ('{"version":1,"segments":[{"name":"w"}]}', r"segment 0 \(w\): shape None is not a list of sizes"),
        ('{"version":1,"segments":[{"name":"w","shape":[2,-1]}]}', r"shape \[2, -1\] is not a list of sizes"),
        (
            '{"version":1,"segments":[{"name":"w","shape":[2],"rule":1}]}',
            r"unknown field 'rule' \(did you mean 'role'\?\); fields are role, layer",
        ),
        (
            '{"version":1,"segments":[{"name":"w","shape":[2],"role":"query"}]}',
            r"unknown role 'query' \(did you mean 'q'\?\); roles are tok_emb",
        ),
        ('{"version":1,"segments":[{"name":"w","shape":[2],"dim":true}]}', r"dim=True is not a whole number"),
        ('{"version":1,"segments":[{"name":"w","shape":[2],"dim":1}]}', r"dim=1 is not a dimension of shape \(2,\)"),
        ('{"version":1,"segments":[{"name":"w","shape":[2],"heads":"2"}]}', r"heads='2' is not a whole number or None"),
        ('{"version":1,"segments":[{"name":"w","shape":[2],"tied":"x"}]}', r"tied 'x' is not a list of names"),
        ('{"version":1,"segments":[{"name":"w","shape":[2],"source":1}]}', r"source 1 is not a string"),
        ('{"version":1,"segments":[{"name":"w","shape":[2],"frozen":1}]}', r"frozen 1 is not true or false"),
        ('{"version":1,"segments":[{"name":"w","shape":[4],"length":2}]}', r"w: rows 2:4 of 4 belong to no segment"),
        ('{"version":1,"segments":[{"name":"w","shape":[4],"count":2}]}', r"do not fit 4 output rows"),
    ],
)
def test_json_that_is_not_a_block_map(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        BlockMap.from_json(text)
    file = tmp_path / "blocks.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"blocks.json: .*"):
        BlockMap.load(file)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.json"):
        BlockMap.load(tmp_path / "nowhere.json")


def test_a_segment_that_moved_in_the_file_is_found(tmp_path: Path) -> None:
    data = json.loads(BlockMap.of(causal(gpt2_config())).to_json())
    fused = [s for s in data["segments"] if s["name"] == "transformer.h.0.attn.c_attn.weight"]
    fused[1]["start"] += 1
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn.weight: rows 8:9 of 24 belong to no segment"):
        BlockMap.from_json(json.dumps(data))


def test_collapsed_names() -> None:
    assert collapse(["a.0.b.1.w", "a.0.b.2.w", "x", "a.1.b.1.w"]) == ["a.{0..1}.b.1.w", "a.0.b.2.w", "x"]
    assert collapse(["10.w", "h2.w"]) == ["10.w", "h2.w"]
    assert number_ranges([4, 2, 1, 9]) == "{1..2,4,9}"


def test_a_map_of_segments_by_hand() -> None:
    by_hand = BlockMap(
        [
            Segment("qkv", (6, 2), Role.V, start=4, length=2, heads=1, source="override"),
            Segment("other", (2,), Role.NORM, source="override"),
            Segment("qkv", (6, 2), Role.Q, length=4, heads=2, source="override"),
        ]
    )
    assert [(s.name, s.role) for s in by_hand] == [("qkv", Role.Q), ("qkv", Role.V), ("other", Role.NORM)]
    assert replace(by_hand.segments[0], layer=1) not in by_hand.segments
