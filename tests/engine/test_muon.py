"""Muon as its users meet it: what goes where, torch's own beside it, odd matrices, what it says and refuses."""

import gc
import logging
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sharpwise
from sharpwise import testing
from sharpwise.blocks import Role, Segment
from sharpwise.engine.backends import owners
from sharpwise.engine.mesh import ReduceGroup
from sharpwise.rules import orthogonalize


class Layer(nn.Module):
    """Projections under names that are known, and whatever else is given."""

    def __init__(self, **matrices: nn.Parameter) -> None:
        super().__init__()
        for name, p in matrices.items():
            self.register_parameter(name, p)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def muon(model: nn.Module, blocks=None, **options):
    return sharpwise.Muon(model, blocks=blocks, **{"lr": 1e-3, **options})


def moved_by(optimizer) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in optimizer.explain():
        found.setdefault(row["rule"], set()).add(row["name"])
    return found


# -- what goes where ---------------------------------------------------------------------------------------------------


def test_hidden_matrices_by_muon_and_all_else_by_adamw():
    model = testing.tiny_model()
    found = moved_by(sharpwise.Muon(model))
    assert found["muon"] == {
        f"transformer.h.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert found["adamw"] == {name for name, _ in model.named_parameters()} - found["muon"]


def test_a_side_of_one_and_more_than_two_dimensions_go_to_adamw_and_are_listed(caplog):
    model = Layer(a=parameter(4, 6), b=parameter(1, 6), c=parameter(6, 1), d=parameter(4, 3, 3))
    with caplog.at_level(logging.WARNING):
        optimizer = muon(model, dict.fromkeys("abcd", "up"))
    assert moved_by(optimizer) == {"muon": {"a"}, "adamw": {"b", "c", "d"}}
    assert "moved by AdamW: b, c, d" in caplog.text


def test_a_parameter_that_is_partly_something_else_goes_to_adamw():
    parts = [Segment("a", (6, 5), Role.Q, length=4), Segment("a", (6, 5), Role.ROUTER, start=4, length=2)]
    blocks = sharpwise.BlockMap(tuple(replace(part, source="override") for part in parts))
    assert moved_by(muon(Layer(a=parameter(6, 5)), blocks)) == {"adamw": {"a"}}


def test_state_of_the_two_halves():
    model = Layer(a=parameter(4, 6), b=parameter(4))
    optimizer = muon(model, {"a": "up", "b": "norm"}, normalize_rows=True)
    optimizer.init_state()
    assert {k: tuple(t.shape) for k, t in optimizer.state[model.a].items()} == {
        "step": (), "momentum_buffer": (4, 6), "row_second_moment": (4,),
    }  # fmt: skip
    assert set(optimizer.state[model.b]) == {"step", "exp_avg", "exp_avg_sq"}
    row = next(row for row in optimizer.explain() if row["name"] == "a")
    assert row["bytes"] == 4 * (24 + 4) and row["backend"] == "matrices"


def test_a_schedule_moves_both_halves():
    """aux_lr is a ratio: what a scheduler makes of lr is made of both."""
    model = Layer(a=parameter(4, 6), b=parameter(4))
    start = model.b.detach().clone()
    optimizer = muon(model, {"a": "up", "b": "norm"}, lr=2e-3, aux_lr=1e-2, weight_decay=0.0)
    scheduler = LambdaLR(optimizer, lambda t: 0.25)
    model.a.grad, model.b.grad = torch.ones(4, 6), torch.ones(4)
    optimizer.step()
    scheduler.step()
    assert torch.allclose(start - model.b, torch.full((4,), 0.25 * 1e-2), rtol=1e-4)
    assert optimizer.param_groups[0]["aux_lr_ratio"] == pytest.approx(5.0)
    rows = {row["name"]: row["lr"] for row in optimizer.lr_multipliers()}
    assert rows == pytest.approx({"a": 5e-4, "b": 2.5e-3})


def test_hyperparameters_of_both_halves_are_read_live():
    def run(change: dict) -> list[torch.Tensor]:
        model = Layer(a=parameter(4, 6), b=parameter(4))
        optimizer = muon(model, {"a": "up", "b": "norm"})
        for t in range(3):
            if t == 1:
                optimizer.param_groups[0].update(change)
            model.a.grad, model.b.grad = parameter(4, 6, seed=t).data, parameter(4, seed=t).data
            optimizer.step()
        return [model.a.detach(), model.b.detach()]

    before = run({})
    matrices, others, both = (True, False), (False, True), (True, True)
    for change, moves in (
        ({"momentum": 0.5}, matrices),
        ({"nesterov": False}, matrices),
        ({"aux_betas": (0.5, 0.6)}, others),
        ({"aux_eps": 1.0}, others),
        ({"aux_weight_decay": 3.0}, others),
        ({"weight_decay": 3.0}, both),
    ):
        assert tuple(not torch.equal(p, q) for p, q in zip(before, run(change), strict=True)) == moves, change


# -- torch's own -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_against_torch(scale, nesterov, monkeypatch):
    """Step by step. torch's products are in bf16: here they are in the type of the matrix."""
    shapes = {"a": (8, 24), "b": (24, 8), "c": (16, 16)}
    ours, theirs = (Layer(**{n: parameter(*s, dtype=torch.float64) for n, s in shapes.items()}) for _ in range(2))
    kw = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    one = sharpwise.Muon(ours, blocks=dict.fromkeys(shapes, "up"), scale=scale, aux_lr=1e-3, **kw)
    two = torch.optim.Muon(theirs.parameters(), adjust_lr_fn=scale, **kw)
    for t in range(8):
        for i, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            p.grad = parameter(*p.shape, seed=100 * t + i, dtype=torch.float64).data
            q.grad = p.grad.clone()
        one.step()
        two.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-9 * float(q.detach().abs().max()))
            momentum = two.state[q]["momentum_buffer"]
            assert torch.allclose(one.state[p]["momentum_buffer"], momentum, rtol=0, atol=1e-12)


