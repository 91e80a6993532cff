"""Models as people write them, and what a trace says about a model in one line per parameter."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpwise.blocks import Segment
from sharpwise.blocks.trace import trace

SIZE, HEADS, HEAD, HIDDEN, VOCAB = 24, 4, 6, 20, 40
IDS = torch.tensor([[3, 17, 5, 9, 30], [2, 2, 8, 1, 11]])

ATTENTION = {"q": "q all /4", "k": "k all /4", "v": "v all /4", "o": "o all"}
MLP_ROLES = {"up": "up all", "down": "down all"}
NORMS = {"norm_1": "norm all", "norm_2": "norm all"}
FUSED = "q 0:24 /4, k 24:48 /4, v 48:72 /4"


def said(model: nn.Module, example: Any = None) -> dict[str, str]:
    """`layer: role rows /heads` of every parameter; the layer is left out where there is none."""
    return {name: described(parts) for name, parts in trace(model, example).segments.items()}


def described(parts: list[Segment]) -> str:
    rows = ", ".join(f"{s.role} {s.describe_rows()}{f' /{s.heads}' if s.heads else ''}" for s in parts)
    return rows if parts[0].layer is None else f"{parts[0].layer}: {rows}"


def named(table: dict[str, str], prefix: str = "", layer: int | None = None) -> dict[str, str]:
    """The entries of a table under longer names, as of one layer."""
    before = "" if layer is None else f"{layer}: "
    return {f"{prefix}{name}": f"{before}{what}" for name, what in table.items()}


def weights(table: dict[str, str], *ends: str) -> dict[str, str]:
    """Module -> parameters: by default its weight alone."""
    return {f"{name}.{end}": what for name, what in table.items() for end in ends or ("weight",)}


class Attention(nn.Module):
    """q, k, v and o apart, softmax(q k) v by matmul; k and v may read another stream, scores may get a bias."""

    def __init__(self, relative: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(4))
        self.relative = nn.Embedding(9, HEADS) if relative else None

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q, k, v = self.heads(self.q(x)), self.heads(self.k(other)), self.heads(self.v(other))
        scores = q @ k.mT / math.sqrt(HEAD)
        if self.relative is not None:
            places = torch.arange(x.shape[1])
            scores = scores + self.relative((places[:, None] - places).clamp(-4, 4) + 4).permute(2, 0, 1)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, HIDDEN), nn.Linear(HIDDEN, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.mixer, self.mlp = mixer, MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


BLOCK = (
    weights(NORMS, "weight", "bias")
    | weights(named(ATTENTION, "mixer."))
    | weights(named(MLP_ROLES, "mlp."), "weight", "bias")
)


class LM(nn.Module):
    """Token numbers to logits, through these layers."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, SIZE)
        self.layers = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


OUTSIDE = {"embedding.weight": "tok_emb all", "head.weight": "head all"} | weights(
    {"norm": "norm all"}, "weight", "bias"
)
TWO_LAYERS = OUTSIDE | named(BLOCK, "layers.0.", 0) | named(BLOCK, "layers.1.", 1)


def two_layers() -> LM:
    return LM(Block(Attention()), Block(Attention()))


class Encoder(nn.Module):
    """One attention behind an embedding, added to the stream, and a head: `attend` makes the sum."""

    def __init__(self, attend: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.embedding, self.attend, self.head = nn.Embedding(VOCAB, SIZE), attend, nn.Linear(SIZE, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(x + self.attend(x))


AROUND = {"embedding.weight": "tok_emb all"} | weights({"head": "head all"}, "weight", "bias")


class StateSpace(nn.Module):
    """A selective state space: convolution, data-dependent recurrence, output gate."""

    def __init__(self, inner: int = 32, states: int = 5, rank: int = 4) -> None:
        super().__init__()
        self.sizes = [rank, states, states]
        self.into, self.conv = nn.Linear(SIZE, 2 * inner), nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.select, self.step = nn.Linear(inner, rank + 2 * states, bias=False), nn.Linear(rank, inner)
        self.decay, self.past = nn.Parameter(torch.rand(inner, states)), nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.into(x).chunk(2, -1)
        u = F.silu(self.conv(u.mT)[..., : x.shape[1]].mT)
        step, b, c = self.select(u).split(self.sizes, -1)
        step, decay = F.softplus(self.step(step))[..., None], -self.decay.exp()
        state, outputs = torch.zeros(len(x), *self.decay.shape), []
        for t in range(x.shape[1]):
            state = (step[:, t] * decay).exp() * state + step[:, t] * b[:, t, None] * u[:, t, :, None]
            outputs.append((state * c[:, t, None]).sum(-1))
        return self.out((torch.stack(outputs, 1) + u * self.past) * F.silu(gate))


class GatedRecurrence(nn.Module):
    """h <- f h + (1 - f) i, token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.forget, self.into, self.gate, self.out = (nn.Linear(SIZE, SIZE) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        forget, into = self.forget(x).sigmoid(), self.into(x)
        state, outputs = torch.zeros_like(into[:, 0]), []
        for t in range(x.shape[1]):
            state = forget[:, t] * state + (1 - forget[:, t]) * into[:, t]
            outputs.append(state)
        return self.out(torch.stack(outputs, 1) * F.silu(self.gate(x)))


class LinearAttention(nn.Module):
    """S <- a S + k v', read by q: no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.decay, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, HEADS), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, HEAD)) for part in self.qkv(x).chunk(3, -1))
        decay, state, outputs = self.decay(x).sigmoid()[..., None, None], torch.zeros(len(x), HEADS, HEAD, HEAD), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return self.out(torch.stack(outputs, 1).flatten(2))
