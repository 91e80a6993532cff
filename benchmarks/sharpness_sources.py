"""Which statistic of a training says what learning rates a search over block types found? No times: log ratios.

    python benchmarks/sharpness_sources.py                      gpt2-0.4m, three seeds, about ten minutes of one core
    python benchmarks/sharpness_sources.py --searched R.json    other ratios: {"Emb": 4, "FFN": 2, ...}
    python benchmarks/sharpness_sources.py --quick              one seed, few steps; saves nothing
    python benchmarks/sharpness_sources.py --until 25           of every run the beginning alone; saves nothing
    python benchmarks/sharpness_sources.py --again              the tables anew, from the runs of the committed file

AdamW trains the model once per seed. At some steps every source of `SharpnessLR` is measured, of every block type: S.
A map with power p would multiply the learning rate of a type by S^-p, times a number that is the same for all, and so
is no matter of ratios. With both logarithms taken relative to their mean over the types,

    miss = -p log S - log (searched ratio)        distance = the root mean square of the misses

0 is the search; "all equal" has the distance that a map without any information has. The power that fits best is told
beside 0.5 and 0.6: where it is negative, the statistic orders the types the other way round.

| statistic | what |
|---|---|
| second_moment, centred, probe, directional, norm_11 | as in `SharpnessLR`; the embedding with both of its uses |
| ..., lookup and ..., head | the embedding by one of its uses alone, all others as they are |
| ..., per occurrence | the look-up, times the rows of the table |
| newton | u^T G u / (g u): its inverse is the step along u that is best for the block alone, so that p is 1 |

Means over segments are arithmetic, or geometric ("geo"). Intervals are of Student's t over the seeds, 95%.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor, nn
from torch.nn import functional as F

from sharpwise.block_lr.blockwise import argument_of
from sharpwise.block_lr.ratios import ROUNDING, arithmetic, geometric
from sharpwise.block_lr.sharpness import FIXABLE
from sharpwise.blocks import Segment
from sharpwise.engine.measuring import second_moments, updates, variances
from sharpwise.probes import Curvature, directional, norm_11, sharpness
from sharpwise.probes.estimate import t_interval
from sharpwise.train.build import Built, build
from sharpwise.train.config_file import make_config
from sharpwise.train.steps import step_starts, train_steps

HERE = Path(__file__).parent
FILE = HERE / "results" / "sharpness_sources.json"
SEARCHED = {"Emb": 4.0, "FFN": 2.0, "QK": 1.0, "Norm": 1.0, "VO": 0.5, "pos_emb": 1.0}
PAPER = {"Emb": 10.0, "FFN": 6.0, "QK": 8.0, "Norm": 1.0, "VO": 4.0, "pos_emb": 1.0}
NAMES = {argument: name for name, argument in FIXABLE.items()}

Values = dict[str, float]
"""Of every block type, by its name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2-0.4m", help="a preset")
    parser.add_argument("--data", default="data/mix4096", help="a folder that sharpwise prepare wrote")
    parser.add_argument("--lr", type=float, default=0.003, help="AdamW's, best where it was tuned")
    parser.add_argument("--steps", type=int, default=244)
    parser.add_argument("--at", type=int, nargs="+", default=[10, 25, 49, 122, 244], help="steps to measure after")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--searched", type=Path, help="a JSON file with a ratio per type")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--until", type=int, help="end every run after this step of it; saves nothing")
    parser.add_argument("--quick", action="store_true", help="to see that it runs; saves nothing")
    parser.add_argument("--again", action="store_true", help="the tables anew, from the runs of a file that is there")
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    if not args.again:
        torch.set_num_threads(1)
        result = measured(args, result)
    searched = json.loads(args.searched.read_text()) if args.searched else result.get("searched", SEARCHED)
    result = with_tables(result, searched)
    show(result)
    if args.quick or args.until:
        return
    save(args.out, result)
    print(f"\nSaved {args.out}")