# -- matrices of odd kinds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [None, False])
@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
def test_zeros_rank_one_and_nan(method, compile):
    """Zeros stand still, rank one moves along itself, NaN stays in its own matrix."""
    model = Layer(**{name: parameter(6, 8, seed=i) for i, name in enumerate("abcd")})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = muon(model, dict.fromkeys("abcd", "up"), weight_decay=0.0, method=method, compile=compile)
    rank_one = torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 9))
    bad = torch.ones(6, 8)
    bad[2, 3] = float("nan")
    for (_, p), g in zip(
        model.named_parameters(), (torch.zeros(6, 8), rank_one, bad, parameter(6, 8).data), strict=True
    ):
        p.grad = g.clone()
    optimizer.step()
    assert torch.equal(model.a, before["a"])
    moved = (before["b"] - model.b).detach()
    assert torch.allclose(moved / moved.norm(), rank_one / rank_one.norm(), atol=1e-3) and moved.norm() > 1e-4
    assert model.c.isnan().all()
    assert model.d.isfinite().all() and not torch.equal(model.d, before["d"])


def test_batches_are_bounded(monkeypatch):

    monkeypatch.setattr(owners, "BATCH", 3 * 6 * 8 * 4)
    names = [f"p{i}" for i in range(8)]
    model = Layer(**{name: parameter(6, 8, seed=i) for i, name in enumerate(names)})
    optimizer = muon(model, dict.fromkeys(names, "up"))
    sizes = []
    own = orthogonalize.newton_schulz
    monkeypatch.setattr(
        "sharpwise.rules.muon.newton_schulz", lambda m, *a, **k: (sizes.append(len(m)), own(m, *a, **k))[1]
    )
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.init_state()
    sizes.clear()  # a rule is rehearsed on a number
    optimizer.step()
    assert sizes == [3, 3, 2]


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations make, as long as a tensor or a view of it lives."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known, self.views, self.now, self.peak = {t.data_ptr() for t in known}, Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in self.known:
                self._count(storage.data_ptr(), storage.nbytes(), 1)
                weakref.finalize(t, self._count, storage.data_ptr(), storage.nbytes(), -1)
        return out

    def _count(self, place: int, size: int, more: int) -> None:
        before = self.views[place] > 0
        self.views[place] += more
        self.now += size * ((self.views[place] > 0) - before)
        self.peak = max(self.peak, self.now)


