"""Maps every causal language model that transformers can build by dataflow, and counts how many come out complete.

    python benchmarks/architectures.py                   all, result in benchmarks/results/architectures.json
    python benchmarks/architectures.py --only llama opt  some; saves nothing

Each model is the default of its type made small (`tiny_models.py`). Where sharpwise also knows the family by name, the
two maps are compared row by row.
"""

import argparse
import collections
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from environment import environment
from tiny_models import CANNOT, VOCABULARY, causal_lm_types, tiny_model
from torch import nn

from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.blocks.names import canonical_name, collapse
from sharpwise.blocks.trace import trace
from sharpwise.table import Table
from sharpwise.train.models import load_model

HERE = Path(__file__).parent
STATUSES = ("complete", "with other", "refused", "not built")
KINDS = ("decoder", "recurrent/hybrid", "encoder-decoder", "encoder")

# Kinds that the type alone tells. Encoders are listed with the causal ones for their decoder mode; of an
# encoder-decoder only the decoder is built, whose cross-attention then sees nothing and is unused.
KIND_OF_TYPE: dict[str, str] = {
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"), "encoder"),
    **dict.fromkeys(("ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"), "encoder"),
    **dict.fromkeys(("roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"), "encoder"),
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian"), "encoder-decoder"),
    **dict.fromkeys(("mbart", "musicgen", "musicgen_melody", "mvp", "pegasus", "plbart"), "encoder-decoder"),
    **dict.fromkeys(("prophetnet", "trocr", "whisper"), "encoder-decoder"),
    **dict.fromkeys(("rwkv", "xlstm"), "recurrent/hybrid"),
}
# Projections that transformers' own code calls by what they are; in a linear attention they may be `other`.
OWN_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("q_proj", "query", "q_lin", "q_b_proj"), ("q", "o_gate")),  # some hold a gate of the output too
    **dict.fromkeys(("k_proj", "key", "k_lin"), ("k",)),
    **dict.fromkeys(("v_proj", "value", "v_lin"), ("v",)),
    **dict.fromkeys(("o_proj", "out_lin"), ("o",)),
    "kv_b_proj": ("k", "v"),
}
# Timed in their full size: the device that they are built on; a trace multiplies no matrix, and needs none.
TIMED = (("gpt2", "cpu"), ("gpt2", "meta"), ("llama-3-8b", "meta"))
# Timed as deep as it takes for 10,000 tensors, and narrow: the cost of a tensor.
DEEP = {"gpt2": 833, "llama": 1111}
# State space, linear attention or convolution, by the names that transformers gives to kinds of layers.
RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types; saves nothing")
    args = parser.parse_args()
    known = causal_lm_types()
    if unknown := [name for name in args.only or () if name not in known]:
        parser.error(f"no causal language model of type {', '.join(unknown)}; one of: {', '.join(known)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("sharpwise").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    result: dict[str, Any] = {"environment": environment()}
    result["architectures"] = rows = {name: walk(name) for name in args.only or known}
    result["summary"] = summary(rows)
    result["seconds"] = {f"{name} on {device}": seconds(load_model(name, device=device)) for name, device in TIMED}
    result["seconds"] |= {f"{name} of 10,000 tensors": seconds(deep(name, layers)) for name, layers in DEEP.items()}
    show(rows, result["summary"])
    print("\nSeconds:", ", ".join(f"{what} {took}" for what, took in result["seconds"].items()))
    if args.only:
        print("\nNothing saved: these were not all.")
        return
    path = HERE / "results" / "architectures.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nSaved {path.relative_to(HERE.parent)}")


def seconds(model: nn.Module) -> float:
    """The median of five traces, in seconds of one thread's CPU time: a loaded machine waits, and does not count."""
    times = []
    for _ in range(5):
        began = time.process_time()
        trace(model)
        times.append(time.process_time() - began)
    return round(statistics.median(times), 3)


def deep(model_type: str, layers: int) -> nn.Module:
    """A small model of many layers."""
    config: Any = tiny_model(model_type).config
    config.num_hidden_layers = layers
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def walk(model_type: str) -> dict[str, Any]:
    """What becomes of one architecture."""
    row: dict[str, Any] = {"kind": kind(model_type, None), "status": "not built", "message": None}
    try:
        model = tiny_model(model_type)
    except Exception as error:  # whatever a model class raises belongs into the table
        return row | {"message": CANNOT.get(model_type) or message(error)}
    row |= {"class": type(model).__name__, "kind": kind(model_type, model.config)}
    row["parameters"] = sum(1 for _ in model.parameters())
    began = time.process_time()
    try:
        traced = trace(model)
    except Exception as error:
        fault = does_not_run(model)
        return row | ({"message": fault} if fault else {"status": "refused", "message": message(error)})
    row["seconds"] = round(time.process_time() - began, 3)
    trained = {canonical_name(name) for name, p in model.named_parameters() if p.requires_grad}  # as in a BlockMap
    used = {name: parts for name, parts in traced.segments.items() if name in trained - {*traced.unused}}
    other = [name for name, parts in used.items() if any(part.role is Role.OTHER for part in parts)]
    row["status"] = "with other" if other else "complete"
    row["roles"] = dict(collections.Counter(str(part.role) for parts in used.values() for part in parts))
    row["other"] = collapse(other)
    row["unused"] = collapse(traced.unused)
    return row | by_family(model, used) | by_own_names(used)


