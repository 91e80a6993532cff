"""The graph that products of one probe share: the same products, new ones for new weights, and nothing left after."""

import gc
import weakref

import pytest
import torch
from torch import nn

from probes.exact import VOCAB, exact, gpt2, tokens
from sharpwise import probes
from sharpwise.probes import Curvature

KINDS = ("hessian", "gauss-newton")


def vectors(dim, count=3):
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Token:
    """Lives as long as the graph that it is in."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clone(), None


class Counting(nn.Module):
    """Counts forward passes, and knows whose graphs are still held."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.alive = []

    def forward(self, inputs):
        token = Token()
        self.alive.append(weakref.ref(token))
        return Marked.apply(self.model(inputs).logits, token)

    @property
    def held(self):
        return sum(ref() is not None for ref in self.alive)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("select", [None, "VO"])
def test_products_are_the_same_bit_for_bit(kind, select):
    model = Counting(gpt2())
    c = Curvature(model, tokens(), kind, select=select)
    anew = [c @ v for v in vectors(c.dim)]
    assert len(model.alive) == 3 and model.held == 0
    with c.kept():
        kept = [c @ v for v in vectors(c.dim)]
        assert len(model.alive) == 4 and model.held == 1
    assert all(torch.equal(a, b) for a, b in zip(anew, kept, strict=True))
    each = 3 if kind == "hessian" else 7 / 3
    assert c.gradients == pytest.approx(6 * each - 2) and c.products == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_changed_weights_change_the_products(kind, dtype):
    """In place, by an optimizer's step, by loading, by another tensor, and by another parameter."""
    model = gpt2().to(dtype)
    c = Curvature(model, tokens(), kind)
    v = vectors(c.dim)[0]
    norm = model.transformer.ln_f

    def in_place():
        with torch.no_grad():
            norm.weight.mul_(1.5)

    def by_step():
        norm.weight.grad = torch.ones_like(norm.weight)
        torch.optim.SGD([norm.weight], lr=0.5).step()
        norm.weight.grad = None

    def by_loading():
        norm.load_state_dict({"weight": norm.weight.detach() * 2, "bias": norm.bias.detach()})

    def other_tensor():
        norm.weight.data = norm.weight.data * 0.5

    def other_parameter():
        norm.weight = nn.Parameter(norm.weight.detach() * 1.25)

    with c.kept():
        before = c @ v
        for change in (in_place, by_step, by_loading, other_tensor, other_parameter):
            change()
            after = c @ v
            assert c.cost == pytest.approx(3 if kind == "hessian" else 7 / 3)
            assert not torch.allclose(after, before), change.__name__
            assert torch.equal(after, Curvature(model, tokens(), kind) @ v), change.__name__
            before = after


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, inputs):
        return self.table(inputs) * self.scale


def test_changed_buffers_count_as_well():
    model = Scaled()
    c = Curvature(model, tokens())
    v = torch.ones(c.dim).cumsum(0)
    with c.kept():
        before = c @ v
        model.scale.fill_(2.0)
        assert not torch.allclose(c @ v, before)


CALLS = {
    "trace": lambda c: probes.trace(c, samples=3),
    "diagonal": lambda c: probes.diagonal(c, samples=30, rtol=0.99),
    "frobenius": lambda c: probes.frobenius(c, samples=30, rtol=0.99),
    "norm_11": lambda c: probes.norm_11(c, samples=40, rtol=0.99),
    "eigenvalues": lambda c: probes.eigenvalues(c, steps=4),
    "density": lambda c: probes.density(c, samples=2, steps=3),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_probe_takes_one_forward_pass_and_holds_nothing_after(name):
    model = Counting(gpt2())
    c = Curvature(model, tokens())
    found = CALLS[name](c)
    assert len(model.alive) == 1 and model.held == 0
    assert found.cost.gradients == 3 + 2 * (found.settings["products"] - 1)
    alone = Curvature(model.model, [tokens()[:1], tokens()[1:]])  # two passes, each time
    assert CALLS[name](alone).cost.gradients % 3 == 0


def test_several_passes_are_made_anew():
    e = exact()
    expected = e.hessian @ vectors(364)[0]
    for options, passes in (({"micro": 1}, 3), ({"micro": 2}, 2)):
        model = Counting(gpt2())
        c = Curvature(model, e.batch, **options)
        with c.kept():
            for _ in range(2):
                assert torch.allclose(c @ vectors(364)[0], expected, atol=1e-12)
                assert model.held == 0
        assert c.passes == passes and len(model.alive) == 2 * passes


@pytest.mark.filterwarnings("error")
def test_the_graph_goes_where_a_probe_fails():
    model = Counting(gpt2())
    c = Curvature(model, tokens())
    gc.disable()  # not even a cycle is left
    try:
        with pytest.raises(KeyboardInterrupt), c.kept():
            c @ vectors(c.dim)[0]
            raise KeyboardInterrupt
        assert model.held == 0
        with pytest.raises(FloatingPointError), c.kept():
            c @ vectors(c.dim)[0]
            with torch.no_grad():
                model.model.transformer.ln_f.weight.fill_(torch.nan)
            c @ vectors(c.dim)[0]
        assert model.held == 0
    finally:
        gc.enable()


def test_within_another():
    model = Counting(gpt2())
    c = Curvature(model, tokens())
    with c.kept():
        probes.trace(c, samples=2)
        probes.eigenvalues(c, steps=3)
        assert len(model.alive) == model.held == 1
    assert model.held == 0
