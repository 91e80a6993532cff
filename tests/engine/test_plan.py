"""The plan of a step: which back end takes what, and what explain() says of it."""

import itertools
import shutil
from collections.abc import Callable

import pytest
import torch

import sharpwise
from sharpwise.blocks.names import collapse
from sharpwise.engine.backends import base, loops
from sharpwise.engine.backends.base import compiler_present
from sharpwise.testing import TinyGPT, fill_gradients, same, tiny_model

needs_compiler = pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")


OF_ELEMENTS = [name for name in sharpwise.list_optimizers() if not name.startswith("muon")]
"""Optimizers of which no part moves whole matrices, which have a back end of their own."""


def large() -> TinyGPT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyGPT(width=256, heads=16, vocabulary=300)


def moved_by(optimizer: torch.optim.Optimizer) -> dict[str, set[str]]:
    """Back ends by the last part of the name of what they move."""
    found: dict[str, set[str]] = {}
    for row in optimizer.explain():
        found.setdefault(".".join(row["name"].split(".")[-2:]), set()).add(row["backend"])
    return found


@pytest.mark.parametrize("name", OF_ELEMENTS)
def test_not_compiled_is_the_reference(name: str) -> None:
    table = sharpwise.create_optimizer(tiny_model(), name, lr=1e-3, compile=False).explain()
    assert {(row["backend"], row["why"]) for row in table} == {("reference", "")}


@needs_compiler
@pytest.mark.parametrize(
    ("build", "options", "expected"),
    [
        (sharpwise.AdamW, {}, {"c_attn.weight": {"cpp"}, "ln_1.weight": {"cpp"}}),
        (sharpwise.AdamW, {"max_grad_norm": 1.0}, {"c_attn.weight": {"cpp"}, "ln_1.weight": {"cpp"}}),
        (sharpwise.AdamMini, {}, {"c_attn.weight": {"cpp (one pass)"}, "ln_1.weight": {"cpp (one pass)"}}),
        (sharpwise.AdamMini, {"on_nonfinite": "skip"}, {"c_attn.weight": {"cpp (one pass)"}}),
        (sharpwise.Lion, {}, {"c_attn.weight": {"cpp"}, "c_attn.bias": {"cpp"}}),
        (sharpwise.SGD, {"momentum": 0.9, "weight_decay": 0.1}, {"c_attn.weight": {"cpp"}}),
        (sharpwise.AdamW, {"storage": "bf16", "stochastic_rounding": True}, {"c_attn.weight": {"cpp"}}),
    ],
)
def test_each_takes_what_is_its_own(build: Callable[..., sharpwise.AdamW], options: dict, expected: dict) -> None:
    optimizer = build(large(), lr=1e-3, compile=True, **options)
    found = moved_by(optimizer)
    assert {key: found[key] for key in expected} == expected
    assert {row["why"] for row in optimizer.explain()} == {""}


def printed(optimizer: torch.optim.Optimizer, **how: bool) -> list[dict[str, str]]:
    """The printed table: its rows by the titles of its columns, between which all lines have two spaces."""
    text = str(optimizer.explain(**how)).splitlines()
    blank = ["".join(column).isspace() for column in itertools.zip_longest(*text, fillvalue=" ")]
    begins = [i for i in range(len(blank)) if not blank[i] and (i == 0 or blank[i - 2 : i] == [True, True])]
    columns = list(zip(begins, [*begins[1:], None], strict=True))
    head, *lines = text
    return [{head[a:b].strip(): line[a:b].strip().replace(",", "") for a, b in columns} for line in lines]


