"""Models as people write them, each around one habit that dataflow has to understand."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, CLASSES = 16, 2, 3


def heads(x: Tensor) -> Tensor:
    """[batch, tokens, width] -> [batch, heads, tokens, head]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)


class Attention(nn.Module):
    """Separate projections; keys and values from a memory of another width, where there is one."""

    def __init__(self, memory: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(memory, WIDTH), nn.Linear(memory, WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = (heads(part(of)) for part, of in ((self.q, x), (self.k, memory), (self.v, memory)))
        return self.o(merged(F.scaled_dot_product_attention(q, k, v)))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm block around any attention and MLP."""

    def __init__(self, attention: nn.Module | None = None, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention() if attention is None else attention
        self.mlp = MLP() if mlp is None else mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Raw frames of width 4, two blocks, a head on their mean."""

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Perceiver(nn.Module):
    """Learned latents read the input, then each other."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, WIDTH))
        self.read, self.think = Attention(memory=12), Block()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), -1, -1)
        latents = self.think(latents + self.read(latents, x))
        return self.head(self.norm(latents).mean(1))


class Detection(nn.Module):
    """Queries in an Embedding, added to the queries and the keys of every layer; classes and boxes come out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.encoder = nn.Conv2d(3, WIDTH, 4, 4), Block()
        self.queries, self.places = nn.Embedding(5, WIDTH), nn.Parameter(torch.randn(16, WIDTH))
        self.cross, self.norm, self.mlp = Attention(), nn.LayerNorm(WIDTH), MLP()
        self.classes, self.hidden, self.boxes = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 24), nn.Linear(24, 4)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.encoder(self.patches(image).flatten(2).transpose(1, 2) + self.places)
        x = self.queries.weight.unsqueeze(0).repeat(len(image), 1, 1)
        x = self.norm(x + self.cross(x, memory))
        x = x + self.mlp(x)
        return self.classes(x), self.boxes(F.relu(self.hidden(x))).sigmoid()


class Modulated(nn.Module):
    """Shift, scale and gate of every block from a time step, and from a pooled text where there is one."""

    def __init__(self, text: bool = False) -> None:
        super().__init__()
        self.embed, self.time1, self.time2 = nn.Linear(4, WIDTH), nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)
        if text:
            self.text1, self.text2 = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.modulate = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.attentions = nn.ModuleList(Attention() for _ in range(2))
        self.norm, self.out = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, time: Tensor, text: Tensor | None = None) -> Tensor:
        x, given = self.embed(x), self.time2(F.silu(self.time1(time)))
        if text is not None:
            given = given + self.text2(F.silu(self.text1(text)))
        for modulate, attention in zip(self.modulate, self.attentions, strict=True):
            shift, scale, gate = modulate(F.silu(given)).unsqueeze(1).chunk(3, -1)
            x = x + gate * attention(self.norm(x) * (1 + scale) + shift)
        return self.out(x)


