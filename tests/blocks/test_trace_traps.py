"""What a second reader of the tracer tried: models that change under a forward, and forwards that mislead."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.hand_made import FUSED, IDS, LM, MLP, SIZE, TWO_LAYERS, VOCAB, Attention, Block, said, two_layers
from sharpwise.blocks import BlockMap
from sharpwise.blocks.trace import trace


class Watched(nn.Module):
    """A stream of its own through `inner`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(VOCAB, SIZE), inner, nn.Linear(SIZE, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(x + self.inner(x))


# -- the model stays as it was -----------------------------------------------------------------------------------------


class Merging(nn.Linear):
    """Merges an adapter when it leaves training, as loralib does."""

    merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if not mode and not self.merged:
            self.weight.data += 1.0
            self.merged = True
        return self


class Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)
        self.register_buffer("average", torch.zeros(SIZE))
        self.last = torch.zeros(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.9).add_(x.mean((0, 1)))
            self.last.add_(1.0)
        return self.linear(x) + self.average


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data[0] = 0.0
        with torch.no_grad():
            self.linear.weight[1] = 0.0
            self.linear.weight.data = F.normalize(self.linear.weight.data)
        return self.linear(x)


@pytest.mark.parametrize("inner", [Merging(SIZE, SIZE), Averaging(), Writing()], ids=lambda m: type(m).__name__)
def test_a_forward_that_writes_leaves_nothing(inner: nn.Module) -> None:
    model = Watched(inner)
    before = copy.deepcopy(model.state_dict())
    last = getattr(inner, "last", None)
    trace(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not getattr(inner, "merged", False)
    assert getattr(inner, "last", None) is last and (last is None or not last.any())
    assert not any(buffer.requires_grad for buffer in model.buffers())
    copy.deepcopy(model)


def test_the_example_stays_as_it_was() -> None:
    class Masking(Watched):
        def forward(self, ids: Tensor) -> Tensor:
            ids[ids == 3] = 0
            return super().forward(ids)

    example = IDS.clone()
    trace(Masking(nn.Identity()), example)
    assert torch.equal(example, IDS)


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 3 * ctx.saved_tensors[0] ** 2


class OwnActivation(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(Cubed.apply(self.up(x)))


def test_nothing_of_a_model_is_kept() -> None:
    model = LM(Block(Attention()))
    model.layers[0].mlp = OwnActivation()
    model.layers[0].mlp.forward = model.layers[0].mlp.forward  # type: ignore[method-assign]
    weight, whole = weakref.ref(model.layers[0].mlp.up.weight), weakref.ref(model)
    assert {str(s.role) for s in BlockMap.of(model, trace=True)["layers.0.mlp.up.weight"]} == {"up"}
    del model
    gc.collect()
    assert weight() is None and whole() is None


# -- what is looked up ------------------------------------------------------------------------------------------------


class WithPositions(Watched):
    def __init__(self) -> None:
        super().__init__(MLP())
        self.places = nn.Embedding(16, SIZE)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(x + self.inner(x))


@pytest.mark.parametrize("example", [torch.arange(8)[None], torch.zeros(1, 8).long(), torch.tensor([[5]])], ids=str)
def test_tokens_that_look_like_places(example: Tensor) -> None:
    found = said(WithPositions(), example)
    assert (found["embedding.weight"], found["places.weight"]) == ("tok_emb all", "pos_emb all")


def test_a_permuted_weight_is_no_table() -> None:
    class Permuted(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.randperm(self.up.out_features))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(F.linear(x, self.up.weight[self.order], self.up.bias)))

    found = said(Watched(Permuted()))
    assert (found["inner.up.weight"], found["inner.down.weight"]) == ("up all", "down all")


# -- other ways to attend ----------------------------------------------------------------------------------------------


def test_attention_without_an_output_projection() -> None:
    class Bare(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.o = nn.Identity()  # type: ignore[assignment]

    model = LM(Block(Bare()))
    found = said(model)
    assert (found["layers.0.mlp.up.weight"], found["layers.0.mlp.down.weight"]) == ("0: up all", "0: down all")
    assert found["head.weight"] == "head all"


def test_one_matrix_behind_attention_and_mlp() -> None:
    class SingleStream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(SIZE, 3 * SIZE + 20), nn.Linear(SIZE + 20, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            *qkv, hidden = self.into(x).split([SIZE, SIZE, SIZE, 20], -1)
            q, k, v = (t.unflatten(-1, (4, 6)).transpose(1, 2) for t in qkv)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(torch.cat([attended, F.gelu(hidden)], -1))

    found = said(Watched(SingleStream()))
    assert found["inner.into.weight"] == f"0: {FUSED}, up 72:92"
    assert found["inner.out.weight"] == "0: o all"


class OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)


class ByOwnFunction(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = OwnLinear.apply(x, self.weight)
        return made if self.bias is None else made + self.bias


def test_linear_as_a_function_with_a_gradient_of_its_own() -> None:
    model = two_layers()
    for layer in model.layers:
        for parent in (layer.mixer, layer.mlp):
            for child in parent.children():
                child.__class__ = ByOwnFunction
    assert said(model) == TWO_LAYERS


def test_a_forward_in_inference_mode() -> None:
    model = two_layers()
    model.forward = torch.inference_mode()(model.forward)  # type: ignore[method-assign]
    assert said(model) == TWO_LAYERS


def test_another_default_device() -> None:
    model = two_layers()
    with torch.device("meta"):
        assert said(model) == TWO_LAYERS


# -- one matrix after another -----------------------------------------------------------------------------------------


class Attended(nn.Module):
    """A matrix that reads what an attention made; `beside` adds that to the stream as well. GLU where it is wider."""

    def __init__(self, size: int, beside: bool) -> None:
        super().__init__()
        self.mixer, self.more, self.beside = Attention(), nn.Linear(SIZE, size, bias=False), beside

    def forward(self, x: Tensor) -> Tensor:
        made = self.mixer(x)
        more = self.more(made)
        more = F.glu(more) if more.shape[-1] > SIZE else more
        return made + more if self.beside else more


@pytest.mark.parametrize(
    ("size", "beside", "role"),
    [
        (2 * SIZE, False, "0: o all"),  # the second factor of a product of rank SIZE
        (2 * SIZE, True, "other all"),  # o is read for more than that
        (SIZE, False, "other all"),  # as wide as o, which is no factor of lower rank
        (SIZE, True, "other all"),
    ],
)
def test_what_reads_the_output_projection(size: int, beside: bool, role: str) -> None:
    found = said(Watched(Attended(size, beside)))
    assert (found["inner.mixer.o.weight"], found["inner.more.weight"]) == ("0: o all", role)


class Two(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, hidden, bias=False), nn.Linear(hidden, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).flip(-1))


@pytest.mark.parametrize(
    ("hidden", "first", "second"),
    [
        (SIZE // 3, "other all", "other all"),  # a product of low rank
        (SIZE, "other all", "other all"),
        (SIZE + 1, "up all", "down all"),  # more units than a linear map could use: there is an activation somewhere
    ],
)
def test_two_matrices_without_a_known_activation(hidden: int, first: str, second: str) -> None:
    found = said(Watched(Two(hidden)))
    assert (found["inner.first.weight"], found["inner.second.weight"]) == (first, second)
