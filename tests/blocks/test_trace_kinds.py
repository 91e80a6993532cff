"""Names are checked at any size: of a large model on one layer of each kind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpwise.blocks.trace
from blocks.models import Attention, NanoGPT
from sharpwise.blocks import BlockMap
from sharpwise.blocks.sources import CHEAP
from sharpwise.blocks.trace import one_of_each_kind


class TurnedAttention(Attention):
    """nanoGPT's by its names, but the fused matrix yields v, q, k."""

    def forward(self, x: Tensor) -> Tensor:
        v, q, k = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def nano(layers: int, turned: Any = ()) -> Any:
    with torch.device("meta"):
        model: Any = NanoGPT(layers=layers)
        for i in turned:
            model.transformer["h"][i].attn = TurnedAttention(8, 2, True)
    return model


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters the models have that are traced."""
    sizes: list[int] = []
    trace = sharpwise.blocks.trace.trace

    def counted(model: nn.Module, example: Any = None) -> Any:
        sizes.append(len(list(model.parameters())))
        return trace(model, example)

    monkeypatch.setattr(sharpwise.blocks.trace, "trace", counted)
    return sizes


@pytest.mark.parametrize("layers", [2, 200])
def test_names_that_lie_are_refused_at_any_size(layers: int) -> None:
    with pytest.raises(ValueError, match=rf"names and dataflow disagree about {2 * layers} parameters") as caught:
        BlockMap.of(nano(layers, turned=range(layers)))
    assert "h.0.attn.c_attn.weight: by name (nanogpt) q 0:8 (2 heads), k 8:16" in str(caught.value)


def test_one_layer_of_another_kind_is_seen() -> None:
    with pytest.raises(ValueError, match="names and dataflow disagree about 2 parameters") as caught:
        BlockMap.of(nano(100, turned=[57]))
    assert "transformer.h.57.attn.c_attn.weight" in str(caught.value)


def test_of_a_large_model_one_layer_of_each_kind_is_run(traced: list[int]) -> None:
    model = nano(12)
    assert len(list(model.parameters())) > CHEAP
    assert BlockMap.of(model) == BlockMap.of(model, trace=False)
    assert traced == [len(list(nano(1).parameters()))]
    assert len(model.transformer["h"]) == 12


def test_a_large_model_that_counts_its_layers_is_run_as_it_is(traced: list[int]) -> None:
    class Counts(NanoGPT):
        def forward(self, tokens: Tensor) -> Tensor:
            assert len(self.transformer["h"]) == self.config.n_layer
            return super().forward(tokens)

    with torch.device("meta"):
        model = Counts(layers=13)
    assert BlockMap.of(model) == BlockMap.of(model, trace=False)
    assert traced == [len(list(nano(1).parameters())), len(list(model.parameters()))]


class Layer(nn.Module):
    def __init__(self, number: int, bias: bool = True, local: bool = False) -> None:
        super().__init__()
        self.linear, self.number, self.local = nn.Linear(4, 4, bias), number + 3, local


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ([Layer(i) for i in range(5)], [0]),
        ([Layer(i, local=i % 3 == 2) for i in range(5)], [0, 2]),
        ([Layer(i, bias=i < 3) for i in range(5)], [0, 3]),
        ([Layer(i % 2) for i in range(5)], [0, 1]),
        ([nn.Linear(4, 4) for _ in range(5)], [0, 1, 2, 3, 4]),
    ],
)
def test_kinds_of_layers(layers: list[nn.Module], kept: list[int]) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(4, 4)})
    model.train(False)
    small: Any = one_of_each_kind(model) or model
    assert [layers.index(layer) for layer in small["layers"]] == kept
    assert small["head"] is model["head"] and list(model["layers"]) == layers
