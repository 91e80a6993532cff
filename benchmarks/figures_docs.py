"""The sentences of docs and docstrings whose figures come from committed files; see `figures.py`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sharpwise.compare.statistics import paired_difference
from sharpwise.probes import Measurement
from sharpwise.probes.order import as_block_lr, relations, suggested_ratios

Load = Callable[[str], Any]
GEOMETRIC = "sharpness, geometric mean"


def span(interval: Any, digits: int = 2) -> str:
    """`low to high`, of a pair or of what has them by name."""
    low, high = (interval["low"], interval["high"]) if isinstance(interval, dict) else interval
    return f"{low:.{digits}f} to {high:.{digits}f}"


def compared(study: dict[str, Any], where: str = "arms") -> dict[Any, dict[str, Any]]:
    """Differences with their verdicts, of arms by name, or of ablations by the names of both."""
    found = {}
    for one in study[where]:
        if one["difference"] is not None:
            key = one["name"] if where == "arms" else (one["arm"], one["ablation"])
            found[key] = {**one["difference"], "verdict": one["verdict"]}
    return found


class Apart(NamedTuple):
    """A difference of two arms, paired by seed."""

    mean: float
    low: float
    high: float
    each: list[float]


def seeds_apart(study: dict[str, Any], arm: str, other: str) -> Apart:
    """How far one arm ended above another, as the study itself compares arms."""
    mine, theirs = (losses(study, name) for name in (arm, other))
    found = paired_difference(mine, theirs, 0.95)
    assert found.mean is not None and found.low is not None and found.high is not None
    return Apart(found.mean, found.low, found.high, [a - b for a, b in zip(mine, theirs, strict=True)])


def losses(study: dict[str, Any], arm: str) -> list[float]:
    return [run["final_loss"] for run in by_name(study, arm)["final"]]


def by_name(study: dict[str, Any], arm: str) -> dict[str, Any]:
    return next(one for one in study["arms"] if one["name"] == arm)  # type: ignore[no-any-return]


def difference(one: dict[str, Any], *, sign: bool = True) -> tuple[str, str]:
    """A mean and its interval, to three digits."""
    return f"{one['mean']:{'+' if sign and one['mean'] > 0 else ''}.3f}", span(one, 3)


def row(one: dict[str, Any], verdict: str) -> str:
    """The last two cells of a row of the table of studies."""
    mean, interval = difference(one)
    return f"{mean} ({interval}) | {verdict} |"


# --- docs/methods/muon.md --------------------------------------------------------------------------------------------


def muon(load: Load) -> Iterator[str]:
    study = load("recipes/muon/result.json")
    arms, tokens = compared(study), study["budget"]["tokens"]
    assert all(one["verdict"] == "better" for one in arms.values()) and len(study["seeds"]) == 3
    yield f"A GPT-2 of 0.4M parameters outside the embeddings, {tokens:,} tokens of Wikipedia, news and books"
    yield f"({study['budget']['tokens_per_parameter']:.1f} per parameter, where 20 are usual)"
    for name, cell in (
        ("muon", "`muon`"),
        ("muon+blockwise", "`muon+blockwise`"),
        ("muon+llr(every=12, soft=6)", "`muon+llr`, best at the largest lr tried"),
        ("normuon", "`muon`, rows normalized (NorMuon)"),
        ("adamw+only(blockwise)", "`adamw`, embedding alone at ten times the rate"),
    ):
        yield f"| {cell} | {by_name(study, name)['setting']['optimizer.lr']:g} | {row(arms[name], 'better')}"
    rest = seeds_apart(study, "adamw+only(blockwise)", "muon")
    yield f"Muon ended {rest.mean:.3f} ({span((rest.low, rest.high), 3)}) below that"
    blocks, rows = (seeds_apart(study, "muon", name) for name in ("muon+blockwise", "normuon"))
    yield f"`muon+blockwise` ended {blocks.mean:.3f} ({span((blocks.low, blocks.high), 3)}) below `muon`"
    yield f"NorMuon {rows.mean:.3f} ({span((rows.low, rows.high), 3)})"
    shapes = load("benchmarks/results/muon.json")["shapes"]
    yield f"needs {shapes['gpt2']['beyond_state'] / 2**20:.0f} MiB at most"
    for shape in shapes.values():
        own = (shape["arms"][name] for name in ("sharpwise.Muon", "sharpwise.Muon, bf16 products"))
        cells = " | ".join(f"{arm['ratio']:.2f} ({span(arm['ratio_95'])})" for arm in own)
        yield f"| {shape['layers']} layers of width {shape['width']} | {cells} |"


# --- docs/concepts/storage.md ----------------------------------------------------------------------------------------


def storage(load: Load) -> Iterator[str]:
    study = load("recipes/int8/adamw.json")
    arms = compared(study)
    assert len(study["seeds"]) == 5 and study["margin"] == 0.02
    yield f"{study['budget']['tokens']:,} tokens"
    for name in ("dynamic", "bitsandbytes"):
        yield f"| `{name}` | {row(arms[name], arms[name]['verdict'])}"
    for name in ("linear", "flat2048"):
        yield f"| `{name}` | {min(losses(study, name)):.0f} to {max(losses(study, name)):.0f} nats"
    timed = load("benchmarks/results/int8.json")["subjects"]
    whole, matrices = timed["small"], timed["matrices of small"]
    yield f"a GPT-2 of {whole['elements'] / 1e6:.1f}M parameters"
    dynamic, linear = "sharpwise AdamW int8-dynamic", "sharpwise Muon int8-linear, elements"
    for found, pair, after in (
        (whole, f"{dynamic} / sharpwise AdamW", " under AdamW with dynamic codes"),
        (matrices, f"{linear} / sharpwise Muon, elements", " of what Muon"),
        (whole, f"bitsandbytes AdamW8bit / {dynamic}", " times ours in 8 bits"),
        (whole, f"torchao AdamW8bit compiled / {dynamic}", ""),
    ):
        ratio, digits = found["ratios"][pair], 1 if "AdamW8bit" in pair else 2
        yield f"{ratio['ratio']:.{digits}f} ({span(ratio['ratio_95'], digits)}){after}"
    study = load("recipes/int8/muon.json")
    assert len(study["seeds"]) == 5 and study["margin"] == 0.02
    assert study["budget"] == load("recipes/int8/adamw.json")["budget"]
    for name, one in compared(study).items():
        yield f"| `{name}` | {row(one, one['verdict'])}"
    yield f"{study['budget']['tokens_per_parameter']:.1f} tokens per parameter"


# --- docs/concepts/block_lr.md ---------------------------------------------------------------------------------------


def block_lr(load: Load) -> Iterator[str]:
    yield from of_costs(load("benchmarks/results/block_lr.json"))
    blockwise, llr, sharp = (load(f"recipes/{name}/result.json") for name in ("blockwise_lr", "llr", "sharpness_lr"))
    gpt, vit = (load(f"recipes/sgd_sai/{name}.json") for name in ("gpt", "vit"))
    ratios = [study["budget"]["tokens_per_parameter"] for study in (blockwise, llr, sharp, gpt)]
    model = blockwise["model"]
    tried = {len(arm["tuning"]) for study in (blockwise, llr, sharp) for arm in study["arms"]}
    more = {len(arm["tuning"]) for study in (gpt, vit) for arm in study["arms"]}
    assert (tried, more) == ({4}, {5, 6}) and all(len(s["seeds"]) == 3 for s in (blockwise, llr, sharp, gpt, vit))
    yield (
        f"a GPT-2 of {model['non_embedding_parameters'] / 1e6:.1f}M parameters outside the embeddings "
        f"({model['parameters'] / 1e3:.0f}k in all, head tied, vocabulary {model['vocabulary']}; `vit` has a ViT of "
        f"{vit['model']['parameters'] / 1e6:.1f}M), every learning rate tuned with four trials (five to six in "
        "`sgd_sai`), 3 seeds"
    )
    descriptions = {study["added_later"]["data"]["description"] for study in (blockwise, llr, sharp, gpt)}
    assert len(descriptions) == 1
    yield f"3 seeds, text that is {descriptions.pop()}."
    yield (
        f"All runs are short, {min(ratios):.1f} to {max(ratios):.1f} tokens per parameter where 20 are usual (the "
        f"ViT sees {vit['budget']['tokens_per_parameter']:.2f} images per parameter)"
    )
    yield from of_blockwise(blockwise, sharp)
    yield from of_adam_mini(load("recipes/adam_mini/result.json"))
    yield from of_llr(llr)
    yield from of_sgd_sai(gpt, vit, blockwise)


def of_costs(found: dict[str, Any]) -> Iterator[str]:
    conv, linear = found["conv1d"], found["linear"]
    costs = [
        layout[f"{rule}, every 200 steps, there in 10"] for layout in (conv, linear) for rule in ("AdamW", "AdamMini")
    ]
    low, high = (100 * limit(cost["median"] for cost in costs) for limit in (min, max))
    most = 100 * max(cost["interval"][1] for cost in costs)
    more = [
        f"{round(100 * (layout[f'{rule} with SharpnessLR']['median'] - 1))}%"
        for layout in (conv, linear)
        for rule in ("AdamW", "AdamMini")
    ]
    yield (
        f"At the default cadence measuring adds {low:.1f}% to {high:.1f}% to their steps, and at most {most:.1f}% by "
        f"the 95% intervals; multipliers as such, where no step measures, add {more[0]} and {more[1]} in the Conv1D "
        f"layout, whose fused QKV has two, and {more[2]} and {more[3]} in the Linear one (`benchmarks/block_lr.py`, "
        f"GPT-2 124M, one process, on {found['environment']['date'][:10]})."
    )


def of_adam_mini(study: dict[str, Any]) -> Iterator[str]:
    tokens = f"{study['budget']['tokens'] / 1e6:.2f}M"
    plain = compared(study)["adam-mini"]
    yield f"| `adam_mini`, {tokens} | `adam-mini`, one rate for all blocks | {row(plain, 'undecided')}"


def of_blockwise(study: dict[str, Any], sharp: dict[str, Any]) -> Iterator[str]:
    arms, own = compared(study), compared(study, "ablations")
    tokens = f"{study['budget']['tokens'] / 1e6:.2f}M"
    assert [arms[name]["verdict"] for name in arms] == ["better", "undecided", "worse", "undecided"]
    fixed = arms["adamw+blockwise"]
    yield f"| `blockwise_lr`, {tokens} | `blockwise`, the paper's fixed ratios | {row(fixed, 'better')}"
    yield f"| | its mean for every block | {row(arms['adamw+mean_matched(blockwise)'], 'undecided')}"
    yield f"| | its ratios in reversed order | {row(arms['adamw+reversed(blockwise)'], 'worse')}"
    yield f"| | `adam-mini+blockwise` | {row(arms['adam-mini+blockwise'], 'undecided')}"
    measured = compared(sharp)["adamw+sharpness(every=20)"]
    assert measured["verdict"] == "undecided"
    words = f"undecided after correction (p {measured['adjusted_p']:.3f})"
    tokens = f"{sharp['budget']['tokens'] / 1e6:.2f}M"
    yield f"| `sharpness_lr`, {tokens} | `sharpness`, second moment | {row(measured, words)}"
    matched = own[("adamw+blockwise", "adamw+mean_matched(blockwise)")]
    yield (
        f"The paper's ratios survive their ablations: {-matched['mean']:.3f} ({-matched['high']:.3f} to "
        f"{-matched['low']:.3f}) below their own mean for every block."
    )
    # One experiment: what both studies have is equal to the last digit.
    shared = [name for name in arms if name in compared(sharp)]
    assert len(shared) == 3 and all(losses(study, name) == losses(sharp, name) for name in (*shared, "adamw"))
    apart = seeds_apart(study, "adam-mini+blockwise", "adamw+blockwise")
    assert min(apart.each) > 0
    yield (
        f"Adam-mini under the same ratios ended {apart.mean:.3f} ({apart.low:.3f} to {apart.high:.3f}) above AdamW "
        "under them, on all seeds."
    )
    runs = by_name(sharp, "adamw+sharpness(every=20)")["final"]
    ends = {role: [last_multiplier(run, role) for run in runs] for role in ("tok_emb", "q", "k", "up", "down")}
    assert set(ends["tok_emb"]) == {1.0} and {f"{m:.3g}" for m in ends["q"] + ends["k"]} == {"10"}
    mlp = ends["up"] + ends["down"]
    yield f"leaves it at 1, and gives queries and keys 10, the MLP {min(mlp):.1f} to {max(mlp):.0f} at the end."


def last_multiplier(run: dict[str, Any], role: str) -> float:
    """Of the last step: norms have 1."""
    return float(f"{run['learning_rates'][role][-1] / run['learning_rates']['norm'][-1]:.4g}")


def of_llr(study: dict[str, Any]) -> Iterator[str]:
    arms, own = compared(study), compared(study, "ablations")
    published, corrected, frozen, embedding = arms.values()
    assert [one["verdict"] for one in arms.values()] == ["undecided", "undecided", "better", "better"]
    words = f"undecided after correction (p {published['adjusted_p']:.3f})"
    yield f"| `llr`, {study['budget']['tokens'] / 1e6:.2f}M | `llr` as published | {row(published, words)}"
    yield f"| | `llr`, shape-corrected | {row(corrected, 'undecided')}"
    yield f"| | `llr`, frozen at initialization | {row(frozen, 'better')}"
    yield f"| | the embedding alone at five times the rate | {row(embedding, 'better')}"
    _, by_spectra, by_shapes = own.values()
    assert {one["verdict"] for one in own.values()} == {"undecided"}
    yield (
        f"That alone ended {by_shapes['mean']:.3f} ({span(by_shapes, 3)}) below LLR frozen at initialization, whose "
        f"spectra know nothing but shapes, and this {by_spectra['mean']:.3f} ({span(by_spectra, 3)}) below LLR as "
        "published"
    )


def of_sgd_sai(gpt: dict[str, Any], vit: dict[str, Any], finer: dict[str, Any]) -> Iterator[str]:
    on_gpt, on_vit = compared(gpt)["sgd-sai"], compared(vit)["sgd-sai"]
    assert (on_gpt["verdict"], on_vit["verdict"]) == ("undecided", "worse")
    yield (
        f"| `sgd_sai/gpt`, {gpt['budget']['tokens'] / 1e6:.2f}M | SGD-SaI | "
        f"{row(on_gpt, 'undecided; AdamW was tuned too coarsely')}"
    )
    yield f"| `sgd_sai/vit`, {vit['budget']['tokens']:,} digits | SGD-SaI | {row(on_vit, 'worse')}"
    adamw, ours, other = (sorted(losses(*of)) for of in ((gpt, "adamw"), (gpt, "sgd-sai"), (finer, "adamw")))
    best = by_name(gpt, "adamw")["setting"]["optimizer.lr"]
    coarse = best / max(lr for lr in lrs(gpt) if lr < best)
    steps, tokens = lrs(finer)[-1] / lrs(finer)[-2], finer["budget"]["tokens"] / gpt["budget"]["tokens"]
    yield (
        f"Its learning rates were {coarse:.1f} times apart, and the best, {1e3 * best:.1f}e-3, is at the edge of "
        f"what is stable: seeds ended at {adamw[0]:.2f}, {adamw[1]:.2f} and {adamw[2]:.2f}, where the AdamW of "
        f"`blockwise_lr`, tuned in steps of {steps:.1f} and on {tokens:.1f} times the tokens, ends at {other[0]:.2f} "
        f"to {other[-1]:.2f}. SGD-SaI ended at {ours[0]:.2f} to {ours[-1]:.2f}."
    )


def lrs(study: dict[str, Any]) -> list[float]:
    """Learning rates that AdamW was tried with, ascending."""
    return sorted(trial["lr"] for trial in by_name(study, "adamw")["tuning"])


# --- docs/guides/measure.md ------------------------------------------------------------------------------------------


def measure(load: Load) -> Iterator[str]:
    yield from kept_graph(load)
    gpt2, llama = (
        [Measurement.from_json(_text(one)) for one in load(f"recipes/sharpness_disparity/{name}.json")]
        for name in ("gpt2", "llama")
    )
    sizes, steps = [beside_embeddings(found[0]) for found in (gpt2, llama)], gpt2[-1].step or 0
    of_step = 16 * load("recipes/blockwise_lr/result.json")["model"]["context"]  # the studies' batch and windows
    shares = [steps * of_step / size for size in sizes]
    settings = {key: {one.settings[key] for one in (*gpt2, *llama)} for key in ("batches", "tokens", "labels")}
    assert (
        settings == {"batches": {16}, "tokens": {16 * 8 * 128}, "labels": {"sampled"}} and len(gpt2) == len(llama) == 8
    )
    yield (
        f"trains a GPT-2 ({sizes[0] / 1e6:.1f}M parameters outside the embeddings, head tied) and a LLaMA "
        f"({sizes[1] / 1e6:.1f}M, head not tied) for {steps} steps of {of_step} tokens, {shares[0]:.1f} and "
        f"{shares[1]:.1f} tokens per parameter, vocabulary 1024, one seed each, and measures at eight steps: labels "
        "drawn from the model, 16 batches of 8 windows of the validation text"
    )
    for pair, sentence in (("QK", "QK < FFN"), ("FFN", "FFN < VO")):
        cells = []
        for steps in (gpt2, llama):
            all_steps = [relation(one, pair) for one in steps]
            assert all(one.holds == "yes" for one in all_steps)
            first, end = all_steps[0], all_steps[-1]
            ends = span((end.low, end.high), 1)
            cells.append(f"at all steps: {times(first.ratio)} times{{}}, {end.ratio:.1f} at the end ({ends})")
        at = " at initialization" if pair == "QK" else ""
        yield f"| {sentence} | {cells[0].format(at)} | {cells[1].format('')} |"
    yield from of_ends(gpt2, llama)
    ratios = [as_block_lr(suggested_ratios(steps[-1])) for steps in (gpt2, llama)]
    yield f"is accordingly `{ratios[0]}` and `{ratios[1]}`; neither was trained with."


def kept_graph(load: Load) -> Iterator[str]:
    speeds = load("benchmarks/results/probes.json")["figures"]
    kept, alone = (speeds[f"Hessian product{how} / gradient"][0] for how in (", kept graph", ""))
    yield f"a further product costs {kept:.1f} gradients in place of {alone:.1f} (`benchmarks/probes.py`)"


def of_ends(gpt2: Sequence[Measurement], llama: Sequence[Measurement]) -> Iterator[str]:
    norm, emb = ([relation(steps[-1], pair) for steps in (gpt2, llama)] for pair in ("VO", "Emb"))
    geometric = [[relation(one, "VO", GEOMETRIC) for one in steps] for steps in (gpt2, llama)]
    for steps in (gpt2, llama):
        assert all(relation(one, pair).ratio < 1 for one in steps for pair in ("VO", "Emb"))
    assert [one.ratio > 1 for one in geometric[0]] == [False] * 5 + [True] * 3
    assert gpt2[5].step == gpt2[-1].step / 4 and all(one.ratio < 1 for one in geometric[1])  # type: ignore[operator]
    yield (
        f"| VO << Norm | never by arithmetic means: Norm is {norm[0].ratio:.2f} of VO at the end "
        f"({span((norm[0].low, norm[0].high))}); by geometric ones from a quarter of the run on, "
        f"{geometric[0][-1].ratio:.1f} times at the end | never: {norm[1].ratio:.2f} at the end "
        f"({span((norm[1].low, norm[1].high))}), {geometric[1][-1].ratio:.2f} by geometric means |"
    )
    yield (
        f"| Emb << QK | never: QK is {emb[0].ratio:.3f} of Emb at the end ({span((emb[0].low, emb[0].high), 3)}) | "
        f"never: {emb[1].ratio:.2f} at the end ({span((emb[1].low, emb[1].high))}) |"
    )
    tenth, half, end = 4, 6, 7
    assert [gpt2[i].step for i in (tenth, half, end)] == [llama[i].step for i in (tenth, half, end)] == [150, 750, 1500]
    vo, qk = ([[relation(one, pair).ratio for one in steps] for steps in (gpt2, llama)] for pair in ("VO", "Emb"))
    assert all(a[tenth] < a[half] for a in (*vo, *qk)) and all(a[end] < a[half] for a in vo)
    assert qk[0][end] > 1.5 * qk[0][half] and qk[1][end] < 1.01 * qk[1][half]
    yield (
        "From a tenth to half of the run both ratios that failed moved towards the paper's (Norm over VO from "
        f"{vo[0][tenth]:.2f} to {vo[0][half]:.2f} and from {vo[1][tenth]:.2f} to {vo[1][half]:.2f}, QK over Emb from "
        f"{qk[0][tenth]:.4f} to {qk[0][half]:.3f} and from {qk[1][tenth]:.3f} to {qk[1][half]:.2f}); over the last "
        f"half Norm over VO moved away again, to {vo[0][end]:.2f} and {vo[1][end]:.2f}, and QK over Emb went on in "
        "the GPT-2 alone."
    )


def beside_embeddings(one: Measurement) -> int:
    """Parameters outside of embeddings; a head of its own is none."""
    sizes = {e.of: e.elements for e in one.select(quantity="sharpness", by="type")}
    return sum(size for kind, size in sizes.items() if kind != "Emb")


def relation(one: Measurement, flatter: str, quantity: str = "sharpness") -> Any:
    return next(found for found in relations(one, quantity) if found.flatter == flatter)


def times(ratio: float) -> str:
    """To two digits."""
    return f"{float(f'{ratio:.2g}'):,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _text(one: dict[str, Any]) -> str:
    import json

    return json.dumps(one)


# --- docstrings ------------------------------------------------------------------------------------------------------


def coverage_of_speedup(load: Load) -> Iterator[str]:
    found = load("benchmarks/results/coverage.json")["speedup"]
    planted, none = ({f"{100 * part:.0f}" for part in found["covered"][true].values()} for true in ("1.3", "1.0"))
    assert none == {"95"} and list(found["covered"]["1.3"]) == ["3", "4", "5"]
    yield (
        f"In {found['studies']:,} simulated studies each of 3, 4 and 5 seeds (noise of {found['noise']:.2f} a run, "
        f"{found['per_doubling']:.3f} nats per doubling) the 95% interval held the true 1.3 in {min(planted)} to "
        f"{max(planted)}%; at 1 times, where nothing is interpolated, in 95%. A percentile bootstrap over three "
        f"seeds held it in {100 * found['percentile_bootstrap_of_3']:.0f}%"
    )


def coverage_of_draws(load: Load) -> Iterator[str]:
    found = load("benchmarks/results/coverage.json")["draws"]
    few, many = ({key: f"{100 * part:.0f}%" for key, part in found[n].items()} for n in ("10", "30"))
    yield f"(squares of one normal variable: it covers {few['t']} with ten draws, {many['t']} with 30)"
    yield f"mean (exp(error / mean) - 1), with {few['positive']} and {many['positive']} there"
    yield f"with the third central moment m3: {few['mean']} and {many['mean']}."
    yield f"Where 30 draws are normal it is {100 * (found['normal']['wider'] - 1):.0f}% wider than it has to be"
