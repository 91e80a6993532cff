"""Language models made from drawn choices, together with the truth about their parameters."""

import math
from collections.abc import Sequence
from types import SimpleNamespace as Choices
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.random_parts import (
    ACTIVATIONS,
    MLP,
    ByHead,
    Experts,
    LowRank,
    Norm,
    Part,
    Projection,
    Row,
    Truth,
)

SIZE, HIDDEN, VOCAB, PLACES, LAYERS = 24, 20, 40, 16, 2

OPTIONS: dict[str, Sequence[Any]] = {
    # attention: the matrices of q, k and v
    "qkv": ("separate", "concatenated", "per group", "q, then kv", "heads first", "heads second", "einsum of three"),
    "order": ("qkv", "kqv", "vkq", "qvk", "kvq", "vqk"),
    "heads_fast": (False, True),  # row = place in the head * heads + head
    "heads": ((4, 4), (4, 2), (4, 1), (6, 3), (1, 1)),  # of q, of k and v
    "head_size": (6, 4, 10),
    "value_size": (None, 8),
    "rank": (None, 9),
    "form": Projection.FORMS,
    "bias": (False, True),
    # attention: what becomes of them
    "attend": (
        "sdpa",
        "sdpa by name",
        "sdpa, enable_gqa",
        "matmul",
        "einsum",
        "einsum by group",
        "einsum, tokens first",
    ),
    "spread": ("repeat_interleave", "expand"),
    "positions": ("none", "rotary halves", "rotary pairs", "rotary complex", "table", "slice", "constant", "alibi"),
    "qk_norm": (None, "per head", "over all"),
    "o_form": ("as the others", "by head"),
    "o_gate": (None, "elementwise", "per head"),
    # the rest of a layer
    "norm": Norm.KINDS,
    "place": ("pre", "post", "sandwich"),
    "parallel": (False, True),
    "mlp": MLP.LAYOUTS,
    "activation": tuple(ACTIVATIONS),
    "experts": (None, *Experts.KINDS),
    "routing": ("softmax, top-k", "top-k, softmax", "sigmoid, top-k"),
    "layer_scale": (False, True),
    # around the layers
    "container": ("ModuleList", "Sequential", "attributes"),
    "embedding": ("nn.Embedding", "F.embedding", "table[ids]"),
    "embedding_scale": (False, True),
    "embedding_norm": (False, True),
    "head": ("untied", "tied", "tied, transposed", "classifier", "none"),
    "final_norm": (True, False),
    "unused": (False, True),
    "train": (True, False),
}


