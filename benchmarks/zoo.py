"""Maps tiny random models of many packages, and compares every parameter with what its model's source says it is.

    python benchmarks/zoo.py                                 all, result in benchmarks/results/zoo.json
    python benchmarks/zoo.py --only timm/ --only bert        some; saves nothing
    python benchmarks/zoo.py --steps                         also three steps of every optimizer
    python benchmarks/zoo.py --steps missing                 the same, of models of which no such record is saved
    python benchmarks/zoo.py --show timm/vit                 one map beside the truth

Models are in `zoo_models`, truths in `zoo_truths` (`zoo_truth.py` has their format). Those whose package is absent are
skipped: `pip install -e '.[zoo]'`. All are mapped anew each time; the record of steps that are not taken again stays,
with the commit whose code took them (`stepped`). Ends with 1 where a role is wrong or a model cannot be mapped.
"""

import argparse
import collections
import contextlib
import gc
import importlib
import importlib.metadata
import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo_truth import TRUTHS, Judged, compare, judge, models_of, rule_for, rules_of

import sharpwise
from sharpwise.blocks import BlockMap
from sharpwise.blocks.names import collapse
from sharpwise.table import Table

HERE = Path(__file__).parent
RESULT = HERE / "results" / "zoo.json"
STATUSES = ("complete", "partly", "wrong", "error", "skipped")
PACKAGES = ("diffusers", "einops", "timm", "torchvision", "transformers", "x-transformers")
STEPS = 3

Build = Callable[[], tuple[nn.Module, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="TEXT", help="models whose name has it; saves nothing")
    parser.add_argument(
        "--steps", nargs="?", const="all", choices=("all", "missing"), help=f"also {STEPS} steps of every optimizer"
    )
    parser.add_argument("--show", metavar="NAME", help="one model's map beside the truth")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="models at a time (1)")
    args = parser.parse_args()
    quiet()
    known = names()
    if args.show is not None:
        if args.show not in known:
            parser.error(f"no model is called {args.show!r}; one of: {', '.join(known)}")
        show(args.show, known[args.show])
        return 0
    chosen = {name: file for name, file in known.items() if not args.only or any(text in name for text in args.only)}
    if not chosen:
        parser.error(f"no model has {args.only} in its name; they are: {', '.join(known)}")

    result: dict[str, Any] = {"environment": environment() | {"packages": versions()}}
    before = steps_before() if args.steps != "all" else {}
    stepping = {name for name in chosen if args.steps and name not in before}
    result["models"] = rows = {}
    for name, row in walked(chosen, stepping, args.jobs):
        rows[name] = row = row | (
            {"stepped": result["environment"]["commit"]} if "failed" in row else before.get(name, {})
        )
        print(f"{name}: {row['status']}", file=sys.stderr)
    result["summary"] = summary(rows)
    report(rows, result["summary"])
    strays = without_truth(set(chosen.values()))
    if strays:
        print(f"\nModels without a truth: {', '.join(strays)}")
    if args.only:
        print("\nNothing saved: these were not all.")
    else:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nSaved {RESULT.relative_to(HERE.parent)}")
    return int(bool(strays) or any(row["status"] in ("wrong", "error") for row in rows.values()))


def steps_before() -> dict[str, dict[str, Any]]:
    """By model the saved record of steps of which none failed."""
    rows = json.loads(RESULT.read_text())["models"] if RESULT.exists() else {}
    return {
        name: {key: row[key] for key in ("failed", "stepped")} for name, row in rows.items() if row.get("failed") == {}
    }


def quiet() -> None:
    """Many packages warn as they are imported and built."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def names() -> dict[str, str]:
    """All models that truths know, and the file that each is in."""
    return {name: path.stem for path in sorted(TRUTHS.glob("*.json")) for name in models_of(path.stem)}


def without_truth(files: Iterable[str]) -> list[str]:
    """Models of these files that no truth knows; of absent packages none."""
    strays: list[str] = []
    for file in sorted(files):
        with contextlib.suppress(ModuleNotFoundError):
            strays += set(importlib.import_module(f"zoo_models.{file}").MODELS) - set(models_of(file))
    return sorted(strays)


def build(name: str, file: str) -> tuple[nn.Module, Any]:
    """A model and its example, the same every time. Raises ModuleNotFoundError where its package is absent."""
    models: Mapping[str, Build] = importlib.import_module(f"zoo_models.{file}").MODELS
    if name not in models:
        raise ValueError(f"zoo_models/{file}.py builds no {name!r}; remove it from the truths, or add it")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models[name]()


def walked(chosen: Mapping[str, str], stepping: Container[str], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What becomes of each model, in order; some take steps."""
    if jobs < 2:
        for name, file in chosen.items():
            yield name, walk(name, file, name in stepping)
            gc.collect()
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=quiet) as pool:
        yield from zip(
            chosen, pool.map(walk, chosen, chosen.values(), [name in stepping for name in chosen]), strict=True
        )


