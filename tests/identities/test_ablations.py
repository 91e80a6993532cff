"""What ablations equal at their limits, and what they keep of any block map."""

import math
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import driver, models
from reference.rig import BARE, bit_equal, both, named, near, same_state, steps, through_disk

import sharpwise
from sharpwise.block_lr import BlockLR, MeanMatched, Only, Reversed, Shuffled
from sharpwise.block_lr.ablations import TYPES
from sharpwise.blocks import BlockMap, BlockType, Role, Segment

MULTIPLIERS = ["emb", "qk", "ffn", "vo", "norm", "head", "pos_emb", "other"]
ALL_TYPES = tuple(map(str, BlockType))


def uniform(value, **options):
    return sharpwise.BlockwiseLR(**dict.fromkeys(MULTIPLIERS, value), **options)


# -- on models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [MeanMatched, Reversed, Shuffled, Only], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rule", BARE)
@pytest.mark.parametrize("model", ["gpt2", "gpt_neox", "llama"])
def test_ablated_multipliers_of_one_are_the_bare_rule(model, rule, wrap):
    constructor, hyper = BARE[rule]
    first, second, _, _ = both(
        lambda m: constructor(m, **hyper, block_lr=wrap(uniform(1)), compile=False),
        lambda m: constructor(m, **hyper, compile=False),
        build=lambda: models.build(model),
        n=6,
    )
    bit_equal(first, second)


@pytest.mark.parametrize(
    ("changed", "plain"),
    [
        (Reversed(Reversed(sharpwise.BlockwiseLR())), sharpwise.BlockwiseLR()),
        (Reversed(Reversed(sharpwise.LayerDecay(rate=0.7))), sharpwise.LayerDecay(rate=0.7)),
        (Only(sharpwise.BlockwiseLR(floor=1e-3), types=ALL_TYPES), sharpwise.BlockwiseLR(floor=1e-3)),
        (Only(sharpwise.LayerDecay(decay="base"), types=tuple(Role)), sharpwise.LayerDecay(decay="base")),
        (MeanMatched(uniform(3.3)), uniform(3.3)),
        (MeanMatched(Reversed(MeanMatched(sharpwise.BlockwiseLR()))), MeanMatched(sharpwise.BlockwiseLR())),
        (Shuffled(uniform(3.3, decay="base")), uniform(3.3, decay="base")),
    ],
    ids=lambda block_lr: str(block_lr),
)
def test_what_an_ablation_equals(changed, plain):
    constructor, hyper = BARE["adam-mini"]
    first, second, one, two = both(
        lambda m: constructor(m, **hyper, block_lr=changed, compile=False),
        lambda m: constructor(m, **hyper, block_lr=plain, compile=False),
        build=lambda: models.build("gpt2"),
        n=10,
    )
    bit_equal(first, second)
    same_state(one, two, first, second, ["exp_avg", "exp_avg_sq", "lr_multiplier"])


@pytest.mark.parametrize("rule", BARE)
def test_a_matched_mean_is_the_bare_rule_at_a_larger_rate(rule):
    """All that an ablation by the mean is to show: what a larger step alone would do."""
    constructor, hyper = BARE[rule]
    blocks = BlockMap.of(models.build("gpt2")).segments
    mean = MeanMatched(sharpwise.BlockwiseLR()).multipliers(blocks)[0]
    first, second = models.build("gpt2"), models.build("gpt2")
    one = constructor(first, **hyper, block_lr="mean_matched(blockwise)")
    two = constructor(second, **{**hyper, "lr": mean * hyper["lr"]})
    grads = driver.gradients(named(first), 10)
    steps(one, named(first), grads)
    steps(two, named(second), grads)
    near(first, second)


def test_groups_do_not_change_the_mean():
    model = models.build("llama")
    parameters = list(model.parameters())
    whole = sharpwise.AdamW(model, block_lr="mean_matched(blockwise)").lr_multipliers()
    part = sharpwise.AdamW([{"params": parameters[:2]}], model=model, block_lr="mean_matched(blockwise)")
    assert {row["multiplier"] for row in part.lr_multipliers()} == {row["multiplier"] for row in whole}
    part.add_param_group({"params": parameters[2:], "lr": 1e-5})
    assert {row["multiplier"] for row in part.lr_multipliers()} == {row["multiplier"] for row in whole}


@pytest.mark.parametrize("wrap", [MeanMatched, Reversed, Shuffled, Only], ids=lambda kind: kind.name)
def test_state_goes_through_disk(wrap):
    block_lr = wrap(sharpwise.LayerDecay(rate=0.9))
    whole, part = models.build("gpt_neox"), models.build("gpt_neox")
    grads = driver.gradients(named(whole), 6)
    steady, first = (sharpwise.AdamMini(m, lr=1e-2, block_lr=block_lr) for m in (whole, part))
    steps(steady, named(whole), grads)
    steps(first, named(part), grads[:3])
    second = sharpwise.AdamMini(part, lr=1e-2, block_lr=block_lr)
    second.load_state_dict(through_disk(first.state_dict()))
    steps(second, named(part), grads[3:])
    bit_equal(whole, part)
    same_state(steady, second, whole, part, ["lr_multiplier", "exp_avg"])


