"""Parameters that look like something else in one place: what they are is open, so the role is `other`."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.hand_made import HEAD, HEADS, IDS, LM, MLP, SIZE, VOCAB, Attention, Block, said


def alone(roles: dict[str, str], *names: str) -> list[str]:
    """The roles of these parameters, without layer and rows."""
    return [roles[name].rpartition(": ")[2].partition(" ")[0] for name in names]


class Streams(nn.Module):
    """Hyper-connections: three streams, mixed by weights that a learned gain of a statistic changes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.mix = layer, nn.LayerNorm(SIZE), nn.Parameter(torch.ones(3))
        self.change, self.gain = nn.Parameter(torch.rand(SIZE, 3)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        mix = self.mix + self.gain * torch.tanh(self.norm(x) @ self.change).mean(-1)
        return x + self.layer((mix[..., None] * x).sum(2))[:, :, None]


class ManyStreams(LM):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)[:, :, None].expand(-1, -1, 3, -1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.sum(2)))


def test_a_gain_of_a_statistic_is_no_norm() -> None:
    roles = said(ManyStreams(Streams(Attention()), Streams(MLP())), IDS)
    assert alone(roles, "layers.0.mix", "layers.0.norm.weight", "layers.0.layer.q.weight") == ["other", "norm", "q"]


class GraphAttention(nn.Module):
    """GAT: scores are sums of two numbers per node, no product; a bias at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.bias = nn.Linear(SIZE, SIZE, bias=False), nn.Parameter(torch.zeros(SIZE))
        self.left, self.right = nn.Parameter(torch.rand(HEADS, 1, HEAD)), nn.Parameter(torch.rand(HEADS, 1, HEAD))

    def forward(self, x: Tensor) -> Tensor:
        values = self.values(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        left, right = ((values * side).sum(-1) for side in (self.left, self.right))
        weights = F.leaky_relu(left[..., :, None] + right[..., None, :]).softmax(-1)
        return (weights @ values).transpose(1, 2).flatten(2) + self.bias


def test_a_bias_behind_weighted_values_is_no_score() -> None:
    roles = said(LM(Block(GraphAttention()), Block(GraphAttention())), IDS)
    assert alone(roles, "layers.0.mixer.bias", "layers.0.mixer.values.weight") == ["other", "other"]


class Sinks(Attention):
    """gpt-oss: one more score per head, of a key that is always there."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(HEADS))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        scores = q @ k.mT
        sinks = self.sinks[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def test_a_score_of_a_key_that_is_always_there_is() -> None:
    assert alone(said(LM(Block(Sinks()), Block(Sinks())), IDS), "layers.1.mixer.sinks") == ["k"]


class Computed(nn.Module):
    """An MLP whose weights a matrix makes, of learned numbers or of the mean of the stream."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.rand(SIZE)) if learned else None
        self.up, self.down = nn.Linear(SIZE, SIZE * 10), nn.Linear(SIZE, 10 * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        code = x.mean(1) if self.code is None else self.code
        up, down = self.up(code).unflatten(-1, (SIZE, 10)), self.down(code).unflatten(-1, (10, SIZE))
        return F.gelu(x @ up) @ down


@pytest.mark.parametrize("learned", [True, False])
def test_weights_that_are_computed_are_no_keys(learned: bool) -> None:
    roles = said(LM(*(Block(Attention()) for _ in range(2)), Computed(learned)), IDS)
    parameters = [name for name in roles if name.startswith("layers.2.")]
    assert set(alone(roles, *parameters)) == {"other"}


class Residual(nn.Module):
    """A norm before a layer, and the sum with what went in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(SIZE), layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


class Transcoder(nn.Module):
    """The five largest hidden units; what is taken off the input is added to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, 30), nn.Parameter(torch.rand(30, SIZE))
        self.center = nn.Parameter(torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        values, places = F.relu(self.up(x - self.center)).topk(5, -1)
        return (values[..., None] * self.down[places]).sum(-2) + self.center


def test_a_center_is_neither_norm_nor_position() -> None:
    assert alone(said(LM(Block(Attention()), Residual(Transcoder())), IDS), "layers.1.layer.center") == ["other"]


class TwoTowers(nn.Module):
    """Users and items, by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.bias = nn.Embedding(90, SIZE), nn.Embedding(50, SIZE), nn.Embedding(90, 1)
        self.left, self.right = nn.Linear(SIZE, 8), nn.Linear(SIZE, 8)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return (self.left(self.user(users)) * self.right(self.item(items))).sum(-1, keepdim=True) + self.bias(users)


def test_numbers_in_a_row_are_no_places_for_that() -> None:
    roles = said(TwoTowers(), (torch.arange(4), torch.tensor([3, 9, 4, 30])))
    assert alone(roles, "user.weight", "bias.weight", "item.weight") == ["other", "other", "tok_emb"]


class Halting(nn.Module):
    """Adaptive computation: the stream of each round counts as much as the round's probability of halting."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.halt = nn.Embedding(VOCAB, SIZE), Block(Attention()), nn.Linear(SIZE, 1)
        self.head = nn.Linear(SIZE, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x, total, rest = self.embedding(ids), torch.zeros(()), torch.ones(())
        for _ in range(2):
            x = self.block(x)
            p = self.halt(x).sigmoid()
            total, rest = total + rest * p * x, rest * (1 - p)
        return self.head(total + rest * x)


def test_what_weighs_the_stream_routes_nothing() -> None:
    roles = said(Halting(), IDS)
    assert alone(roles, "halt.weight", "halt.bias", "block.mlp.down.weight", "head.weight") == [
        "other", "other", "down", "head",
    ]  # fmt: skip


class Shortened(Attention):
    """Linformer: keys and values of fewer places, each a learned sum of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fewer_k, self.fewer_v = nn.Parameter(torch.rand(3, 5)), nn.Parameter(torch.rand(3, 5))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        k, v = torch.einsum("st,btd->bsd", self.fewer_k, self.k(x)), self.fewer_v @ self.v(x)
        q, k, v = self.heads(self.q(x)), self.heads(k), self.heads(v)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_sums_over_tokens_are_no_keys() -> None:
    roles = said(LM(Block(Shortened()), Block(Shortened())), IDS)
    names = [f"layers.1.mixer.{name}" for name in ("fewer_k", "fewer_v", "k.weight", "q.weight", "o.weight")]
    assert alone(roles, *names) == ["other", "other", "other", "q", "o"]


class Synthesized(nn.Module):
    """Synthesizer: an MLP makes the weights of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scores = nn.Linear(SIZE, 30), nn.Linear(30, IDS.shape[1])
        self.v, self.o = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.scores(F.relu(self.up(x))).softmax(-1) @ self.v(x))


def test_what_makes_weights_of_values_is_no_mlp() -> None:
    roles = said(LM(Block(Synthesized())), IDS)
    names = [f"layers.0.mixer.{name}.weight" for name in ("up", "scores", "v", "o")]
    assert alone(roles, *names, "layers.0.mlp.up.weight") == ["other"] * 4 + ["up"]


class Pooled(nn.Module):
    """Latents made of the mean of the stream read it, and are read by it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.read, self.back = nn.Linear(SIZE, 3 * SIZE), Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        latents = self.pool(x.mean(1)).unflatten(-1, (3, SIZE))
        return self.back(x, latents + self.read(latents, x))


def test_a_second_stream_made_of_the_first_is_no_embedding() -> None:
    roles = said(LM(Block(Pooled()), Block(Pooled())), IDS)
    assert alone(roles, "layers.0.mixer.pool.weight", "layers.0.mixer.read.q.weight") == ["other", "q"]