def walk(name: str, file: str, steps: bool = False) -> dict[str, Any]:
    """What becomes of one model: its status, what is wrong, what is without a role."""
    began = time.perf_counter()
    try:
        model, example = build(name, file)
    except ModuleNotFoundError as error:
        return {"status": "skipped", "message": str(error)}
    except Exception as error:
        return {"status": "error", "message": f"cannot be built: {type(error).__name__}: {error}"}
    row: dict[str, Any] = {"class": type(model).__name__, "parameters": sum(1 for _ in model.parameters())}
    try:
        blocks = BlockMap.of(model, example=example)
    except Exception as error:  # whatever it is, it is what this looks for
        return row | {"status": "error", "message": f"{type(error).__name__}: {error}"}
    try:
        found = judge(blocks, rules_of(file, name))
    except ValueError as error:
        return row | {"status": "error", "message": f"the truth of {name}: {error}"}
    wrong, other = (grouped([one for one in found if one.wrong is which]) for which in (True, False))
    row["without_heads"] = collapse(headless(blocks))
    row |= {"status": "wrong" if wrong else "partly" if other else "complete", "wrong": wrong, "other": other}
    if steps:
        failed = step(model, example, blocks)
        row |= {"failed": failed} | ({"status": "error", "message": str(failed)} if failed else {})
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def grouped(found: list[Judged]) -> list[dict[str, Any]]:
    """Those with one truth and one map together, names that differ in a number on one line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in found:
        groups.setdefault((one.truth, one.got), []).append(one.name)
    return [{"parameters": collapse(names), "truth": truth, "got": got} for (truth, got), names in groups.items()]


def headless(blocks: BlockMap) -> list[str]:
    """Matrices of queries and keys of which the map has no number of heads: Adam-mini asks for it."""
    return [s.name for s in blocks if s.role in ("q", "k") and s.is_matrix and s.heads is None]


def step(model: nn.Module, example: Any, blocks: BlockMap) -> dict[str, str]:
    """Steps of every optimizer, one after the other on the same weights; what failed, by optimizer.

    By the reference, which takes every view: kernels would be built for each shape of block, and have their own tests.
    In evaluation mode, or that of training where nothing goes backward in the other: RWKV scales its weights in it.
    """
    try:
        loss(model, example).backward()
    except Exception:
        model.train()
    # What dataflow leaves open counts as said, and no block has to be a head then.
    known = BlockMap(replace(segment, source=segment.source or "override") for segment in blocks)
    failed = {}
    for name in sharpwise.list_optimizers():
        options = {"cut": "tensor"} if name == "adam-mini" and (blocks.unexplained or headless(blocks)) else {}
        try:
            optimizer = sharpwise.create_optimizer(model, name, lr=1e-4, blocks=known, compile=False, **options)
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss(model, example).backward()
                optimizer.step()
            bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
            if bad:
                raise ValueError(f"not finite: {', '.join(collapse(bad))}")
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


def loss(model: nn.Module, example: Any) -> Tensor:
    """The mean square of all that the model returns."""
    if isinstance(example, Mapping):
        output = model(**example)
    else:
        output = model(*example) if isinstance(example, (tuple, list)) else model(example)
    found = [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([leaf.float().square().mean() for leaf in found]).mean()


def _plain(output: Any) -> Any:
    if isinstance(output, Mapping):
        return dict(output)
    return vars(output) if hasattr(output, "__dict__") and not isinstance(output, Tensor) else output


def summary(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many models of each package have which status, and how many parameters were compared."""
    counts: dict[str, collections.Counter[str]] = {}
    sizes: collections.Counter[str] = collections.Counter()
    for name, row in rows.items():
        for package in (name.partition("/")[0], "all"):
            counts.setdefault(package, collections.Counter())[row["status"]] += 1
            sizes[package] += row.get("parameters", 0)
    counts["all"] = counts.pop("all")
    return {
        name: {"models": found.total(), "parameters": sizes[name]} | {key: found[key] for key in STATUSES}
        for name, found in counts.items()
    }


def report(rows: Mapping[str, Mapping[str, Any]], counts: Mapping[str, Mapping[str, int]]) -> None:
    for name, row in rows.items():
        for one in row.get("wrong", ()):
            print(f"{name}: {', '.join(one['parameters'])}: is {one['truth']}, got {one['got']}")
    for name, row in rows.items():
        if row["status"] in ("error", "skipped"):
            print(f"{name}: {row['status']}: {row['message']}")
    print()
    print(
        Table(
            ("package", "models", "parameters", *STATUSES), [(name, *found.values()) for name, found in counts.items()]
        )
    )


def show(name: str, file: str) -> None:
    """One model's map beside the truth."""
    model, example = build(name, file)
    rules = rules_of(file, name)
    blocks = BlockMap.of(model, example=example)
    lines = []
    for s in blocks:
        rule = rule_for(s.name, rules)
        judged = compare(s.name, blocks[s.name], rule.truth) if rule else None
        verdict = None if judged is None else "WRONG" if judged.wrong else "partly"
        truth = rule.truth if rule else "no rule"
        lines.append((s.name, s.describe_shape(), str(s.role), s.describe_rows(), s.source or None, truth, verdict))
    print(Table(("name", "shape", "role", "rows", "source", "truth", ""), lines))


def versions() -> dict[str, str | None]:
    """Of the packages that the models are of, None for one that is absent."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
