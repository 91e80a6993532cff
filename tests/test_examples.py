"""The programs of `examples/` run as they are called there, and what they train improves."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "diffusion_lora.py": ("diffusers", "peft", "sklearn"),
    "finetune_lora.py": ("trl", "peft"),
    "grpo.py": ("trl",),
    "vision.py": ("sklearn", "transformers"),
}


def run(name: str, *options: str, processes: int = 0) -> str:
    """What an example prints."""
    missing = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    python = [sys.executable, "-W", "ignore"]
    if processes:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    command = [*python, str(EXAMPLES / name), *options]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def numbers(text: str, pattern: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def test_every_example_is_short_and_run() -> None:
    """Under a hundred lines, with a command in its first lines; this file has a test of each."""
    tested = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) < 100, path.name
        assert f"examples/{path.name}" in text.partition('"""\n\nimport')[0], path.name
        assert f'run("{path.name}"' in tested, path.name


@pytest.mark.slow
def test_pretraining() -> None:
    first, last = numbers(run("pretrain_nanogpt.py", "--steps", "40"), r"validation loss ([\d.]+)")
    assert last < first - 1


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--qlora",)], ids=["lora", "qlora"])
def test_fine_tuning(more: tuple[str, ...]) -> None:
    if more and find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    text = run("finetune_lora.py", "--steps", "12", *more)
    (sft,), (dpo,) = numbers(text, r"SFT: loss ([\d.]+)"), numbers(text, r"DPO: loss ([\d.]+)")
    assert sft < 2.6  # ln 15 is 2.71: that of words drawn at random
    assert dpo < 0.6931  # ln 2: that of a model that prefers neither


@pytest.mark.slow
def test_grpo() -> None:
    text = run("grpo.py", "--steps", "4")
    assert re.findall(r"^([\w-]+): reward", text, flags=re.MULTILINE) == ["adam-mini", "adapm"]
    pairs = re.findall(r"reward ([\d.]+), then ([\d.]+)", text)
    assert all(float(last) > float(first) for first, last in pairs)


@pytest.mark.slow
def test_vision() -> None:
    found = numbers(run("vision.py", "--epochs", "3"), r"accuracy ([\d.]+)")
    assert len(found) == 2 and min(found) > 0.4  # of ten classes


@pytest.mark.slow
def test_diffusion() -> None:
    text = run("diffusion_lora.py", "--steps", "30")
    ((first, last),) = re.findall(r"loss ([\d.]+), then ([\d.]+)", text)
    assert float(last) < float(first) and text.strip().endswith("roles k, o, q, v")


@pytest.mark.slow
def test_a_mesh() -> None:
    first, last = numbers(run("fsdp_tp.py", "--tp", "2", processes=4), r"loss ([\d.]+)")
    assert last < first - 1


@pytest.mark.slow
def test_switching() -> None:
    text = run("switch.py")
    before, *after = numbers(text, r"loss ([\d.]+)")
    assert len(after) == 3 and max(after) < before
    assert re.findall(r"then (\w+):", text) == ["AdamW", "AdamW8bit", "AdamMini"]
