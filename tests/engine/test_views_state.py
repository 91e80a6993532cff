"""State of several views of one parameter: its names and shapes, saved and loaded, and what tables show of it."""

import copy
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from distributed.rules import Orthogonal, Unit
from engine.views import (
    BLOCKS,
    LAYOUTS,
    MIXED,
    STRIDED,
    TURNED,
    Mixed,
    Model,
    gradients,
    optimizer_of,
    segments_of,
    train,
)
from first_contact.tiny import batches, gpt2, loss_of
from reference.rig import through_disk
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sharpwise.engine import BlockOptimizer
from sharpwise.engine.agreement import _lines
from sharpwise.engine.options import Options
from sharpwise.probes import sharpness_from_optimizer
from sharpwise.probes.fisher import sharpness_by_name
from sharpwise.rules import SGD, AdamW, Lion
from sharpwise.rules.base import Rule

SHARPNESS = "sharpness(start=1, every=2, by=module, power=2)"


def trained(name, by, steps=range(3), **options):
    model = Model(name)
    return train(model, optimizer_of(model, by, **options), steps, segments_of(model))


def same(one, other):
    """Parameters and state, bit for bit."""
    (model, optimizer), (twin, theirs) = one, other
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert optimizer.state[p].keys() == theirs.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, theirs.state[q][key]), (name, key)


def test_names_and_shapes():
    """What all views keep has the parameter's name and shape; what some keep has theirs; the step is one."""

    def shapes(name, by):
        model, optimizer = trained(name, by)
        return {key: tuple(value.shape) for key, value in optimizer.state[model.fused].items()}

    assert shapes("rows", MIXED) == {"step": (), "exp_avg": (24, 8), "exp_avg_sq.v": (8, 8)}
    assert shapes("columns", MIXED) == {"step": (), "exp_avg": (8, 24), "exp_avg_sq.v": (8, 8)}
    assert shapes("columns", TURNED) == {"step": (), "exp_avg": (8, 24), "exp_avg_sq.q+v": (8, 16)}
    blocks = {"step": (), "exp_avg": (24, 8), "exp_avg_sq.q": (8, 8), "exp_avg_sq.k+v": (2 + 8,)}
    assert shapes("rows", BLOCKS) == blocks
    assert shapes("interleaved", BLOCKS) == blocks
    experts = shapes("experts by columns", MIXED)
    assert experts == {"step": (), "exp_avg": (2, 8, 16), "exp_avg_sq.gate": (2 * 8,), "exp_avg_sq.up": (2, 8, 8)}


@pytest.mark.parametrize("block_lr", [None, "blockwise(qk=2)", SHARPNESS, "gradient_snr"])
@pytest.mark.parametrize(("name", "by"), [("rows", MIXED), ("interleaved", BLOCKS), ("strided columns", TURNED)])
def test_resumed_is_uninterrupted(name, by, block_lr):
    """By file, by name in another order, by deepcopy and by pickle."""
    options = {"block_lr": block_lr}
    segments = segments_of(Model(name))
    steady = trained(name, by, range(7), **options)
    ways = {}
    for way in ("file", "another order", "deepcopy", "pickle", "twice"):
        model, optimizer = trained(name, by, **options)
        if way in ("deepcopy", "pickle"):
            pair = (model, optimizer)
            ways[way] = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
            continue
        saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        resumed = Model(name)
        resumed.load_state_dict(saved["model"])
        groups = [{"params": list(resumed.parameters())[:: -1 if way == "another order" else 1]}]
        second = optimizer_of(resumed, by, first=groups, **options)
        for _ in range(2 if way == "twice" else 1):
            second.load_state_dict(saved["optimizer"])
        ways[way] = resumed, second
    for way, pair in ways.items():
        train(*pair, range(3, 7), segments)
        for (key, p), q in zip(steady[0].named_parameters(), pair[0].parameters(), strict=True):
            assert torch.equal(p, q), (way, key)


