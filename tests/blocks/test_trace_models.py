"""What a trace says of torch's own modules, of encoder-decoders, images, recurrences, and of models in any state."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from blocks.hand_made import (
    AROUND,
    ATTENTION,
    BLOCK,
    FUSED,
    HEADS,
    IDS,
    LM,
    MLP,
    OUTSIDE,
    SIZE,
    TWO_LAYERS,
    Attention,
    Block,
    Encoder,
    GatedRecurrence,
    LinearAttention,
    StateSpace,
    named,
    said,
    two_layers,
    weights,
)
from sharpwise.blocks.trace import trace

X, Y = torch.rand(2, 7, SIZE), torch.rand(2, 5, SIZE)

# -- torch's own modules -----------------------------------------------------------------------------------------------

MHA = {"in_proj_weight": FUSED, "in_proj_bias": FUSED, "out_proj.weight": "o all", "out_proj.bias": "o all"}
TORCH_MLP = weights({"linear1": "up all", "linear2": "down all"}, "weight", "bias")


class OneAttention(nn.Module):
    """Queries from the first argument, keys and values from the last two given."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, HEADS, **options)

    def forward(self, q, k=None, v=None):
        return self.attention(q, q if k is None else k, q if v is None else v)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("x", [X, X[0]], ids=["batch", "unbatched"])
def test_multihead_attention(batch_first, x):
    assert said(OneAttention(batch_first=batch_first), x) == named(MHA, "attention.", 0)


def test_multihead_attention_with_keys_and_values_of_other_sizes():
    model = OneAttention(kdim=10, vdim=14, batch_first=True)
    apart = {f"{role}_proj_weight": f"{role} all /4" for role in "qkv"}
    expected = apart | {name: what for name, what in MHA.items() if name != "in_proj_weight"}
    assert said(model, (X, torch.rand(2, 5, 10), torch.rand(2, 5, 14))) == named(expected, "attention.", 0)


def torch_layer(*attentions: str) -> dict[str, str]:
    norms = weights({f"norm{i + 1}": "norm all" for i in range(len(attentions) + 1)}, "weight", "bias")
    return norms | TORCH_MLP | {k: v for name in attentions for k, v in named(MHA, f"{name}.").items()}


def torch_stack(prefix: str, layers: int, *attentions: str) -> dict[str, str]:
    final = weights({f"{prefix}norm": "norm all"}, "weight", "bias")
    table = torch_layer(*attentions)
    return final | {k: v for i in range(layers) for k, v in named(table, f"{prefix}layers.{i}.", i).items()}


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"batch_first": True, "activation": "gelu"}], ids=str)
def test_transformer_encoder(options):
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 20, **options)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(SIZE), enable_nested_tensor=False)
    assert said(model, X) == torch_stack("", 2, "self_attn")


def test_transformer_decoder():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(SIZE, HEADS, 20, batch_first=True), 2, nn.LayerNorm(SIZE))
    assert said(model, (X, Y)) == torch_stack("", 2, "self_attn", "multihead_attn")


def test_transformer():
    model = nn.Transformer(SIZE, HEADS, 1, 2, 20, batch_first=True)
    encoder = torch_stack("encoder.", 1, "self_attn")
    assert said(model, (X, Y)) == encoder | torch_stack("decoder.", 2, "self_attn", "multihead_attn")


# -- encoder-decoder, images, pooling ----------------------------------------------------------------------------------


class CrossBlock(Block):
    """As T5 has them: relative positions in the first layer, cross-attention in the decoder."""

    def __init__(self, first, cross):
        super().__init__(Attention(relative=first))
        if cross:
            self.norm_3, self.cross = nn.RMSNorm(SIZE), Attention()

    def forward(self, x, memory=None):
        x = x + self.mixer(self.norm_1(x))
        if memory is not None:
            x = x + self.cross(self.norm_3(x), memory)
        return x + self.mlp(self.norm_2(x))


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, SIZE)
        self.encoder = nn.ModuleList(CrossBlock(i == 0, cross=False) for i in range(2))
        self.decoder = nn.ModuleList(CrossBlock(i == 0, cross=True) for i in range(2))
        self.norm, self.head = nn.RMSNorm(SIZE), nn.Linear(SIZE, 40)

    def forward(self, source, target):
        memory, x = self.embedding(source), self.embedding(target)
        for layer in self.encoder:
            memory = layer(memory)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.head(self.norm(x))


def test_encoder_decoder_with_cross_attention():
    cross = weights(named(ATTENTION, "cross.")) | {"norm_3.weight": "norm all"}
    expected = AROUND | {"norm.weight": "norm all"}
    for i in range(2):
        expected |= named(BLOCK, f"encoder.{i}.", i) | named(BLOCK | cross, f"decoder.{i}.", i)
    for side in ("encoder", "decoder"):
        expected[f"{side}.0.mixer.relative.weight"] = "0: rel_pos all"
    assert said(EncoderDecoder(), (IDS, IDS.flip(1)[:, :4])) == expected


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, SIZE, 4, 4)
        self.start, self.places = nn.Parameter(torch.randn(1, 1, SIZE)), nn.Parameter(torch.randn(1, 5, SIZE))
        self.layers = nn.Sequential(Block(Attention()), Block(Attention()))
        self.norm, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, 5)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.layers(x))[:, 0])


