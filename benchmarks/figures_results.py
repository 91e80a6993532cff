"""The sentences of the README, the first pages and the results whose figures are committed; see `figures.py`."""

from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

from figures_docs import by_name, compared, losses, span

Load = Callable[[str], Any]
ARMS = [  # of the table of steps: how it is written, and the arm
    ("torch AdamW, fused", "torch AdamW fused"),
    ("torch AdamW, foreach", "torch AdamW foreach"),
    ("`sharpwise.AdamW`", "sharpwise AdamW"),
    ("`sharpwise.AdamW`, `BlockwiseLR`", "sharpwise AdamW BlockwiseLR"),
    ("torch `clip_grad_norm_` and fused AdamW", "torch clip + AdamW fused"),
    ('`sharpwise.AdamW`, clipping and `on_nonfinite="skip"`', "sharpwise AdamW clip skip"),
    ("`sharpwise.AdamMini`", "sharpwise AdamMini"),
    ("the `adam-mini` package 1.1.1", "adam-mini package"),
    ("`pytorch_optimizer` 4.1.0 AdamMini", "pytorch_optimizer AdamMini"),
]
SMALL = [  # the columns of the table of small models
    "torch AdamW fused",
    "sharpwise AdamW",
    "sharpwise AdamMini",
    "torch clip + AdamW fused",
    "sharpwise AdamW clip skip",
    "sharpwise AdamW BlockwiseLR clip skip",
]


def readme(load: Load) -> Iterator[str]:
    sizes = load("benchmarks/results/state_bytes.json")["bytes"]["GPT-2 124M"]
    yield (
        f"On GPT-2 124M this holds {mib(sizes['AdamMini'])} MiB of optimizer state instead of {mib(sizes['AdamW'])} MiB"
    )
    study = load("recipes/blockwise_lr/result.json")
    fixed = compared(study)["adamw+blockwise"]
    yield (
        f"a GPT-2 of {study['model']['non_embedding_parameters'] / 1e6:.1f}M parameters, "
        f"{study['budget']['tokens_per_parameter']:.1f} tokens per parameter, every learning rate tuned; AdamW with "
        f"`BlockwiseLR` ended {-fixed['mean']:.3f} nats below AdamW (95% interval {-fixed['high']:.3f} to "
        f"{-fixed['low']:.3f}, {len(study['seeds'])} seeds)."
    )


def choose(load: Load) -> Iterator[str]:
    study = load("recipes/muon/result.json")
    yield f"its best was {best(study, 'muon')} where AdamW's was {best(study, 'adamw')}."
    study = load("recipes/blockwise_lr/result.json")
    yield (f"the best learning rate was {best(study, 'adamw')} without and {best(study, 'adamw+blockwise')} with it.")

    for name in (sizes := load("benchmarks/results/state_bytes.json")["bytes"])["GPT-2 124M"]:
        yield f"| `{name}` | {' | '.join(binary(by_name[name]) for by_name in sizes.values())} |"


