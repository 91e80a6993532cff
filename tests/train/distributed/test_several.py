"""Runs of several processes under torchrun: the same losses on any mesh, gone on with on any other, and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sharpwise.train import final
from sharpwise.train.config_file import read_given
from sharpwise.train.run import run
from train.distributed.rig import LENGTH, STEPS, job, settings, work
from train.run_rig import lines, prepare, stop_after

Said = dict[str, list[dict[str, Any]]]
MINI = {"name": "adam-mini", "block_lr": "", "v_by": "row"}
UNEVEN = {"sequences": 5, "micro": 1}  # with two processes, one of them takes a pass for nothing
FSDP, TP = {"fsdp": 2}, {"tp": 2}
ONE_KEY_HEAD = {"name": "llama-tiny", "settings": {"num_key_value_heads": 1}}

# What is trained, beside the defaults, and on which mesh of two processes.
ALIKE: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "replicas": ({}, {}),
    "fsdp": ({}, FSDP),
    "tp": ({}, TP),
    "tied, replicas": ({"model": {"settings": {"tied": True}}}, {}),
    "tied, fsdp": ({"model": {"settings": {"tied": True}}}, FSDP),
    "uneven, replicas": ({"batch": UNEVEN}, {}),
    "uneven, fsdp": ({"batch": UNEVEN}, FSDP),
    "adam-mini, fsdp": ({"optimizer": MINI}, FSDP),
    "adam-mini, tp": ({"optimizer": MINI}, TP),
    # Three heads, so that one lies in both processes.
    "adam-mini of cut heads, tp": (
        {"optimizer": MINI, "model": {"settings": {"width": 24, "plan": "all heads"}}},
        TP,
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(data: Path, folder: Path) -> dict[str, Path]:
    """What one process makes of each of the configurations, and a run of one that was stopped."""
    found: dict[str, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(final, "LENGTH", LENGTH)
        for name, (tables, _) in ALIKE.items():
            what = name.partition(",")[0] if "," in name else "default"
            found[name] = folder / f"{what} alone"
            run(settings(data, **tables), found[name])
        run(settings(data), folder / "begun by one", **stop_after(6))
    return found


@pytest.fixture(scope="module")
def two(data: Path, folder: Path, alone: dict[str, Path]) -> Said:
    """Two processes."""
    given = settings(data)
    skip = {"on_nonfinite": "skip"}
    jobs = [job(name, settings(data, **tables, mesh=mesh)) for name, (tables, mesh) in ALIKE.items()]
    jobs += [
        job("stop, fsdp", settings(data, mesh=FSDP), folder="moved", stop=7),
        job("stop, replicas", given, folder="moved", stop=4),
        job("stop, tp", settings(data, mesh=TP), folder="moved", stop=4),
        job("begun by one", settings(data, mesh=FSDP)),
        job("nan, raise", settings(data, mesh=FSDP), trouble="nan 1 7"),
        job("nan, skip", settings(data, optimizer=skip, mesh=FSDP), trouble="nan 1 7"),
        job("nan, replicas", settings(data, optimizer=skip), trouble="nan 1 7"),
        job("other configuration", given, rank1={"seed": 4}),
        job("other model", settings(data, model={"settings": {"other": True}})),
        job("another run", settings(data, optimizer={"lr": 1.0}), folder="moved"),
        job("too many", settings(data, batch={"sequences": 1, "micro": 1})),
        job("no plan", settings(data, model={"name": "train.kill_rig:build"}, mesh=TP)),
        job("indivisible", settings(data, mesh={"tp": 4})),
        job("three heads", settings(data, model={"settings": {"width": 24}}, mesh=TP)),
        job("cannot run", settings(data, model={"settings": {"plan": "queries alone"}}, mesh=TP)),
        job("other heads", settings(data, model={"settings": {"heads": 4}}, mesh=TP)),
        job("one key head", settings(data, model=ONE_KEY_HEAD, mesh=TP)),
        job("full disk", given, spoil="full"),
    ]
    return work(2, folder, jobs)


@pytest.fixture(scope="module")
def three(data: Path, folder: Path, two: Said) -> Said:
    """Three processes, which divide nothing evenly."""
    jobs = [
        job("fsdp of three", settings(data, mesh={"fsdp": 0})),
        job("stop, three", settings(data, mesh={"fsdp": 3}), folder="moved", stop=2),
        job("no multiple", settings(data, mesh=FSDP)),
    ]
    return work(3, folder, jobs)


def worst(mine: Path, other: Path) -> float:
    """The largest difference of a loss, in nats per token."""
    both = [lines(path) for path in (mine, other)]
    assert [line["step"] for line in both[0]] == list(range(1, STEPS + 1))
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(*both, strict=True)]
    for a, b in zip(*both, strict=True):
        # From the gradients of micro-batches, which one process sees and several do not.
        alone = {"noise_scale", *(["gradient_signal", "gradient_noise"] if a["step"] == 1 else [])}
        assert a.keys() - alone == b.keys() - alone
        if "validation_loss" in a:
            differences.append(abs(a["validation_loss"] - b["validation_loss"]))
        for role, value in a.get("update_rms", {}).items():
            assert value == pytest.approx(b["update_rms"][role], rel=1e-2)
    return max(differences)


def assert_all_finished(said: list[dict[str, Any]]) -> None:
    assert [own.get("state", own.get("error")) for own in said] == ["finished"] * len(said)
    assert len({own["loss"] for own in said}) == 1


# --- the same run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_as_one(two: Said, folder: Path, alone: dict[str, Path], name: str) -> None:
    assert_all_finished(two[name])
    assert worst(folder / name, alone[name]) < 2e-5
    mine, other = (load_file(path / "final" / "model.safetensors") for path in (folder / name, alone[name]))
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in other.items()}
    for tensor_name, tensor in mine.items():
        assert torch.allclose(tensor, other[tensor_name], atol=2e-3), tensor_name
    for same in ("blocks.json", "sample.txt"):
        assert (folder / name / same).read_bytes() == (alone[name] / same).read_bytes()


def test_three_processes_with_uneven_shards(three: Said, folder: Path, alone: dict[str, Path]) -> None:
    assert_all_finished(three["fsdp of three"])
    assert worst(folder / "fsdp of three", alone["fsdp"]) < 2e-5


@pytest.mark.slow
def test_four_processes_on_two_dimensions(data: Path, folder: Path, alone: dict[str, Path]) -> None:
    meshes = {"hsdp": FSDP, "fsdp and tp": {**FSDP, **TP}, "replicas and tp": TP}
    said = work(4, folder, [job(name, settings(data, mesh=mesh)) for name, mesh in meshes.items()])
    for name in meshes:
        assert_all_finished(said[name])
        assert worst(folder / name, alone["fsdp"]) < 2e-5


def test_the_folder_says_who_trained(two: Said, folder: Path) -> None:
    place = folder / "fsdp"
    [start] = json.loads((place / "environment.json").read_text())
    assert (start["processes"], start["mesh"]) == (2, {"replicate": 1, "shard": 2, "tp": 1})
    assert read_given(place / "config.toml")["mesh"] == {"fsdp": 2, "tp": 1}
    assert [path.name for path in sorted((place / "checkpoints").iterdir())] == [f"step-{n:08d}" for n in (12, 16, 20)]
    assert {path.name for path in (place / "checkpoints" / "step-00000020").iterdir()} == {
        *(".metadata", "__0_0.distcp", "__1_0.distcp", "about.json")
    }
    assert [line["step"] for line in lines(place, "timing.jsonl")] == list(range(1, STEPS + 1))


# --- going on on another mesh ----------------------------------------------------------------------------------------


def test_two_go_on_with_what_one_began(two: Said, folder: Path, alone: dict[str, Path]) -> None:
    assert_all_finished(two["begun by one"])
    assert worst(folder / "begun by one", alone["fsdp"]) < 2e-5
    begun, reference = (path / "metrics.jsonl" for path in (folder / "begun by one", alone["fsdp"]))
    assert begun.read_bytes().splitlines()[:6] == reference.read_bytes().splitlines()[:6]


def test_on_other_meshes_and_in_the_end_by_one(
    two: Said, three: Said, data: Path, folder: Path, alone: dict[str, Path]
) -> None:
    """FSDP of two, replicas, tensor parallelism, FSDP of three, one process: a few steps each."""
    steps = {"stop, fsdp": 7, "stop, replicas": 11, "stop, tp": 15}
    for name, step in steps.items():
        assert [(own["state"], own["step"]) for own in two[name]] == [("interrupted", step)] * 2
    assert [(own["state"], own["step"]) for own in three["stop, three"]] == [("interrupted", 17)] * 3
    assert run(settings(data), folder / "moved").state == "finished"
    assert worst(folder / "moved", alone["fsdp"]) < 2e-5
    starts = json.loads((folder / "moved" / "environment.json").read_text())
    assert [start["step"] for start in starts] == [1, 8, 12, 16, 18]
    assert [start.get("processes", 1) for start in starts] == [2, 2, 2, 3, 1]


def test_a_damaged_part_is_passed_over(two: Said, data: Path, folder: Path, alone: dict[str, Path], tmp_path) -> None:
    place = tmp_path / "run"
    shutil.copytree(folder / "fsdp", place)
    shutil.rmtree(place / "final")
    with (place / "checkpoints" / "step-00000020" / "__1_0.distcp").open("r+b") as file:
        file.seek(300)
        file.write(b"?")
    seen: list[int] = []
    run(settings(data), place, on_start=lambda start: seen.append(start.step))
    assert seen == [16]
    assert worst(place, alone["fsdp"]) < 2e-5
    assert (place / "checkpoints" / "damaged-step-00000020").exists()


def test_a_checkpoint_of_another_model(two: Said, data: Path, folder: Path, tmp_path) -> None:
    place = tmp_path / "run"
    shutil.copytree(folder / "replicas", place)
    shutil.rmtree(place / "final")
    toml = place / "config.toml"
    toml.write_text(toml.read_text().replace("[model.settings]", "[model.settings]\nwidth = 40"))
    assert "width = 40" in toml.read_text()
    with pytest.raises(ValueError, match=r"step-00000020 does not fit the model as it is now"):
        run(None, place, trust_code=True)


# --- decided by all --------------------------------------------------------------------------------------------------


def test_a_nan_on_one_rank_ends_all_alike(two: Said, folder: Path) -> None:
    first, second = two["nan, raise"]
    assert first == second
    assert first["kind"] == "Diverged"
    assert first["error"].startswith("step 4: the loss is not finite")
    assert "step-00000004" not in first["error"]  # there was none yet
    assert json.loads((folder / "nan, raise" / "status.json").read_text())["state"] == "diverged"


@pytest.mark.parametrize("name", ["nan, skip", "nan, replicas"])
def test_a_nan_on_one_rank_leaves_the_step_out_on_all(two: Said, folder: Path, name: str) -> None:
    assert_all_finished(two[name])
    metrics = lines(folder / name)
    assert [line["step"] for line in metrics if "skipped" in line] == [4]
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.2


def test_a_full_disk_on_one_rank_ends_all(two: Said, folder: Path) -> None:
    first, second = two["full disk"]
    assert first == second
    assert first["error"].endswith("make room and start the run again: it goes on from its last checkpoint")
    assert [path.name for path in (folder / "full disk" / "checkpoints").glob("step-*")] == [
        "step-00000004",
        "step-00000008",
    ]


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other configuration", "rank 1 has another configuration than rank 0: seed is 4 there, 3 on rank 0. All proc"),
        ("other model", "rank 1 has another model than rank 0: embed_tokens.weight is (300, 32) torch.float32 "),
        ("another run", "holds a run with another configuration:\n  optimizer.lr: the run has 0.003, now it is 1.0\n"),
        ("too many", "batch.sequences=1 are too few for 2 processes with a share each; start fewer"),
        ("no plan", "mesh.tp=2: Tiny has no plan for tensor parallelism. Take mesh.fsdp instead, a model that has one"),
        ("indivisible", "mesh.fsdp=1 and mesh.tp=4 take a multiple of 4 processes, and there are 2: start so many"),
        ("three heads", "mesh.tp=2 does not divide the 3 heads of layers.0.self_attn.q_proj; take a divisor of it, me"),
        ("cannot run", "mesh.tp=2: Small cannot run when it is cut by its plan (RuntimeError: The size of tensor a"),
        ("other heads", "mesh.tp=2: Small computes something else when it is cut by its plan: logits differ by 0.0"),
        ("one key head", "mesh.tp=2 does not divide the 1 of num_key_value_heads; take a divisor of it, or mesh.fsdp"),
    ],
)
def test_what_is_refused_is_refused_by_all(two: Said, folder: Path, name: str, message: str) -> None:
    first, second = two[name]
    assert first == second
    assert first["kind"] == "ValueError"
    assert message in first["error"]
    assert name == "another run" or not (folder / name).exists()


def test_a_mesh_that_does_not_multiply(three: Said) -> None:
    assert {own["kind"] for own in three["no multiple"]} == {"ValueError"}
    assert "take a multiple of 2 processes, and there are 3" in three["no multiple"][0]["error"]


def test_one_process_for_a_mesh_of_two(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"take 2 processes .* start torchrun --nproc-per-node 2 -m sharpwise train"):
        run(settings(data, mesh=FSDP), tmp_path / "run")
    assert not (tmp_path / "run").exists()
