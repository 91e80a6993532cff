"""The Triton kernels, interpreted: in a process of its own, as Triton is imported for one or for the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed.launch import launch

import sharpwise
from sharpwise.engine.backends import triton_launch
from sharpwise.testing import fill_gradients, tiny_model

FILES = [Path(__file__).with_name(f"interpreted{of}.py") for of in ("", "_int8", "_controls")]
needs_triton = pytest.mark.skipif(bool(triton_launch.absent()), reason=triton_launch.absent() or "triton is here")


def interpret(selection):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", selection, *map(str, FILES)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=env, cwd=FILES[0].parents[2], check=False)
    assert found.returncode == 0, found.stdout[-6000:]
    assert " passed" in found.stdout, found.stdout[-2000:]


@needs_triton
def test_pairs_of_everything_are_the_reference():
    interpret("not slow")


@needs_triton
@pytest.mark.slow
def test_everything_is_the_reference():
    interpret("slow")


def test_without_triton_the_reference_steps(monkeypatch):
    """Nothing is imported before it is asked for, and what is not there is said."""
    code = "import sharpwise, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setattr(triton_launch, "find_spec", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_launch.absent.cache_clear()
    try:
        assert triton_launch.refused(torch.device("cuda")) == "triton is not installed"
        assert triton_launch.refused(torch.device("cpu")) == "not for cpu"
    finally:
        monkeypatch.undo()
        triton_launch.absent.cache_clear()
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-3)
    fill_gradients(model, 0)
    optimizer.step()
    assert "triton" not in {row["backend"] for row in optimizer.explain()}


@needs_triton
@pytest.mark.slow
def test_parts_of_a_mesh_are_the_whole(tmp_path):
    found = launch("engine.sharded_triton", 2, tmp_path)
    for off, where, turned, moved_by in found:
        assert off <= 1e-6, where
        assert turned <= 2
        assert {name.split(" ")[0] for name in moved_by} == {"triton"}
