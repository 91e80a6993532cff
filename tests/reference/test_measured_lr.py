"""Learning rates that follow measurements, against the equations: every step, every parameter, every multiplier."""

from functools import lru_cache

import numpy as np
import pytest
import torch

import sharpwise
from reference import ablations, adamw, cuts, driver, gradient_snr, heavy_tail_lr, layer_decay, models, sharpness_lr
from reference.measured_lr import Follows, in_steps, matrix_of
from reference.test_ablations import ARMS, LAYERS
from reference.test_block_lr import RULES, setup

MODELS = list(models.BUILD)
STEPS = 12


@lru_cache
def pieces_of(model):
    """Index sets of the whole model."""
    return driver.pieces_of(model, list(models.build(model).named_parameters()))


def beside(model, rule, block_lr, source, *, steps=STEPS, tolerance=None, missing=(3, 7), **options):
    """Runs an optimizer and its reference. `missing`: of the gradients; `options`: of `Follows`, and of `setup`."""
    of_setup = {key: options.pop(key) for key in ("dtype", "grouped", "compiled", "total_steps") if key in options}
    policy = Follows(pieces_of(model), source(pieces_of(model)), **options)
    optimizer, named, twin, rates = setup(model, rule, block_lr=block_lr, reference=lambda: policy, **of_setup)
    grads = driver.gradients(named, steps, missing=missing)
    for recorded in grads:  # norms are the sharpest in a transformer
        for name, g in recorded.items():
            if g is not None and ("norm" in name or "ln_" in name):
                g *= 30
    lrs = lambda t: [driver.schedule(lr, t) for lr in rates]  # noqa: E731
    driver.run(optimizer, named, twin, lrs, grads=grads, tolerance=tolerance)
    return policy


def varied(policy, least=3):
    """The test is of something: there are some different multipliers at the end."""
    assert len(set(np.round(policy.now, 6))) >= least, policy.now


def sharp(*, decay="scaled", source=None, **schedule):
    """A spelling's arguments once for both: SharpnessLR, reference of its source, arguments of `Follows`."""
    source = source or {}
    block_lr = sharpwise.SharpnessLR(decay=decay, **{"start": 0, "soft": schedule["every"], **schedule}, **source)
    reference = {"reference": block_lr.reference.lower()} if "reference" in source else {}
    make = lambda pieces: sharpness_lr.Sharpness(pieces, **{**source, **reference})  # noqa: E731
    soft = schedule.get("soft")
    return block_lr, make, {**schedule, "soft": schedule["every"] if soft is None else soft, "decay": decay}


# Sharpness


@pytest.mark.parametrize("decay", ["scaled", "base"])
@pytest.mark.parametrize("by", ["type", "module"])
@pytest.mark.parametrize("rule", ["adamw", "adam-mini"])
@pytest.mark.parametrize("model", MODELS)
def test_sharpness(model, rule, by, decay):
    block_lr, source, more = sharp(
        decay=decay, source={"by": by, "power": 0.3, "max_ratio": 50.0, "ema": 0.25}, start=1, every=3, stop=8
    )
    varied(beside(model, rule, block_lr, source, **more))


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"power": 0.0},
        {"power": 2.5},
        {"max_ratio": 1.0},
        {"max_ratio": 1.7},
        {"ema": 0.0},
        {"ema": 0.95},
        {"reference": "FFN"},
        {"reference": "VO", "by": "module"},
    ],
    ids=str,
)
def test_sharpness_settings(source):
    block_lr, make, more = sharp(source=source, start=2, every=2)
    policy = beside("gpt2", "adamw", block_lr, make, **more)
    if source.get("power") == 0 or source.get("max_ratio") == 1:
        assert (policy.now == 1).all()


@pytest.mark.parametrize(
    "schedule",
    [
        {"start": 0, "every": 1},
        {"start": 0, "every": 1, "soft": 0},
        {"start": 3, "every": 4, "soft": 1},
        {"start": 1, "every": 5, "soft": 2},
        {"start": 1, "every": 2, "soft": 6},  # sets out again before it is there
        {"start": 2, "every": 3, "soft": 0, "stop": 5},
        {"start": 4, "every": 3, "stop": 7},
    ],
    ids=str,
)
def test_schedules(schedule):
    block_lr, make, more = sharp(source={"by": "module"}, **schedule)
    beside("llama", "adamw", block_lr, make, **more)