def binary(count: int) -> str:
    """Bytes in the unit of their size."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{mib(count)} MiB"


def best(study: dict[str, Any], arm: str) -> str:
    """The learning rate that tuning chose."""
    return f"{by_name(study, arm)['setting']['optimizer.lr']:g}"


def where(load: Load) -> Iterator[str]:
    yield from of_versions(load("benchmarks/results/versions.json"))
    names = (
        *("adam_mini/result", "blockwise_lr/result", "int8/adamw", "int8/muon", "llr/result", "muon/result"),
        *("sgd_sai/gpt", "sgd_sai/vit", "update_size/batch"),
    )
    longest = max(load(f"recipes/{name}.json")["budget"]["tokens_per_parameter"] for name in names)
    yield f"Anything longer than {longest:.1f} tokens per parameter outside the embeddings."


def to_baseline(study: dict[str, Any], arm: str) -> str:
    """How far an arm ended from the baseline, with the verdict; "" of the baseline itself."""
    found = compared(study).get(arm)
    return f"{found['mean']:+.3f} ({span(found, 3)}), {found['verdict']}" if found else ""


def ended(study: dict[str, Any], arm: str) -> list[str]:
    """Cells of a table: the learning rate that was best, the mean final loss, how far that is from the baseline."""
    return [best(study, arm), f"{mean(losses(study, arm)):.3f}", to_baseline(study, arm)]


def length(study: dict[str, Any]) -> str:
    """How long its runs are."""
    budget = study["budget"]
    return f"{budget['steps']} steps, {budget['tokens']:,} tokens, {budget['tokens_per_parameter']:.1f} per parameter"


def fine_tuning(load: Load) -> Iterator[str]:
    for name in ("full", "lora"):
        study, texts = load(f"recipes/finetune/{name}.json"), load(f"recipes/finetune/{name}-texts.json")
        for arm in (one["name"] for one in study["arms"]):
            own = [row for row in texts if row["arm"] == arm]
            assert len(own) == len(study["seeds"])
            cells = [f"{mean(row[key] for row in own):.3f}" for key in ("loss", "accuracy", "old_loss", "old_accuracy")]
            yield f"| `{arm}` | {best(study, arm)} | {to_baseline(study, arm)} | {' | '.join(cells)} |"
    base = next(row for row in texts if row["arm"] == "base")
    yield f"at {base['loss']:.2f} on the new text and {base['old_loss']:.2f} on the old"


def speed(load: Load) -> Iterator[str]:
    yield from of_steps(load("benchmarks/results/step_time.json"))
    meshes = load("benchmarks/results/distributed.json")
    fsdp, tp = (on_mesh(meshes, mesh, "Adam-mini") for mesh in ("fsdp", "tensor parallel"))
    yield (
        f"Over two processes on CPUs (gloo, one thread each, GPT-2 124M, {day(meshes)}) Adam-mini takes "
        f"{fsdp['ratio']:.2f} ({span(fsdp['interval'])}) times the step of `sharpwise.AdamW` on the same mesh under "
        f"FSDP2, and {tp['ratio']:.2f} ({span(tp['interval'])}) under tensor parallelism; its block sums are "
        f"{100 * fsdp['of_gradient_traffic']:.2f}% of the gradient traffic"
    )
    train, prepare = (load(f"benchmarks/results/{name}_throughput.json") for name in ("train", "prepare"))
    ratios = [run["ratio"] for run in train["runs"]]
    assert day(train) == day(prepare)
    rate = prepare["end_to_end"]["jobs=2"]["mb_per_s_median"]
    yield (
        f"On {day(train)}, and the code has changed since, `sharpwise train` ran at {min(ratios):.2f} to "
        f"{max(ratios):.2f} of a minimal loop"
    )
    yield f"read, tokenized and wrote {rate:.1f} MB of text per second on the same two cores"


def on_mesh(found: dict[str, Any], mesh: str, arm: str) -> dict[str, Any]:
    return next(one for one in found["meshes"][mesh] if one["arm"] == arm)


def distributed(load: Load) -> Iterator[str]:
    found = load("benchmarks/results/distributed.json")
    fsdp, tp = (on_mesh(found, mesh, "Adam-mini") for mesh in ("fsdp", "tensor parallel"))
    yield (
        "on GPT-2 124M over two processes the block sums of Adam-mini are "
        f"{100 * fsdp['of_gradient_traffic']:.2f}% of the gradient traffic"
    )
    thin = on_mesh(found, "fsdp", "AdaPM, block v")["of_gradient_traffic"]
    yield f"the sums of AdaPM (rank 16, second moments by block) {100 * thin:.0f}%"
    yield (
        f"its step takes {fsdp['ratio']:.2f} ({span(fsdp['interval'])}) times that of AdamW on the same mesh under "
        f"FSDP2, {tp['ratio']:.2f} ({span(tp['interval'])}) under tensor parallelism"
    )


def capped(load: Load) -> Iterator[str]:
    found = load("benchmarks/results/capped.json")
    yield (
        f"The largest micro-batch of `{found['model']}` on a CPU, in sequences of {found['context']} tokens, where "
        f"private memory has a limit of {found['cap'] >> 20} MiB"
    )
    for name, row in found["arms"].items():
        tokens = f"{row['ratio']:.2f} ({span(row['ratio_95'])})"
        yield f"| {name} | {mib(row['state_bytes'])} MiB | {row['micro_batch']} | {tokens} |"
    yield f"on {day(found)}, {found['threads']} threads"


def of_versions(found: list[dict[str, Any]]) -> Iterator[str]:
    older, old = found
    for one in found:
        assert one["python"].startswith("3.11.") and not one["not_passed"] and one["passed"] == old["passed"]
        assert one["tests"] == ["tests/engine", "tests/identities", "tests/reference"]
    names = [one["torch"].partition("+")[0] for one in (older, old)]
    yield (
        f"Under torch {names[0]} and {names[1]} those of the engine, of identities and of references pass, "
        f"{old['passed']:,} of them"
    )


def blocks(load: Load) -> Iterator[str]:
    found = load("benchmarks/results/architectures.json")
    seconds, decoders = found["seconds"], found["summary"]["by_kind"]["decoder"]
    version = found["environment"]["versions"]["transformers"].rpartition(".")[0]
    gpt2, llama = seconds["gpt2 on cpu"], seconds["llama-3-8b on meta"]
    yield f"It takes {gpt2:.2f} s of CPU time for GPT-2 124M and {llama:.2f} s for Llama-3-8B"
    yield (
        f"Of the {decoders['types']} decoder-only architectures that transformers {version} lists as causal language "
        f"models it maps {decoders['complete']} completely and {decoders['with other']} with parameters of role "
        f"`other`; {decoders['not built']} cannot be built here"
    )


def evidence(load: Load) -> Iterator[str]:
    found = load("benchmarks/results/zoo.json")
    counts = found["summary"]["all"]
    assert counts["wrong"] == counts["error"] == counts["skipped"] == 0
    yield (
        f"Of {counts['models']} tiny models {counts['complete']} are complete, and {counts['partly']} partly `other`; "
        f"none of their {counts['parameters']:,} parameters has a role that its model's source contradicts"
    )


def controls(load: Load) -> Iterator[str]:
    layouts = load("benchmarks/results/step_time_further.json")["layouts"]
    for name in ("angular", "hyperball", "l2"):
        pair = f"sharpwise Lion {name} / sharpwise Lion"
        linear, conv = (layouts[layout]["pairs"][pair]["ratio"] for layout in ("linear", "conv1d"))
        yield f"{name} {linear:.1f} and {conv:.1f}"


def of_steps(found: dict[str, Any]) -> Iterator[str]:
    where, conv, linear = found["environment"], found["layouts"]["conv1d"], found["layouts"]["linear"]
    vectors = "with" if "AVX512" in where["capability"] else "without"
    yield (
        f"`make bench` on {day(found)}: {where['cpus']} cores of an {where['cpu']} {vectors} AVX-512, "
        f"{where['threads']} threads, torch {where['versions']['torch'].partition('+')[0]} CPU, GPT-2 124M, fp32, "
        f"{found['rounds']} rounds in each of {found['processes']} processes"
    )
    sizes = {name: mib(linear["arms"][name]["state_bytes"]) for _, name in ARMS}
    for written, name in ARMS:
        assert sizes[name] == mib(conv["arms"][name]["state_bytes"])
        cells = [
            f"{layout['arms'][name]['median_ms']:.0f} ms, {ratio(layout['arms'][name])}" for layout in (conv, linear)
        ]
        yield f"| {written} | {' | '.join(cells)} | {sizes[name]} |"
    *first, last = (f"{one:.2f}" for one in linear["arms"]["sharpwise AdamMini"]["ratio_by_process"])
    yield f"Adam-mini in the Linear layout took {', '.join(first)} and {last} of the base."
    clip = [layout["pairs"]["sharpwise AdamW clip skip / torch clip + AdamW fused"] for layout in (conv, linear)]
    yield (
        f"Clipping and the guard inside the optimizer: {clip[0]['ratio']:.2f} (Conv1D, {span(clip[0]['ratio_95'])}) "
        f"and {clip[1]['ratio']:.2f} (Linear, {span(clip[1]['ratio_95'])}) of torch's clipping and fused step."
    )
    package, other = (
        [ratio(layout["pairs"][f"{name} / sharpwise AdamMini"]) for layout in (conv, linear)]
        for name in ("adam-mini package", "pytorch_optimizer AdamMini")
    )
    yield (
        f"The `adam-mini` package takes {package[0]} and {package[1]} times as long as ours, `pytorch_optimizer` "
        f"{other[0]} and {other[1].replace(' (', ' times (')}."
    )
    elements = linear["parameters"]
    moved = [linear["arms"][name]["bytes_moved"] / elements for name in ("sharpwise AdamMini", "sharpwise AdamW")]
    yield f"It moves {moved[0]:.0f} bytes per element where AdamW moves {moved[1]:.0f}"
    small = found["small_tensors"]
    yield (
        f"150 tensors of 64 elements: `sharpwise.AdamW` {small['sharpwise AdamW']:.1f} ms, torch's foreach "
        f"{small['torch AdamW foreach']:.1f} ms, its fused kernel {small['torch AdamW fused']:.1f} ms."
    )
    ours = [runs for name, runs in found["fresh_process"].items() if "sharpwise" in name]
    cold, warm = (max(run[kind]["first_step_s"] for run in ours) for kind in ("cold", "warm"))
    beyond = max(run[kind]["beyond_state_bytes"] for run in ours for kind in ("cold", "warm"))
    yield (
        f"The first step takes at most {cold:.1f} s on a machine where nothing has been compiled yet, {warm:.1f} s "
        f"afterwards. Beyond its state a step holds at most {mib(beyond)} MiB."
    )
    models = found["tiny_models"]
    few, many = (models[n][SMALL[1]]["median_ms"] / models[n][SMALL[0]]["median_ms"] for n in ("1.0M", "12.3M"))
    yield f"AdamW's step takes {few:.2f} of torch's fused one at 1.0M parameters, {many:.2f} at 12.3M"
    for size, arms in models.items():
        cells = " | ".join(f"{arms[name]['median_ms']:.2f}" for name in SMALL)
        yield f"| {size} | {cells} |"


def ratio(row: dict[str, Any]) -> str:
    """With its interval: to two digits after the point below 2, to one above."""
    digits = 2 if row["ratio"] < 2 else 1
    return f"{row['ratio']:.{digits}f} ({span(row['ratio_95'], digits)})"


def mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def day(found: dict[str, Any]) -> str:
    return str(found["environment"]["date"][:10])
