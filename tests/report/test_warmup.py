"""What a run says of its warm-up, from angles that are given, and of a run that trains."""

import json
import re

import pytest

from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.controls.snr import rrc_growth
from sharpwise.report.run import read_run
from sharpwise.report.warmup import Update, advice, advise

STEPS = 400
SEEN = [1, 2, 4, *range(8, STEPS + 1, 8)]


def updates(first, upto, warmup):
    """Angles that begin at `first` times the usual 0.01 at the peak, for `upto` steps."""
    found = []
    for step in SEEN:
        at_peak = 0.01 * (first if step <= upto else 1.0)
        found.append(Update(step, at_peak * (min(1.0, step / warmup) if warmup else 1.0), at_peak))
    return found


@pytest.mark.parametrize(
    ("first", "upto", "warmup", "says"),
    [
        (1.2, 8, 40, "The warm-up of 40 steps was not needed for the size of updates: .* 1.2 times as far"),
        (4.0, 8, 40, "The warm-up of 40 steps was needed, and long enough: .* 4 times .*, and large ones up to step 8"),
        (4.0, 4, 40, "was longer than the size of updates asks for: .* large ones up to step 4"),
        (4.0, 40, 40, "was too short: even under it, step 40 turned neurons 4 times as far"),
        (3.0, 4, 0, "A warm-up was missing: .* 3 times .* up to step 4, and a warm-up of 8 steps or more"),
        (1.0, 4, 0, "No warm-up was needed: the first updates turned neurons at most 1 times as far as is usual later"),
    ],
    ids=["not needed", "right", "long", "short", "missing", "none needed"],
)
def test_the_sentence(first, upto, warmup, says):
    assert re.search(says, advise(updates(first, upto, warmup), warmup, STEPS))


def test_too_little_says_nothing():
    assert advise([], 40, STEPS) == ""
    assert advise(updates(4.0, 8, 40)[:3], 40, STEPS) == ""


def write_run(folder, warmup, angles, snr):
    (folder / "config.toml").write_text(
        f"[optimizer]\nname = 'adamw'\nlr = 0.01\n[schedule]\nsteps = {STEPS}\nwarmup = {warmup}\n"
        "[batch]\nsequences = 8\n"
    )
    lines = []
    for step in SEEN:
        lr = 0.01 * min(1.0, step / warmup)
        lines.append(
            {
                "step": step, "loss": 3.0, "lr": lr, "update_relative": {"q": 0.1},
                "update_angle": {"q": angles(step) * lr, "tok_emb": 1.0}, "gradient_snr": {"model": snr(step)},
            }
        )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(folder)


def test_of_a_run_on_disk(tmp_path):
    run = write_run(tmp_path, 40, lambda step: 3.0 if step <= 8 else 1.0, lambda step: 0.0)
    assert "was needed, and long enough" in advice(run) and "3 times as far" in advice(run)
    assert "0.01 rad" in advice(run)


def test_gradients_that_agree_count_as_larger_updates(tmp_path):
    """Equal angles; an SNR of 1 per sequence in the first 8 steps, 8 sequences in a step, 64 inputs."""
    blocks = BlockMap((Segment("w", (32, 64), Role.Q, dim=0, source="said"),))
    blocks.save(tmp_path / "blocks.json")
    run = write_run(tmp_path, 40, lambda step: 1.0, lambda step: 8.0 if step <= 8 else 0.0)
    assert f"{rrc_growth(1.0, 8, 64):.2g} times as far" in advice(run)
    assert rrc_growth(1.0, 8, 64) > 1.5


def test_a_run_without_what_it_takes(tmp_path):
    run = write_run(tmp_path, 40, lambda step: 0.0, lambda step: 0.0)
    assert advice(run) == ""
