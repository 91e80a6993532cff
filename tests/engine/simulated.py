"""The device that counts and computes nothing, `benchmarks/fake_device.py`, for tests."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@contextmanager
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, for as long as a test lasts; skips that where torch cannot be told of such a device."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fake_device as module

    try:
        module.provide_guard()
    except module.CannotFake as error:
        pytest.skip(str(error))
    yield module
    sys.modules.pop("fake_device", None)