def test_state_of_another_block_lr_begins_anew(caplog):
    _, optimizer = trained("rows", MIXED, block_lr="blockwise(qk=2, vo=3)")
    other = Model("rows")
    second = optimizer_of(other, MIXED, block_lr="blockwise(qk=4, vo=5)")
    second.load_state_dict(through_disk(optimizer.state_dict()))
    assert "begins anew" in caplog.text
    held = second.state_dict()["state"]
    found = [own for own in held.values() if "exp_avg_sq.v" in own]
    assert [own["lr_multiplier.q+k"].tolist() for own in found] == [[4.0, 4.0]]
    assert [row["multiplier"] for row in second.lr_multipliers() if row["name"] == "fused"] == [4.0, 4.0, 5.0]
    for own in second.state.values():
        assert not [key for key in own if key.startswith("multiplier_")]


def test_a_file_without_the_parts():
    """Of the same rule, with other segments: a part takes its rows of what was kept of all; shapes have to fit."""
    _, optimizer = trained("rows", dict.fromkeys("qkv", "adamw"))
    saved = through_disk(optimizer.state_dict())
    _, second = trained("rows", MIXED, range(1))
    second.load_state_dict(saved)
    pairs = list(zip(second.state_dict()["state"].values(), saved["state"].values(), strict=True))
    parts = [(own["exp_avg_sq.v"], theirs["exp_avg_sq"]) for own, theirs in pairs if "exp_avg_sq.v" in own]
    assert parts and all(torch.equal(own, theirs[-len(own) :]) for own, theirs in parts)  # v comes last
    with pytest.raises(ValueError, match=r"saved exp_avg_sq\.v of fused has shape \(8, 7\), here it is \(8, 8\)"):
        broken = through_disk(second.state_dict())
        for own in broken["state"].values():
            if "exp_avg_sq.v" in own:
                own["exp_avg_sq.v"] = own["exp_avg_sq.v"][:, :7]
        second.load_state_dict(broken)


def test_frozen_and_back():
    """Its count and its parts stand while it is frozen."""
    for name in ("rows", "interleaved"):
        model, optimizer = trained(name, MIXED, range(2))
        segments = segments_of(model)
        held = {key: value.clone() for key, value in optimizer.state[model.fused].items()}
        model.fused.requires_grad_(False)
        for t in range(2, 4):
            gradients(model, t, segments)
            model.fused.grad = None
            optimizer.step()
        assert all(torch.equal(value, held[key]) for key, value in optimizer.state[model.fused].items())
        saved = through_disk(optimizer.state_dict())
        model.fused.requires_grad_(True)
        train(model, optimizer, range(4, 6), segments)
        assert optimizer.state[model.fused]["step"] == 4
        assert optimizer.state[model.first]["step"] == 6
        assert {len(own) for own in saved["state"].values()} == {3}


def test_exchanged():
    """Before the first step a parameter may be exchanged, with all of its parts; later it is refused."""
    model = Model("rows")
    optimizer = optimizer_of(model, MIXED)
    optimizer.init_state()
    model.fused = nn.Parameter(model.fused.detach().clone())
    for group in optimizer.param_groups:
        group["params"] = [dict(model.named_parameters())[name] for name in group["param_names"]]
    same(train(model, optimizer, range(3), segments_of(model)), trained("rows", MIXED))
    group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    with pytest.raises(RuntimeError, match="was exchanged after the first step"):
        optimizer.state_dict()


