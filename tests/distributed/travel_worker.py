"""One of three gloo processes: state saved by two is loaded by three, goes on there, and comes back to two.

    RANK=0 WORLD_SIZE=3 MASTER_ADDR=... MASTER_PORT=... python -m distributed.travel_worker FOLDER KIND... OUTPUT.json

What is found is judged by test_state_dicts.py, which saved on one device into FOLDER/1 and loads FOLDER/2 and FOLDER/3.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from first_contact.fsdp_worker import shard
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from distributed.serving import Case, serve
from distributed.travel import STOPS, WAYS, WAYS_BACK, arrive, arrived, load, run, save, start

Place = Callable[[nn.Module], nn.Module]


def travels(kind: str, folder: Path) -> dict[str, Any]:
    """The whole journey of one kind; FOLDER/N holds what N processes saved."""
    folder = folder / kind
    everyone = DeviceMesh("cpu", torch.arange(3))
    two = DeviceMesh("cpu", torch.arange(2))
    inside = dist.get_rank() < 2
    found: dict[str, Any] = {}
    if inside:
        model, optimizer = start(kind, partial(shard, mesh=two))
        run(kind, model, optimizer, range(STOPS[0]))
        for way in WAYS:
            save(way, model, optimizer, folder / "2", two.get_group())
        torch.save(optimizer.state_dict(), folder / "2" / f"rank {dist.get_rank()}")
    dist.barrier()
    for way in WAYS:
        model, optimizer = arrive(kind, partial(shard, mesh=everyone))
        load(way, model, optimizer, folder / "2", everyone.get_group())
        found[f"{way}, 2 to 3"] = arrived(kind, model, optimizer, STOPS[0])
    model, optimizer = arrive(kind, partial(shard, mesh=everyone))
    found["one device, 1 to 3"] = from_one_device(kind, model, optimizer, folder)
    model, optimizer = arrive(kind, partial(shard, mesh=everyone))
    load("shards", model, optimizer, folder / "2", everyone.get_group())
    run(kind, model, optimizer, range(*STOPS))
    for way in WAYS_BACK:
        save(way, model, optimizer, folder / "3", everyone.get_group())
    found["own shards, 3 to 3"] = own_shards(kind, model, optimizer, folder)
    dist.barrier()
    if inside:
        for way in WAYS_BACK:
            model, optimizer = arrive(kind, partial(shard, mesh=two))
            load(way, model, optimizer, folder / "3", two.get_group())
            found[f"{way}, 3 to 2"] = arrived(kind, model, optimizer, STOPS[1])
    dist.barrier()
    return found


def from_one_device(kind: str, model: nn.Module, optimizer: Any, folder: Path) -> dict[str, Any]:
    """`torch.save(optimizer.state_dict())` of one process, loaded by `optimizer.load_state_dict` on the mesh."""
    saved = torch.load(folder / "1" / "one device", weights_only=True)
    set_model_state_dict(model, saved["model"], options=StateDictOptions(full_state_dict=True))
    optimizer.load_state_dict(saved["optimizer"])
    return arrived(kind, model, optimizer, STOPS[0])


def own_shards(kind: str, model: nn.Module, optimizer: Any, folder: Path) -> dict[str, Any]:
    """`torch.save(optimizer.state_dict())` of every process, loaded where it was; that of another mesh is refused."""
    file = folder / "3" / f"rank {dist.get_rank()}"
    torch.save(optimizer.state_dict(), file)
    other = torch.load(folder / "2" / f"rank {dist.get_rank() % 2}", weights_only=True)
    try:
        optimizer.load_state_dict(other)
    except ValueError as error:
        said = str(error)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.fill_(0.25)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return {**arrived(kind, model, optimizer, STOPS[1]), "other mesh": said}


def cases(folder: Path, kinds: Sequence[str]) -> dict[str, Case]:
    return {kind: partial(travels, kind, folder) for kind in kinds}


if __name__ == "__main__":
    serve(cases(Path(sys.argv[1]), sys.argv[2:-1]), sys.argv[-1])
