"""The sentences of docs/results/rates.md, from the committed studies and measurements; see `figures.py`."""

import math
from collections.abc import Iterator
from typing import Any

from disparity_vocabulary import ratio
from figures_docs import Load, by_name, compared, losses, row, seeds_apart, span
from sharpness_sources import PAPER, SEARCHED, distances, flat_distance, moved

TYPES = ("Emb", "pos_emb", "QK", "VO", "FFN", "Norm", "Head")
STEP = "122"
"""Of the runs of `sharpness_sources.py`, half of all."""
SOURCES = (
    ("norm_11", "`norm_11`"),
    ("directional", "`directional`"),
    ("centred", "`centred`"),
    ("second_moment", "`second_moment`"),
    ("probe", "`probe`"),
    ("probe, lookup", '`probe`, `tied="lookup"`'),
)
STUDIES = (("GPT-2", "dynamic"), ("LLaMA", "dynamic-llama"))
ARMS = (
    ("adamw+blockwise", "`blockwise`, the paper's ratios"),
    ("searched", "searched"),
    ("of_gpt2", "what was searched on the GPT-2"),
    ("centred", "`sharpness`, `centred`"),
    ("norm_11", "`sharpness`, `norm_11`"),
    ("early", "`sharpness`, `norm_11`, from step 4 on"),
    ("calibrated", "`norm_11` of another run, fixed"),
    ("reversed", "`sharpness`, `norm_11`, reversed"),
)


def rates(load: Load) -> Iterator[str]:
    searches = {name: load(f"recipes/roles/{name}.json") for name in ("gpt2", "llama")}
    yield from of_searches(searches)
    yield from of_transfer(load)
    studies = {title: load(f"recipes/sharpness_lr/{name}.json") for title, name in STUDIES}
    for title, study in studies.items():
        yield from of_arms(study, title)
    yield from of_verdict(studies)
    yield from of_sources(load("benchmarks/results/sharpness_sources.json"), searches["gpt2"])
    yield from of_vocabularies(load("recipes/sharpness_disparity/vocabulary.json"))


def of_searches(searches: dict[str, Any]) -> Iterator[str]:
    for study, title in zip(searches.values(), ("GPT-2", "LLaMA"), strict=True):
        arm = by_name(study, "searched")
        factors, one = arm["search"]["factors"], compared(study)["searched"]
        cells = [f"{factors[kind]:g}" if kind in factors else "" for kind in TYPES]
        at = f"{arm['setting']['optimizer.lr']:g}"
        yield f"| {title}, lr {at} | {' | '.join(cells)} | {row(one, one['verdict'])}"
    gpt2, llama = searches.values()
    taken = [s for s in by_name(gpt2, "searched")["search"]["steps"] if s["type"] == "Norm" and s["taken"]]
    gains = [a - b for s in taken for a, b in zip(s["against"], s["losses"], strict=True)]
    assert all(len(s["seeds"]) == 2 for s in taken) and min(gains) > 0
    yield (
        f"{len(taken)} doublings of the norms' rate in a row, from 1 to {taken[-1]['after']:g}, gained "
        f"{span((min(gains), max(gains)), 3)}"
    )
    far = losses(llama, "adamw")
    yield f"seeds of the LLaMA's AdamW ended {max(far) - min(far):.3f} nats apart"


def of_transfer(load: Load) -> Iterator[str]:
    for size in ("1M", "3M"):
        study = load(f"recipes/roles/transfer-gpt2-{size.lower()}.json")
        ((_, one),) = compared(study).items()
        yield f"| GPT-2, {size}, {study['budget']['tokens']:,} | {row(one, one['verdict'])}"
    study = load("recipes/sharpness_lr/dynamic-llama.json")
    one = compared(study)["of_gpt2"]
    yield f"| LLaMA, 0.4M, {study['budget']['tokens']:,} | {row(one, one['verdict'])}"


def of_arms(study: dict[str, Any], title: str) -> Iterator[str]:
    arms = compared(study)
    for name, said in ARMS:
        if name in arms:
            lr = by_name(study, name)["setting"]["optimizer.lr"]
            yield f"| {title} | {said} | {lr:g} | {row(arms[name], arms[name]['verdict'])}"


def of_verdict(studies: dict[str, Any]) -> Iterator[str]:
    gpt2, llama = (compared(study) for study in studies.values())
    fixed = [-arms["calibrated"]["mean"] for arms in (gpt2, llama)]
    assert llama["calibrated"]["verdict"] == "better" and gpt2["calibrated"]["verdict"] == "undecided"
    p = gpt2["calibrated"]["adjusted_p"]
    yield f"Among {len(gpt2)} comparisons the GPT-2's does not stand (adjusted p {p:.3f})"
    yield f"ended {fixed[0]:.3f} and {fixed[1]:.3f} below AdamW"
    yield f"{-gpt2['adamw+blockwise']['mean']:.3f} below and {llama['adamw+blockwise']['mean']:.3f} above"
    apart = [seeds_apart(study, "calibrated", "adamw+blockwise") for study in studies.values()]
    yield " and ".join(f"{one.mean:+.3f} ({span((one.low, one.high), 3)})" for one in apart)


def of_sources(found: dict[str, Any], search: dict[str, Any]) -> Iterator[str]:
    factors = by_name(search, "searched")["search"]["factors"]
    assert found["searched"] == factors and set(found["seeds"]) == {1, 2, 3}
    matrices = ("Emb", "QK", "VO", "FFN")
    targets = [factors, {kind: factors[kind] for kind in matrices}, SEARCHED]
    near = [distances(found["runs"], target) for target in targets]
    steps = moved(found["runs"], list(factors))
    for name, said in SOURCES:
        cells = [
            f"{own[name][STEP]['distance at 0.5'][0]:.2f} ({own[name][STEP]['distance at 0.5'][1]:.2f})" for own in near
        ]
        drift = steps[name][f"{STEP} to {found['steps']}"]
        yield f"| {said} | {' | '.join(cells)} | {drift[0]:.2f} ({drift[1]:.2f}) |"
    for values, said in (({}, "all equal"), (PAPER, "the paper's ratios")):
        far = [flat_distance({kind: values.get(kind, 1.0) for kind in target}, target) for target in targets]
        yield f"| {said} | {' | '.join(f'{one:.2f}' for one in far)} | |"
    own = near[0]["norm_11"][STEP]["log S"]
    lowest = min(
        entry[STEP]["log S"]["Norm"][0] - entry[STEP]["log S"]["FFN"][0]
        for name, entry in near[0].items()
        if name in dict(SOURCES) and name != "directional"
    )
    assert own["Norm"][0] == max(own[kind][0] for kind in own)
    yield f"the norms are at least {math.exp(lowest):.0f} times as sharp as the FFN"


def of_vocabularies(found: dict[str, Any]) -> Iterator[str]:
    runs = found["runs"]
    for model, title in (("gpt2-1m", "GPT-2"), ("llama-1m", "LLaMA")):
        for vocabulary in sorted({run["vocabulary"] for run in runs if run["model"] == model}):
            own = [run for run in runs if (run["model"], run["vocabulary"]) == (model, vocabulary)]
            uses = ("both", "lookup") if "lookup" in own[0]["measured"][0]["S"] else ("both",)
            cells = [
                "{:.3g} ({:.2g} to {:.2g})".format(*ratio(own, own[0]["steps"], use, "arithmetic", ("QK", "Emb")))
                for use in uses
            ]
            yield f"| {title}, {vocabulary:,}, {len(own)} seeds | {' | '.join(cells)} |"