@pytest.mark.parametrize("name", [*LAYOUTS[:-1], *STRIDED])
def test_tables_list_segments_in_the_order_of_the_parameter(name):
    model, optimizer = trained(name, TURNED, block_lr="blockwise(qk=2, vo=3)", compile=None)
    segments = segments_of(model)
    for table in (optimizer.explain(), optimizer.lr_multipliers()):
        assert [row["name"] for row in table] == ["first", "last", *["fused"] * len(segments)]
        assert [row["role"] for row in table if row["name"] == "fused"] == [str(s.role) for s in segments]
    own = [row for row in optimizer.explain() if row["name"] == "fused"]
    if len(segments) == 3:
        assert [row["rule"] for row in own] == ["adamw", "lion", "adamw"]
        assert [row["multiplier"] for row in own] == [2.0, 2.0, 3.0]
    bytes_of = sum(row["bytes"] for row in own)
    own = {k: v for k, v in optimizer.state[model.fused].items() if k != "step" and "lr" not in k}
    assert bytes_of == sum(t.numel() * t.element_size() for t in own.values())


def test_ranks_compare_every_part():
    lines = [_lines(trained("rows", by)[1]._bind().views, trained("rows", by)[1].options) for by in (MIXED, TURNED)]
    differ = [line for line in lines[0] if line not in lines[1]]
    assert any(line.startswith("fused.q+k (24, 8) torch.float32: lion") for line in differ), differ
    assert any(line.startswith("fused.v (24, 8) torch.float32: adamw (v by element)") for line in differ), differ


def test_sharpness_of_the_parts_that_keep_a_second_moment():
    """As of parameters of their own; parts without one are left out."""
    for by in (MIXED, BLOCKS):
        model, optimizer = trained("rows", by)
        apart = Model("rows", apart=True)
        _, separate = train(apart, optimizer_of(apart, by), range(3), segments_of(model))
        found, want = (sharpness_from_optimizer(o, tokens=10) for o in (optimizer, separate))
        values = [{e.of: e.value for e in m.select(by="role")} for m in (found, want)]
        assert set(values[0]) == {"norm", "o", "v"} | ({"q", "k"} if by is BLOCKS else set())
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_segments_of_one_role_get_one_rule():
    """Their state would have one name."""

    class ByPlace(Mixed):
        def assign(self, segment):
            return (Lion(self.betas) if segment.start == 0 else AdamW(self.betas)), "element"

    for roles, what in ((("v", "up", "v"), "v"), (("q", "up", "up"), "")):
        thirds = [{"role": role, "start": 8 * i, "length": 8} for i, role in enumerate(roles)]
        model = nn.ParameterDict({"w": nn.Parameter(torch.randn(24, 8))})
        model["w"].grad = torch.randn(24, 8)
        optimizer = BlockOptimizer(
            model, ByPlace(), lr=0.1, weight_decay=0.0, options=Options(), blocks={"w": thirds}, model=model
        )
        if not what:
            optimizer.step()
            continue
        with pytest.raises(ValueError, match=rf"w: rule 'test-mixed' gives segments of one role, {what}, different"):
            optimizer.step()


@dataclass(frozen=True)
class Raised(Rule):
    """q by AdamW, v by SGD, whose momentum may be 0."""

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    name: ClassVar[str] = "test-raised"
    hyperparameters: ClassVar[tuple[str, ...]] = ("betas", "eps", "momentum", "dampening", "nesterov")

    def assign(self, segment):
        return (AdamW(self.betas, self.eps) if segment.role == "q" else SGD(self.momentum), "element")


def test_a_part_that_begins_to_keep_state_leaves_the_count_of_the_others():
    """Momentum raised from 0: SGD alone would count anew, and AdamW's correction of the bias with it."""

    def run(*shapes):
        model = nn.ParameterDict({name: nn.Parameter(torch.ones(n, 4)) for name, n in shapes})
        halves = [{"role": role, "start": 4 * i, "length": 4} for i, role in enumerate("qv")]
        blocks = {"w": halves} if len(shapes) == 1 else {"q": "q", "v": "v"}
        optimizer = BlockOptimizer(
            model, Raised(), lr=0.1, weight_decay=0.0, options=Options(), blocks=blocks, model=model
        )
        for t in range(8):
            optimizer.param_groups[0]["momentum"] = 0.9 if t >= 4 else 0.0
            g = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))
            for p, own in zip(model.values(), [g] if len(shapes) == 1 else g.split(4), strict=True):
                p.grad = own.clone()
            optimizer.step()
        return model, optimizer

    (fused, optimizer), (apart, _) = run(("w", 8)), run(("q", 4), ("v", 4))
    torch.testing.assert_close(fused["w"], torch.cat([apart["q"], apart["v"]]))
    held = optimizer.state[fused["w"]]
    assert held["step"] == 8 and set(held) == {"step", "exp_avg.q", "exp_avg_sq.q", "momentum_buffer.v"}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("by", [MIXED, BLOCKS])
