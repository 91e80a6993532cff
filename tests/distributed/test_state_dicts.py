"""State that travels between two processes, three (uneven shards) and one arrives whole, in every form it takes.

Continued training equals the run that nobody stopped: to the bit where no output row is cut, else within 1e-6. The
clipping norm is a sum over all elements, which a mesh always cuts.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from distributed.launch import launch
from distributed.serving import of
from distributed.travel import KINDS, STOPS, WAYS, WAYS_BACK, arrive, arrived, load, run, start

LATER = {"adamw, blockwise", "adamw, stochastic", "adamw, int8", "muon, heads"}
"""For `make test-all`: Adam-mini's twins of the first two have all their state and a block's besides, and Muon in 8
bits has that of the others, but for heads."""
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in LATER)) for kind in KINDS]
)
Found = Callable[[str], dict[str, Any]]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torch's, of its checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("travel")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """What three processes found of a kind, after one process saved what they load: two starts, one for `LATER`."""

    @cache
    def travel(later: bool) -> dict[str, dict[str, Any]]:
        kinds = [kind for kind in KINDS if (kind in LATER) is later]
        for kind in kinds:
            model, optimizer = start(kind)
            run(kind, model, optimizer, range(STOPS[0]))
            (folder / kind / "1").mkdir(parents=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / kind / "1" / "one device")
        return launch("distributed.travel_worker", 3, folder, str(folder), *kinds)

    return lambda kind: of(travel(kind in LATER), kind)


def judge(kind: str, result: dict[str, Any]) -> None:
    bound = 1e-6 if "rows cut" in kind or "clip" in kind else 0.0
    assert not result["settings"]
    assert result["parameters"] <= bound
    assert result["state"] <= bound


JOURNEYS = [*(f"{way}, 2 to 3" for way in WAYS), *(f"{way}, 3 to 2" for way in WAYS_BACK), "one device, 1 to 3"]


@pytest.mark.parametrize("journey", JOURNEYS)
@every_kind
def test_between_meshes(found: Found, kind: str, journey: str) -> None:
    judge(kind, found(kind)[journey])


@every_kind
def test_shards_go_back_to_their_own_mesh_only(found: Found, kind: str) -> None:
    result = found(kind)["own shards, 3 to 3"]
    judge(kind, result)
    assert "is a shard of DeviceMesh" in result["other mesh"]
    assert "torch.distributed.checkpoint, or the whole" in result["other mesh"]


@pytest.mark.parametrize(("processes", "way"), [*((2, way) for way in WAYS), *((3, way) for way in WAYS_BACK)])
@every_kind
def test_to_one_device(found: Found, folder: Path, kind: str, processes: int, way: str) -> None:
    found(kind)
    model, optimizer = arrive(kind)
    load(way, model, optimizer, folder / kind / str(processes))
    judge(kind, arrived(kind, model, optimizer, STOPS[processes == 3]))


@every_kind
def test_to_one_device_by_load_state_dict(found: Found, folder: Path, kind: str) -> None:
    """What two processes gathered, without `set_optimizer_state_dict`: parameters have names in it, not numbers."""
    found(kind)
    model, optimizer = arrive(kind)
    saved = torch.load(folder / kind / "2" / "full", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    judge(kind, arrived(kind, model, optimizer, STOPS[0]))


@pytest.mark.gpu
def test_a_full_state_dict_on_a_gpu() -> None:
    """`set_optimizer_state_dict` refuses one if the state there is, apart from scalars, lies on several devices."""
    options = StateDictOptions(full_state_dict=True)
    model, optimizer = start("adamw, blockwise", lambda m: m.cuda())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    _, second = arrive("adamw, blockwise", lambda m: model)
    set_optimizer_state_dict(model, second, saved, options=options)
    for p in model.parameters():
        assert all(torch.equal(value, second.state[p][key]) for key, value in optimizer.state[p].items())
