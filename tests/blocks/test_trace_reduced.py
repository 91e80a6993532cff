"""The smallest models of which a trace said something wrong."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from blocks.hand_made import (
    AROUND,
    ATTENTION,
    BLOCK,
    FUSED,
    HEAD,
    HEADS,
    IDS,
    LM,
    MLP,
    OUTSIDE,
    SIZE,
    Attention,
    Block,
    Encoder,
    named,
    said,
    weights,
)
from sharpwise.blocks.trace import trace

X = torch.rand(2, 7, SIZE)
ONE_LAYER = OUTSIDE | named(BLOCK, "layers.0.", 0)


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.2 * torch.randn(*shape))


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, size], from three of them."""
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)


def test_norm_of_the_models_own_input():
    assert said(Block(Attention()), X) == named(BLOCK, layer=0)


class Unrolled(nn.Module):
    """Layers without a list, with lists of other things inside."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, SIZE)
        self.first, self.second = ListedAttention(), ListedAttention()
        self.head = nn.Linear(SIZE, 5)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.first(x)
        return self.head(x + self.second(x))


class ListedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkvo = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v, o = self.qkvo
        return o(attended(q(x), k(x), v(x)))


def test_a_list_of_matrices_is_no_list_of_layers():
    listed = weights({f"qkvo.{i}": what for i, what in enumerate(ATTENTION.values())})
    assert said(Unrolled()) == AROUND | named(listed, "first.", 0) | named(listed, "second.", 1)


class GroupedEinsum(nn.Module):
    """Four heads of queries, two of keys and values, none of them repeated."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(SIZE, size, bias=False) for size in (SIZE, 12, 12, SIZE))

    def forward(self, x):
        q = self.q(x).unflatten(-1, (2, 2, HEAD))
        k, v = (f(x).unflatten(-1, (2, HEAD)) for f in (self.k, self.v))
        weights = torch.einsum("bqnge,bkne->bngqk", q, k).softmax(-1)
        return self.o(torch.einsum("bngqk,bkne->bqnge", weights, v).flatten(2))


def test_heads_of_queries_that_share_keys_by_einsum():
    expected = ATTENTION | {"k": "k all /2", "v": "v all /2"}
    assert said(Encoder(GroupedEinsum())) == AROUND | named(weights(expected), "attend.", 0)


class OneOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, SIZE), matrix(SIZE, 1)

    def forward(self, ids):
        return self.embedding(ids) @ self.head


def test_a_transposed_matrix_with_one_output():
    (segment,) = trace(OneOutput()).segments["head"]
    assert (segment.role, segment.dim, segment.rows) == ("head", 1, 1)


class OneGate(Attention):
    def __init__(self):
        super().__init__()
        self.gate = matrix(SIZE, 1)

    def forward(self, x):
        q, k, v = self.q(x)[:, None], self.k(x)[:, None], self.v(x)[:, None]
        return self.o(F.scaled_dot_product_attention(q, k, v)[:, 0] * torch.sigmoid(x @ self.gate))


def test_a_transposed_gate_of_one_head():
    expected = {name: what.replace("/4", "/1") for name, what in weights(ATTENTION).items()} | {"gate": "o_gate all"}
    assert said(Encoder(OneGate())) == AROUND | named(expected, "attend.", 0)


class FourInOne(nn.Module):
    """q, k, v and o in one parameter, as modded-nanogpt has them."""

    def __init__(self):
        super().__init__()
        self.qkvo = matrix(4, SIZE, SIZE)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkvo[:3].flatten(end_dim=1)).chunk(3, -1)
        return F.linear(attended(q, k, v), self.qkvo[3])


def test_four_matrices_of_different_roles_in_one_parameter():
    expected = {"attend.qkvo": "0: q 0:24 /4, k 24:48 /4, v 48:72 /4, o 72:96"}
    assert said(Encoder(FourInOne())) == AROUND | expected


class ManyInOne(nn.Module):
    """The same with the heads as a dimension of their own; `inner`: that of the matrices lies behind it."""

    def __init__(self, inner: bool):
        super().__init__()
        self.qkv, self.o, self.inner = (
            matrix(*((HEADS, 3) if inner else (3, HEADS)), HEAD, SIZE),
            matrix(SIZE, SIZE),
            inner,
        )

    def forward(self, x):
        qkv = self.qkv.transpose(0, 1) if self.inner else self.qkv
        return F.linear(attended(*(F.linear(x, one.flatten(end_dim=1)) for one in qkv)), self.o)


def test_heads_of_several_matrices_in_one_parameter():
    expected = AROUND | {"attend.o": "0: o all"}
    one_by_one = {"attend.qkv": "0: q 0:24 /4, k 24:48 /4, v 48:72 /4"}
    assert said(Encoder(ManyInOne(inner=False))) == expected | one_by_one
    by_head = {"attend.qkv": ", ".join(f"{r} 4 x 6 from {6 * i} every 18 /4" for i, r in enumerate("qkv"))}
    assert said(Encoder(ManyInOne(inner=True))) == expected | {"attend.qkv": f"0: {by_head['attend.qkv']}"}