def test_state_by_name_as_distributed_checkpoints_have_it(by, flat):
    """torch's get and set_optimizer_state_dict, also flattened, where names of state are joined by dots."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    steady = trained("rows", by, range(6), block_lr=SHARPNESS)
    model, optimizer = trained("rows", by, block_lr=SHARPNESS)
    saved = through_disk(get_optimizer_state_dict(model, optimizer, options=options))
    other = Model("rows")
    other.load_state_dict(model.state_dict())
    second = optimizer_of(other, by, block_lr=SHARPNESS)
    set_optimizer_state_dict(other, second, saved, options=options)
    train(other, second, range(3, 6), segments_of(other))
    same(steady, (other, second))


def _one_step(rule, blocks, shape=(24, 8)):
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(shape))})
    model["w"].grad = torch.randn(shape)
    before = model["w"].detach().clone()
    optimizer = BlockOptimizer(model, rule, lr=0.1, weight_decay=0.0, options=Options(), blocks=blocks, model=model)
    optimizer.step()
    return before, model["w"].detach(), model["w"].grad


def test_reductions_of_a_part_are_over_its_rows():
    class OfQueries(Unit):
        def assign(self, segment):
            return (self if segment.role == "q" else SGD(self.momentum)), "element"

    halves = [{"role": role, "start": 12 * i, "length": 12} for i, role in enumerate("qk")]
    before, after, g = _one_step(OfQueries(), {"w": halves})
    assert torch.allclose(before[:12] - after[:12], 0.1 * g[:12] / g[:12].norm(), atol=1e-6)
    assert torch.allclose(before[12:] - after[12:], 0.1 * g[12:], atol=1e-6)


def test_owners_of_whole_matrices_take_no_part():
    class OfQueries(Orthogonal):
        def assign(self, segment):
            return (self, "tensor") if segment.role == "q" else (SGD(self.momentum), "element")

    halves = [{"role": role, "start": 12 * i, "length": 12} for i, role in enumerate("qk")]
    with pytest.raises(ValueError, match=r"w: rule 'test-orthogonal' is for matrices, got its q rows alone"):
        _one_step(OfQueries(), {"w": halves})
    _one_step(OfQueries(), {"w": "q"})


def test_hyperparameters_that_a_part_lacks():
    class Short(Mixed):
        hyperparameters = ("betas",)

    match = r"w: rule 'test-mixed' gives o the rule 'adamw', and has no eps for it; name all that its rules need"
    with pytest.raises(ValueError, match=match):
        _one_step(Short(), {"w": "o"})


def test_a_probe_measures_every_part():
    """The multipliers that it gives do not depend on which rule moves what."""
    given = [{"input_ids": tokens, "labels": tokens} for tokens in batches(3)]
    found = []
    for by in ({}, MIXED, TURNED):
        model = gpt2()
        options = {"block_lr": "sharpness(source=probe, start=1, every=1, by=module, power=2)"}
        optimizer = optimizer_of(model, by, probe_batches=given, probe=sharpness_by_name, lr=0.0, **options)
        for _ in range(3):
            loss_of(model, given[0]["input_ids"]).backward()
            optimizer.step()
        found.append([(row["name"], row["role"], row["multiplier"]) for row in optimizer.lr_multipliers()])
    assert found[0] == found[1] == found[2]
    assert len({multiplier for _, role, multiplier in found[0] if role in "qkv"}) > 1