def save(path: Path, result: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def with_tables(result: Mapping[str, Any], searched: Values) -> dict[str, Any]:
    """The runs, and what follows from them."""
    runs = result["runs"]
    tables = {"distances": distances(runs, searched), "moved": moved(runs, list(searched)), "as built": as_built(runs)}
    return {**result, "searched": searched, **tables}


# --- measuring -------------------------------------------------------------------------------------------------------


def measured(args: argparse.Namespace, before: Mapping[str, Any]) -> dict[str, Any]:
    """Runs of all seeds; those that a file has, of the same settings, are not made again."""
    seeds, steps, at = (args.seeds[:1], 6, [3, 6]) if args.quick else (args.seeds, args.steps, args.at)
    at = [step for step in at if step <= (args.until or steps)]
    result: dict[str, Any] = {}
    for seed in seeds:
        built = build(make_config(config_of(args, seed, steps)))
        about = {
            "model": args.model, "lr": args.lr, "steps": steps, "at": at, "data": built.data.about,
            "tokens": steps * built.plan.tokens_per_step, "vocabulary": built.data.vocabulary,
        }  # fmt: skip
        same = {key: before.get(key) for key in about} == about and not args.quick and not args.until
        result = result or {"environment": environment(), **about, "runs": before["runs"] if same else []}
        if all(any((run["seed"], run["step"]) == (seed, step) for run in result["runs"]) for step in at):
            continue
        result["runs"] = [run for run in result["runs"] if run["seed"] != seed] + runs_of(built, seed, at, args.until)
        result["seeds"] = sorted({run["seed"] for run in result["runs"]})
        if not (args.quick or args.until):
            save(args.out, with_tables(result, SEARCHED))
    return result


def runs_of(built: Built, seed: int, at: Sequence[int], until: int | None) -> list[dict[str, Any]]:
    """What is measured in the run of one seed."""
    runs: list[dict[str, Any]] = []
    starts = step_starts(built.data.train, built.plan, 0)  # those of no step of the run
    batch = torch.from_numpy(built.data.train.windows(starts, built.plan.context + 1))
    data = built.data.train, built.data.validation
    for step in train_steps(built.model, built.optimizer, *data, built.plan, forward=built.forward):
        if step.step in at:
            began = time.perf_counter()
            values = statistics_of(built, batch, not until and step.step in at[-2:])
            runs.append({"seed": seed, "step": step.step, "loss": step.loss, "S": values})
            seconds = time.perf_counter() - began
            print(f"seed {seed}, step {step.step}: loss {step.loss:.3f}, measured in {seconds:.0f} s", flush=True)
        if step.step == until:
            break
    else:
        runs[-1]["validation_loss"] = step.validation_loss
    return runs


def config_of(args: argparse.Namespace, seed: int, steps: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "model": {"name": args.model},
        "data": {"path": args.data, "context": 256},
        "batch": {"sequences": 16},
        "optimizer": {"name": "adamw", "lr": args.lr},
        "schedule": {"steps": steps},
        "compute": {"device": "cpu", "precision": "bf16-autocast", "threads": 1},
        "validation": {"every": 0},
    }


def statistics_of(built: Built, batch: Tensor, rows: bool) -> dict[str, Values]:
    """Every statistic by type, `rows`: also those of norm_11, which takes most of the time."""
    model, optimizer = built.model, built.optimizer
    stepper = optimizer._bind()  # type: ignore[union-attr]
    views, blocks = stepper.views, optimizer.blocks
    u = updates(views)
    segments = [s for view in views for s in view.segments]
    found: dict[str, list[float]] = {}
    for name, moments in (("second_moment", second_moments), ("centred", variances)):
        sums = [total for own in moments(views, stepper.group) for total in own]
        found[name] = [total / s.numel for total, s in zip(sums, segments, strict=True)]
    for tied in ("both", "lookup", "head"):
        own = sharpness(model, batch, blocks=blocks, samples=4, tied=tied)  # type: ignore[arg-type]
        found[f"probe {tied}"] = [e.value for e in own.select(by="segment", quantity="sharpness")]
        if rows:
            matrix = Curvature(model, batch[:4], "gauss-newton", blocks=blocks, tied=tied)  # type: ignore[arg-type]
            found[f"norm_11 {tied}"] = [e.value for e in norm_11(matrix, samples=20).select(by="segment")]
    result = {}
    for name, values in found.items():
        for mean, of in (("", arithmetic), (" geo", geometric)):
            own = by_type(segments, values, of)
            kind, _, tied = name.partition(" ")
            if tied in ("lookup", "head"):
                own = result[kind + mean] | {"Emb": own["Emb"]}
            result[f"{kind}{mean}" + (f", {tied}" if tied not in ("", "both") else "")] = own
            if tied == "lookup":
                result[f"{kind}{mean}, per occurrence"] = own | {"Emb": own["Emb"] * built.data.vocabulary}
    return result | along(model, batch, segments, u)


def by_type(segments: Sequence[Segment], values: Sequence[float], mean: Any) -> Values:
    least = ROUNDING * max(values) if mean is geometric else 0.0
    kinds = [NAMES[argument_of(s)] for s in segments]
    own = {k: [(v, s.numel) for v, s, kind in zip(values, segments, kinds, strict=True) if kind == k] for k in kinds}
    return {kind: mean([pair for pair in pairs if pair[0] > least]) for kind, pairs in own.items()}


def along(model: nn.Module, batch: Tensor, segments: Sequence[Segment], u: Mapping[str, Tensor]) -> dict[str, Values]:
    """Curvature along the update of every type, and that over the slope."""
    kinds: dict[str, list[Segment]] = {}
    for segment in segments:
        kinds.setdefault(NAMES[argument_of(segment)], []).append(segment)
    g = gradient(model, batch)
    found: dict[str, Values] = {"directional": {}, "newton": {}}

    def curvature(kind: str, tied: Any) -> float:
        matrix = Curvature(model, batch, "gauss-newton", select=kinds[kind], tied=tied)
        return directional(matrix, u, by="model")[0].value

    for kind, own in kinds.items():
        S = curvature(kind, "both")
        slope = sum(float((s.take(g[s.name]) * s.take(u[s.name])).sum()) for s in own)
        square = sum(float(s.take(u[s.name]).square().sum()) for s in own)
        found["directional"][kind] = S
        if slope > 0:
            found["newton"][kind] = S * square / slope
    for tied in ("lookup", "head"):
        if "Emb" in kinds and kinds["Emb"][0].tied:
            found[f"directional, {tied}"] = found["directional"] | {"Emb": curvature("Emb", tied)}
    return found


def gradient(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Of the text's own loss, in fp32."""
    model.eval()
    logits = model(batch[:, :-1]).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    named = dict(model.named_parameters())
    found = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    model.train()
    return found


# --- judging ---------------------------------------------------------------------------------------------------------


def relative(values: Values, types: Sequence[str]) -> list[float]:
    """Logarithms, relative to their mean over the types."""
    logs = [math.log(values[kind]) for kind in types]
    return [log - sum(logs) / len(logs) for log in logs]


def distances(runs: Sequence[Mapping[str, Any]], searched: Values) -> dict[str, Any]:
    """By statistic and step: means over the seeds, with half the width of their intervals."""
    found: dict[str, Any] = {}
    for step in dict.fromkeys(run["step"] for run in runs):
        own = [run["S"] for run in runs if run["step"] == step]
        for name in own[0]:
            types = [kind for kind in searched if all(S[name].get(kind, math.nan) > 0 for S in own)]
            if len(types) < 3:
                continue  # a step along the update of so many of them would lead up
            wanted = relative(searched, types)
            logs = [relative(S[name], types) for S in own]
            entry: dict[str, Any] = {"types": types, "log S": interval_by_type(logs, types)}
            fits = [-dot(x, wanted) / dot(x, x) for x in logs]
            entry["power"] = interval(fits)
            for label, powers in (("0.5", [0.5] * len(logs)), ("0.6", [0.6] * len(logs)), ("1", [1.0] * len(logs))):
                misses = [
                    [-p * a - b for a, b in zip(x, wanted, strict=True)] for p, x in zip(powers, logs, strict=True)
                ]
                roots = [math.sqrt(dot(m, m) / len(m)) for m in misses]
                entry[f"distance at {label}"] = interval(roots)
                entry[f"misses at {label}"] = interval_by_type(misses, types)
            mean_fit = sum(fits) / len(fits)
            best = [math.sqrt(dot(m, m) / len(m)) for m in
                    [[-mean_fit * a - b for a, b in zip(x, wanted, strict=True)] for x in logs]]  # fmt: skip
            entry["distance at the best"] = interval(best)
            found.setdefault(name, {})[str(step)] = entry
    return found


def moved(runs: Sequence[Mapping[str, Any]], types: Sequence[str]) -> dict[str, Any]:
    """By statistic, from each step to the next: how far two types moved apart at the most, as a logarithm."""
    found: dict[str, Any] = {}
    at = list(dict.fromkeys(run["step"] for run in runs))
    S = {(run["seed"], run["step"]): run["S"] for run in runs}
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    for before, after in itertools.pairwise(at):
        for name in S[seeds[0], before].keys() & S[seeds[0], after].keys():
            pairs = [(S[seed, before][name], S[seed, after][name]) for seed in seeds]
            there = [kind for kind in types if all(value.get(kind, 0.0) > 0 for pair in pairs for value in pair)]
            if len(there) < 3:
                continue
            logs = [[math.log(b[kind] / a[kind]) for kind in there] for a, b in pairs]
            found.setdefault(name, {})[f"{before} to {after}"] = interval([max(own) - min(own) for own in logs])
    return found


def as_built(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `block_lr="sharpness"` makes of it by step: the ratios of the norms to each type, their power 0.6 within 1
    and 10, and how much of the second moment is the square of the mean gradient."""
    found: dict[str, Any] = {}
    for step in dict.fromkeys(run["step"] for run in runs):
        own = [run["S"] for run in runs if run["step"] == step]
        types = [kind for kind in own[0]["probe"] if kind != "Norm"]
        entry: dict[str, Any] = {}
        for name in ("second_moment", "probe"):
            ratios = {kind: [S[name]["Norm"] / S[name][kind] for S in own] for kind in types}
            entry[f"norms to, {name}"] = {kind: [min(r), max(r)] for kind, r in ratios.items()}
            entry[f"multipliers, {name}"] = {
                kind: interval([min(max(x**0.6, 1.0), 10.0) for x in r]) for kind, r in ratios.items()
            }
        shares = {kind: [1 - S["centred"][kind] / S["second_moment"][kind] for S in own] for kind in own[0]["probe"]}
        entry["square of the mean in the second moment"] = {kind: interval(share) for kind, share in shares.items()}
        found[str(step)] = entry
    return found


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def interval(draws: Sequence[float]) -> list[float | None]:
    mean, half = t_interval(draws)
    return [mean, half]


def interval_by_type(rows: Sequence[Sequence[float]], types: Sequence[str]) -> dict[str, list[float | None]]:
    return {kind: interval([row[i] for row in rows]) for i, kind in enumerate(types)}


def flat_distance(ratios: Values, searched: Values) -> float:
    """Of ratios that need no measurement."""
    types = list(searched)
    misses = [a - b for a, b in zip(relative(ratios, types), relative(searched, types), strict=True)]
    return math.sqrt(dot(misses, misses) / len(misses))


def show(result: Mapping[str, Any]) -> None:
    searched = result["searched"]
    print(f"\n{result['model']}, {result['tokens']:,} tokens, seeds {result['seeds']}; searched: {searched}")
    equal = flat_distance(dict.fromkeys(searched, 1.0), searched)
    print(f"distance of all equal {equal:.2f}, of the paper's ratios {flat_distance(PAPER, searched):.2f}")
    types = list(searched)
    for step in result["at"]:
        print(
            f"\nafter step {step}: log S relative to its mean (half width), and the distance at power 0.5 (0.6), best"
        )
        print(f"{'':34s}" + "".join(f"{kind:>16s}" for kind in types) + "   at 0.5       at 0.6  power         there")
        rows = [(name, own[str(step)]) for name, own in result["distances"].items() if str(step) in own]
        for name, own in sorted(rows, key=lambda row: row[1]["distance at 0.5"][0]):
            cells = "".join(f"{said(own['log S'].get(kind)):>16s}" for kind in types)
            ends = "  ".join(
                said(own[key]) for key in ("distance at 0.5", "distance at 0.6", "power", "distance at the best")
            )
            print(f"{name:34s}{cells}  {ends}")

    print("\nhow far two types moved apart from one measurement to the next, as a logarithm (half width)")
    for name, own in sorted(result["moved"].items()):
        print(f"{name:34s}" + "".join(f"{steps:>12s} {said(value):12s}" for steps, value in own.items()))
    print(
        "\nas built: multipliers by the second moment, and by the probe; ratio of the norms to the type by the probe;"
    )
    print("share of the squared mean in the second moment")
    for step, own in result["as built"].items():
        for kind, value in own["multipliers, second_moment"].items():
            ratio = "{:.3g} to {:.3g}".format(*own["norms to, probe"][kind])
            share = said(own["square of the mean in the second moment"][kind])
            by_probe = said(own["multipliers, probe"][kind])
            print(f"step {step:>4s} {kind:8s} {said(value):14s} {by_probe:14s} {ratio:22s} {share}")


def said(pair: Sequence[float | None] | None) -> str:
    if pair is None:
        return "-"
    return f"{pair[0]:.2f}" + ("" if pair[1] is None else f" ({pair[1]:.2f})")


if __name__ == "__main__":
    main()