class Table(nn.Module):
    """Modulation as a learned table plus what one projection of the time step gives to all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(4, WIDTH), nn.Linear(8, 3 * WIDTH)
        self.table = nn.Parameter(torch.randn(3, WIDTH))
        self.attention, self.mlp = Attention(), MLP()
        self.norm, self.out = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.embed(x)
        shift, scale, gate = (self.table[None] + self.time(time).view(-1, 3, WIDTH)).chunk(3, 1)
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        return self.out(x + self.mlp(x))


class Speech(nn.Module):
    """A waveform through strided convolutions and a projection, positions by a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = nn.Conv1d(1, 12, 5, 2), nn.Conv1d(12, 12, 3, 2)
        self.norm0, self.project = nn.LayerNorm(12), nn.Linear(12, WIDTH)
        self.places = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=4)
        self.block, self.head = Block(), nn.Linear(WIDTH, CLASSES)

    def forward(self, wave: Tensor) -> Tensor:
        x = F.gelu(self.conv1(F.gelu(self.conv0(wave.unsqueeze(1))))).transpose(1, 2)
        x = self.project(self.norm0(x))
        x = x + F.gelu(self.places(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.block(x))


class MixMLP(MLP):
    """A depthwise convolution between the two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(40, 40, 3, padding=1, groups=40)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.mix(self.up(x).transpose(1, 2)).transpose(1, 2)))


class Reduced(Attention):
    """Keys and values of every second token, by a strided convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.norm = nn.Conv1d(WIDTH, WIDTH, 2, 2), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        return super().forward(x, self.norm(self.reduce(x.transpose(1, 2)).transpose(1, 2)))


class Stacked(nn.Module):
    """Queries, keys, values and output in one parameter [4, width, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkvo = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(x @ self.qkvo[i].T) for i in range(3))
        return merged(F.scaled_dot_product_attention(q, k, v)) @ self.qkvo[3].T


class NoKeyBias(nn.Module):
    """One fused matrix whose bias is joined from two parameters and zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.o(merged((q @ k.mT / math.sqrt(8)).softmax(-1) @ v))


class Interleaved(nn.Module):
    """Each head's values, queries and keys in turn, in that order."""

    def __init__(self) -> None:
        super().__init__()
        self.vqk, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        v, q, k = heads(self.vqk(x)).chunk(3, -1)
        return self.o(merged(F.scaled_dot_product_attention(q, k, v)))


class Gated(Attention):
    """A sigmoid of the input multiplies what attention gives, before the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        return self.o(merged(F.scaled_dot_product_attention(q, k, v)) * self.gate(x).sigmoid())


class Relative(Attention):
    """Transformer-XL: keys of distances by a projection of their own, and two biases of the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.distances, self.r = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.content, self.place = nn.Parameter(torch.zeros(HEADS, 1, 8)), nn.Parameter(torch.zeros(HEADS, 1, 8))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        at = torch.arange(x.shape[1], device=x.device)
        r = heads(self.r(self.distances((at[:, None] - at + 5).clamp(0, 10))))  # [tokens, heads, tokens, head]
        by_place = torch.einsum("bhid,ihjd->bhij", q + self.place, r)
        scores = ((q + self.content) @ k.mT + by_place) / math.sqrt(8)
        return self.o(merged(scores.softmax(-1) @ v))


class Continuous(Attention):
    """Swin V2: an MLP over coordinates of distances makes the bias of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.bias1, self.bias2 = nn.Linear(1, 12), nn.Linear(12, HEADS, bias=False)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        at = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        bias = self.bias2(F.relu(self.bias1((at[:, None] - at).unsqueeze(-1)))).permute(2, 0, 1)
        return self.o(merged((q @ k.mT / math.sqrt(8) + bias).softmax(-1) @ v))


class ConvEnd(nn.Module):
    """Attention over patches, then convolutions up to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, WIDTH, 4, 4), Block()
        self.conv1, self.fuse = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)
        self.conv2, self.head = nn.Conv2d(WIDTH, 24, 1), nn.Linear(24, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        y = self.patches(image)
        x = self.block(y.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(y)
        x = F.silu(self.fuse(torch.cat([y, F.silu(self.conv1(x))], 1)))
        return self.head(F.silu(self.conv2(x)).mean((2, 3)))


class Codes(nn.Module):
    """Audio codes: three codebooks summed, three heads, positions from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.books = nn.ModuleList(nn.Embedding(11, WIDTH) for _ in range(3))
        self.places, self.block = nn.Embedding(8, WIDTH), Block()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 11) for _ in range(3))

    def forward(self, codes: Tensor) -> list[Tensor]:
        x = sum(book(codes[..., i]) for i, book in enumerate(self.books))
        x = self.block(x + self.places(torch.arange(codes.shape[1], device=codes.device)))
        return [head(x) for head in self.heads]


class Einsum(nn.Module):
    """Projections [width, heads, head] and [heads, head, width], as in JAX."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, HEADS, 8) / 4) for _ in range(3))
        self.o = nn.Parameter(torch.randn(HEADS, 8, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhe->bhte", x, part) for part in (self.q, self.k, self.v))
        scores = torch.einsum("bhie,bhje->bhij", q, k) / math.sqrt(8)
        return torch.einsum("bhij,bhje,hed->bid", scores.softmax(-1), v, self.o)


class Parallel(nn.Module):
    """Attention and a gated MLP out of one matrix and into one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.into, self.out = nn.Linear(WIDTH, 7 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        up, gate, q, k, v = self.into(self.norm(x)).split([2 * WIDTH, 2 * WIDTH, WIDTH, WIDTH, WIDTH], -1)
        seen = merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))
        return x + self.out(torch.cat([seen, up * F.silu(gate)], -1))


class Linear(Attention):
    """Linear attention: positive features in place of a softmax, keys and values multiplied first."""

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = F.elu(heads(self.q(x))) + 1, F.elu(heads(self.k(x))) + 1, heads(self.v(x))
        return self.o(merged(q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)))


class Experts(nn.Module):
    """Four stacked experts, all computed, weighed by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4, bias=False)
        self.gate_up = nn.Parameter(torch.randn(4, WIDTH, 48) / 4)
        self.out = nn.Parameter(torch.randn(4, 24, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("btd,edf->betf", x, self.gate_up).chunk(2, -1)
        y = torch.einsum("betf,efd->betd", F.silu(gate) * up, self.out)
        return torch.einsum("betd,bte->btd", y, self.router(x).softmax(-1))


class Edges(Attention):
    """A graph transformer: features of edges make a bias of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Linear(3, HEADS)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        bias = self.edge(edges).permute(0, 3, 1, 2)
        return self.o(merged(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.attention, self.mlp, self.norm = Edges(), MLP(), nn.LayerNorm(WIDTH)

    def forward(self, atoms: Tensor, edges: Tensor) -> Tensor:
        x = self.embed(atoms)
        x = x + self.attention(x, edges)
        return self.head(self.norm(x + self.mlp(x)).sum(1))


def _frames(model: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (model(), tuple(torch.randn(2, *shape) for shape in shapes or ((6, 4),)))


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "hand-written/encoder": _frames(Encoder),
    "hand-written/perceiver": _frames(Perceiver, (9, 12)),
    "hand-written/detection": _frames(Detection, (3, 16, 16)),
    "hand-written/modulated": _frames(Modulated, (5, 4), (8,)),
    "hand-written/modulated-text": _frames(lambda: Modulated(text=True), (5, 4), (8,), (6,)),
    "hand-written/modulation-table": _frames(Table, (5, 4), (8,)),
    "hand-written/speech": _frames(Speech, (60,)),
    "hand-written/mix-mlp": _frames(lambda: Encoder(lambda: Block(mlp=MixMLP()))),
    "hand-written/reduced": _frames(lambda: Encoder(lambda: Block(Reduced()))),
    "hand-written/stacked": _frames(lambda: Encoder(lambda: Block(Stacked()))),
    "hand-written/no-key-bias": _frames(lambda: Encoder(lambda: Block(NoKeyBias()))),
    "hand-written/interleaved": _frames(lambda: Encoder(lambda: Block(Interleaved()))),
    "hand-written/gated": _frames(lambda: Encoder(lambda: Block(Gated()))),
    "hand-written/relative": _frames(lambda: Encoder(lambda: Block(Relative()))),
    "hand-written/continuous": _frames(lambda: Encoder(lambda: Block(Continuous()))),
    "hand-written/conv-end": _frames(ConvEnd, (3, 16, 16)),
    "hand-written/codes": lambda: (Codes(), torch.randint(11, (2, 5, 3))),
    "hand-written/einsum": _frames(lambda: Encoder(lambda: Block(Einsum()))),
    "hand-written/parallel": _frames(lambda: Encoder(Parallel)),
    "hand-written/linear": _frames(lambda: Encoder(lambda: Block(Linear()))),
    "hand-written/experts": _frames(lambda: Encoder(lambda: Block(mlp=Experts()))),
    "hand-written/graph": lambda: (Graph(), (torch.randint(7, (2, 5)), torch.randn(2, 5, 5, 3))),
}
