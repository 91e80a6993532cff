"""AdaPM as its users meet it: what keeps what, its bytes, what it says and refuses."""

import logging

import pytest
import torch
from engine.test_int8_memory import GI, MI, PUBLISHED, state_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sharpwise
from sharpwise import testing
from sharpwise.train.models import load_model

# AdamW; AdaPM of rank 16; with Adam-mini's second moments; beside that the momentum of v in 8 bits and factors in bf16.
BYTES = {
    "gpt2-124m": (949.4 * MI, 510 * MI, 36.2 * MI, 12.2 * MI),
    "gpt2-1.5b": (11.605 * GI, 6.33 * GI, 544 * MI, 161.7 * MI),
    "llama-7b": (50.205 * GI, 27.2 * GI, 2.12 * GI, 586.7 * MI),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_of_whole_models(name):
    adamw, element, block, eight = BYTES[name]
    assert state_bytes(name, "AdamW") == pytest.approx(adamw, rel=0.01)
    assert state_bytes(name, "AdaPM") == pytest.approx(element, rel=0.01)
    assert state_bytes(name, "AdaPM", second_moment="block") == pytest.approx(block, rel=0.01)
    found = state_bytes(name, "AdaPM", second_moment="block", storage="int8-dynamic")
    assert found == pytest.approx(eight, rel=0.01) and found <= 0.014 * adamw


def rules_of(optimizer):
    return {(row["name"].split(".", 3)[-1], row["role"]): row["rule"] for row in optimizer.explain()}


def test_momentum_by_role():
    found = rules_of(sharpwise.AdaPM(testing.tiny_model(), rank=2))
    none, low, full = "adapm-none", "adapm-low-rank", "adamw"
    matrices = {role: rule for (name, role), rule in found.items() if "bias" not in name and role != "norm"}
    assert matrices == {
        "tok_emb": none, "pos_emb": none, "o": none, "q": low, "k": low, "v": full, "up": low, "down": low,
    }  # fmt: skip
    vectors = [rule for (name, role), rule in found.items() if "bias" in name or role == "norm"]
    assert set(vectors) == {full}


def test_momentum_that_is_asked_for():
    momentum = {"o": "full", "v": "low_rank", "up": "none"}
    found = rules_of(sharpwise.AdaPM(testing.tiny_model(), rank=2, momentum=momentum))
    assert found["attn.c_proj.weight", "o"] == "adamw" and found["attn.c_attn.weight", "v"] == "adapm-low-rank"
    assert found["mlp.c_fc.weight", "up"] == "adapm-none" and found["mlp.c_fc.bias", "up"] == "adamw"
    every = rules_of(sharpwise.AdaPM(testing.tiny_model(), momentum="full", second_moment="block"))
    assert set(every.values()) == {"adamw", "adam-mini"}


def test_a_rank_above_a_matrix_keeps_its_momentum_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        optimizer = sharpwise.AdaPM(testing.tiny_model(), rank=12)
    assert "factors of rank 12 would not be smaller than the matrix, whose momentum is kept in full" in caplog.text
    assert "transformer.h.0.attn.c_attn.weight" in caplog.text and "c_fc" not in caplog.text
    found = rules_of(optimizer)
    assert found["attn.c_attn.weight", "q"] == "adamw" and found["mlp.c_fc.weight", "up"] == "adapm-low-rank"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 0}, ValueError, r"rank must be a whole number >= 1, got 0"),
        ({"rank": 2.0}, ValueError, r"rank must be a whole number >= 1, got 2.0"),
        ({"momentum": {"query": "full"}}, ValueError, r"'query' is none \(did you mean 'q'\?\); roles are"),
        ({"momentum": {"q": "some"}}, ValueError, r"momentum of q must be one of 'none', 'full', 'low_rank', got 'so"),
        ({"momentum": "half"}, ValueError, r"a table.* or one of 'none', 'full', 'low_rank' for all, got 'half'"),
        ({"momentum": ["q"]}, TypeError, r"must be a table of roles, such as \{'o': 'full'\}, or one of"),
        ({"second_moment": "row"}, ValueError, r"second_moment must be 'element' or 'block', got 'row'"),
        ({"debias": -1.0}, ValueError, r"debias must be a finite number >= 0, got -1.0"),
        ({"debias": "full"}, TypeError, r"debias must be a finite number >= 0, got 'full'"),
        ({"clip": 0.0}, ValueError, r"clip must be a finite number > 0, or None, got 0.0"),
        ({"clip": True}, TypeError, r"clip must be a number > 0, or None, got True"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be two numbers in \[0, 1\)"),
        ({"storage": "int8-linear"}, ValueError, r"int8-linear for second moments makes the small ones 0"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        sharpwise.AdaPM(testing.tiny_model(), **options)


def test_roles_that_are_not_known_are_refused():
    with pytest.raises((TypeError, ValueError), match="roles"):
        sharpwise.AdaPM(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))


@pytest.mark.parametrize("options", [{}, {"second_moment": "block"}], ids=["element", "block"])
def test_other_betas_and_debias_are_read_live(options):
    model, twin = testing.tiny_model(), testing.tiny_model()
    one = sharpwise.AdaPM(model, rank=2, lr=1e-2, **options)
    two = sharpwise.AdaPM(twin, rank=2, lr=1e-2, **options)
    testing.run(model, one, range(2))
    testing.run(twin, two, range(2))
    for key, value in (("betas", (0.5, 0.99)), ("debias", 0.0)):
        one.param_groups[0][key] = value
        before = [p.detach().clone() for p in model.parameters()]
        testing.run(model, one, [2])
        testing.run(twin, two, [2])
        name = "transformer.h.0.mlp.c_fc.weight"
        assert not torch.equal(model.get_parameter(name), twin.get_parameter(name)), key
        assert not torch.equal(before[4], list(model.parameters())[4])
        twin.load_state_dict(model.state_dict())
        two.load_state_dict(one.state_dict())


@pytest.mark.parametrize("second", ["element", "block"])
@pytest.mark.parametrize("name", ["row by row", "fused", "columns"])
def test_kernels_are_the_reference(name, second):
    """Conv1D, fused and single, with clipping and a schedule: within 1e-6 of the norm."""
    from reference import models

    kinds = {"row by row": "llama", "fused": "nanogpt", "columns": "gpt2"}
    pair = [models.build(kinds[name]) for _ in range(2)]
    built = [
        sharpwise.AdaPM(m, lr=1e-2, rank=2, second_moment=second, max_grad_norm=1.0, block_lr="blockwise", compile=c)
        for m, c in zip(pair, (None, False), strict=True)
    ]
    for step in range(4):
        for model, optimizer in zip(pair, built, strict=True):
            testing.run(model, optimizer, [step])
    for p, q in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        assert (p - q).norm() <= 1e-6 * q.norm()


def test_state_that_was_not_saved_begins_anew():
    """Of a run that had not begun, in a file without state: the right factor is the sketch again, not 0."""
    model = testing.tiny_model()
    optimizer = sharpwise.AdaPM(model, rank=2)
    begun = {key: t.clone() for key, t in optimizer.state_dict()["state"][4].items()}
    testing.run(model, optimizer, range(2))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    now = optimizer.state_dict()["state"][4]
    assert "right.q" in now and now["right.q"].any()
    assert all(torch.equal(t, now[key]) for key, t in begun.items())


class _Largest(TorchDispatchMode):
    """The largest tensor that operations make."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        owned = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(found):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in owned:
                self.numel = max(self.numel, t.numel())
        return found


@pytest.mark.parametrize("second", ["element", "block"])
def test_nothing_larger_than_a_matrix_is_made(second):
    model = testing.TinyGPT(width=64)
    optimizer = sharpwise.AdaPM(model, rank=2, second_moment=second, max_grad_norm=1.0)
    testing.run(model, optimizer, range(2))
    testing.fill_gradients(model, 2)
    with _Largest() as seen:
        optimizer.step()
    assert 0 < seen.numel <= max(p.numel() for p in model.parameters())
    held = sum(len(t) for t in optimizer._backends.scratch._held.values())
    assert held <= max(p.numel() for p in model.parameters())


@pytest.mark.parametrize("second", ["element", "block"])
def test_interleaved_and_stacked_matrices_move_as_those_alone(second):
    """Rows that lie scattered, and experts one by one: as parameters of their own."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self, **weights):
            super().__init__()
            for name, weight in weights.items():
                self.register_parameter(name, nn.Parameter(weight.clone()))

    w, experts = torch.randn(24, 20), torch.randn(3, 24, 20)
    scattered = [{"role": role, "start": 6 * i, "length": 6, "stride": 12, "count": 2} for i, role in enumerate("qk")]
    rows = [torch.cat([torch.arange(6), torch.arange(12, 18)]) + 6 * i for i in range(2)]
    heads = {"heads": 2} if second == "block" else {}
    one = Model(w=w, experts=experts)
    two = Model(q=w[rows[0]], k=w[rows[1]], a=experts[0], b=experts[1], c=experts[2])
    options = {"lr": 1e-2, "rank": 2, "second_moment": second}
    blocks = {"w": [{**part, **heads} for part in scattered], "experts": {"role": "up", "dim": 1, "stacked": True}}
    first = sharpwise.AdaPM(one, blocks=blocks, **options)
    alone = {name: {"role": name, **heads} for name in "qk"} | dict.fromkeys("abc", "up")
    second_one = sharpwise.AdaPM(two, blocks=alone, **options)
    for _ in range(5):
        one.w.grad, one.experts.grad = torch.randn(24, 20), torch.randn(3, 24, 20)
        two.q.grad, two.k.grad = one.w.grad[rows[0]], one.w.grad[rows[1]]
        for p, g in zip((two.a, two.b, two.c), one.experts.grad, strict=True):
            p.grad = g.clone()
        first.step()
        second_one.step()
    for p, q in [
        (one.w[rows[0]], two.q),
        (one.w[rows[1]], two.k),
        *zip(one.experts, (two.a, two.b, two.c), strict=True),
    ]:
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"second_moment": "block"}], ids=["element", "block"])
@pytest.mark.parametrize("build", [testing.tiny_model, lambda: load_model("gpt2-tiny")], ids=["rows", "columns"])
def test_updates_are_bounded_as_they_move(options, build, monkeypatch):
    """By kernels: torch does not work them out a second time. Of block state the sums come with the numerators."""
    model = build()
    optimizer = sharpwise.AdaPM(model, rank=2, lr=1e-2, clip=0.1, **options)
    testing.run(model, optimizer, [0])
    rows = [(row["role"], row["backend"], row["why"]) for row in optimizer.explain() if row["rule"] == "adapm-low-rank"]
    assert {(backend, why) for _, backend, why in rows} == {("thin (one pass)" if not options else "thin", "")}

    def again(*given):
        raise AssertionError("worked out twice")

    monkeypatch.setattr("sharpwise.engine.control.aimed", again)
    testing.run(model, optimizer, [1])