@pytest.mark.parametrize(
    ("ranks", "cut", "sizes"),
    [((), (), [2] * 5), ((0, 1, 2), (0,), [6, 4]), ((0, 1, 2), (), [3, 3, 3, 1]), ((0, 1), (), [2] * 5)],
    ids=["alone", "sharded", "replicas", "two replicas"],
)
def test_a_batch_is_bounded_by_what_a_process_holds_and_occupies_all(ranks, cut, sizes, monkeypatch):
    monkeypatch.setattr(owners, "BATCH", 2 * 6 * 8 * 4)
    view = SimpleNamespace(dtype=torch.float32, shard=SimpleNamespace(cut=cut))
    ten = [SimpleNamespace(shape=(6, 8), view=view) for _ in range(10)]
    found = owners.batches(ten, ReduceGroup(None, ranks))
    assert [len(batch.matrices) for batch in found] == sizes


@pytest.mark.parametrize("compile", [None, False])
def test_memory_beyond_state_is_four_batches(compile, monkeypatch):
    """The matrices, which stay from step to step, X, and two products of the size of X, where rows and columns are as
    many; one batch at a time."""
    batch = 4 * 64 * 64 * 4
    monkeypatch.setattr(owners, "BATCH", batch)
    names = [f"p{i}" for i in range(12)]
    model = Layer(**{name: parameter(64, 64, seed=i) for i, name in enumerate(names)})
    optimizer = muon(model, dict.fromkeys(names, "up"), normalize_rows=True, compile=compile)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    held = [t for own in optimizer.state.values() for t in own.values()]
    (scratch,) = optimizer._backends.matrices[compile is None]._scratch.values()
    held.append(scratch)
    peaks = []
    for _ in range(5):  # garbage that nobody has collected yet, and addresses that are given again, make one larger
        gc.collect()
        with Live([*model.parameters(), *(p.grad for p in model.parameters()), *held]) as live:
            optimizer.step()
        peaks.append(live.peak)
    assert scratch.nbytes == batch
    assert 2 * batch < min(peaks) < 3.2 * batch, peaks


# -- what it says and refuses ------------------------------------------------------------------------------------------


