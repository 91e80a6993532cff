"""DeepSpeed, where it is installed: stage 0 leaves parameters whole and is served, ZeRO is refused with the reason."""

import pytest
from distributed.launch import launch
from distributed.serving import Found, of

pytest.importorskip("deepspeed")

NAMES = ("adamw", "adam-mini")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launch("first_contact.deepspeed_worker", 2, tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_stage_0_equals_one_process(found: Found, name: str) -> None:
    result = of(found, f"{name}, 0")
    assert result["steps"] == [10.0]
    assert result["losses"] <= 1e-5
    assert abs(result["moved"]) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_zero_is_refused(found: Found, name: str, stage: int) -> None:
    said = of(found, f"{name}, {stage}")["said"]
    assert "group of 28 parameters that begins with transformer.wte.weight now holds 1 tensors" in said
    assert "fully_shard(model)" in said and "DeepSpeed ZeRO-1, 2 and 3 are not supported" in said