def kind(model_type: str, config: Any) -> str:
    """One of KINDS. Without a config, of what the type alone tells."""
    if model_type in KIND_OF_TYPE:
        return KIND_OF_TYPE[model_type]
    text = config.get_text_config() if config is not None else None
    layers = {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "layers_block_type", None) or ())}
    return "recurrent/hybrid" if layers & RECURRENT_LAYERS else "decoder"


def message(error: Exception) -> str:
    """What an error says, on one line that is not too long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"


def does_not_run(model: nn.Module) -> str | None:
    """Why the model fails on eight tokens without sharpwise; None where it does not."""
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(8)[None] + VOCABULARY // 4, use_cache=False)
    except Exception as error:
        return f"built, but does not run: {message(error)}"
    return None


def by_family(model: nn.Module, used: dict[str, list[Segment]]) -> dict[str, Any]:
    """Where the map by name, if there is one for this model, says something else about rows of a used parameter."""
    named = BlockMap.of(model, trace=False)
    known = [name for name in used if name in named and named[name][0].source]
    differ: dict[str, list[str]] = {}
    for name in known:
        by_name, by_flow = (rows_of(parts) for parts in (named[name], used[name]))
        for says in differences(by_name, by_flow):
            differ.setdefault(says, []).append(name)
    return {
        "family": named[known[0]][0].source if known else None,
        "known_by_name": len(known),
        "differ": {says: collapse(names) for says, names in differ.items()},
    }


def by_own_names(used: dict[str, list[Segment]]) -> dict[str, Any]:
    """Projections whose name in the model's own code says something else than the trace."""
    wrong: dict[str, list[str]] = {}
    named = [(name, OWN_NAMES[part]) for name in used for part in name.split(".")[-2:-1] if part in OWN_NAMES]
    for name, allowed in named:
        roles = " ".join(dict.fromkeys(str(part.role) for part in used[name]))
        if not set(roles.split()) <= {*allowed, "other"}:
            wrong.setdefault(f"{roles} by dataflow", []).append(name)
    return {"projections": len(named), "called_otherwise": {says: collapse(names) for says, names in wrong.items()}}


def rows_of(parts: tuple[Segment, ...] | list[Segment]) -> dict[str, np.ndarray]:
    """What is said about each output row: its role, how many heads its segment has, the dimension and the layer."""
    said: dict[str, np.ndarray] = {}
    for what in ("role", "heads", "dim", "layer"):
        said[what] = np.full(parts[0].output_size, "-", dtype=object)
        for part in parts:
            value = getattr(part, what)
            said[what][part.row_index().numpy()] = "-" if value is None else str(value)
    return said


def differences(by_name: dict[str, np.ndarray], by_flow: dict[str, np.ndarray]) -> list[str]:
    """As `role: q by name, k by dataflow`; rows along other dimensions cannot be compared any further."""
    for what in ("dim", "role", "heads", "layer"):
        pairs = zip(by_name[what].tolist(), by_flow[what].tolist(), strict=False)
        found = [f"{what}: {a} by name, {b} by dataflow" for a, b in dict.fromkeys(pairs) if a != b]
        if found:
            return found
    return []


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Counts by kind, and the share of complete maps among the architectures that were built."""
    counts: dict[str, Any] = {}
    for name in (*KINDS, "all"):
        statuses = collections.Counter(row["status"] for row in rows.values() if name in (row["kind"], "all"))
        built = statuses.total() - statuses["not built"]
        counts[name] = {"types": statuses.total()} | {status: statuses[status] for status in STATUSES}
        counts[name]["share_complete"] = round(statuses["complete"] / built, 4) if built else None
    known = [row for row in rows.values() if row.get("family")]
    return {
        "by_kind": counts,
        "known_by_name": len(known),
        "known_by_name_and_differ": sum(1 for row in known if row["differ"]),
        "projections_with_a_name": sum(row.get("projections", 0) for row in rows.values()),
        "projections_called_otherwise": {
            n: row["called_otherwise"] for n, row in rows.items() if row.get("called_otherwise")
        },
    }


def show(rows: dict[str, dict[str, Any]], counts: dict[str, Any]) -> None:
    columns = ("type", "kind", "status", "seconds", "what")
    lines = []
    for name, row in rows.items():
        what = row["message"] or shortened(row.get("other", [])) or None
        lines.append((name, row["kind"], row["status"], row.get("seconds"), what))
    print(Table(columns, lines))
    by_name = [
        (name, row["family"], row["known_by_name"], shortened(row["differ"]))
        for name, row in rows.items()
        if row.get("differ")
    ]
    if by_name:
        print("\nBy name and by dataflow, where they differ")
        print(Table(("type", "family", "parameters", "differ"), by_name))
    print(f"\nKnown by name: {counts['known_by_name']}, of which {counts['known_by_name_and_differ']} differ")
    otherwise = counts["projections_called_otherwise"]
    print(
        f"Projections named in the models' code: {counts['projections_with_a_name']}; called otherwise: {otherwise}\n"
    )
    print(Table(("kind", *counts["by_kind"]["all"]), [(k, *v.values()) for k, v in counts["by_kind"].items()]))


def shortened(items: Any, most: int = 4) -> str:
    """The first of them; the result file has all."""
    first = [f"{item} ({', '.join(items[item])})" if isinstance(items, dict) else item for item in list(items)[:most]]
    return ", ".join(first) + (f", and {len(items) - most} more" if len(items) > most else "")


if __name__ == "__main__":
    main()