class Attention(Part):
    def __init__(self, c: Choices) -> None:
        super().__init__()
        self.c = c
        heads, groups = c.heads
        if c.qkv == "einsum of three":
            groups = heads
        self.heads, self.groups = heads, groups
        self.count = {"q": heads, "k": groups, "v": groups}
        self.size = {"q": c.head_size, "k": c.head_size, "v": c.value_size or c.head_size}
        if c.qkv == "einsum of three":
            self.size["v"] = c.head_size
        self.parts = {"separate": list(c.order), "q, then kv": ["q", c.order.replace("q", "")]}.get(c.qkv, [c.order])
        if c.qkv in ("heads first", "heads second"):
            self.parts = list(c.order)
            made = [
                ByHead(c.qkv == "heads first", SIZE, role, self.count[role], self.size[role], c.bias)
                for role in self.parts
            ]
        elif c.qkv == "einsum of three":
            self.make("qkv", (3, SIZE, heads, c.head_size), Truth([(r, None) for r in c.order], exact=False))
            made = []
        elif c.rank is None:
            made = [Projection(c.form, SIZE, self.rows(part), c.bias) for part in self.parts]
        else:
            made = [LowRank(c.form, c.norm, SIZE, c.rank, self.rows(part), c.bias) for part in self.parts]
        self.projections = nn.ModuleList(made)
        widths = {r: self.size[r] * (1 if c.qk_norm == "per head" else self.count[r]) for r in "qk"}
        self.norms = nn.ModuleDict({r: Norm(c.norm, widths[r], "qk_norm") for r in "qk" if c.qk_norm})
        width = heads * self.size["v"]
        if c.o_gate:
            outputs = width if c.o_gate == "elementwise" else heads
            self.gate = Projection(c.form, SIZE, [("o_gate", None)] * outputs, c.bias)
        if c.o_form == "by head":
            self.make("o", (heads, self.size["v"], SIZE), Truth([("o", None)] * SIZE, dim=2))
        else:
            self.o = Projection(c.form, width, [("o", None)] * SIZE, c.bias)

    def rows(self, part: str) -> list[Row]:
        """What each output row of the matrix that makes this part of q, k and v is for."""
        if self.c.qkv == "per group":
            return [
                (role, group * (self.count[role] // self.groups) + i)
                for group in range(self.groups)
                for role in part
                for i in range(self.count[role] // self.groups)
                for _ in range(self.size[role])
            ]
        if self.c.heads_fast:
            return [(r, head) for r in part for _ in range(self.size[r]) for head in range(self.count[r])]
        return [(r, head) for r in part for head in range(self.count[r]) for _ in range(self.size[r])]

    def cut(self, made: Tensor, part: str) -> list[Tensor]:
        """One tensor [batch, tokens, heads, head size] per letter, cut out of what one matrix made."""
        if self.c.qkv == "per group":
            per = {r: self.count[r] // self.groups for r in part}
            pieces = made.unflatten(-1, (self.groups, -1)).split([per[r] * self.size[r] for r in part], -1)
            return [
                piece.unflatten(-1, (per[r], self.size[r])).flatten(2, 3) for r, piece in zip(part, pieces, strict=True)
            ]
        pieces = made.split([self.count[r] * self.size[r] for r in part], -1)
        if self.c.heads_fast:
            cut = [p.unflatten(-1, (self.size[r], self.count[r])).mT for r, p in zip(part, pieces, strict=True)]
            return cut
        return [p.unflatten(-1, (self.count[r], self.size[r])) for r, p in zip(part, pieces, strict=True)]

    def project(self, x: Tensor) -> list[Tensor]:
        """q, k, v: [batch, tokens, heads, head size]."""
        if self.c.qkv == "einsum of three":
            found = dict(zip(self.c.order, torch.einsum("btd,cdhe->cbthe", x, self.qkv), strict=True))
        elif self.c.qkv in ("heads first", "heads second"):
            found = {part: make(x) for part, make in zip(self.parts, self.projections, strict=True)}
        else:
            found = {}
            for part, make in zip(self.parts, self.projections, strict=True):
                found |= zip(part, self.cut(make(x), part), strict=True)
        return [found[r] for r in "qkv"]

    def normed(self, x: Tensor, role: str) -> Tensor:
        if not self.c.qk_norm:
            return x
        if self.c.qk_norm == "per head":
            return self.norms[role](x)
        return self.norms[role](x.flatten(2)).view_as(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        q, k = self.normed(q, "q"), self.normed(k, "k")
        if self.c.positions.startswith("rotary"):
            q, k = rotary(self.c.positions, q), rotary(self.c.positions, k)
        out = attend(self.c, q, k, v)
        if self.c.o_gate == "per head":
            out = out * self.gate(x).sigmoid()[..., None]
        elif self.c.o_gate:
            out = out * self.gate(x).sigmoid().view_as(out)
        return torch.einsum("bthe,hed->btd", out, self.o) if self.c.o_form == "by head" else self.o(out.flatten(2))


def rotary(kind: str, x: Tensor) -> Tensor:
    """Turns [batch, tokens, heads, size] by angles that grow with the place."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] / 100.0 ** (torch.arange(half) / half)
    if kind == "rotary complex":
        turned = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(1)
        return torch.view_as_real(turned).flatten(-2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    if kind == "rotary halves":
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def attend(c: Choices, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [batch, tokens, heads, size], in one of its spellings."""
    tokens, groups, times = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    grouped = c.attend in ("sdpa, enable_gqa", "einsum by group")
    if times > 1 and not grouped:
        if c.spread == "expand":
            k, v = (x.unsqueeze(3).expand(-1, -1, -1, times, -1).flatten(2, 3) for x in (k, v))
        else:
            k, v = k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)
    scale = q.shape[-1] ** -0.5
    places = torch.arange(tokens)
    bias = torch.zeros(tokens, tokens).masked_fill(places[:, None] < places, -math.inf)
    if c.positions == "alibi":
        bias = bias - (places[:, None] - places) * 2.0 ** -torch.arange(q.shape[2]).view(-1, 1, 1)
    if c.attend == "einsum, tokens first":
        weights = (torch.einsum("bqhe,bkhe->bhqk", q, k) * scale + bias).softmax(-1)
        return torch.einsum("bhqk,bkhe->bqhe", weights, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    match c.attend:
        case "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, bias.expand(q.shape[1], -1, -1))
        case "sdpa by name":
            out = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=bias, dropout_p=0.0, scale=scale)
        case "sdpa, enable_gqa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        case "matmul":
            weights = (q @ k.transpose(-1, -2) * scale + bias).softmax(-1, dtype=torch.float32).to(q.dtype)
            out = F.dropout(weights, 0.5, training=True) @ v
        case "einsum":
            weights = torch.einsum("bhqe,bhke->bhqk", q * scale, k) + bias
            out = torch.einsum("bhqk,bhke->bhqe", weights.softmax(-1), v)
        case "einsum by group":
            scores = torch.einsum("bngqe,bnke->bngqk", q.unflatten(1, (groups, times)), k) * scale
            bias = bias.unflatten(0, (groups, times)) if bias.ndim == 3 else bias
            out = torch.einsum("bngqk,bnke->bngqe", (scores + bias).softmax(-1), v).flatten(1, 2)
    return out.transpose(1, 2)


class Layer(Part):
    def __init__(self, c: Choices) -> None:
        super().__init__()
        self.c = c
        self.attention = Attention(c)
        self.mlp = Experts(c, SIZE, HIDDEN) if c.experts else MLP(c, SIZE, HIDDEN)
        self.norms = nn.ModuleList(Norm(c.norm, SIZE) for _ in range(2))
        self.after = nn.ModuleList(Norm(c.norm, SIZE) for _ in range(2 if c.place == "sandwich" else 0))
        if c.layer_scale:
            for name in ("gain_0", "gain_1"):
                self.make(name, (SIZE,), "other")

    def branch(self, i: int, x: Tensor) -> Tensor:
        """What the attention (0) or the MLP (1) adds."""
        out = (self.attention, self.mlp)[i](x if self.c.place == "post" else self.norms[i](x))
        if self.after:
            out = self.after[i](out)
        return out * getattr(self, f"gain_{i}") if self.c.layer_scale else out

    def forward(self, x: Tensor) -> Tensor:
        if self.c.place == "post":
            x = self.norms[0](x + self.branch(0, x))
            return self.norms[1](x + self.branch(1, x))
        if self.c.parallel:
            return x + self.branch(0, x) + self.branch(1, x)
        x = x + self.branch(0, x)
        return x + self.branch(1, x)


class Model(Part):
    def __init__(self, c: Choices) -> None:
        super().__init__()
        self.c = c
        if c.embedding == "nn.Embedding":
            self.embedding = nn.Embedding(VOCAB, SIZE)
            self.truth["embedding.weight"] = Truth([("tok_emb", None)] * VOCAB)
        else:
            self.make("embedding", (VOCAB, SIZE), "tok_emb")
        if c.positions in ("table", "slice"):
            self.make("places", (PLACES, SIZE), "pos_emb")
        if c.embedding_norm:
            self.embedding_norm = Norm(c.norm, SIZE)
        layers = [Layer(c) for _ in range(LAYERS)]
        for i, layer in enumerate(layers):
            for part in layer.modules():
                for truth in getattr(part, "truth", {}).values():
                    truth.layer = i
        if c.container == "attributes":
            self.first, self.second = layers
        else:
            self.layers = nn.Sequential(*layers) if c.container == "Sequential" else nn.ModuleList(layers)
        self.final_norm = Norm(c.norm, SIZE) if c.final_norm else nn.Identity()
        if c.head in ("untied", "classifier"):
            self.head = Projection(c.form, SIZE, [("head", None)] * (5 if c.head == "classifier" else VOCAB), c.bias)
        if c.unused:
            self.make("unused", (3, SIZE), "other")

    def forward(self, ids: Tensor) -> Tensor:
        table = self.embedding.weight if self.c.embedding == "nn.Embedding" else self.embedding
        match self.c.embedding:
            case "nn.Embedding":
                x = self.embedding(ids)
            case "F.embedding":
                x = F.embedding(ids, table)
            case "table[ids]":
                x = table[ids]
        tokens = ids.shape[1]
        if self.c.embedding_scale:
            x = x * SIZE**0.5
        if self.c.positions == "table":
            x = x + F.embedding(torch.arange(tokens), self.places)
        elif self.c.positions == "slice":
            x = x + self.places[:tokens]
        elif self.c.positions == "constant":
            x = x + torch.arange(tokens)[:, None].mul(torch.arange(SIZE)).sin()
        if self.c.embedding_norm:
            x = self.embedding_norm(x)
        for layer in (self.first, self.second) if self.c.container == "attributes" else self.layers:
            x = layer(x)
        x = self.final_norm(x)
        match self.c.head:
            case "untied":
                return self.head(x)
            case "tied":
                return F.linear(x, table)
            case "tied, transposed":
                return x @ table.T
            case "classifier":
                return self.head(x.mean(1))
        return x


def build(c: Choices) -> tuple[Model, dict[str, Truth]]:
    """The model, and what each of its parameters is."""
    model = Model(c).train(c.train)
    known = {
        f"{path}.{name}".lstrip("."): truth
        for path, part in model.named_modules()
        if isinstance(part, Part)
        for name, truth in part.truth.items()
    }
    return model, {name: known[name] for name, _ in model.named_parameters()}
