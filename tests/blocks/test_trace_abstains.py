"""Models that are no language models: a role is right, or `other`."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpwise
from blocks.hand_made import HEADS, IDS, LM, MLP, SIZE, VOCAB, Attention, Block, Encoder, said
from sharpwise.blocks import BlockMap

X = torch.rand(2, 6, SIZE)
IMAGE = torch.rand(2, 3, 16, 16)


def alone(roles: dict[str, str], *names: str) -> list[str]:
    """The roles of these parameters, without layer and rows."""
    return [roles[name].rpartition(": ")[2].partition(" ")[0] for name in names]


class Residual(nn.Module):
    """A ResNet in small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(x + self.b(F.relu(self.a(x)))).mean((2, 3)))


def test_convolutions_are_no_heads() -> None:
    roles = said(Residual(), IMAGE)
    assert alone(roles, "stem.weight", "a.weight", "b.weight", "head.weight") == ["conv", "conv", "conv", "head"]


class Reduced(Attention):
    """Keys and values of fewer tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fewer, self.norm = nn.Conv1d(SIZE, SIZE, 2, 2), nn.LayerNorm(SIZE)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(x, self.norm(self.fewer(x.mT).mT))


class MixedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.mix = nn.Linear(SIZE, 20), nn.Linear(20, SIZE), nn.Conv1d(20, 20, 3, 1, 1, groups=20)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.mix(self.up(x).mT).mT))


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention, self.mlp = nn.Conv2d(3, SIZE, 4, 4), Reduced(), MixedMLP()
        self.head = nn.Linear(SIZE, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = x + self.attention(x)
        return self.head((x + self.mlp(x)).mean(1))


def test_spatial_reduction_and_mixing() -> None:
    roles = said(Pyramid(), IMAGE)
    names = (
        "patches.weight",
        "attention.fewer.weight",
        "attention.norm.weight",
        "attention.k.weight",
        "mlp.mix.weight",
    )
    assert alone(roles, *names) == ["patch_emb", "conv", "norm", "k", "conv"]
    assert {*alone(roles, "mlp.up.weight", "mlp.down.weight")} <= {"up", "down", "other"}
    assert alone(roles, "head.weight") == ["head"]


class Latents(nn.Module):
    """Learned queries: a parameter, or the rows of an embedding."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        self.queries = nn.Embedding(4, SIZE) if table else nn.Parameter(torch.randn(1, 4, SIZE))
        self.attention, self.mlp, self.head = Attention(), MLP(), nn.Linear(SIZE, 5)

    def forward(self, memory: Tensor) -> Tensor:
        x = self.queries.weight[None] if isinstance(self.queries, nn.Embedding) else self.queries
        x = x.expand(len(memory), -1, -1)
        x = x + self.attention(x, memory)
        return self.head((x + self.mlp(x)).mean(1))


@pytest.mark.parametrize("table", [False, True])
def test_learned_queries(table: bool) -> None:
    roles = said(Latents(table), X)
    assert roles.pop("queries.weight" if table else "queries") == "pos_emb all"
    assert alone(roles, "attention.q.weight", "attention.o.weight", "mlp.up.weight") == ["q", "o", "up"]


class Conditioned(nn.Module):
    """adaLN: scale, shift and gate from a condition, and from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm = nn.Linear(8, SIZE), nn.LayerNorm(SIZE, elementwise_affine=False)
        self.time = nn.Sequential(nn.Linear(8, SIZE), nn.SiLU(), nn.Linear(SIZE, SIZE))
        self.modulate, self.table = nn.Linear(SIZE, 3 * SIZE), nn.Parameter(torch.randn(3, SIZE))
        self.attention, self.out = Attention(), nn.Linear(SIZE, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.into(x)
        made = self.modulate(F.silu(self.time(time))).unflatten(-1, (3, SIZE)) + self.table
        shift, scale, gate = made.chunk(3, 1)
        return self.out(x + gate * self.attention(self.norm(x) * (1 + scale) + shift))


def test_modulation() -> None:
    roles = said(Conditioned(), (torch.rand(2, 6, 8), torch.rand(2, 8)))
    names = ("into.weight", "modulate.weight", "table", "time.0.weight", "time.2.weight", "out.weight")
    assert alone(roles, *names) == ["patch_emb", "modulation", "modulation", "other", "other", "head"]


class Relative(Attention):
    """Scores with a bias of computed buckets, of a small network, or of relative keys."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.rows = kind, nn.Embedding(11, SIZE if kind == "keys" else HEADS)
        self.one, self.two = nn.Linear(1, 12), nn.Linear(12, HEADS, bias=False)
        self.places = nn.Linear(SIZE, SIZE, bias=False)
        self.register_buffer("steps", torch.linspace(-1, 1, 11)[:, None])

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        n = torch.arange(x.shape[1])
        pairs = (n[:, None] - n).clamp(-5, 5) + 5
        scores = q @ k.mT
        if self.kind == "buckets":
            scores = scores + self.rows(pairs).permute(2, 0, 1)
        elif self.kind == "network":
            scores = scores + self.two(F.relu(self.one(self.steps)))[pairs].permute(2, 0, 1)
        else:
            keys = self.places(self.rows.weight).unflatten(-1, (HEADS, -1)).transpose(0, 1)
            scores = scores + (q @ keys.mT).gather(-1, pairs.expand(*scores.shape))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["buckets", "network", "keys"])
