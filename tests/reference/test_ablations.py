"""Ablations against their definitions, element by element: fused matrices by rows, every rule, floors, both decays."""

import numpy as np
import pytest

import sharpwise
from reference import ablations, driver, layer_decay, models
from reference.blockwise_lr import PAPER, RATIO_OF_ROLE
from reference.test_block_lr import RATIOS, RULES, setup, warm_up_and_decay

ARMS = {
    "mean_matched": (sharpwise.MeanMatched, lambda m, roles: ablations.mean_matched(m)),
    "reversed": (sharpwise.Reversed, lambda m, roles: ablations.reversed_(m)),
    "shuffled": (lambda of: sharpwise.Shuffled(of, seed=5), lambda m, roles: ablations.shuffled(m, 5)),
    "only": (sharpwise.Only, lambda m, roles: ablations.only(m, roles, ["Emb"])),
    "only, by role": (
        lambda of: sharpwise.Only(of, types=("q", "FFN", "norm")),
        lambda m, roles: ablations.only(m, roles, ["q", "FFN", "norm"]),
    ),
    "mean of reversed": (
        lambda of: sharpwise.MeanMatched(sharpwise.Reversed(of)),
        lambda m, roles: ablations.mean_matched(ablations.reversed_(m)),
    ),
}
LAYERS = {"gpt2": models.GPT2, "llama": models.LLAMA, "gpt_neox": models.NEOX, "nanogpt": models.NANOGPT}


def by_ratio(role, layer):
    return RATIOS[RATIO_OF_ROLE[role]]


def both(model, rule, arm, *, of=None, multiplier=by_ratio, floor=None, decay="scaled", **options):
    """An optimizer with the arm, and its reference."""
    make, change = ARMS[arm]
    of = of or sharpwise.BlockwiseLR(**RATIOS, floor=floor, decay=decay)
    pieces = driver.pieces_of(model, list(models.build(model).named_parameters()))
    return setup(
        model,
        rule,
        block_lr=make(of),
        reference=lambda: ablations.Ablated(pieces, multiplier, change, floor=floor, decay=decay),
        **options,
    )


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", models.BUILD)
def test_of_blockwise(model, rule, arm):
    optimizer, named, twin, (lr,) = both(model, rule, arm)
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(lr, t)], steps=6)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("rule", ["adamw", "adam-mini"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_of_layer_decay(model, rule, arm):
    n_layers = LAYERS[model]["layers"]
    optimizer, named, twin, (lr,) = both(
        model,
        rule,
        arm,
        of=sharpwise.LayerDecay(rate=0.65),
        multiplier=lambda role, layer: layer_decay.multiplier(role, layer, n_layers, 0.65),
    )
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(lr, t)], steps=6)


@pytest.mark.parametrize("decay", ["scaled", "base"])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "two groups"])
def test_a_floor_and_the_decay_are_those_of_what_is_wrapped(arm, decay, grouped):
    """The changed multiplier anneals to the floor as any other; groups do not change the mean."""
    floor = RULES["adamw"][2]["lr"] * 0.3
    optimizer, named, twin, peaks = both("gpt2", "adamw", arm, floor=floor, decay=decay, grouped=grouped)
    driver.run(optimizer, named, twin, lambda t: [warm_up_and_decay(peak, t) for peak in peaks], steps=15)


@pytest.mark.parametrize("arm", ["mean_matched", "shuffled"])
def test_resumed_on_the_way_down(arm):
    floor = RULES["adamw"][2]["lr"] * 0.3
    optimizer, named, twin, (peak,) = both("gpt_neox", "adamw", arm, floor=floor)
    grads = driver.gradients(named, 12)
    driver.run(optimizer, named, twin, lambda t: [warm_up_and_decay(peak, t)], grads=grads[:6])
    resumed, other, _, _ = both("gpt_neox", "adamw", arm, floor=floor)
    resumed.load_state_dict(optimizer.state_dict())
    for (_, p), (_, q) in zip(named, other, strict=True):
        q.data.copy_(p.data)
    driver.run(resumed, other, twin, lambda t: [warm_up_and_decay(peak, t + 6)], grads=grads[6:])
    for (_, p), (_, q) in zip(named, other, strict=True):
        assert optimizer.state[p]["lr_multiplier"].tolist() == resumed.state[q]["lr_multiplier"].tolist()


