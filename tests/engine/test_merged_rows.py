"""Several matrices in one parameter, `[matrices, rows, columns]`: all is as if they were parameters of their own."""

import numpy as np
import pytest
import torch
from torch import Tensor

import sharpwise
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.blocks.trace.rows import Ledger
from sharpwise.engine.layout import _local_rows
from sharpwise.probes.gather import Selection, square_sums
from sharpwise.probes.update_size import _sums
from sharpwise.shards import Shard

ROLES = ("q", "k", "v", "o")
SIZE, HEADS = 64, 4
ONE = {"shape": (4, SIZE, SIZE), "dim": 1, "merged": True}
SHARED = {"layer": 0, "source": "override"}


def heads(role: str) -> int | None:
    return None if role == "o" else HEADS


def merged() -> list[Segment]:
    return [
        Segment("qkvo", role=Role(r), start=i * SIZE, length=SIZE, heads=heads(r), **ONE, **SHARED)
        for i, r in enumerate(ROLES)
    ]


def apart() -> list[Segment]:
    return [Segment(r, (SIZE, SIZE), role=Role(r), heads=heads(r), **SHARED) for r in ROLES]


def numbers(seed: int) -> Tensor:
    return torch.randn(4, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam-mini", {"compile": True}),
        ("adam-mini", {}),
        ("adam-mini", {"storage": "int8-linear"}),
        ("adapm", {"rank": 4}),
        ("adamw", {"block_lr": "blockwise"}),
        ("lion", {"control": "angular"}),
        ("muon", {"per_head": True}),
        ("sgd-sai", {}),
    ],
)
def test_as_if_apart(name: str, options: dict) -> None:
    one, four = torch.nn.Parameter(numbers(0)), [torch.nn.Parameter(x.clone()) for x in numbers(0)]
    common = {"lr": 1e-2, "weight_decay": 0.1, "compile": False, **options}
    first = sharpwise.create_optimizer([("qkvo", one)], name, blocks=BlockMap(merged()), **common)
    other = sharpwise.create_optimizer(list(zip(ROLES, four, strict=True)), name, blocks=BlockMap(apart()), **common)
    for step in range(3):
        one.grad = numbers(1 + step)
        for p, g in zip(four, numbers(1 + step), strict=True):
            p.grad = g.clone()
        for optimizer in (first, other):
            optimizer.step()
    torch.testing.assert_close(one.detach(), torch.stack([p.detach() for p in four]), rtol=0, atol=1e-6)


def test_a_map_keeps_merged_rows() -> None:
    blocks = BlockMap(merged())
    assert BlockMap.from_json(blocks.to_json()).segments == blocks.segments
    assert [s.numel for s in blocks] == 4 * [SIZE * SIZE] and all(s.is_hidden_matrix for s in blocks)
    with pytest.raises(ValueError, match="belong to no segment"):
        BlockMap(merged()[:3])


def test_probes_see_each_matrix() -> None:
    x, y = numbers(0), numbers(1)
    blocks = BlockMap(merged())
    assert torch.equal(torch.stack([s.take(x) for s in blocks]), x)
    assert all(torch.equal(m, x[i]) for i, s in enumerate(blocks) for m in s.matrices(x))
    expected = x.double().square().sum((1, 2))
    assert square_sums([x], [blocks["qkvo"]]).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    sums = _sums(x, y, blocks["qkvo"][0])
    torch.testing.assert_close(sums[0].view(4, SIZE), x.double().square().sum(2))
    picked = Selection([s for s in blocks if s.role == "v"], ["qkvo"])
    only = x * torch.tensor([0.0, 0.0, 1.0, 0.0]).view(4, 1, 1)
    assert torch.equal(picked.scatter(picked.gather({"qkvo": x}))["qkvo"], only)


@pytest.mark.parametrize("given", [{"dim": 0}, {"dim": 1, "stacked": True}])
def test_merged_rows_run_over_several_dimensions(given: dict) -> None:
    with pytest.raises(ValueError, match="merged rows run over the dimensions up to dim"):
        Segment("qkvo", (4, 8, 8), merged=True, **given)


def test_rows_of_a_part_that_a_mesh_cuts() -> None:
    """Along dimension 0 they lie together; cut inside, rules that sum over rows find theirs, and matrices refuse."""
    first = merged()[0]
    whole = slice(0, SIZE)
    by_matrix, inside = (slice(1, 3), whole, whole), (slice(0, 4), slice(0, 8), whole)
    assert first.rows_in(by_matrix) == slice(SIZE, 3 * SIZE)
    held = _local_rows(first, (2, SIZE, SIZE), Shard(first.shape, by_matrix))
    assert held.tolist() == [*range(SIZE, 3 * SIZE)]
    held = _local_rows(first, (4, 8, SIZE), Shard(first.shape, inside))
    assert held.tolist() == [i * SIZE + row for i in range(4) for row in range(8)]
    with pytest.raises(ValueError, match="shard it along dimension 0"):
        first.rows_in(inside)


def test_rows_that_hold_several_roles_are_other() -> None:
    """Rows along a dimension in the middle, each with queries and keys: what lies behind is not cut."""
    ledger = Ledger((8, 2, 6))
    head, place = (x.reshape(-1) for x in np.indices((2, 6)))
    for role, chosen in ((Role.Q, place < 3), (Role.K, place >= 3)):
        ledger.assign((None, head[chosen], place[chosen]), role, "seen")
    assert [(s.role, s.dim) for s in ledger.segments("qk")] == [(Role.OTHER, 1)]
