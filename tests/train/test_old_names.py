"""Checkpoints with the names that a block_lr had before the first release: runs go on as if never interrupted."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sharpwise.measure.subject import open_subject
from sharpwise.train.run import run
from train.kill_rig import settings
from train.run_rig import assert_same, lines, prepare, stop_after

SHARPNESS = {"name": "adamw", "block_lr": "sharpness(start=3, every=6, soft=8)"}
OLD = {
    "multiplier_from": "lr_before",
    "multiplier_to": "lr_after",
    "block_lr_measured": "lr_measured",
    "block_lr_step": "lr_step",
    "multiplier_ramp": "lr_switch",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run in "whole", and the same stopped in the middle of a ramp in "half"."""
    folder = tmp_path_factory.mktemp("runs")
    given = settings(prepare(folder), SHARPNESS)
    run(given, folder / "whole")
    run(given, folder / "half", **stop_after(7))
    return folder


def under_old_names(held: dict[str, Any]) -> dict[str, Any]:
    return {OLD.get(key, key): value for key, value in held.items() if key != "block_lr_settled"}


def age(checkpoint: Path, *, parts: bool) -> None:
    """Write what is in a checkpoint as older versions did: one process, or several, each its part."""
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    own = state["optimizer"]
    own["state"] = {i: under_old_names(held) for i, held in own["state"].items()}
    own["param_groups"] = [under_old_names(group) for group in own["param_groups"]]
    if parts:
        names = [name for group in own["param_groups"] for name in group["param_names"]]
        own["state"] = {names[i]: held for i, held in own["state"].items()}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(checkpoint), no_dist=True)
        (checkpoint / "state.pt").unlink()
    else:
        torch.save(state, checkpoint / "state.pt")
    notes = checkpoint / "about.json"
    about = json.loads(notes.read_text())
    files = [path for path in checkpoint.iterdir() if path != notes]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    about["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": hashes[path.name]} for path in files}
    del about["sha256"]
    about["sha256"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    notes.write_text(json.dumps(about))


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # as is meant
@pytest.mark.parametrize("parts", [False, True], ids=["of one process", "in parts"])
def test_a_run_goes_on(folder: Path, tmp_path: Path, parts: bool) -> None:
    place = tmp_path / "run"
    shutil.copytree(folder / "half", place)
    for checkpoint in (place / "checkpoints").iterdir():
        age(checkpoint, parts=parts)
    open_subject(place, trust_code=True).at(7)
    seen: list[int] = []
    run(None, place, trust_code=True, on_start=lambda start: seen.append(start.step))
    assert seen == [7]
    assert_same(place, folder / "whole")
    multipliers = [line["multipliers"] for line in lines(place) if "multipliers" in line]
    assert len({json.dumps(own) for own in multipliers}) > 2  # a ramp
