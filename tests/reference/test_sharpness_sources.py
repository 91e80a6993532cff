"""SharpnessLR's sources, maps and phases against float64 transcriptions of the equations."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sharpwise
from reference import driver, models, sharpness_lr
from reference.rig import named, steps
from reference.test_measured_lr import MODELS, beside, sharp, varied
from sharpwise.block_lr.ratios import balanced
from sharpwise.engine.measuring import updates, variances
from sharpwise.testing import fill_gradients, run, tiny_model

# The variance that both moments tell


@pytest.mark.parametrize("rule", ["adamw", "adam-mini"])
@pytest.mark.parametrize("model", MODELS)
def test_centred(model, rule):
    """From the gradients themselves, weighted as the moments do; every step from the second on."""
    source = {"source": "centred", "by": "module", "max_ratio": 1e3}
    block_lr, make, more = sharp(source=source, start=1, every=3, stop=10)
    varied(beside(model, rule, block_lr, make, tolerance=2e-6, **more))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.99, 0.95)], ids=str)
def test_the_variance_has_no_bias(betas):
    """Mean over 20,000 elements of gradients with a known mean and variance; without the correction it would be off."""
    n, mu, sigma = 20_000, 0.7, 1.5
    p = torch.nn.Parameter(torch.zeros(n // 10, 10, dtype=torch.float64))
    optimizer = sharpwise.AdamW([("w", p)], lr=0.0, betas=betas)
    generator, b1 = torch.Generator().manual_seed(0), betas[0]
    for t in range(1, 13):
        p.grad = mu + sigma * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        stepper = optimizer._bind()
        found = variances(stepper.views, stepper.group)[0][0] / n
        if t == 1:
            assert math.isnan(found)
            continue
        u = (1 - b1) * b1 ** np.arange(t) / (1 - b1**t)
        # Of one element at most 4 sigma^2; 5 standard errors
        assert abs(found - sigma**2) < 5 * 4 * sigma**2 / (1 - (u**2).sum()) / math.sqrt(n), t
        plain = found * (1 - (u**2).sum())
        assert abs(plain - sigma**2) > 0.02 * sigma**2 or (u**2).sum() < 0.02


def test_centred_of_state_in_8_bits():
    """What the codes say, decoded."""
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 64)
    blocks = {"weight": "up", "bias": "up"}
    second = copy.deepcopy(model)
    eight = sharpwise.AdamW8bit(second, lr=0.0, blocks=blocks)
    whole = sharpwise.AdamW(model, lr=0.0, blocks=blocks)
    for step in range(4):
        for twin, optimizer in ((second, eight), (model, whole)):
            run(twin, optimizer, [step])
    values = []
    for optimizer in (eight, whole):
        stepper = optimizer._bind()
        values.append([own[0] for own in variances(stepper.views, stepper.group)])
    assert eight.state[next(iter(eight.state))]["exp_avg"].dtype == torch.uint8
    assert values[0] == pytest.approx(values[1], rel=0.05) and values[0][0] != values[1][0]


# The map

SETTINGS = [
    {"mean": "geometric", "max_ratio": 1e4},
    {"mean": "geometric", "by": "module"},
    {"normalize": "geometric", "max_ratio": 4.0},
    {"normalize": "geometric", "max_ratio": 1.3, "power": 2.0},
    {"normalize": "geometric", "max_ratio": 1.0},
    {"normalize": "geometric", "by": "module", "power": 0.5},
    {"normalize": "geometric", "mean": "geometric", "power": 0.5, "max_ratio": 4.0, "fixed": {"Emb": 10}},
    {"fixed": {"Emb": 10, "Norm": 0.5, "pos_emb": 3}},
    {"source": "centred", "normalize": "geometric", "mean": "geometric"},
    {"per_occurrence": True, "normalize": "geometric", "max_ratio": 1e6},
]


@pytest.mark.parametrize("source", SETTINGS, ids=str)
def test_maps(source):
    model = "llama" if source.get("per_occurrence") else "gpt2"
    if source.get("per_occurrence"):
        source = {**source, "rows": models.LLAMA["vocab"]}
    given = {key: value for key, value in source.items() if key != "rows"}
    block_lr, _, more = sharp(source=given, start=1, every=2)
    arguments = {"Emb": "emb", "Norm": "norm"}
    fixed = {arguments.get(key, key): value for key, value in source.get("fixed", {}).items()}
    theirs = {key: value for key, value in source.items() if key != "per_occurrence"} | {"fixed": fixed}
    make = lambda pieces: sharpness_lr.Sharpness(pieces, **theirs)  # noqa: E731
    policy = beside(model, "adamw", block_lr, make, tolerance=2e-6, **more)
    varied(policy, least=1 if source.get("max_ratio") == 1 else 3)
    if source.get("normalize") == "geometric":
        free = np.array([kind not in fixed for kind in policy.source.kinds])
        sizes = policy.source.sizes[free]
        assert abs(sizes @ np.log(policy.after[free])) < 1e-9 * sizes.sum()


some = st.lists(
    st.tuples(st.one_of(st.just(math.nan), st.floats(1e-300, 1e300)), st.integers(0, 10**9)), min_size=1, max_size=9
)


@settings(deadline=None)
@given(some, st.floats(0, 3), st.floats(1, 1e6))
def test_a_redistribution_keeps_the_mean(pairs, power, cap):
    """The geometric mean is 1, all are within the cap, what is sharper is not faster, and equals stay equal."""
    values, sizes = zip(*pairs, strict=True)
    found = balanced(values, sizes, power, cap)
    known = [(v, m, n) for v, m, n in zip(values, found, sizes, strict=True) if not math.isnan(v)]
    assert all(1 / cap <= m <= cap for _, m, _ in known)
    assert all(m == 1 for v, m in zip(values, found, strict=True) if math.isnan(v))
    total = sum(n for *_, n in known)
    assert abs(math.fsum(n * math.log(m) for _, m, n in known)) <= 1e-9 * max(total, 1) * max(1.0, math.log(cap))
    for (v, m, _), (w, k, _) in zip(sorted(known), sorted(known)[1:], strict=False):
        assert m >= k and (v != w or m == k)


def test_what_is_fixed_is_so_from_the_first_step_on():
    """Of tokens, not of positions; in the tables, in products, and under ablations."""
    fixed = sharpwise.SharpnessLR(start=3, fixed={"Emb": 10, "VO": 0.5})
    for block_lr, times in (
        (fixed, {"tok_emb": 10.0, "v": 0.5, "o": 0.5}),
        (
            fixed * sharpwise.BlockwiseLR(emb=2, qk=3, ffn=1, vo=4),
            {"tok_emb": 20.0, "v": 2.0, "o": 2.0, "q": 3.0, "k": 3.0},
        ),
        (sharpwise.Reversed(fixed), {"tok_emb": 0.5, "v": 10.0, "o": 10.0}),
        (sharpwise.Only(fixed, "VO"), {"v": 0.5, "o": 0.5}),
    ):
        optimizer = sharpwise.AdamW(tiny_model(), block_lr=block_lr)
        for table in (optimizer.explain(), optimizer.lr_multipliers()):
            assert {row["multiplier"] for row in table if row["role"] not in times} == {1.0}
            assert all(row["multiplier"] == times[row["role"]] for row in table if row["role"] in times)


def test_what_rounding_leaves_enters_no_geometric_mean():
    """As of the biases of keys, which do not matter to the loss; an arithmetic mean does not mind."""
    segments = sharpwise.BlockMap.of(tiny_model()).segments
    values = [{"q": 1e-16, "k": 4.0, "norm": 16.0}.get(str(s.role), 16.0) for s in segments]
    for mean, want in (("geometric", 2.0), ("arithmetic", 8**0.5)):
        block_lr = sharpwise.SharpnessLR(mean=mean, power=0.5)
        found = dict(
            zip([str(s.role) for s in segments], block_lr.multipliers(segments, {block_lr: values}), strict=True)
        )
        assert found["q"] == found["k"] == pytest.approx(want), mean


# When


@pytest.mark.parametrize("settle", [0.0, 0.3, 2.0, 1e6])
@pytest.mark.parametrize("more", [{}, {"by": "module"}, {"fixed": {"Emb": 2}, "mean": "geometric"}], ids=str)
def test_multipliers_wait_until_two_measurements_agree(settle, more):
    block_lr, _, schedule = sharp(source={"settle": settle, "ema": 0.25, **more}, start=1, every=1, soft=0)
    fixed = {"emb": 2.0} if "fixed" in more else {}
    make = lambda pieces: sharpness_lr.Sharpness(pieces, **{"settle": settle, "ema": 0.25, **more, "fixed": fixed})  # noqa: E731
    policy = beside("gpt2", "adamw", block_lr, make, missing=(3, 7, 8), **schedule)
    assert policy.source.settled.any() == (settle > (0.5 if "by" in more else 0.1))


def test_one_measurement_moves_nothing():
    """Whatever it finds: not by default, and not of what joins later."""
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-3, block_lr="sharpness(start=1, every=2, soft=0, max_ratio=1e6)")
    late = "transformer.h.1.mlp.c_fc.weight"
    for step in range(10):
        fill_gradients(model, step, skip=[late] if step < 5 else [])
        for name, p in model.named_parameters():
            if "ln_" in name and p.grad is not None:
                p.grad *= 30
        optimizer.step()
        multipliers = {row["name"]: row["multiplier"] for row in optimizer.lr_multipliers()}
        assert step >= 3 or set(multipliers.values()) == {1.0}, step
        own = optimizer.state[model.get_parameter(late)]
        assert (float(own["block_lr_measured"]) > 0, bool(own["block_lr_settled"])) == (step >= 7, step >= 9)
    assert min(multipliers.values()) == 1.0 < 5 < max(multipliers.values())


def steps_that_settle(model, optimizer, begin, end):
    """Steps with the same gradients, but for much larger ones of vectors from the fourth on; the multipliers."""
    seen = []
    for t in range(begin, end):
        for i, (_, p) in enumerate(named(model)):
            p.grad = torch.full_like(p, (1.0 + i % 3) * (30.0 if t > 2 and p.dim() < 2 else 1.0))
        optimizer.step()
        seen.append([row["multiplier"] for row in optimizer.lr_multipliers()])
    return seen


def test_what_has_settled_follows_whatever_is_measured():
    """Measurements that agree, then one that does not; the same where it is resumed between them."""
    spelling = "sharpness(start=1, every=1, soft=0, settle=0.2, ema=0, normalize=geometric, max_ratio=1e6)"
    models = [tiny_model(seed=seed) for seed in (0, 0, 1)]
    whole, first, second = (sharpwise.AdamW(m, lr=1e-3, betas=(0.9, 0.9), block_lr=spelling) for m in models)
    seen = steps_that_settle(models[0], whole, 0, 5)
    assert set(seen[1]) == {1.0} and seen[2] == pytest.approx(seen[3]) != seen[4] and len(set(seen[4])) > 2
    steps_that_settle(models[1], first, 0, 4)
    models[2].load_state_dict(models[1].state_dict())
    second.load_state_dict(first.state_dict())
    assert steps_that_settle(models[2], second, 4, 5) == seen[4:]


def lrs_of(peak, kind):
    """12 learning rates."""
    if kind == "warm-up":
        return [peak * min((t + 1) / 5, 1.0) * (1 - max(t - 4, 0) / 10) for t in range(12)]
    if kind == "from zero":
        return [peak * min(max(t - 2, 0) / 3, 1.0) for t in range(12)]
    return [peak] * 12


@pytest.mark.parametrize(("kind", "first"), [("warm-up", 6), ("from zero", 6), ("constant", 2)])
def test_the_start_is_the_end_of_the_warm_up(kind, first):
    """At the multiples of 2 whose learning rate is no new peak: from `first` on; the same after a resume."""
    rates, begun = lrs_of(1e-3, kind), {}
    spelling = "sharpness(start=peak, every=2, soft=0, power=2, max_ratio=1e3)"
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-3, block_lr=spelling)
    for t, lr in enumerate(rates):
        if t == 5:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.param_groups[0]["lr"] = lr
        run(model, optimizer, [t])
        for what in ("measured", "settled"):
            if any(own[f"block_lr_{what}"].any() for own in optimizer.state.values()):
                begun.setdefault(what, t)
    assert begun == {"measured": first, "settled": first + 2}
    other = tiny_model(seed=1)
    again = sharpwise.AdamW(other, lr=1e-3, block_lr=spelling)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for t in range(5, 12):
        again.param_groups[0]["lr"] = rates[t]
        run(other, again, [t])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


# Directions


def test_the_direction_is_that_of_the_last_step():
    """Of every element, however its moments are kept: what the parameter moved by, without decay, over the rate."""
    for name in ("adamw", "adam-mini"):
        for build in ("gpt2", "gpt_neox"):
            model = models.build(build)
            optimizer = sharpwise.create_optimizer(model, name, lr=1.0, weight_decay=0.0, compile=False)
            steps(optimizer, named(model), driver.gradients(named(model), 3))
            before = {key: p.detach().clone() for key, p in named(model)}
            steps(optimizer, named(model), driver.gradients(named(model), 1, seed=3))
            u = updates(optimizer._bind().views)
            for key, p in named(model):
                moved = (before[key] - p.detach()).double()
                bad = float((u[key].double() - moved).norm() / moved.norm())
                assert bad < 1e-4, (name, build, key, bad)