@pytest.mark.parametrize(("start", "stop", "total"), [(0.1, 0.6, 12), (0.25, None, 10), (0.02, 0.5, 13), (3, 0.9, 9)])
def test_fractions_of_the_training(start, stop, total):
    block_lr = sharpwise.SharpnessLR(start=start, stop=stop, every=2, soft=2)
    last = None if stop is None else in_steps(stop, total)
    more = {"start": in_steps(start, total), "stop": last, "every": 2, "soft": 2, "total_steps": total}
    beside("gpt2", "adamw", block_lr, sharpness_lr.Sharpness, **more)


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("rule", ["adamw", "adam-mini"])
def test_groups_share_what_is_measured(rule, compiled):
    block_lr, make, more = sharp(source={"by": "type"}, start=1, every=3)
    beside("gpt_neox", rule, block_lr, make, grouped=True, compiled=compiled, **more)


@pytest.mark.parametrize("rule", ["adamw", "adam-mini"])
def test_sharpness_in_fp64(rule):
    """Measurements are rounded to 24 bits, nothing else."""
    block_lr, make, more = sharp(source={"by": "module"}, start=1, every=3)
    beside("gpt2", rule, block_lr, make, dtype=torch.float64, tolerance=1e-7, **more)


# Heavy tails


def tails(*, source=None, decay="scaled", every=4, stop=8, soft=3, start=0, **more):
    source = {"least": 4, **(source or {})}
    schedule = {"start": start, "every": every, "stop": stop, "soft": soft}
    block_lr = sharpwise.HeavyTailLR(**source, **schedule, decay=decay)
    return block_lr, lambda pieces: heavy_tail_lr.HeavyTail(pieces, **source), {**schedule, "decay": decay, **more}


@pytest.mark.parametrize(("rule", "decay"), [*((rule, "scaled") for rule in RULES), ("adamw", "base"), ("sgd", "base")])
@pytest.mark.parametrize("model", MODELS)
def test_heavy_tails(model, rule, decay):
    block_lr, make, more = tails(decay=decay)
    varied(beside(model, rule, block_lr, make, **more))