def test_equal_layers_share_a_printed_line_and_the_last_has_the_sums() -> None:
    optimizer = sharpwise.AdamMini(tiny_model(), lr=1e-3, weight_decay=0.1, block_lr="layer_decay(rate=0.5)")
    rows = list(optimizer.explain())
    *lines, total = printed(optimizer)
    assert len(lines) < len(rows) == len({(row["name"], row["role"]) for row in rows})
    assert "why" not in total and {"rule", "cut", "decay", "storage", "backend"} <= total.keys()
    line = next(
        line for line in lines if "{0..1}" in line["name"] and line["role"] == "down" and "weight" in line["name"]
    )
    own = [row for row in rows if row["name"] in (line["name"].replace("{0..1}", str(i)) for i in (0, 1))]
    assert [float(x) for x in line["lr"].split(" to ")] == pytest.approx(sorted(row["lr"] for row in own))
    assert [row["lr"] for row in own] == pytest.approx([1e-3 * row["multiplier"] for row in own])
    for key in ("elements", "blocks", "bytes"):
        assert int(line[key]) == sum(row[key] for row in own)
    assert int(total["elements"]) == sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert int(total["bytes"]) == sum(row["bytes"] for row in rows)
    every = printed(optimizer, verbose=True)
    assert [line["name"] for line in every] == [*(row["name"] for row in rows), "total"]


def test_layers_that_differ_have_lines_of_their_own() -> None:
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-3, no_decay=("norm",), weight_decay=0.1)
    names = [line["name"] for line in printed(optimizer)]
    assert len(set(names)) == len(collapse([name for name, _ in model.named_parameters()])) + 1  # and the sums
    odd = [name for name, _ in model.named_parameters() if ".1." in name and "down" not in name]
    groups = [{"params": [p for n, p in model.named_parameters() if (n in odd) == it], "weight_decay": decay}
              for it, decay in ((True, 0.0), (False, 0.1))]  # fmt: skip
    apart = [line["name"] for line in printed(sharpwise.AdamW(groups, model=model, lr=1e-3))]
    assert all(name in apart for name in odd)


@needs_compiler
def test_small_models_are_no_other() -> None:
    table = sharpwise.Lion(tiny_model(), lr=1e-3).explain()
    assert {(row["backend"], row["why"]) for row in table} == {("cpp", "")}


@needs_compiler
def test_what_cpp_does_not_take() -> None:
    optimizer = sharpwise.AdamW(tiny_model().double(), lr=1e-3)
    whys = {(row["backend"], row["why"]) for row in optimizer.explain()}
    assert whys == {("reference", "cpp: fp32 and bf16 alone, not float64")}


@needs_compiler
def test_a_kernel_that_does_not_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference moves what the kernel would have, and explain() says so."""

    def fail(*args: object) -> None:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(loops, "library", fail)
    models = [large() for _ in range(2)]
    options = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}
    first, second = (sharpwise.SGD(m, **options, compile=c) for m, c in zip(models, (True, False), strict=True))
    for step in range(3):
        for model, optimizer in zip(models, (first, second), strict=True):
            fill_gradients(model, step)
            optimizer.step()
    row = first.explain()[0]
    assert row["backend"] == "reference"
    assert row["why"] == "cpp: building a kernel failed: out of luck"
    assert same(*models)


@pytest.mark.parametrize("name", OF_ELEMENTS)
def test_without_a_compiler(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The reference moves everything, to the bit; that is said once, whatever the number of optimizers."""
    monkeypatch.setattr(base, "_SAID", set())
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    models = [tiny_model() for _ in range(4)]
    for model, compiles in zip(models, (None, True, None, False), strict=True):
        optimizer = sharpwise.create_optimizer(model, name, lr=1e-2, max_grad_norm=0.1, compile=compiles)
        for step in range(2):
            fill_gradients(model, step)
            optimizer.step()
        whys = {(row["backend"], row["why"]) for row in optimizer.explain()}
        assert whys == {("reference", "" if compiles is False else "cpp: no C++ compiler")}
    assert all(same(models[-1], model) for model in models)
    assert [record.getMessage() for record in caplog.records if record.name == base.__name__] == [
        "no C++ compiler: steps on the CPU are the reference's, as right and slower; install g++ or clang++"
    ]


def test_whole_matrices_have_a_back_end_of_their_own() -> None:
    for compiled in (None, False):
        table = sharpwise.Muon(tiny_model(), compile=compiled).explain()
        own = {row["backend"] for row in table if row["rule"] == "muon"}
        rest = {row["backend"] for row in table if row["rule"] != "muon"}
        assert own == {"matrices"} and rest <= {"reference", "cpp"}