# -- on any block map --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(BlockLR):
    """Any multipliers, by the names of segments."""

    values: tuple[tuple[str, float], ...] = ()
    name = "given"

    def multipliers(self, segments, measured=None):
        return [dict(self.values)[segment.name] for segment in segments]


@st.composite
def maps(draw):
    """Segments of a model, and a block_lr with any multipliers, few of them distinct or many."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3000)), min_size=1, max_size=12))
    values = draw(st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=6))
    chosen = [draw(st.sampled_from(values)) for _ in sizes]
    roles = [draw(st.sampled_from(list(Role))) for _ in sizes]
    segments = [Segment(f"w{i}", size, role) for i, (size, role) in enumerate(zip(sizes, roles, strict=True))]
    return segments, Given("scaled", tuple((s.name, m) for s, m in zip(segments, chosen, strict=True)))


def shared(before, after):
    """Which values became which."""
    became = defaultdict(set)
    for m, n in zip(before, after, strict=True):
        became[m].add(n)
    return became


@given(maps())
def test_the_mean_is_kept(case):
    segments, of = case
    total = sum(s.numel for s in segments)
    assume(total)
    before, after = of.multipliers(segments), MeanMatched(of).multipliers(segments)
    mean = sum(Fraction(m) * s.numel for m, s in zip(before, segments, strict=True)) / total
    assert len(set(after)) == 1
    assert abs(Fraction(after[0]) - mean) <= Fraction(1, 10**12) * mean
    assert MeanMatched(of).multipliers(segments[::-1]) == after


@given(maps(), st.integers(0, 10**12))
def test_values_are_kept_and_meet_other_groups(case, seed):
    segments, of = case
    before = of.multipliers(segments)
    values = sorted(set(before))
    turned, drawn = Reversed(of).multipliers(segments), Shuffled(of, seed).multipliers(segments)
    for after in (turned, drawn):
        became = shared(before, after)
        assert all(len(new) == 1 for new in became.values())  # equal ones stay equal
        assert sorted(new for (new,) in became.values()) == values  # each value is used once
    assert [next(iter(shared(before, turned)[m])) for m in values] == values[::-1]
    if len(values) > 1:
        assert all(m != n for m, n in zip(before, drawn, strict=True))
    assert Reversed(Reversed(of)).multipliers(segments) == before
    assert Shuffled(of, seed).multipliers(segments[::-1]) == drawn[::-1]


@given(maps(), st.sets(st.sampled_from(TYPES), min_size=1))
def test_only_these(case, types):
    segments, of = case
    after = Only(of, types).multipliers(segments)
    for segment, m, n in zip(segments, of.multipliers(segments), after, strict=True):
        assert n == (m if str(segment.role) in types or str(segment.block_type) in types else 1.0)


@given(st.floats(1e-6, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_means_match_all_the_way_to_the_floor(peak, share, at):
    segments = BlockMap.of(models.build("nanogpt")).segments
    of = sharpwise.BlockwiseLR(floor=share * peak)
    lr = at * peak
    assume(lr > 0)
    total = sum(s.numel for s in segments)
    now = [of.effective(m, lr, peak) * s.numel for m, s in zip(of.multipliers(segments), segments, strict=True)]
    matched = MeanMatched(of)
    assert math.isclose(
        matched.effective(matched.multipliers(segments)[0], lr, peak), math.fsum(now) / total, rel_tol=1e-9
    )


def test_no_elements_at_all():
    empty = [Segment("w", (0, 4))]
    assert MeanMatched(sharpwise.BlockwiseLR()).multipliers(empty) == [1.0]
    for wrap in (MeanMatched, Reversed, Shuffled, Only):
        assert wrap(sharpwise.BlockwiseLR()).multipliers([]) == []


def test_what_was_never_drawn_is_a_permutation_too():
    """Every order that leaves nothing in its place comes up about as often: 44 of five values."""
    drawn = defaultdict(int)
    segments = [Segment(f"w{i}", (1,)) for i in range(5)]
    of = Given("scaled", tuple((f"w{i}", float(i)) for i in range(5)))
    for seed in range(4400):
        drawn[tuple(Shuffled(of, seed).multipliers(segments))] += 1
    assert len(drawn) == 44
    expected = 4400 / 44
    assert sum((n - expected) ** 2 / expected for n in drawn.values()) < 80  # chi-squared of 43: p = 0.0005
