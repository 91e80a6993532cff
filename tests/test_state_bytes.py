"""The committed sizes of state, which README and documentation draw, are what is allocated."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def state_bytes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import state_bytes

    yield state_bytes
    for name in ("state_bytes", "environment"):
        sys.modules.pop(name)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["GPT-2 124M", "GPT-2 1.5B", "Llama-2-7B"])
def test_committed_sizes_are_what_is_allocated(state_bytes, model):
    committed = json.loads(state_bytes.RESULT.read_text())["bytes"]
    assert [*committed] == [*state_bytes.MODELS]
    preset = state_bytes.MODELS[model]
    assert committed[model] == {name: state_bytes.state_bytes(preset, arm) for name, arm in state_bytes.ARMS.items()}


def test_sizes_of_adamw_are_two_numbers_of_every_parameter(state_bytes):
    committed = json.loads(state_bytes.RESULT.read_text())["bytes"]["GPT-2 124M"]
    assert committed["AdamW"] == 8 * 124_439_808
