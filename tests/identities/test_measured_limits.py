"""Block_lrs that follow measurements: at their limits, on any finite numbers, and resumed at any step."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import driver, models
from reference.rig import BARE, bit_equal, named, steps

import sharpwise
from sharpwise.block_lr import Product, make_block_lr
from sharpwise.testing import TinyGPT, check_measured

ONES = {
    "sharpness, power 0": "sharpness(power=0, start=0, every=2)",
    "sharpness, cap 1": "sharpness(max_ratio=1, start=0, every=2, decay=base)",
    "llr, low = high": "llr(low=1, high=1, least=4, every=2, stop=4, soft=2)",
    "llr, too few eigenvalues": "llr(every=2, stop=4, decay=base)",
    "product": "llr(low=1, high=1, least=4, stop=4)*layer_decay(rate=1)",
}


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("case", ONES)
@pytest.mark.parametrize("rule", ["adamw", "adam-mini", "lion", "sgd, decoupled"])
def test_multipliers_of_1_are_none(rule, case, compiled):
    """Bit for bit on the eager path."""
    if "sharpness" in case and rule not in ("adamw", "adam-mini"):
        pytest.skip("keeps no second moment")
    constructor, hyper = BARE[rule]
    first, second = models.build("gpt2"), models.build("gpt2")
    grads = driver.gradients(named(first), 5)
    one = constructor(first, **hyper, compile=compiled)
    two = constructor(second, **hyper, compile=compiled, block_lr=ONES[case])
    steps(one, named(first), grads)
    steps(two, named(second), grads)
    assert {row["multiplier"] for row in two.lr_multipliers()} == {1.0}
    if compiled is False and "sgd" not in rule:  # whose fused matrices, moved row by row, round once more
        bit_equal(first, second)
    else:
        for (name, p), (_, q) in zip(named(first), named(second), strict=True):
            assert driver.error(q, driver.as_array(p)) <= 1e-6, name


RESUMED = [
    "sharpness(start=0, every=2, soft=5, by=module, ema=0.9)",
    "sharpness(start=1, every=2, soft=0, stop=4, max_ratio=1e6, by=module)",
    "sharpness(start=1, every=1, soft=2, source=centred, normalize=geometric, mean=geometric, fixed={Emb: 10})",
    "sharpness(start=1, every=1, soft=2, normalize=geometric, by=module, settle=0.5)",
    "mean_matched(sharpness(start=1, every=2, source=centred, normalize=geometric, by=module))*layer_decay(rate=0.9)",
    "reversed(sharpness(start=1, every=1, normalize=geometric, mean=geometric, fixed={Emb: 10}))",
    "llr(least=4, every=3, stop=3, soft=4, shape_corrected=True, normalize=geometric)",
    "llr(least=4, stop=0, soft=5, by=type)*layer_decay(rate=0.9)",
    "llr(least=4, every=2, stop=4, soft=3)*sharpness(start=1, every=3)",
    "reversed(sharpness(start=1, every=2, by=module))",
    "shuffled(gradient_snr(normalize=max), seed=2)",
    "mean_matched(gradient_snr*blockwise(floor=1e-4))",
]


@pytest.mark.parametrize("spelling", RESUMED)
def test_the_same_after_a_resume_at_any_step(spelling):
    check_measured(make_block_lr(spelling), steps=6)


# Any finite numbers

DTYPES = [torch.float32, torch.float64]
KINDS = ("zero", "rank one", "constant", "random", "one element", "huge", "tiny", "largest", "smallest", "mixed")


def filled(shape, kind, dtype, generator):
    """A tensor of one of `KINDS`."""
    info = torch.finfo(dtype)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "rank one" and len(shape) == 2:
        x = x[:, :1] * x[:1]
    factor = {"huge": 1e300 if dtype == torch.float64 else 1e38, "tiny": info.tiny, "zero": 0.0}.get(kind, 1.0)
    x = (x * factor).clamp(-info.max, info.max).to(dtype)
    if kind == "constant":
        x.fill_(-0.3)
    elif kind == "one element":
        x.view(-1)[1:] = 0.0
    elif kind == "largest":
        x = x.sign() * torch.tensor(info.max, dtype=dtype)
    elif kind == "smallest":
        x.fill_(info.tiny * info.eps)
    elif kind == "mixed":
        x.view(-1)[::2] *= info.max / 16
        x.view(-1)[1::3] = 0.0
    return x


def bounds(part, segment):
    """Least and largest multiplier of one of these block_lrs."""
    if isinstance(part, sharpwise.SharpnessLR):
        return 1.0, part.max_ratio
    if isinstance(part, sharpwise.HeavyTailLR):
        return min(part.low, 1.0), max(part.high, 1.0)
    return 1.0, 10 * math.sqrt(max(segment.numel, 1))


BLOCK_LRS = [
    ("adamw", "sharpness(start=0, every=1, soft=0, power=3)"),
    ("adam-mini", "sharpness(start=0, every=1, soft=2, by=module, max_ratio=1e300, power=50)"),
    ("adamw", "llr(least=2, every=1, stop=9, soft=0)"),
    ("sgd", "llr(least=2, every=1, stop=9, soft=2, shape_corrected=True, by=type, low=0.1, high=1e30)"),
    ("adamw", "gradient_snr"),
    ("sgd", "gradient_snr*llr(least=3, every=1, stop=9, soft=0, convention=published)"),
]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=st.sampled_from(BLOCK_LRS),
    dtype=st.sampled_from(DTYPES),
    weights=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    gradients=st.lists(st.sampled_from((*KINDS, "none")), min_size=1, max_size=7),
    seed=st.integers(0, 2**31),
)
def test_finite_positive_and_bounded(case, dtype, weights, gradients, seed):
    """Through steps at lr 0, so that weights stay what they are."""
    rule, spelling = case
    generator = torch.Generator().manual_seed(seed)
    model = TinyGPT(width=4, heads=2, vocabulary=5).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(filled(p.shape, weights[i % len(weights)], dtype, generator))
    optimizer = sharpwise.create_optimizer(model, rule, lr=0.0, weight_decay=0.0, block_lr=spelling)
    block_lr = make_block_lr(spelling)
    parts = block_lr.factors if isinstance(block_lr, Product) else (block_lr,)
    for _ in range(2):
        for i, p in enumerate(model.parameters()):
            kind = gradients[i % len(gradients)]
            p.grad = None if kind == "none" else filled(p.shape, kind, dtype, generator)
        optimizer.step()
        for segment, row in zip(optimizer.blocks.segments, optimizer.lr_multipliers(), strict=True):
            low, high = np.prod([bounds(part, segment) for part in parts], 0)
            m = row["multiplier"]
            assert math.isfinite(m) and low * (1 - 1e-6) <= m <= high * (1 + 1e-6), (segment, m, low, high)
        for own in optimizer.state.values():
            assert own["block_lr_measured"].isfinite().all() and own["lr_multiplier"].isfinite().all()


SEGMENTS = sharpwise.BlockMap.of(TinyGPT(width=4)).segments
anything = st.one_of(st.just(math.nan), st.floats(5e-324, 1.7976931348623157e308))


def all_segments(values):
    """One per segment, over and over."""
    return [values[i % len(values)] for i in range(len(SEGMENTS))]


@settings(max_examples=40, deadline=None)
@given(st.lists(anything, min_size=1, max_size=5).map(all_segments), st.sampled_from(["type", "module"]))
def test_sharpness_of_any_measurements(values, by):
    for power, cap in ((0.6, 10.0), (7.0, 1e308), (1e300, 3.0)):
        block_lr = sharpwise.SharpnessLR(power=power, max_ratio=cap, by=by)
        found = block_lr.multipliers(SEGMENTS, {block_lr: values})
        assert all(1.0 <= m <= cap for m in found), found


@given(anything, anything, st.floats(0, 1, exclude_max=True))
def test_averages_stay_between(before, now, ema):
    found = sharpwise.SharpnessLR(ema=ema).updated(before, now)
    known = [x for x in (before, now) if not math.isnan(x)]
    if not known:
        assert math.isnan(found)
        return
    assert min(known) * (1 - 1e-12) <= found <= max(known) * (1 + 1e-12) and 0 < found < math.inf


alphas = st.one_of(st.just(math.nan), st.floats(-10, 100), st.sampled_from([2.0, 2.0 + 1e-15]))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(alphas, min_size=1, max_size=5).map(all_segments),
    st.floats(1e-100, 1e100),
    st.floats(1e-100, 1e100),
    st.sampled_from(["matrix", "type"]),
    st.sampled_from(["none", "geometric"]),
)
def test_heavy_tails_of_any_alphas(values, low, high, by, normalize):
    block_lr = sharpwise.HeavyTailLR(low=low, high=high, by=by, normalize=normalize)
    found = block_lr.multipliers(SEGMENTS, {block_lr: values})
    assert all(0 < m < math.inf for m in found), found
    if normalize == "none":
        least, most = min(low, high, 1) * (1 - 1e-12), max(low, high, 1) * (1 + 1e-12)
        assert all(least <= m <= most for m in found), found


def test_the_lightest_tail_has_what_embeddings_have():
    """One value, not two that differ in the last bit: ablations go by distinct values."""
    for low in range(1, 20):
        block_lr = sharpwise.HeavyTailLR(low=low / 10, high=2.9)
        own = [2.0 + i if block_lr.reads(segment) else math.nan for i, segment in enumerate(SEGMENTS)]
        found = block_lr.multipliers(SEGMENTS, {block_lr: own})
        assert len({m for m in found if abs(m / 2.9 - 1) < 1e-9}) == 1
        assert len({m for m in found if abs(m / (low / 10) - 1) < 1e-9}) == 1
