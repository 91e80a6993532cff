"""What committed results say: studies by path, their arms as rows of a table, their losses as a picture."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from charts import COLOURS, Curve, curves, svg

ROOT = Path(__file__).parents[2]
SIZES = "benchmarks/results/state_bytes.json"
HEAD = ("arm", "lr", "final loss", "to the baseline", "verdict", "state")


@cache
def load(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def committed() -> list[str]:
    """The results of studies, by path; what was measured of models has no baseline."""
    paths = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("recipes/*/*.json"))
    return [path for path in paths if isinstance(load(path), dict) and "baseline" in load(path)]


def setting(study: dict[str, Any]) -> str:
    """What was compared on what, in a sentence or two."""
    model, budget, where = study["model"], study["budget"], study["environment"]
    per = budget["tokens_per_parameter"]
    tried = sorted({len(arm["tuning"]) for arm in study["arms"]} - {0})
    trials = " to ".join(f"{count}" for count in sorted({tried[0], tried[-1]})) if tried else "no"
    return (
        f"{model['name'].rpartition(':')[2]}, {model['parameters']:,} parameters, trained for {budget['steps']:,} "
        f"steps on {budget['tokens']:,} tokens ({per:.2g} per parameter outside the embeddings); "
        f"{trials} settings tried per tuned arm, {len(study['seeds'])} seeds; on {where['device']}, "
        f"{where['date'][:10]}, torch {where['torch']}. Losses in nats per token; differences are paired by seed, "
        "with 95% intervals."
    )


def rows(study: dict[str, Any]) -> Iterator[list[str]]:
    """Of every arm, the cells of `HEAD`."""
    for arm in study["arms"]:
        lr, apart = (arm["setting"] or {}).get("optimizer.lr"), arm["difference"]
        between = f"{apart['mean']:+.3f} ({apart['low']:.3f} to {apart['high']:.3f})" if apart else ""
        loss = "diverged" if arm["mean"] is None else f"{arm['mean']:.3f}"
        yield [f"`{arm['name']}`", f"{lr:g}" if lr else "", loss, between, arm["verdict"], size(arm["state_bytes"])]


def losses(study: dict[str, Any]) -> str:
    """Validation loss of every arm, or, if they are too many, of those with a setting of their own: the mean over the
    seeds, and all of them as a band. "" where losses were measured at the end alone."""
    drawn, base = [], []
    many = len(study["arms"]) > len(COLOURS)
    for arm in study["arms"]:
        if many and arm["setting_of"]:
            continue
        ended = [run for run in arm["final"] if run["stopped_at"] is None]
        if not ended:
            continue
        by_step = [*zip(*(run["validation_loss"] for run in ended), strict=True)]
        mean = [sum(one) / len(one) for one in by_step]
        tokens = ended[0]["validation_tokens"]
        drawn.append(Curve(arm["name"], tokens, mean, [*map(min, by_step)], [*map(max, by_step)]))
        base = base or mean
    if all(len(curve.low) < 2 for curve in drawn):
        return ""
    lowest = min(min(curve.low) for curve in drawn)
    scale = {"lowest": 0.98 * lowest, "highest": 1.02 * base[0]}
    parts = curves(drawn, "tokens", "validation loss, all seeds", height=300, width=560, spelled=short, **scale)
    assert len(drawn) <= len(COLOURS)
    return svg(560, 314 + 20 * len(drawn), *parts, title=f"{study['name']}: validation loss against tokens")


def short(count: float) -> str:
    """A number of tokens."""
    return f"{count / 1e6:g}M" if count >= 1e6 else f"{count / 1e3:g}k" if count >= 1e3 else f"{count:g}"


def size(count: float) -> str:
    """Bytes, with their unit."""
    unit = next((name, of) for name, of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if count >= of)
    return f"{count / unit[1]:.{2 if unit[0] == 'GiB' else 1}f} {unit[0]}"
