"""Draws the picture of the README from committed results: `python docs/pictures.py`; a test holds it to them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

from charts import Curve, bars, curves, svg
from committed import SIZES, load, short, size

from sharpwise.compare.statistics import paired_difference

OVERVIEW = Path(__file__).parent / "pictures" / "overview.svg"
MODEL = "GPT-2 124M"
SHOWN = (
    "AdamW",
    "Muon",
    "AdamMini",
    "AdamW8bit(keep_fp32=())",
    "Muon8bit(aux_storage='int8-dynamic')",
    "AdaPM(second_moment='block')",
)
STUDY, ARM = "recipes/blockwise_lr/result.json", "adamw+blockwise"


def overview() -> str:
    """State by optimizer; and how far below AdamW a learning rate per block was, over a run."""
    sizes = load(SIZES)["bytes"][MODEL]
    left = bars([(arm, sizes[arm], size(sizes[arm])) for arm in SHOWN], f"Optimizer state, {MODEL}")
    study = load(STUDY)
    right = curves(
        [difference()], "tokens", "BlockwiseLR less AdamW: loss, 95% interval", left=390, width=350, height=250,
        lowest=-0.5, highest=0.1, spelled=short,
    )  # fmt: skip
    assert (
        len(study["seeds"]) == 3 and study["model"]["name"] == "gpt2-0.4m" and study["environment"]["device"] == "cpu"
    )
    title = f"State by optimizer; validation loss of {ARM} less that of {study['baseline']}, GPT-2 of 0.4M parameters"
    return svg(750, 255, *left, *right, title=title)


def difference() -> Curve:
    """Of the arm to the baseline at every validation, paired by seed."""
    arms = {arm["name"]: arm["final"] for arm in load(STUDY)["arms"]}
    mine, theirs = arms[ARM], arms[load(STUDY)["baseline"]]
    tokens = mine[0]["validation_tokens"]
    assert all(run["validation_tokens"] == tokens for run in (*mine, *theirs))
    by_step = [
        paired_difference(*([run["validation_loss"][at] for run in runs] for runs in (mine, theirs)), 0.95)
        for at in range(len(tokens))
    ]
    return Curve(ARM, tokens, *([getattr(d, key) for d in by_step] for key in ("mean", "low", "high")))


if __name__ == "__main__":
    OVERVIEW.write_text(overview(), encoding="utf-8")