def test_conventions_mixed_up(caplog):
    model = testing.tiny_model()
    with caplog.at_level(logging.WARNING):
        sharpwise.Muon(model, lr=0.02)
    assert "looks like one for scale='original'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sharpwise.Muon(model, lr=1e-3, scale="original", aux_lr=1e-3)
    assert "looks like one for scale='match_rms_adamw'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sharpwise.Muon(model, lr=0.02, scale="original", aux_lr=1e-3)
        sharpwise.Muon(model, lr=1e-3)
    assert not caplog.text


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"scale": "original"}, ValueError, "give aux_lr"),
        ({"scale": "spectral"}, ValueError, "scale must be one of 'match_rms_adamw', 'original', got 'spectral'"),
        ({"method": "svd"}, ValueError, "method must be one of"),
        ({"precision": "fp16"}, ValueError, "precision must be None, 'fp32' or 'bf16'"),
        ({"ns_steps": 0}, ValueError, "steps must be a whole number >= 1"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
        ({"beta2": -0.1}, ValueError, "beta2 must be a finite number >= 0"),
        ({"aux_lr": "1e-3"}, TypeError, "must be numbers"),
        ({"aux_lr": 1e-3, "lr": 0.0}, ValueError, "lr of the peak"),
        ({"aux_lr": -1e-3}, ValueError, "aux_lr must be a finite number >= 0, got -0.001"),
        ({"per_head": "all"}, TypeError, "per_head must be True or False, got 'all'"),
        ({"normalize_rows": 1}, TypeError, "normalize_rows must be True or False, got 1"),
        ({"nesterov": "no"}, TypeError, "nesterov must be True or False, got 'no'"),
        ({"aux_betas": (0.9, 1.0)}, ValueError, "betas must be two numbers"),
        ({"process_group": "world"}, TypeError, "process_group must be a torch.distributed.ProcessGroup"),
    ],
)
def test_refused(options, error, words):
    with pytest.raises(error, match=words):
        sharpwise.Muon(testing.tiny_model(), **options)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"aux_lr": 1e-2}, "a group takes aux_lr_ratio"),
        ({"per_head": True}, "per_head is fixed when the optimizer is built, here as False; a group has True"),
        ({"ns_steps": 3}, "ns_steps is fixed when the optimizer is built, here as 5"),
        ({"scale": "original"}, "scale is fixed when the optimizer is built, here as 'match_rms_adamw'"),
    ],
)
def test_a_group_is_not_told_in_vain(setting, words):
    """What holds for the whole optimizer would be ignored in a group."""
    model = testing.tiny_model()
    with pytest.raises(ValueError, match=words):
        sharpwise.Muon([{"params": list(model.parameters()), **setting}], model=model)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"heavy_ball": True}, "heavy_ball is fixed .* here as False; a group has True"),
        ({"scale": "original", "aux_lr": 1e-3}, "scale is fixed .* a group has 'original'"),
    ],
)
def test_state_that_means_something_else_is_refused(theirs, words):
    """lr is in other units, or momentum is that many times as large."""
    model = Layer(a=parameter(4, 6))
    saved = muon(model, {"a": "up"}, **theirs).state_dict()
    with pytest.raises(ValueError, match=words):
        muon(model, {"a": "up"}).load_state_dict(saved)


def test_state_of_torch_goes_on_here_at_the_same_scale():
    ours, theirs = Layer(a=parameter(4, 6)), Layer(a=parameter(4, 6))
    two = torch.optim.Muon(theirs.parameters(), lr=0.02, momentum=0.9)
    theirs.a.grad = parameter(4, 6, seed=1).data
    two.step()
    ours.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"adjust_lr_fn is fixed .* a group has 'original'"):
        muon(ours, {"a": "up"}).load_state_dict(two.state_dict())
    one = muon(ours, {"a": "up"}, scale="original", aux_lr=1e-3)
    one.load_state_dict(two.state_dict())
    assert (one.param_groups[0]["lr"], one.param_groups[0]["momentum"]) == (0.02, 0.9)
    ours.a.grad = theirs.a.grad.clone()
    for optimizer in (one, two):
        optimizer.step()
    # torch's products are in bf16: updates of 0.02 apart by a few of its roundings
    assert torch.allclose(ours.a, theirs.a, rtol=0, atol=0.02 * 0.02)


def test_roles_that_nothing_explains_are_asked_for():
    with pytest.raises((TypeError, ValueError), match="rule 'muon' distinguishes roles"):
        sharpwise.Muon(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_heads_have_to_be_known_and_to_divide_the_rows():
    model = Layer(a=parameter(6, 5))
    with pytest.raises(TypeError, match="how many heads"):
        muon(model, {"a": "q"}, per_head=True)
    with pytest.raises(ValueError, match="do not divide into 4 heads"):
        muon(model, {"a": {"role": "q", "heads": 4}}, per_head=True)
    assert [row["blocks"] for row in muon(model, {"a": {"role": "q", "heads": 3}}, per_head=True).explain()] == [3]