def found(block_lr, *trained):
    """{role: multiplier} of the tied GPT-2, of which all is trained, or what has these words in its names."""
    model = models.build("gpt2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not trained or any(word in name for word in trained))
    optimizer = sharpwise.AdamW(model, block_lr=block_lr)
    return {row["role"]: row["multiplier"] for row in optimizer.lr_multipliers()}


def test_the_paper_s_values_by_hand():
    """Tied GPT-2, V=17, P=9, d=12, L=2: elements of each type counted by hand."""
    d, layers = 12, 2
    count = {
        10: 17 * d,  # tokens
        8: layers * 2 * (d * d + d),  # q, k
        6: layers * (4 * d * d + 4 * d + 4 * d * d + d),  # up, down
        4: layers * 2 * (d * d + d),  # v, o
        1: 9 * d + (2 * layers + 1) * 2 * d,  # positions, norms
    }
    mean = sum(value * n for value, n in count.items()) / sum(count.values())
    assert set(found("mean_matched(blockwise)").values()) == {mean}
    types = {"tok_emb": 10, "q": 8, "k": 8, "up": 6, "down": 6, "v": 4, "o": 4, "norm": 1, "pos_emb": 1}
    assert found("blockwise") == types
    other_way = {10: 1, 8: 4, 6: 6, 4: 8, 1: 10}
    assert found("reversed(blockwise)") == {role: other_way[m] for role, m in types.items()}
    assert found("only(blockwise)") == {role: 10 if role == "tok_emb" else 1 for role in types}
    assert found("only(blockwise, types=(FFN, v))") == {
        role: m if role in ("up", "down", "v") else 1 for role, m in types.items()
    }


def test_frozen_parameters_do_not_count():
    """Of the tied GPT-2 attention's queries, keys, values (8, 8, 4) and the norms (1) are trained, d=12, L=2."""
    d, layers = 12, 2
    count = {8: layers * 2 * (d * d + d), 4: layers * (d * d + d), 1: (2 * layers + 1) * 2 * d}
    mean = sum(value * n for value, n in count.items()) / sum(count.values())
    trained = ("c_attn", "ln_")
    assert found("blockwise", *trained) == {"q": 8, "k": 8, "v": 4, "norm": 1}
    assert set(found("mean_matched(blockwise)", *trained).values()) == {mean}
    assert found("reversed(blockwise)", *trained) == {"q": 1, "k": 1, "v": 4, "norm": 8}
    shuffled = found("shuffled(blockwise, seed=1)", *trained)
    assert sorted(set(shuffled.values())) == [1, 4, 8]
    assert shuffled["q"] != 8 and shuffled["v"] != 4 and shuffled["norm"] != 1


@pytest.mark.parametrize(
    ("seed", "values"),
    [(0, {1: 10, 4: 6, 6: 8, 8: 4, 10: 1}), (1, {1: 4, 4: 8, 6: 10, 8: 6, 10: 1})],
)
def test_a_seed_shuffles_the_same_for_ever(seed, values):
    """Written down once: another version or machine has to give the same."""
    plain = found("blockwise")
    assert found(sharpwise.Shuffled(sharpwise.BlockwiseLR(), seed)) == {role: values[m] for role, m in plain.items()}


def test_reference():
    """The definitions at a small example, by hand."""
    m, roles = np.array([10.0, 10.0, 8.0, 1.0]), np.array(["tok_emb", "tok_emb", "q", "norm"])
    assert ablations.mean_matched(m).tolist() == [7.25] * 4
    assert ablations.reversed_(m).tolist() == [1, 1, 8, 10]
    assert ablations.only(m, roles, ["QK", "norm"]).tolist() == [1, 1, 8, 1]
    assert sorted(ablations.permutation(0, 2)) == [1, 2] and ablations.permutation(3, 2) == [2, 1]
    assert ablations.permutation(0, 1) == [1]
    assert set(PAPER) == set(RATIOS)
