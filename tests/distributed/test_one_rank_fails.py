"""A rank that raises alone while the others wait for it: torchrun ends them, long before the process group would."""

import time
from pathlib import Path

import pytest
from train.distributed.rig import launch

from . import lr_worker


@pytest.mark.parametrize("lr", ["nan", pytest.param("-1.0", marks=pytest.mark.slow)])
def test_an_invalid_lr_on_one_rank_ends_the_job_soon(lr: str) -> None:
    """No collective asks all ranks for their lr: each step would pay for it. The rank says what is wrong."""
    began = time.monotonic()
    done = launch(2, str(Path(lr_worker.__file__)), lr)
    assert done.returncode == 1
    assert time.monotonic() - began < 120
    assert f"ValueError: AdamMini: lr must be a finite number >= 0, got {lr}" in done.stderr, done.stderr[-6000:]
    assert "rank      : 1 (local_rank: 1)" in done.stderr
