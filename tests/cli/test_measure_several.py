"""`sharpwise measure` by one process on what two have trained: checkpoints in parts, whatever the mesh was."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train.distributed.rig import job, settings, work
from train.run_rig import prepare
from typer.testing import CliRunner, Result

from sharpwise.cli.main import create_app
from sharpwise.measure.results import read
from sharpwise.measure.subject import open_subject

MESHES = {"replicas": {}, "fsdp": {"fsdp": 2}, "tp": {"tp": 2}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 4 steps by two processes, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    tables = {"schedule": {"steps": 4, "warmup": 1}, "checkpoint": {"every": 2}, "validation": {"sequences": 2}}
    data = prepare(folder)
    said = work(2, folder, [job(name, settings(data, mesh=mesh, **tables)) for name, mesh in MESHES.items()])
    assert [own["state"] for name in MESHES for own in said[name]] == ["finished"] * 6
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(create_app(), ["measure", *map(str, arguments), "--trust-code"])


@pytest.mark.parametrize("mesh", MESHES)
def test_parts_are_put_together(runs: Path, mesh: str) -> None:
    parts = {path.name for path in (runs / mesh / "checkpoints" / "step-00000004").glob("*.distcp")}
    assert parts == {"__0_0.distcp", "__1_0.distcp"}
    subject = open_subject(runs / mesh, trust_code=True)
    assert subject.steps == (0, 2, 4)
    final = load_file(runs / mesh / "final" / "model.safetensors")
    found = subject.at(4).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in final.items())
    before = {name: tensor.clone() for name, tensor in subject.at(2).state_dict().items()}
    assert not torch.equal(before["norm.weight"], final["norm.weight"])


def test_every_probe(runs: Path, tmp_path: Path) -> None:
    small = ("--sequences", 2, "--out", tmp_path)
    for arguments in (
        ("sharpness", runs / "fsdp", "--at", "all", "--batches", 2, *small),
        ("hessian", runs / "tp", "--what", "eigenvalues", "--select", "Norm", *small),
        ("spectrum", runs / "replicas", "--out", tmp_path),
        ("updates", runs / "fsdp", "--at", "0,2", "--batches", 2, *small),
    ):
        done = call(*arguments)
        assert done.exit_code == 0, done.output
    assert [one.step for one in read(tmp_path / "sharpness.json")] == [0, 2, 4]
    sizes = [one.value(quantity="relative update", by="model") for one in read(tmp_path / "update-size.json")]
    assert len(sizes) == 2 and min(sizes) > 0


def test_a_part_that_is_missing(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "fsdp", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "__1_0.distcp").unlink()
    done = call("spectrum", tmp_path / "run", "--at", "4", "--out", tmp_path / "out")
    assert done.exit_code != 0 and "cannot be read" in " ".join(done.output.split())
    assert "__1_0.distcp" in done.output
