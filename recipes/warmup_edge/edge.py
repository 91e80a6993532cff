"""How large a learning rate AdamW and Adam-mini stand, with a warm-up of one step and of a tenth of the run.

    python recipes/warmup_edge/edge.py                 # trains the grid below runs/warmup_edge, and goes on if stopped
    python recipes/warmup_edge/edge.py --dry-run       # checks every configuration and lists the runs

The edge of an optimizer and a warm-up is the largest learning rate up to which every run ends, its loss, the mean over
seeds, at most `FAR` nats above the best of the row. All are in edge.json, with the losses (null where it diverged).
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from sharpwise.train.config_file import make_config, read_given, set_keys
from sharpwise.train.run import Diverged, run

OPTIMIZERS = ("adamw", "adam-mini")
LRS = (1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1)
WARMUPS: dict[str, float] = {"1 step": 1, "10%": 0.1}
SEEDS = (1, 2)
FAR = 0.5


class Cell(NamedTuple):
    """A run of the grid."""

    optimizer: str
    warmup: str
    lr: float
    seed: int

    @property
    def place(self) -> str:
        return f"{self.optimizer}/warmup{WARMUPS[self.warmup]:g}-lr{self.lr:g}-seed{self.seed}"

    def config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Of the run, as TOML gives it."""
        given = {**base, "seed": self.seed}
        given["optimizer"] = {**base.get("optimizer", {}), "name": self.optimizer, "lr": self.lr}
        given["schedule"] = {**base.get("schedule", {}), "warmup": WARMUPS[self.warmup]}
        return given


def cells() -> Iterator[Cell]:
    for optimizer in OPTIMIZERS:
        for warmup in WARMUPS:
            for lr in LRS:
                for seed in SEEDS:
                    yield Cell(optimizer, warmup, lr, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path, nargs="?", default=Path(__file__).with_name("run.toml"))
    parser.add_argument("--out", type=Path, default=Path("runs/warmup_edge"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="a setting of all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    base = set_keys(read_given(args.base), args.set)
    grid = list(cells())
    for cell in grid:
        make_config(cell.config(base))
    if args.dry_run:
        print("\n".join(cell.place for cell in grid), f"\n{len(grid)} runs")
        return
    losses: dict[Cell, float | None] = {}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        places = [args.out / cell.place for cell in grid]
        for cell, loss in zip(grid, pool.map(trained, (cell.config(base) for cell in grid), places), strict=True):
            losses[cell] = loss
            print(f"{cell.place}: {'diverged' if loss is None else f'{loss:.4f}'}", flush=True)
    found = {"far": FAR, "config": base, "rows": list(rows(losses))}
    (args.out / "edge.json").write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        print(f"{row['optimizer']:10s} warm-up {row['warmup']:7s} edge {row['edge']}")


def trained(config: dict[str, Any], folder: Path) -> float | None:
    """The last validation loss of a run, None where it diverged; trained if it is not there already."""
    if (ended := folder / "diverged").exists():
        return None
    try:
        return run(config, folder).validation_loss
    except Diverged as error:
        ended.write_text(f"{error}\n")
        return None


def rows(losses: Mapping[Cell, float | None]) -> Iterator[dict[str, Any]]:
    """Losses by learning rate, and the edge, for every optimizer and warm-up."""
    for optimizer in OPTIMIZERS:
        for warmup in WARMUPS:
            by_lr = {lr: [losses[Cell(optimizer, warmup, lr, seed)] for seed in SEEDS] for lr in LRS}
            yield {"optimizer": optimizer, "warmup": warmup, "losses": by_lr, "edge": edge(by_lr)}


def edge(by_lr: Mapping[float, list[float | None]]) -> float | None:
    """The largest learning rate up to which all end, at most `FAR` above the best; those below the best do not count.

    >>> edge({0.1: [9.0, 9.1], 0.2: [3.0, 3.2], 0.4: [3.2, 3.3], 0.8: [3.1, None]})
    0.4
    """
    means = {
        lr: math.inf if None in of else statistics.mean(x for x in of if x is not None) for lr, of in by_lr.items()
    }
    best = min(means, key=lambda lr: means[lr])
    if math.isinf(means[best]):
        return None
    found = best
    for lr in sorted(lr for lr in means if lr > best):
        if means[lr] > means[best] + FAR:
            break
        found = lr
    return found


if __name__ == "__main__":
    main()