@pytest.mark.parametrize("by", ["matrix", "type"])
@pytest.mark.parametrize("normalize", ["none", "geometric"])
@pytest.mark.parametrize("corrected", [False, True], ids=lambda c: f"corrected={c}")
@pytest.mark.parametrize("convention", ["hill", "published"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_heavy_tail_settings(model, convention, corrected, normalize, by):
    source = {"convention": convention, "shape_corrected": corrected, "normalize": normalize, "by": by}
    block_lr, make, more = tails(source={**source, "low": 0.8, "high": 3.5})
    # The law's quantiles are integrated on other grids.
    policy = beside(model, "adamw", block_lr, make, steps=6, tolerance=2e-5 if corrected else None, **more)
    varied(policy)


@pytest.mark.parametrize("least", [13, 17])
def test_matrices_without_an_alpha_have_1(least):
    """Llama's k and v have 12 eigenvalues, the others 16; with 17 asked for, none is left."""
    block_lr, make, more = tails(source={"least": least})
    policy = beside("llama", "adamw", block_lr, make, steps=6, **more)
    k = policy.multipliers()[0]["model.layers.0.self_attn.k_proj.weight"]
    assert k == [1.0]


@pytest.mark.parametrize("schedule", [{"stop": 0.2, "every": 2}, {"start": 0.25, "stop": 0.5, "every": 3}], ids=str)
def test_heavy_tail_phases(schedule):
    total = 12
    block_lr = sharpwise.HeavyTailLR(least=4, soft=2, **schedule)
    steps = {key: in_steps(value, total) for key, value in schedule.items()}
    beside(
        "gpt2", "adam-mini", block_lr, lambda p: heavy_tail_lr.HeavyTail(p, least=4), soft=2, total_steps=total, **steps
    )


@pytest.mark.parametrize("frozen", ["embed_tokens", "lm_head", "layers.1", "mlp"])
def test_what_is_frozen_counts_for_nothing(frozen):
    """Neither in the geometric mean, nor as the lightest or heaviest tail: as if it were not there."""
    model = models.build("llama")
    named = [(name, p) for name, p in model.named_parameters() if frozen not in name]
    for name, p in model.named_parameters():
        p.requires_grad_(frozen not in name)
    block_lr = sharpwise.HeavyTailLR(least=4, normalize="geometric", stop=0, soft=0)
    optimizer = sharpwise.AdamW(model, lr=1e-3, block_lr=block_lr)
    for _, p in named:
        p.grad = torch.ones_like(p)
    pieces = {name: own for name, own in pieces_of("llama").items() if frozen not in name}
    policy = Follows(pieces, heavy_tail_lr.HeavyTail(pieces, least=4, normalize="geometric"))
    policy.source.look(driver.Twin(adamw, named, [(driver.names_of(named), {})]))
    optimizer.step()
    found = {row["name"]: row["multiplier"] for row in optimizer.lr_multipliers()}
    assert [found[name] for name, _ in named] == pytest.approx(list(policy.targets()), rel=1e-5)


@pytest.mark.parametrize("by", ["matrix", "type"])
def test_heavy_tails_in_fp64(by):
    """Measurements are rounded to 24 bits, nothing else."""
    block_lr, make, more = tails(source={"by": by, "normalize": "geometric"})
    beside("gpt2", "adamw", block_lr, make, dtype=torch.float64, tolerance=1e-6, steps=6, **more)


def test_reversed_mapping():
    """s1 above s2: light tails get the small rate."""
    block_lr, make, more = tails(source={"low": 4.0, "high": 0.5})
    beside("gpt2", "lion", block_lr, make, **more)


# Signal to noise


@pytest.mark.parametrize(("normalize", "decay"), [("none", "base"), ("max", "scaled")])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_gradient_snr(model, rule, decay, normalize):
    """One parameter gets its first gradient at the second step."""
    block_lr = sharpwise.GradientSNR(normalize=normalize, decay=decay)
    source = lambda pieces: gradient_snr.GradientSNR(pieces, normalize=normalize)  # noqa: E731
    policy = beside(model, rule, block_lr, source, decay=decay, steps=7, missing=(0, 4))
    varied(policy)
    assert not np.isnan(policy.source.s).any()


# Products and ablations of each


def each(model, kind):
    """One of each kind, with its reference."""
    if kind == "sharpness":
        return sharp(source={"by": "type", "ema": 0.25}, start=1, every=3)
    if kind == "llr":
        return tails()
    return sharpwise.GradientSNR(), gradient_snr.GradientSNR, {"decay": "base"}


KINDS = ["sharpness", "llr", "gradient_snr"]


@pytest.mark.parametrize(("rule", "factor_first"), [("adamw", False), ("adam-mini", True)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_products_with_layer_decay(model, kind, rule, factor_first):
    block_lr, make, more = each(model, kind)
    n_layers, other = LAYERS[model]["layers"], sharpwise.LayerDecay(rate=0.65)
    product = other * block_lr if factor_first else block_lr * other
    fixed = lambda role, layer: layer_decay.multiplier(role, layer, n_layers, 0.65)  # noqa: E731
    beside(model, rule, product, make, fixed=fixed, **more)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model", "rule"), [("gpt2", "adamw"), ("llama", "adam-mini")])
def test_ablations(model, rule, kind, arm):
    block_lr, make, more = each(model, kind)
    wrap, change = ARMS[arm]
    beside(model, rule, wrap(block_lr), make, change=change, **more)


@pytest.mark.parametrize("rule", ["lion", "sgd"])
@pytest.mark.parametrize("kind", ["llr", "gradient_snr"])
def test_reversed_product(kind, rule):
    block_lr, make, more = each("gpt_neox", kind)
    fixed = lambda role, layer: layer_decay.multiplier(role, layer, models.NEOX["layers"], 0.9)  # noqa: E731
    product = sharpwise.Reversed(block_lr * sharpwise.LayerDecay(rate=0.9))
    beside("gpt_neox", rule, product, make, fixed=fixed, change=ARMS["reversed"][1], **more)


# The references, by hand


def test_reference_of_the_schedule():
    class Steps:
        values = 1.0

        def look(self, view):
            self.values += 4.0

        def multipliers(self):
            return [self.values]

    policy = Follows({"w": cuts.gpt2()["transformer.wte.weight"]}, Steps(), start=1, every=4, stop=6, soft=4)
    seen = [policy.measure(None) or policy.now[0] for _ in range(11)]
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]
    assert [in_steps(x, 50) for x in (0, 0.02, 0.5, 7, 7.0)] == [0, 1, 25, 7, 7]


def test_reference_of_sharpness():
    class View:
        def second_moment(self, name):
            return {"e": np.full(4, 1.0), "q": np.array([16.0, 16.0, 4.0, 4.0]), "n": np.full(2, 64.0)}[name]

    whole = lambda role, *index: cuts.Piece(role, None, np.array(index), [])  # noqa: E731
    pieces = {
        "e": [whole("tok_emb", 0, 1, 2, 3)],
        "q": [whole("q", 0, 1), whole("v", 2, 3)],
        "n": [whole("norm", 0, 1)],
    }
    source = sharpness_lr.Sharpness(pieces, power=0.5, max_ratio=6.0)
    assert source.multipliers().tolist() == [1, 1, 1, 1]
    source.look(View())
    assert source.multipliers().tolist() == [1, 1, 1, 1]
    source.look(View())
    assert np.allclose(source.multipliers(), [6, 2, 4, 1])
    source.normalize, source.max_ratio = "geometric", 4.0
    # 1, 1/4, 1/2, 1/8 over 4, 2, 2, 2 elements: 12 factors of 1/2 in 10 elements
    assert np.allclose(source.multipliers(), np.array([1, 1 / 4, 1 / 2, 1 / 8]) * 2.0**1.2)
    source.max_ratio = 2.0
    assert np.allclose(source.multipliers(), [2.0, 0.5, 1.0, 0.5])
    source.fixed, source.max_ratio = {"emb": 10.0}, 4.0
    assert np.allclose(source.multipliers(), [10.0, 1.0, 2.0, 0.5])
    source.normalize, source.max_ratio, source.fixed = "reference", 6.0, {}
    source.S *= 16.0
    source.look(View())
    assert np.allclose(source.S, [4, 64, 16, 256])


def test_reference_of_alpha():
    """Eigenvalues 1, e, e^2, e^4, e^6: k = 2 above e^2; the released code counts e^2 itself."""
    values = np.exp([0.0, 1.0, 2.0, 4.0, 6.0])
    assert np.isclose(heavy_tail_lr.hill(values), 1 + 2 / (2 + 4))
    assert np.isclose(heavy_tail_lr.hill(values, "published"), 1 + 3 / (2 + 4))
    assert np.isclose(heavy_tail_lr.hill(values[:4]), 1 + 2 / (1 + 3))
    assert np.isnan(heavy_tail_lr.hill(np.array([0.0, 0, 0, 1, 2]))) and np.isnan(heavy_tail_lr.hill(np.ones(4)))
    for aspect, want in ((1, 2.12), (3, 3.11), (4, 3.45)):
        assert abs(heavy_tail_lr.hill(heavy_tail_lr.quantiles_of_random(512, 512 * aspect)) - want) < 0.02
    piece = cuts.gpt2()["transformer.h.0.attn.c_attn.weight"][1]
    w = np.arange(12 * 36).reshape(12, 36)
    assert (matrix_of(piece, w) == w[:, 12:24]).all()


def test_reference_of_the_signal_to_noise():
    assert np.isclose(gradient_snr.snr(np.array([3.0, 1.0])), np.sqrt(10))  # norm sqrt 10, deviation 1
    assert np.isclose(gradient_snr.snr(np.array([-1.0, 1.0, -1.0, 1.0])), 2)
    assert gradient_snr.snr(np.full(9, 7.0)) == 30
    assert gradient_snr.snr(np.array([0.3])) == 1 and np.isnan(gradient_snr.snr(np.zeros(3)))
    assert set(ablations.ROLES_OF_TYPE) == {str(kind) for kind in sharpwise.blocks.BlockType}
