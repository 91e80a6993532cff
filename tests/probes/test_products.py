"""Products with the Hessian and the Gauss-Newton matrix: exact, restricted, in parts, and on other models."""

import pytest
import torch
from torch import nn

from probes.exact import CONTEXT, VOCAB, exact, gpt2, tokens
from sharpwise.probes import Curvature

KINDS = ("hessian", "gauss-newton")


def vector(dim, seed=0, dtype=torch.float64):
    return torch.randn(dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def matrix(kind):
    return exact().hessian if kind == "hessian" else exact().fisher


@pytest.mark.parametrize("kind", KINDS)
def test_whole_model_with_tied_weights(kind):
    e = exact()
    c = Curvature(e.model, e.batch, kind, blocks=e.blocks)
    v = vector(c.dim)
    assert torch.allclose(c @ v, matrix(kind) @ v, atol=1e-12)
    assert c.products == 1 and c.dim == 364


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("select", ["VO", "q", ["Norm", "k"], "*.h.1.*"])
def test_restriction_is_a_principal_submatrix(kind, select):
    e = exact()
    c = Curvature(e.model, e.batch, kind, select=select, blocks=e.blocks)
    if "*" in select:
        rows = [i for i, s in zip(range(364), per_element(), strict=True) if s.layer == 1]
    else:
        rows = e.rows(*([select] if isinstance(select, str) else select))
    assert c.dim == len(rows)
    v = vector(c.dim)
    assert torch.allclose(c @ v, matrix(kind)[rows][:, rows] @ v, atol=1e-12)


def per_element():
    selection = exact().selection
    return [s for s in selection.segments for _ in range(s.numel)]


def test_segments_as_selection_and_vectors_as_dicts():
    e = exact()
    chosen = [s for s in e.blocks if s.role == "q" and s.layer == 0 and not s.bias]
    c = Curvature(e.model, e.batch, select=chosen, blocks=e.blocks)
    name = "transformer.h.0.attn.c_attn.weight[q]"
    v = vector(16).view(4, 4)  # 4 inputs, 4 of the 12 columns
    rows = [i for i, s in enumerate(per_element()) if s in chosen]
    found = c.matvec({name: v})
    assert list(found) == [name] and found[name].shape == (4, 4)
    assert torch.allclose(found[name].flatten(), e.hessian[rows][:, rows] @ v.flatten(), atol=1e-12)
    everything = Curvature(e.model, e.batch, blocks=e.blocks)
    column = everything.matvec({name: v})
    assert torch.allclose(column[name], found[name], atol=1e-12) and len(column) == len(e.blocks)
    with pytest.raises(KeyError, match="no segment 'wte' is selected"):
        c.matvec({"wte": v})


@pytest.mark.parametrize("kind", KINDS)
def test_batches_weigh_by_tokens_whatever_the_parts(kind):
    e = exact()
    first, second = e.batch[:1], e.batch[1:]
    v = vector(364)
    expected = matrix(kind) @ v
    for batches in ([first, second], [second, first]):
        assert torch.allclose(Curvature(e.model, batches, kind, blocks=e.blocks, micro=1) @ v, expected, atol=1e-12)
    inputs, targets = e.batch[:, :-1], e.batch[:, 1:].clone()
    targets[2], targets[0, 3:] = -100, -100
    some = Curvature(e.model, (inputs, targets), kind, blocks=e.blocks)
    one, two = (Curvature(e.model, b, kind, blocks=e.blocks) for b in (e.batch[:1, :4], e.batch[1:2]))
    assert some.tokens == 3 + CONTEXT
    assert torch.allclose(some @ v, (3 * (one @ v) + CONTEXT * (two @ v)) / 8, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_against_differences_of_gradients(family):
    """Grouped-query attention and interleaved QKV, with fused attention."""
    from reference import models

    model = getattr(models, family)().double()
    batch = torch.randint(11, (2, 6))
    c = Curvature(model, batch)
    v = vector(c.dim)
    along = c.selection.scatter(v)

    def gradient(step):
        model.eval().zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(step * along[name])
        nn.functional.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(step * along[name])
        return c.selection.gather({n: p.grad for n, p in model.named_parameters()})

    h = 1e-3 if family == "llama" else 1e-5  # its norms are in float32 whatever the model is
    expected = (gradient(h) - gradient(-h)) / (2 * h)
    close = 1e-2 if family == "llama" else 1e-5
    assert float((c @ v - expected).norm()) < close * float(expected.norm())


def test_symmetric_and_of_the_same_value_in_float32():
    e = exact()
    c = Curvature(e.model, e.batch, dtype=torch.float32, blocks=e.blocks)
    u, v = vector(364, 1, torch.float32), vector(364, 2, torch.float32)
    assert c.dtype == torch.float32 and (c @ v).dtype == torch.float32
    assert float(u @ (c @ v)) == pytest.approx(float(v @ (c @ u)), rel=1e-4)
    assert torch.allclose((c @ v).double(), e.hessian @ v.double(), rtol=1e-3, atol=1e-4)


def test_half_precision_is_widened_and_said():
    model = gpt2().bfloat16()
    c = Curvature(model, tokens())
    assert c.dtype == torch.float32
    assert c.warnings == [
        "Curvature: weights in bfloat16 were taken to float32, as second derivatives need; the curvature is that of "
        "the float32 model at these weights"
    ]
    v = vector(c.dim, dtype=torch.float32)
    wide = Curvature(gpt2().bfloat16().double(), tokens()) @ v.double()
    assert torch.allclose((c @ v).double(), wide, rtol=1e-3, atol=1e-4 * float(wide.abs().max()))
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(c @ v, Curvature(model, tokens()) @ v)


def test_leaves_the_model_alone_and_reads_the_weights_as_they_are():
    model = gpt2()
    model.train()
    c = Curvature(model, tokens(), blocks=exact().blocks)
    v = vector(c.dim)
    with torch.no_grad():
        before = c @ v
        assert torch.equal(c @ v, before)  # no dropout
        model.transformer.ln_f.weight.mul_(2)
    assert not torch.allclose(c @ v, before)
    assert all(module.training for module in model.modules()) and model.config.use_cache
    assert all(p.grad is None for p in model.parameters())


def test_parameters_without_a_part_in_the_loss():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.unused = nn.Embedding(VOCAB, VOCAB), nn.Parameter(torch.ones(3))

        def forward(self, inputs):
            return self.table(inputs)

    for kind in KINDS:
        c = Curvature(Model(), tokens(), kind)
        split = c.selection.split(c @ torch.ones(c.dim))
        assert (split["unused"] == 0).all()
        alone = Curvature(Model(), tokens(), kind, select="unused")
        assert (alone @ torch.ones(3) == 0).all()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


class Kernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, inputs):
        return Once.apply(self.table(inputs))


def test_what_cannot_be_differentiated_twice_is_said():
    c = Curvature(Kernel(), tokens())
    with pytest.raises(ValueError, match=r"once_differentiable\); build it with plain torch operations"):
        c @ torch.ones(c.dim)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "fisher"}, ValueError, "kind must be 'hessian' or 'gauss-newton', got 'fisher'"),
        ({"select": "VQ"}, ValueError, "Curvature: select='VQ' matches nothing; this model has the roles"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype must be torch.float32 or torch.float64, got torch.bfloat16"),
        ({"micro": 0}, ValueError, "micro is the number of sequences per pass"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        Curvature(exact().model, tokens(), **options)


def test_bad_vectors():
    c = Curvature(exact().model, tokens(), blocks=exact().blocks)
    with pytest.raises(ValueError, match=r"got a tensor of shape \[3\], expected \[364\]"):
        c @ torch.ones(3)
    with pytest.raises(ValueError, match="the vector is not finite"):
        c @ torch.full((364,), torch.nan)
    model = gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="product with the hessian is not finite"):
        Curvature(model, tokens(), blocks=exact().blocks) @ torch.ones(364)


@pytest.mark.slow
def test_compiled_models_run_uncompiled():
    model = gpt2()
    c = Curvature(torch.compile(model, backend="aot_eager"), tokens(), blocks=exact().blocks)
    v = vector(364)
    expected = Curvature(model, tokens(), blocks=exact().blocks) @ v
    assert torch.equal(c @ v, expected)
    model.compile(backend="aot_eager")  # in place: no wrapper to take off
    model(tokens()[:, :-1])
    assert torch.equal(c @ v, expected)