def test_relative_positions_are_no_tokens(kind: str) -> None:
    roles = said(Block(Relative(kind)), X)
    assert alone(roles, *(f"mixer.{name}.weight" for name in "qkvo")) == ["q", "k", "v", "o"]
    rest = ("mixer.rows.weight", "mixer.one.weight", "mixer.two.weight", "mixer.places.weight")
    assert {*alone(roles, *rest)} <= {"rel_pos", "other"}
    if kind == "buckets":
        assert alone(roles, rest[0]) == ["rel_pos"]


class Fronted(nn.Module):
    """Sound through two convolutions and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.project = nn.Conv1d(1, 12, 5, 2), nn.Conv1d(12, 12, 3, 2), nn.Linear(12, SIZE)
        self.block, self.head = Block(Attention()), nn.Linear(SIZE, 5)

    def forward(self, sound: Tensor) -> Tensor:
        x = F.gelu(self.b(F.gelu(self.a(sound[:, None])))).mT
        return self.head(self.block(self.project(x)))


def test_a_front_end_of_convolutions() -> None:
    roles = said(Fronted(), torch.rand(2, 40))
    assert alone(roles, "a.weight", "b.weight", "project.weight") == ["conv", "conv", "other"]


class Talking(Attention):
    """Heads are mixed before and after the softmax; two heads that nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        scores = self.before((q @ k.mT).permute(0, 2, 3, 1)).softmax(2)
        return self.o((self.after(scores).permute(0, 3, 1, 2) @ v).transpose(1, 2).flatten(2))


def test_mixes_of_heads_are_no_mlp() -> None:
    roles = said(Block(Talking()), X)
    assert {*alone(roles, "mixer.before.weight", "mixer.after.weight")} == {"other"}
    assert alone(roles, "mlp.up.weight", "mlp.down.weight") == ["up", "down"]


