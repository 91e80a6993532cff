"""Parts of decoders that the dataflow of published models has: what is known of them, and what is not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.hand_made import BLOCK, HEADS, IDS, LM, OUTSIDE, SIZE, VOCAB, Attention, Block, named, said, weights

ONE_LAYER = OUTSIDE | named(BLOCK, "layers.0.", 0)


class Choosing(Attention):
    """A small attention with a weight for each of its heads chooses what is attended to; its queries share a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.q = nn.Linear(SIZE, 8), nn.LayerNorm(8), nn.Linear(16, SIZE, bias=False)
        self.few_q, self.few_k, self.weigh = nn.Linear(8, 2 * 6), nn.Linear(SIZE, 6), nn.Linear(SIZE, 2)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        first = self.first(x)
        normed = self.norm(first)
        few = (self.few_q(normed).unflatten(-1, (2, 6)) @ self.few_k(x).mT[:, None]).relu()
        chosen = (self.weigh(x)[:, :, None] @ few)[:, :, 0].topk(3).indices
        mask = torch.full((len(x), x.shape[1], x.shape[1]), -1e9).scatter(-1, chosen, 0.0)[:, None]
        q, k, v = (self.heads(t) for t in (self.q(torch.cat([normed, first], -1)), self.k(x), self.v(x)))
        return self.o(((q @ k.mT + mask).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_scores_of_heads_that_are_weighed_and_summed_are_no_attention() -> None:
    found = said(LM(Block(Choosing())))
    roles = {"first": "q all", "few_q": "q all", "few_k": "k all", "weigh": "router all"}
    expected = named(weights(roles), "layers.0.mixer.", 0)
    assert {name: found[name] for name in expected} == expected


class Sorted(torch.autograd.Function):
    """Tokens in another order, with a gradient of its own; `bend` cuts what is negative."""

    @staticmethod
    def forward(ctx: object, x: Tensor, order: Tensor, bend: bool) -> Tensor:
        return x[:, :, order].masked_fill(x < 0, 0) if bend else x[:, :, order]


class Hashed(Attention):
    """An attention with its softmax by a log-sum-exp, whose output a function of the model's own puts in order."""

    def __init__(self, bend: bool) -> None:
        super().__init__()
        self.bend = bend

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        scores = q @ k.mT
        made = (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v
        order = torch.arange(x.shape[1]).flip(0)
        return self.o(Sorted.apply(made, order, self.bend).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bend", [False, True])
def test_a_function_that_only_moves_is_seen_from_within(bend: bool) -> None:
    expected = ONE_LAYER | ({"layers.0.mixer.o.weight": "0: other all"} if bend else {})
    assert said(LM(Block(Hashed(bend)))) == expected


class Axial(LM):
    """Positions of two parameters: one along the rows of a grid, one along its columns."""

    def __init__(self) -> None:
        super().__init__(Block(Attention()))
        self.rows, self.columns = (nn.Parameter(torch.ones(3, 1, SIZE // 2)), nn.Parameter(torch.ones(1, 3, SIZE // 2)))

    def forward(self, ids: Tensor) -> Tensor:
        table = torch.cat([p.expand(3, 3, -1) for p in (self.rows, self.columns)], -1).reshape(9, SIZE)
        x = self.embedding(ids) + table.index_select(0, torch.arange(ids.shape[1]))
        return self.head(self.norm(self.layers[0](x)))


def test_positions_of_two_parameters() -> None:
    assert said(Axial()) == ONE_LAYER | {"rows": "pos_emb all", "columns": "pos_emb all"}


class Kinds(LM):
    """What is looked up by the kinds of the tokens is added to them, or stands for them."""

    def __init__(self, added: bool) -> None:
        super().__init__(Block(Attention()))
        self.kinds, self.added = nn.Embedding(3, SIZE), added

    def forward(self, ids: Tensor) -> Tensor:
        kinds = self.kinds(torch.where(ids > VOCAB // 2, 2, 0))
        x = self.embedding(ids) + kinds if self.added else kinds
        return self.head(self.norm(self.layers[0](x)))


def test_kinds_of_tokens() -> None:
    assert said(Kinds(True), IDS)["kinds.weight"] == "pos_emb all"
    assert said(Kinds(False), IDS)["kinds.weight"] == "other all"  # these are the tokens of this model


class Started(LM):
    """A vector that all tokens begin with alike: no place has its own."""

    def __init__(self) -> None:
        super().__init__(Block(Attention()))
        self.start = nn.Parameter(torch.zeros(SIZE))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(self.norm(self.layers[0](x + self.start.expand_as(x).contiguous())))


def test_a_vector_that_all_tokens_begin_with_is_no_position() -> None:
    assert said(Started()) == ONE_LAYER | {"start": "other all"}


class GatedNorm(nn.Module):
    """A norm that is multiplied by what a small network makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(SIZE), nn.Linear(SIZE, 4), nn.Linear(4, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y * self.b(nn.functional.silu(self.a(y))).sigmoid()


def test_what_scales_what_it_is_made_of_is_neither_an_mlp_nor_a_modulation() -> None:
    block = Block(Attention())
    block.norm_1 = GatedNorm()  # type: ignore[assignment]
    found = said(LM(block))
    assert {found[f"layers.0.norm_1.{name}.weight"] for name in "ab"} == {"0: other all"}
    assert found["layers.0.norm_1.norm.weight"] == "0: norm all"


class ScaledBySink(Attention):
    """A key that is always there, as a factor of the output: how its score compares with what all keys sum up to."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(HEADS))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        scores = q @ k.mT
        beside = (scores.logsumexp(-1) - self.sinks.view(1, -1, 1)).sigmoid()
        return self.o((scores.softmax(-1) @ v * beside[..., None]).transpose(1, 2).flatten(2))


def test_a_sink_beside_the_sum_of_all_keys() -> None:
    roles = said(LM(Block(ScaledBySink())))
    assert roles["layers.0.mixer.sinks"] == "0: k all"
    assert [roles[f"layers.0.mixer.{name}.weight"].split()[1] for name in "qkvo"] == [*"qkvo"]


class ByAngle(Attention):
    """Values are weighed by the angles of queries and keys, whose norms are left out of a trace."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        weights = (1 - cosines.acos() / torch.pi) ** 8
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def test_weights_by_angles() -> None:
    assert said(LM(Block(ByAngle()))) == ONE_LAYER