def test_vision_transformer():
    expected = TWO_LAYERS | {"start": "pos_emb all", "places": "pos_emb all", "head.bias": "head all"}
    expected |= weights({"patches": "patch_emb all"}, "weight", "bias")
    del expected["embedding.weight"]
    assert said(Images(), torch.rand(2, 3, 8, 8)) == expected


class Pooling(nn.Module):
    """Learned queries look at the stream that a block made."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(40, SIZE), nn.ModuleList([Block(Attention())])
        self.queries, self.pool = nn.Parameter(torch.randn(1, 3, SIZE)), Attention()
        self.head = nn.Linear(SIZE, 5)

    def forward(self, ids):
        x = self.layers[0](self.embedding(ids))
        return self.head(F.gelu(self.pool(self.queries.expand(len(x), -1, -1), x)).mean(1))


def test_pooling_by_learned_queries():
    found = said(Pooling())
    assert {name: found[name] for name in found if name.startswith("pool")} == weights(named(ATTENTION, "pool."))
    assert found["queries"] == "pos_emb all"
    rest = {name: what for name, what in found.items() if not name.startswith(("pool", "queries", "head"))}
    assert rest == {"embedding.weight": "tok_emb all"} | named(BLOCK, "layers.0.", 0)


# -- attention in other hands ------------------------------------------------------------------------------------------


def hidden_attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    parts = (F.linear(x, w).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (q, k, v))
    q, k, v = parts
    return F.linear(torch.softmax(q @ k.mT, -1).matmul(v).transpose(1, 2).flatten(2), o)


class HiddenAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.all = nn.ParameterList(torch.randn(SIZE, SIZE) for _ in range(4))

    def forward(self, x):
        return hidden_attention(x, *self.all)


def test_attention_in_a_function_of_ones_own():
    expected = {f"attend.all.{i}": f"0: {what}" for i, what in enumerate(ATTENTION.values())}
    assert said(Encoder(HiddenAttention())) == AROUND | expected


class Flex(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups
        self.qkv, self.o = nn.Linear(SIZE, SIZE + 12 * groups, bias=False), nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x):
        sizes = [SIZE, 6 * self.groups, 6 * self.groups]
        q, k, v = (part.unflatten(-1, (-1, 6)).transpose(1, 2) for part in self.qkv(x).split(sizes, -1))
        out = flex_attention(q, k, v, score_mod=closer_is_better, enable_gqa=self.groups < HEADS)
        return self.o(out.transpose(1, 2).flatten(2))


def closer_is_better(score, batch, head, q, k):
    return score - (q - k).abs()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("groups", "qkv"), [(4, FUSED), (2, "q 0:24 /4, k 24:36 /2, v 36:48 /2")])
def test_flex_attention(groups, qkv):
    expected = {"attend.qkv.weight": f"0: {qkv}", "attend.o.weight": "0: o all"}
    assert said(Encoder(Flex(groups))) == AROUND | expected


@pytest.mark.parametrize("mixer", [StateSpace, GatedRecurrence, LinearAttention])
def test_recurrence_between_attentions(mixer):
    model = LM(Block(Attention()), Block(mixer()), Block(Attention()))
    inside = {name: "other all" for name, _ in model.named_parameters() if name.startswith("layers.1.mixer.")}
    expected = OUTSIDE | named(BLOCK, "layers.0.", 0) | named(BLOCK, "layers.1.", 1) | named(BLOCK, "layers.2.", 2)
    expected = {name: what for name, what in expected.items() if not name.startswith("layers.1.mixer.")}
    inside |= {name: "conv all" for name in inside if ".conv." in name}
    assert said(model) == expected | named(inside, layer=1)


def test_shared_layer():
    shared = Block(Attention())
    found = said(LM(shared, shared, Block(Attention())))
    assert found == OUTSIDE | named(BLOCK, "layers.0.", 0) | named(BLOCK, "layers.2.", 2)


# -- models in any state -----------------------------------------------------------------------------------------------


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return two_layers()


def half_compiled() -> nn.Module:
    model = two_layers()
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    model.layers[1].compile(backend="eager")
    return model


STATES = {
    "as built": two_layers,
    "meta": on_meta,
    "bfloat16": lambda: two_layers().bfloat16(),
    "float64": lambda: two_layers().double(),
    "evaluating": lambda: two_layers().eval(),
    "frozen": lambda: two_layers().requires_grad_(False),
    "compiled": lambda: torch.compile(two_layers(), backend="eager"),
    "layers compiled": half_compiled,
    "DataParallel": lambda: nn.DataParallel(two_layers()),
}


@pytest.mark.parametrize("state", STATES)
def test_the_same_in_any_state(state):
    assert said(STATES[state]()) == TWO_LAYERS


def test_under_no_grad():
    with torch.no_grad():
        assert said(two_layers()) == TWO_LAYERS


def test_unused_parameters_are_listed():
    model = two_layers()
    model.spare, model.layers[1].spare = MLP(), nn.Parameter(torch.zeros(3))
    traced = trace(model)
    assert set(traced.unused) == {"spare." + name for name, _ in model.spare.named_parameters()} | {"layers.1.spare"}
    assert {traced.why[name] for name in traced.unused} == {"the forward does not use it"}


def test_without_attention_nothing_is_said_of_one():
    model = nn.Sequential(nn.Embedding(40, SIZE), nn.LayerNorm(SIZE), nn.Linear(SIZE, 40))
    assert trace(model).attentions == 0
    assert said(model) == {"0.weight": "tok_emb all", "2.weight": "head all", "2.bias": "head all"} | weights(
        {"1": "norm all"}, "weight", "bias"
    )