class WithBiasKV(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, HEADS, add_bias_kv=True, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_bias_kv_of_multihead_attention():
    traced = trace(WithBiasKV(), X)
    assert traced.unused == ()
    assert {str(traced.segments[f"attention.bias_{r}"][0].role) for r in "kv"} in ({"k", "v"}, {"other"})


class RawQueries(nn.Module):
    """The queries are a parameter: no matrix makes them."""

    def __init__(self):
        super().__init__()
        self.queries = matrix(1, SIZE)
        self.k, self.v, self.o = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(3))

    def forward(self, x):
        return self.o(attended(self.queries.expand(len(x), -1, -1), self.k(x), self.v(x)))


def test_queries_that_are_a_parameter():
    found = said(Encoder(RawQueries()))
    assert found.pop("attend.queries").endswith(("q all", "q all /4", "other all", "pos_emb all"))
    without_q = {name: what for name, what in ATTENTION.items() if name != "q"}
    assert found == AROUND | named(weights(without_q), "attend.", 0)


class LoneAttention(nn.Module):
    """Nothing is added to the stream: what comes before is read by q, k and v alone, what comes after reads o alone."""

    def __init__(self):
        super().__init__()
        self.into, self.attention, self.head = nn.Linear(10, SIZE), Attention(), nn.Linear(SIZE, 5)

    def forward(self, x):
        x = self.into(x)
        return self.head(self.attention(x[:, :1], x).mean(1))


def test_what_is_around_a_lone_attention():
    expected = weights({"into": "patch_emb all", "head": "head all"}, "weight", "bias")
    assert said(LoneAttention(), torch.rand(2, 7, 10)) == expected | named(weights(ATTENTION), "attention.", 0)


class ScaledStream(nn.Module):
    """Learned numbers times the stream, which a norm without weights made."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(40, SIZE), nn.ModuleList([Block(Attention())])
        self.scale, self.head = nn.Parameter(torch.ones(2)), nn.Linear(SIZE, 5)

    def forward(self, ids):
        x = start = F.rms_norm(self.embedding(ids), (SIZE,))
        for layer in self.layers:
            x = layer(self.scale[0] * x + self.scale[1] * start)
        return self.head(x)


def test_numbers_that_scale_the_stream():
    expected = AROUND | named(BLOCK, "layers.0.", 0) | {"scale": "other all"}
    assert said(ScaledStream()) == expected


class GainBehindNorm(Attention):
    def __init__(self):
        super().__init__()
        self.norm, self.gain = nn.LayerNorm(SIZE), nn.Parameter(torch.ones(SIZE))

    def forward(self, x):
        return self.norm(super().forward(x)) * self.gain


def test_a_gain_behind_a_norm():
    expected = weights({"norm": "norm all"}, "weight", "bias") | {"gain": "other all"}
    assert said(LM(Block(GainBehindNorm()))) == ONE_LAYER | named(expected, "layers.0.mixer.", 0)


def renamed(table: dict[str, str], old: str, *new: str) -> dict[str, str]:
    what = table[old]
    return {name: w for name, w in table.items() if name != old} | dict.fromkeys(new, what)


def test_spectral_norm():
    model = LM(Block(Attention()))
    parametrizations.spectral_norm(model.layers[0].mixer.q)
    q = "layers.0.mixer.q."
    assert said(model) == renamed(ONE_LAYER, f"{q}weight", f"{q}parametrizations.weight.original")


# -- not wrong, but `other` where more can be known --------------------------------------------------------------------


def test_weight_norm():
    model = LM(Block(Attention()))
    parametrizations.weight_norm(model.layers[0].mlp.up)
    up = "layers.0.mlp.up."
    found = said(model)
    assert found.pop(f"{up}parametrizations.weight.original0") in ("0: up all", "0: other all")
    assert found == renamed(ONE_LAYER, f"{up}weight", f"{up}parametrizations.weight.original1")


class Merged(nn.Module):
    """A low-rank adapter, added to the weight rather than to the output."""

    def __init__(self):
        super().__init__()
        self.weight, self.a, self.b = matrix(SIZE, SIZE), matrix(3, SIZE), matrix(SIZE, 3)

    def forward(self, x):
        return F.linear(x, self.weight + self.b @ self.a)


# The heads of a factor are not told.
def test_weight_plus_low_rank_product():
    attention = Attention()
    attention.q = Merged()
    expected = {"q.weight": "q all /4", "q.a": "q all", "q.b": "q all"}
    expected |= {name: what for name, what in weights(ATTENTION).items() if name != "q.weight"}
    assert said(Encoder(attention)) == AROUND | named(expected, "attend.", 0)


class OneHot(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mlp = matrix(40, SIZE), MLP()

    def forward(self, ids):
        x = F.one_hot(ids, 40).float() @ self.table
        return x + self.mlp(x)


def test_embedding_by_one_hot_vectors():
    assert said(OneHot(), IDS)["table"] == "tok_emb all"


class WrittenSoftmax(Attention):
    def forward(self, x):
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        scores = q @ k.mT
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return self.o((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))


def test_softmax_written_out():
    assert said(LM(Block(WrittenSoftmax()))) == ONE_LAYER


def test_fused_heads_of_all_matrices():
    """The control of this file: the plain thing comes out."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.o = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

        def forward(self, x):
            return self.o(attended(*self.qkv(x).chunk(3, -1)))

    expected = weights({"qkv": FUSED, "o": "o all"}, "weight", "bias")
    assert said(Encoder(Fused())) == AROUND | named(expected, "attend.", 0)
