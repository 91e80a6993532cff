"""The benchmark of steps on a GPU, as far as a machine without one shows: bytes, the calls, the refusal."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine.simulated import fake_device

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts, with a device that counts."""
    with fake_device(monkeypatch):
        import arms
        import on_device
        import shapes

        yield arms, on_device, shapes
    for name in ("arms", "on_device", "shapes"):
        sys.modules.pop(name, None)


def test_bytes_are_those_of_the_tensors(scripts):
    """As worked out by hand per element, but for state by block and counters, which are few."""
    arms, on_device, shapes = scripts
    shape = shapes.Shape(n_layer=1, n_head=2, n_embd=64, vocab_size=500, block_size=32)
    for arm in arms.DEVICE_ARMS:
        model = shapes.model_with_gradients("linear", shape)
        optimizer = arm.build(model)
        optimizer.step()
        elements = sum(p.numel() for p in model.parameters())
        found = on_device.bytes_moved(optimizer, arm.reads_gradients) / elements
        assert arm.bytes_per_element <= found <= arm.bytes_per_element * 1.01, arm.name
    assert {arm.name: arm.bytes_per_element for arm in arms.DEVICE_ARMS}[arms.BASE] == 28


def test_every_arm_steps_on_the_device_that_computes_nothing(scripts, capsys):
    arms, on_device, shapes = scripts
    shape = shapes.Shape(n_layer=1, n_head=2, n_embd=64, vocab_size=500, block_size=32)
    found = on_device.measured("fake", shape, rounds=1, repeats=1, only=None)
    assert found["environment"]["device"] == "none: fake"
    for own in found["layouts"].values():
        assert list(own["arms"]) == [*(arm.name for arm in arms.DEVICE_ARMS), on_device.COPY]
        for row in own["arms"].values():
            seconds = row["median_ms"] / 1e3
            assert row["over_copy"] == pytest.approx(row["bytes_moved"] / seconds / own["copy_bytes_per_s"])
            assert len(row["taken"]) == len(row["beside"]) == 1
        assert own["arms"][on_device.COPY]["over_copy"] == pytest.approx(1.0)
        assert own["arms"][on_device.COPY]["bytes_moved"] == 8 * own["parameters"]
    assert "a copy moves" in capsys.readouterr().out


def test_a_part_of_the_arms_has_the_base_with_it(scripts):
    arms, on_device, shapes = scripts
    found = on_device.measured("fake", shapes.Shape(1, 2, 64, 500, 32), rounds=1, repeats=1, only=["Lion"])
    assert list(found["layouts"]["linear"]["arms"]) == [arms.BASE, "sharpwise Lion", on_device.COPY]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("more", [[], ["--check"]], ids=["", "check"])
def test_without_a_gpu_one_line_says_what_to_do(more):
    command = [sys.executable, str(BENCHMARKS / "step_time.py"), "--device", "cuda", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("step_time.py: no CUDA device: torch ") and "make bench-gpu" in line


def test_one_command_runs_the_tests_first():
    recipe = (BENCHMARKS.parent / "Makefile").read_text().partition("\nbench-gpu:")[2].partition("\n\n")[0]
    _, check, tests, times = (line.strip() for line in recipe.splitlines())
    assert check.endswith("step_time.py --device cuda --check")
    assert tests.endswith("pytest -m gpu")
    assert times.endswith("step_time.py --device cuda")
