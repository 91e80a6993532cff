"""Checkpoints that are as they were written, but not by this version, or not by any: one sentence, and nothing runs."""

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

from sharpwise.cli.main import create_app
from sharpwise.measure.subject import open_subject
from sharpwise.train.checkpoint import read_checkpoint
from sharpwise.train.run import run
from train.run_rig import content, half_a_run

STEP = "step-00000007"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_a_run(tmp_path_factory.mktemp("half"))


@pytest.fixture
def place(half: Path, tmp_path: Path) -> Path:
    shutil.copytree(half, tmp_path / "run")
    return tmp_path / "run"


def sealed(folder: Path, about: dict[str, Any]) -> None:
    """Write the notes with their hash, as whoever wrote the checkpoint would."""
    about.pop("sha256", None)
    about["sha256"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    (folder / "about.json").write_text(json.dumps(about))


def forge(place: Path, change: Callable[[dict[str, Any]], object] = lambda about: None, **files: bytes) -> None:
    """Change the notes and files of all checkpoints."""
    for folder in (place / "checkpoints").iterdir():
        about = json.loads((folder / "about.json").read_text())
        for name, data in {name.replace("_", "."): data for name, data in files.items()}.items():
            (folder / name).write_bytes(data)
            about["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        change(about)
        sealed(folder, about)


def packed(state: Any) -> bytes:
    path = Path("packed.pt")
    torch.save(state, path)
    return path.read_bytes()


class Planted:
    """A pickle that leaves a mark when it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- notes -----------------------------------------------------------------------------------------------------------

KEYS = ["format", "files", "validation_loss", "last_validation_loss", "best_loss", "metrics_bytes", "timing_bytes"]


@pytest.mark.parametrize("key", [*KEYS, "probes", "step"])
def test_notes_without_a_key(place: Path, key: str) -> None:
    forge(place, lambda about: about.pop(key))
    before = content(place)
    with pytest.raises(ValueError, match=f"the checkpoint .*{STEP} lacks '{key}'.* sharpwise 0.* has written it"):
        run(None, place, trust_code=True)
    assert content(place) == before  # nothing is set aside as damaged


@pytest.mark.parametrize(
    ("key", "value"),
    [("best_loss", "low"), ("last_validation_loss", [1]), ("best_loss", float("nan")), ("metrics_bytes", 1.5),
     ("timing_bytes", True), ("probes", 3), ("files", {}), ("files", {"state.pt": 1}), ("files", {"../x": {}})],
)  # fmt: skip
def test_notes_of_another_kind(place: Path, key: str, value: Any) -> None:
    forge(place, lambda about: about.update({key: value}))
    before = content(place)
    with pytest.raises(ValueError, match=f"{STEP} lacks .* or has it in another form"):
        run(None, place, trust_code=True)
    assert content(place) == before


def test_another_format(place: Path) -> None:
    forge(place, lambda about: about.update(format=2, sharpwise="9.1"))
    before = content(place)
    message = rf"{STEP} has format 2, as sharpwise 9\.1 writes it, and sharpwise 0\..* reads format 1; go on with that"
    with pytest.raises(ValueError, match=message):
        run(None, place, trust_code=True)
    with pytest.raises(ValueError, match=message):
        open_subject(place, trust_code=True).at(7)
    assert content(place) == before


@pytest.mark.parametrize("probes", [{}, {"noise": 1, "snr": [], "weight": None}])
def test_probes_that_do_not_fit(place: Path, probes: Any) -> None:
    forge(place, lambda about: about.update(probes=probes))
    with pytest.raises(ValueError, match=f"{STEP} does not fit"):
        run(None, place, trust_code=True)


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message"),
    [({"optimizer": {}}, "lacks the state of the model"), ({"model": {}}, "lacks the state of the optimizer"),
     ([1], "lacks the state of the model"), (None, "lacks the state of the model"),
     ({"model": 1, "optimizer": {}}, "lacks the state of the model")],
)  # fmt: skip
def test_a_state_without_a_part(place: Path, state: Any, message: str) -> None:
    forge(place, state_pt=packed(state))
    with pytest.raises(ValueError, match=f"{STEP} {message}"):
        run(None, place, trust_code=True)
    with pytest.raises(ValueError, match=f"{STEP} {message}"):
        open_subject(place, trust_code=True).at(7)


@pytest.mark.parametrize("optimizer", [{}, {"state": {}}, {"state": [], "param_groups": 3}, {"param_groups": [{}]}])
def test_a_state_of_another_optimizer(place: Path, optimizer: Any) -> None:
    model = torch.load(place / "checkpoints" / STEP / "state.pt")["model"]
    forge(place, state_pt=packed({"model": model, "optimizer": optimizer}))
    with pytest.raises(ValueError, match=f"{STEP} does not fit the model as it is now"):
        run(None, place, trust_code=True)
    with pytest.raises(ValueError, match="step 7 is of another model"):
        open_subject(place, trust_code=True).at(7)


@pytest.mark.parametrize("planted", [pickle.dumps(Planted()), None], ids=["pickle", "torch"])
def test_a_planted_pickle_does_not_run(place: Path, planted: bytes | None) -> None:
    forge(place, state_pt=planted or packed({"model": Planted(), "optimizer": Planted()}))
    shutil.copytree(place, "again")
    for command in (["measure", "spectrum", str(place)], ["train", "again"]):
        done = CliRunner().invoke(create_app(), [*command, "--trust-code"])
        said = " ".join(done.output.split())
        assert done.exit_code == 2
        assert "state.pt holds more than tensors and plain values, and was not loaded" in said
        assert "weights_only" not in said  # torch's message says how to run it
        assert isinstance(done.exception, SystemExit)
    assert not Path("ran").exists()


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_other_metrics_are_not_gone_on_with(place: Path) -> None:
    """Of another run, a longer one, or of another step: the file would have gaps, or steps twice."""
    metrics = (place / "metrics.jsonl").read_bytes()
    lines = metrics.splitlines(keepends=True)
    for name, other in (
        ("metrics", b"".join(line.replace(b'"loss":', b'"loss":1') for line in lines) * 2),
        ("metrics", b"".join(lines[1:] * 3)),
        ("timing", b"[" * 2_000_000),
    ):
        before = (place / f"{name}.jsonl").read_bytes()
        (place / f"{name}.jsonl").write_bytes(other)
        again = place.with_name("again")
        shutil.copytree(place, again)
        with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
            run(None, again, trust_code=True)
        assert (again / f"{name}.jsonl").read_bytes() == other
        shutil.rmtree(again)
        (place / f"{name}.jsonl").write_bytes(before)
    forge(place, lambda about: about.update(metrics_bytes=about["metrics_bytes"] - 1))
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        run(None, place, trust_code=True)
    assert (place / "metrics.jsonl").read_bytes() == metrics


# --- in parts --------------------------------------------------------------------------------------------------------


def in_parts(folder: Path) -> dict[str, Any]:
    """A checkpoint as several processes write it; returns a state like it."""
    state = {
        "model": {"w": torch.ones(3)},
        "optimizer": {
            "state": {"w": {"step": torch.tensor(2.0)}},
            "param_groups": [{"params": [0], "param_names": ["w"], "lr": 0.1, "betas": (0.9, 0.99), "name": "a"}],
        },
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    about = {"format": 1, "step": 3, "files": {}}
    for path in folder.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        about["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest}  # type: ignore[index]
    sealed(folder, about)
    group = {"params": [0], "param_names": ["w"], "lr": 0.0, "betas": (0.0, 0.0), "name": ""}
    return {
        "model": {"w": torch.zeros(3)},
        "optimizer": {"state": {0: {"step": torch.tensor(0.0)}}, "param_groups": [group]},
    }


def test_what_is_planted_in_parts_does_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000003"
    like = in_parts(folder)
    found = read_checkpoint(tmp_path, 3).state_like(like)
    assert torch.equal(found["model"]["w"], torch.ones(3))
    assert found["optimizer"]["param_groups"][0]["lr"] == 0.1
    assert found["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    metadata = pickle.loads(whole[".metadata"])

    def plant(name: str, data: bytes) -> None:
        for other, before in whole.items():
            (folder / other).write_bytes(before)
        (folder / name).write_bytes(data)
        about = json.loads(whole["about.json"])
        about["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        sealed(folder, about)

    plant(".metadata", pickle.dumps(Planted()))
    with pytest.raises(ValueError, match=r"\.metadata is no list of parts .*it wants to run \w+\.mkdir"):
        read_checkpoint(tmp_path, 3).state_like(like)
    plant(".metadata", pickle.dumps([1]))
    with pytest.raises(ValueError, match=r"\.metadata is no list of parts, it holds a list"):
        read_checkpoint(tmp_path, 3).state_like(like)
    plain = next(key for key in metadata.storage_data if key.fqn == "optimizer.param_groups.0.lr")
    place, data = metadata.storage_data[plain], packed(Planted())
    part = whole[place.relative_path]
    place.offset, place.length = len(part), len(data)
    whole[".metadata"] = pickle.dumps(metadata)
    about = json.loads(whole["about.json"])
    about["files"][".metadata"] = {
        "bytes": len(whole[".metadata"]), "sha256": hashlib.sha256(whole[".metadata"]).hexdigest(),
    }  # fmt: skip
    whole["about.json"] = json.dumps(about).encode()
    plant(place.relative_path, part + data)
    with pytest.raises(ValueError, match="rank 0: UnpicklingError"):
        read_checkpoint(tmp_path, 3).state_like(like)
    assert not Path("ran").exists()