class Held(nn.Module):
    """A matrix that is no parameter, with a low-rank factor beside it, as in QLoRA."""

    def __init__(self, rows: int, columns: int, buffer: bool) -> None:
        super().__init__()
        base = torch.randn(rows, columns)
        if buffer:
            self.register_buffer("base", base)
        else:
            self.base = nn.Parameter(base, requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(3, columns)), nn.Parameter(torch.zeros(rows, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base) + F.linear(F.linear(x, self.a), self.b)


@pytest.mark.parametrize("buffer", [False, True])
def test_factors_beside_a_matrix_that_is_no_parameter(buffer: bool) -> None:
    block = Block(Attention())
    for name in "qkvo":
        setattr(block.mixer, name, Held(SIZE, SIZE, buffer))
    block.mlp.up, block.mlp.down = Held(20, SIZE, buffer), Held(SIZE, 20, buffer)  # type: ignore[assignment]
    roles = said(LM(block))
    for name in ("mixer.q", "mixer.k", "mixer.v", "mixer.o", "mlp.up", "mlp.down"):
        assert (
            alone(roles, f"layers.0.{name}.a", f"layers.0.{name}.b") == [name[6:] if "mixer" in name else name[4:]] * 2
        )


class Adapted(nn.Module):
    """A frozen matrix with low-rank factors, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, 3, bias=False)
        self.b = nn.Linear(3, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class UNet(nn.Module):
    """An image whose cross attention reads what the model is given of a text, with LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.norm = nn.Conv2d(4, SIZE, 3, 1, 1), nn.Conv2d(SIZE, 4, 3, 1, 1), nn.GroupNorm(4, SIZE)
        self.project, self.back = nn.Conv2d(SIZE, SIZE, 1), nn.Conv2d(SIZE, SIZE, 1)
        self.own, self.cross, self.mlp = Attention(), Attention(), MLP()
        self.cross.k, self.cross.v = (nn.Linear(10, SIZE, bias=False) for _ in "kv")
        for attention in (self.own, self.cross):
            for name in "qkvo":
                setattr(attention, name, Adapted(getattr(attention, name)))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = self.into(image)
        h = self.project(self.norm(x)).flatten(2).mT
        h = h + self.own(h)
        h = h + self.cross(h, text)
        h = h + self.mlp(h)
        return self.out(F.silu(x + self.back(h.mT.unflatten(-1, x.shape[-2:]))))


def test_lora_on_cross_attention_to_what_the_model_is_given() -> None:
    roles = said(UNet(), (torch.rand(2, 4, 4, 4), torch.rand(2, 5, 10)))
    for name in "qkvo":
        assert alone(roles, f"own.{name}.a.weight", f"own.{name}.b.weight") == [name, name]
        # A first factor that reads the model's own input may be what begins a stream.
        assert alone(roles, f"cross.{name}.a.weight") == [name if name in "qo" else "other"]
        assert alone(roles, f"cross.{name}.b.weight", f"cross.{name}.base.weight") == [name, name]


# -- what raised -------------------------------------------------------------------------------------------------------


class Turning(nn.Linear):
    """A matrix and what becomes of its output."""

    def __init__(self, how: str) -> None:
        super().__init__(SIZE, SIZE, bias=False)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return {"scaled": 2 * y, "bent": y.relu(), "both": y + y.relu()}[self.how]


@pytest.mark.parametrize(("how", "role"), [("scaled", "q"), ("bent", "other"), ("both", "other")])
def test_what_is_bent_on_one_of_its_ways_makes_no_queries(how: str, role: str) -> None:
    attention = Attention()
    attention.q = Turning(how)
    names = ("q", "k", "v", "o")
    roles = said(Encoder(attention), IDS)
    assert alone(roles, *(f"attend.{name}.weight" for name in names)) == [role, "k", "v", "o"]


class ThreeBiases(Attention):
    """One matrix, with biases for queries and values."""

    def __init__(self, like: bool) -> None:
        super().__init__()
        self.all, self.like = nn.Linear(SIZE, 3 * SIZE, bias=False), like
        self.of_q, self.of_v = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        none = torch.zeros_like(self.of_v) if self.like else torch.zeros(SIZE)
        made = F.linear(x, self.all.weight, torch.cat((self.of_q, none, self.of_v)))
        q, k, v = (self.heads(t) for t in made.chunk(3, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("like", [False, True])
def test_biases_of_queries_and_values(like: bool) -> None:
    assert alone(said(Block(ThreeBiases(like)), X), "mixer.of_q", "mixer.of_v") == ["q", "v"]


class Viewed(nn.Module):
    """A view of what a norm made of transposed numbers, and of an attention's output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.mT.contiguous().mT).view(-1, SIZE))


def test_a_view_behind_a_norm() -> None:
    assert alone(said(Viewed(), X), "norm.weight", "head.weight") == ["norm", "head"]


class Biased(Attention):
    """A table, indexed inside the mask of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(HEADS, 11))
        self.register_buffer("pairs", (torch.arange(6)[:, None] - torch.arange(6)) + 5)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        made = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table[:, self.pairs])
        return self.o(made.transpose(1, 2).flatten(2))


def test_a_table_in_the_mask() -> None:
    assert alone(said(Block(Biased()), X), "mixer.table") == ["rel_pos"]


class ClassAttention(nn.Module):
    """The class token is what is added to, and joined before."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.attention, self.head = nn.Parameter(torch.zeros(1, 1, SIZE)), Attention(), nn.Linear(SIZE, 5)

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        return self.head((token + self.attention(token, torch.cat([token, x], 1)))[:, 0])


def test_a_class_token_is_no_bias() -> None:
    assert said(ClassAttention(), X)["token"] == "pos_emb all"


class Inner(nn.Module):
    """Output dimensions in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(VOCAB, SIZE), nn.Parameter(torch.randn(SIZE, HEADS, 2))
        self.q = nn.Parameter(torch.randn(2, SIZE, 6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return torch.einsum("btd,dhk->bthk", x, self.inner).sum(-1) + torch.einsum("btd,gdk->btgk", x, self.q).sum()


@pytest.mark.parametrize("optimizer", [sharpwise.AdamW, sharpwise.Lion])
def test_what_moves_by_element_needs_no_roles(optimizer: type) -> None:
    model = Inner()
    made = optimizer(model, lr=1e-3)
    model(IDS).square().sum().backward()
    before = model.inner.detach().clone()
    made.step()
    assert not torch.equal(model.inner, before)


def test_a_disagreement_does_not_reach_what_moves_by_element(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> BlockMap:
        raise ValueError("no map")

    monkeypatch.setattr(BlockMap, "of", fails)
    assert {str(s.role) for s in sharpwise.AdamW(Inner(), lr=1e-3).blocks} == {"other"}
    with pytest.raises(ValueError, match="no map"):
        sharpwise.AdamMini(Inner(), lr=1e-3)


def test_learning_rates_by_role_say_where_there_are_none(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    roles = {"0.*": "other", "1.*": "other"}
    with caplog.at_level("WARNING", "sharpwise"):
        sharpwise.AdamW(model, lr=1e-3, blocks=roles, block_lr="blockwise")
        sharpwise.AdamW(model, lr=1e-3, blocks=roles)
    assert [record.getMessage()[:44] for record in caplog.records] == ["AdamW: 100% of the elements are 'other', for"]
