"""Not what we believe about the layouts but what the models do: rows are known by what they change.

Add 1 to one output row of a q, k or v matrix and look at what goes into the output projection, [token, head, size]:

- a row of v, at all tokens: the weights of attention sum to 1, so that each head that it serves changes by exactly 1 in
  one place, at every token; no row of q or k does that;
- a row of q, at token 1: that token changes, in one head; no other token does;
- a row of k, at token 1: other tokens change too, in all heads that it serves.

One element of a batch tries one row.
"""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blocks.models import TINY
from sharpwise.blocks import BlockMap, Role, Segment

TOKENS = 5
HEADS = 4
CLOSE = 1e-6  # some compute their softmax in float32
Change = tuple[str, frozenset[int]]


def double(family: str) -> Any:
    model = TINY[family]().double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the other has no float64
    return model


def run(model: Any, batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randperm(97, generator=generator)[:TOKENS].expand(batch, -1)
    image = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64).expand(batch, -1, -1, -1)
    names = inspect.signature(model.forward).parameters
    if "pixel_values" in names:
        model(pixel_values=image)
    elif "images" in names:
        model(image)
    elif "decoder_input_ids" in names:
        model(input_ids=words, decoder_input_ids=words)
    else:
        model(words)


def changes(model: nn.Module, source: nn.Module, sink: nn.Module) -> list[Change]:
    """What each output row of `source` is, by what reaches `sink`."""
    caught: list[Tensor] = []
    outputs: list[Tensor] = []
    hooks = [
        sink.register_forward_pre_hook(lambda module, args: caught.append(args[0].detach())),
        source.register_forward_hook(lambda module, args, out: outputs.append(out)),
    ]
    run(model, 1)
    rows = outputs[0].shape[-1]
    for where in (slice(None), slice(1, 2)):
        moved = torch.zeros(rows, TOKENS, rows, dtype=torch.float64)
        moved[:, where] = torch.eye(rows, dtype=torch.float64)[:, None]
        hooks.append(source.register_forward_hook(lambda module, args, out, moved=moved: out + moved.view_as(out)))
        run(model, rows)
        hooks.pop().remove()
    for hook in hooks:
        hook.remove()
    everywhere, at_one = ((after - caught[0]).unflatten(-1, (HEADS, -1)) for after in caught[1:])
    return [_change(*row) for row in zip(everywhere, at_one, strict=True)]


def _change(everywhere: Tensor, at_one: Tensor) -> Change:
    ones = (everywhere - 1).abs() < CLOSE
    served = ones.any(-1).all(0)
    if served.any() and torch.equal(ones.sum((0, 2)), TOKENS * served):
        assert everywhere[~ones].abs().max() < CLOSE
        return "v", frozenset(served.nonzero().flatten().tolist())
    moved = at_one.abs().amax(-1) > CLOSE
    assert moved.any()
    others = moved[[t for t in range(TOKENS) if t != 1]]
    return ("k" if others.any() else "q"), frozenset(moved.any(0).nonzero().flatten().tolist())


def claims(segments: tuple[Segment, ...]) -> list[Change]:
    """The same as the map says it."""
    found: dict[int, Change] = {}
    for segment in segments:
        assert segment.heads is not None
        served = HEADS // segment.heads
        for row, head in zip(segment.row_index().tolist(), segment.block_of_row("head").tolist(), strict=True):
            found[row] = str(segment.role), frozenset(range(head * served, (head + 1) * served))
    return [found[row] for row in range(len(found))]


def attentions(block_map: BlockMap) -> list[tuple[str, str]]:
    """Names of each weight with heads, and of the output matrix of the same attention; the first layer's suffice."""
    found = []
    for name in block_map.names():
        first = block_map[name][0]
        if first.layer == 0 and first.heads is not None and name.endswith(".weight"):
            outs = [s.name for s in block_map if s.role is Role.O and s.name.endswith(".weight") and s.layer == 0]
            path = name.rpartition(".")[0].rpartition(".")[0].removesuffix(".self")
            (out,) = (o for o in outs if o.startswith(path + "."))
            found.append((name, out))
    return found


# In F.multi_head_attention_forward the matrices are not called as modules; it has a proof of its own below.
@pytest.mark.parametrize("family", [name for name in TINY if name != "transformer_encoder"])
def test_rows_are_what_they_change(family: str) -> None:
    model: Any = double(family)
    block_map = BlockMap.of(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # what is born small or zero would hide what it does
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        names = attentions(block_map)
        assert {str(s.role) for name, _ in names for s in block_map[name]} == {"q", "k", "v"}
        for name, out in names:
            source, sink = (model.get_submodule(n.rpartition(".")[0]) for n in (name, out))
            found, claimed = changes(model, source, sink), claims(block_map[name])
            if family == "olmo2":  # its norm of q and k spans all heads
                found, claimed = [(r, frozenset()) for r, _ in found], [(r, frozenset()) for r, _ in claimed]
            assert found == claimed, name


def test_torch_multihead_attention() -> None:
    model: Any = double("transformer_encoder")
    block_map, attention = BlockMap.of(model), model.layers[1].self_attn
    x = torch.randn(1, TOKENS, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused = {str(s.role): s for s in block_map["layers.1.self_attn.in_proj_weight"]}

    def without(role: str) -> Tensor:
        saved = attention.in_proj_weight.clone()
        attention.in_proj_weight[fused[role].row_index()] = 0
        out = attention(x, x, x, need_weights=False)[0]
        attention.in_proj_weight.copy_(saved)
        return out

    with torch.no_grad():
        torch.testing.assert_close(without("v"), attention.out_proj.bias.expand(1, TOKENS, -1))
        torch.testing.assert_close(without("q"), without("k"))  # without either, all tokens weigh the same
        assert not torch.allclose(without("q"), attention(x, x, x, need_weights=False)[0])
        value = nn.functional.linear(x.mean(1, keepdim=True), attention.in_proj_weight[fused["v"].row_index()])
        torch.testing.assert_close(without("k"), attention.out_proj(value).expand(1, TOKENS, -1))


@pytest.mark.parametrize("family", ["phi3", "glm4", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_gate_and_up_halves(family: str) -> None:
    """Only the up half takes a factor out of the product; through the gate's SiLU it comes out bent."""
    model: Any = double(family)
    block_map = BlockMap.of(model)
    name = next(n for n in block_map.names() if n.endswith(("gate_up_proj", "gate_up_proj.weight")))
    owner = model.get_submodule(name.removesuffix(".gate_up_proj.weight").removesuffix(".gate_up_proj"))
    weight, x = model.get_parameter(name), torch.randn(6, 32, dtype=torch.float64)
    routes = (torch.arange(6)[:, None] % 4, torch.ones(6, 1, dtype=torch.float64)) if weight.dim() == 3 else ()
    with torch.no_grad():
        before = owner(x, *routes)
        for segment in block_map[name]:
            index = segment.row_index()
            weight.index_copy_(segment.dim, index, 3 * weight.index_select(segment.dim, index))
            after = owner(x, *routes)
            weight.index_copy_(segment.dim, index, weight.index_select(segment.dim, index) / 3)
            assert torch.allclose(after, 3 * before) == (segment.role is Role.UP)
