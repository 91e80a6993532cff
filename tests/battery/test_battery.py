"""The public battery over the table of supported combinations: pairs of values and checks, all of it under `slow`."""

import itertools

import pytest
import torch
from pairwise import pairwise

import sharpwise
from sharpwise import testing
from sharpwise.block_lr import make_block_lr
from sharpwise.combinations import APART
from sharpwise.optim import (
    ABLATIONS,
    BLOCK_LRS,
    COMBINES,
    CONSTRUCTORS,
    OPTIMIZERS,
    PRESETS,
    STORAGES,
    create_optimizer,
)

ALL = [
    (name, block_lr, storage, rounding)
    for name, (lrs, storages) in COMBINES.items()
    for block_lr, storage, rounding in itertools.product((None, *lrs), storages, (False, True))
]


PAIRWISE = pairwise(ALL)

# An ablation combines as what it is of. It is nothing but other numbers, so that one rule each does for a quick look.
ABLATED = [
    (name, f"{ablation}({block_lr})", storage, rounding)
    for (name, block_lr, storage, rounding), ablation in itertools.product(ALL, ABLATIONS)
    if block_lr == "blockwise"
]
RULES = itertools.cycle(sorted(COMBINES, reverse=True))
QUICK = [
    next(row for row in ABLATED if row[:2] == (name, f"{a}(blockwise)"))
    for a, name in zip(ABLATIONS, RULES, strict=False)
]


def make_of(name, block_lr, storage, rounding):
    extra = {"sgd": {"momentum": 0.9}, "adapm": {"rank": 2}}.get(name, {}) | {"weight_decay": 0.1}
    extra |= {"block_lr": testing.EXAMPLES.get(block_lr, block_lr), "storage": storage, "stochastic_rounding": rounding}
    return lambda first, **more: create_optimizer(first, name, lr=1e-3, **{**extra, **more})


@pytest.mark.pairwise
@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("combination", PAIRWISE + QUICK, ids=str)
def test_combination(combination, check):
    check(make_of(*combination))


@pytest.mark.slow
@pytest.mark.parametrize("combination", [row for row in ALL + ABLATED if row not in PAIRWISE + QUICK], ids=str)
def test_every_other_combination(combination):
    testing.check_optimizer(make_of(*combination))


@pytest.mark.parametrize("name", COMBINES)
def test_compiled_is_eager_and_compiles_once(name):
    testing.check_no_recompilation(make_of(name, "blockwise", "fp32", False))


@pytest.mark.parametrize(
    "block_lr",
    [
        *BLOCK_LRS,
        *(f"{a}(layer_decay)" for a in ABLATIONS),
        *(f"{a}({testing.EXAMPLES['sharpness']})" for a in ABLATIONS),
        f"{testing.EXAMPLES['llr']}*{testing.EXAMPLES['sharpness']}*layer_decay",
    ],
)
def test_block_lr(block_lr):
    testing.check_block_lr(make_block_lr(testing.EXAMPLES.get(block_lr, block_lr)))


@pytest.mark.parametrize("storage", STORAGES.values(), ids=lambda s: s.name)
def test_storage(storage):
    testing.check_storage(storage)


def test_table_is_what_there_is():
    assert {*COMBINES, *PRESETS, *APART} == set(sharpwise.list_optimizers())
    assert set(OPTIMIZERS) == set(COMBINES) and set(CONSTRUCTORS) == {*COMBINES, *APART}
    assert {lr for lrs, _ in COMBINES.values() for lr in lrs} == set(BLOCK_LRS)
    assert {s for _, storages in COMBINES.values() for s in storages} == {
        s for s in STORAGES if not s.endswith("-2048")
    }


@pytest.mark.parametrize("name", COMBINES)
def test_stochastic_rounding_is_a_function_of_seed_and_step(name):
    results = []
    for seed in (0, 0, 1):
        model = testing.tiny_model(torch.bfloat16)
        optimizer = make_of(name, None, "bf16", True)(model, seed=seed)
        testing.run(model, optimizer, range(3))
        results.append(model)
    assert testing.same(results[0], results[1])
    assert not testing.same(results[0], results[2])


def test_rounding_by_hash_is_the_same_by_kernels_and_eager():
    """The hash knows the element, not the path: bf16 weights that start alike end alike."""
    models = [testing.tiny_model(torch.bfloat16) for _ in range(2)]
    for model, compile in zip(models, (False, None), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model.get_submodule("transformer").add_module("wide", torch.nn.Linear(256, 384, dtype=torch.bfloat16))
        options = {"blocks": {"transformer.wide.*": "up"}, "compile": compile}
        optimizer = make_of("lion", None, "bf16", True)(model, **options)
        testing.run(model, optimizer, range(4))
        assert (optimizer.compiled_graphs > 0) == (compile is not False)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert (p != q).float().mean() < 1e-3  # a sum that compiled code contracts may round to the other side
