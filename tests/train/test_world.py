"""Shares of a batch, and what a launcher says in the environment; the processes themselves are in `distributed/`."""

import numpy as np
import pytest
import torch

from sharpwise.train import launch
from sharpwise.train.config import MeshConfig
from sharpwise.train.launch import Launch, joined
from sharpwise.train.parallel import layers_of, mesh_sizes
from sharpwise.train.world import ALONE, passes_of, share_of
from train.distributed.rig import build

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("n", [1, 2, 5, 7, 64])
@pytest.mark.parametrize("shares", [1, 2, 3, 5])
def test_shares_are_all_of_it_in_order(n: int, shares: int) -> None:
    parts = [np.arange(n)[share_of(n, i, shares)] for i in range(shares)]
    assert np.concatenate(parts).tolist() == list(range(n))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for micro in (1, 2, 3):
        passes = passes_of(n, micro, shares)
        assert all(passes - 1 <= -(-size // micro) <= passes for size in sizes)


def test_one_process_is_alone(monkeypatch) -> None:
    with joined() as world:
        assert world is ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters do; a rank is missing
    with joined() as world:
        assert world is ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with joined() as world:
        assert world is ALONE


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "not MASTER_ADDR and MASTER_PORT, where they meet: there is no process gr"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "not MASTER_PORT, where they meet"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2 processes"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "expected whole numbers, as torchrun sets them"),
    ],
)
def test_an_environment_that_makes_no_sense(monkeypatch, said: dict[str, str], message: str) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Launch.of_environment()


@pytest.mark.parametrize("seconds", ["soon", "0", "-3", "inf"])
def test_a_timeout_that_makes_no_sense(monkeypatch, seconds: str) -> None:
    monkeypatch.setenv("SHARPWISE_TIMEOUT", seconds)
    with pytest.raises(ValueError, match="expected seconds, between 1 and 86400"):
        launch._timeout()


def test_others_that_do_not_come(monkeypatch, unused_port: int) -> None:
    said = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port)}
    for name, value in (said | {"SHARPWISE_TIMEOUT": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"rank 0 of 3: no process group at 127\.0\.0\.1:\d+ .*start all proc"):
        joined().__enter__()


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("mesh", "processes", "sizes"),
    [
        (MeshConfig(), 4, (4, 1, 1)),
        (MeshConfig(fsdp=2), 6, (3, 2, 1)),
        (MeshConfig(fsdp=0), 6, (1, 6, 1)),
        (MeshConfig(fsdp=0, tp=2), 6, (1, 3, 2)),
        (MeshConfig(fsdp=2, tp=2), 8, (2, 2, 2)),
    ],
)
def test_what_is_left_are_replicas(mesh: MeshConfig, processes: int, sizes: tuple[int, ...]) -> None:
    assert tuple(mesh_sizes(mesh, processes).values()) == sizes


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=4), MeshConfig(tp=4), MeshConfig(fsdp=0, tp=4), MeshConfig(fsdp=2, tp=2)]
)
def test_a_mesh_that_does_not_divide(mesh: MeshConfig) -> None:
    with pytest.raises(
        ValueError, match=r"take a multiple of 4 processes, and there are 6: start so many, or set them"
    ):
        mesh_sizes(mesh, 6)


def test_layers_are_found_once() -> None:
    model = build(300)
    assert layers_of(model) == list(model.layers)  # type: ignore[arg-type]
    shared = torch.nn.Linear(3, 3)
    nested = torch.nn.ModuleList([torch.nn.ModuleList([shared]), shared, shared, torch.nn.ReLU()])
    assert len(layers_of(torch.nn.Sequential(nested))) == 2
