"""Bad input of block_lrs that measure, of PerRole, of products: what was got, what is allowed, what to do."""

import logging
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from reference import driver, models
from reference.refusals import refuse
from reference.rig import named, steps

import sharpwise
from sharpwise.block_lr import BlockLR, Product
from sharpwise.probes import sharpness
from sharpwise.testing import fill_gradients, run, tiny_model

PROBE = "sharpness(source=probe, start=0, every=2)"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sharpwise.SharpnessLR(power=-1), r"sharpness: power must be a number in \[0, inf\), got -1"),
        (lambda: sharpwise.SharpnessLR(power=math.nan), r"power must be .*got nan"),
        (lambda: sharpwise.SharpnessLR(max_ratio=0), r"max_ratio must be a number in \[1, inf\), got 0"),
        (lambda: sharpwise.SharpnessLR(max_ratio=-3), r"max_ratio must be .*got -3"),
        (lambda: sharpwise.SharpnessLR(ema=1.0), r"ema must be a number in \[0, 1\), got 1.0"),
        (lambda: sharpwise.SharpnessLR(source="hessian"), "source must be one of second_moment, .*got 'hessian'"),
        (lambda: sharpwise.SharpnessLR(source="centered"), r"got 'centered' \(did you mean 'centred'\?\)"),
        (lambda: sharpwise.SharpnessLR(mean="median"), "mean must be one of arithmetic, geometric, got 'median'"),
        (lambda: sharpwise.SharpnessLR(normalize="none"), "normalize must be one of reference, geometric, got 'none'"),
        (lambda: sharpwise.SharpnessLR(source="probe", tied="out"), "tied must be one of both, lookup, head, got"),
        (lambda: sharpwise.SharpnessLR(tied="head"), "source='second_moment' is of the sum of both; source"),
        (lambda: sharpwise.SharpnessLR(per_occurrence="no"), "per_occurrence must be one of False, True, got 'no'"),
        (lambda: sharpwise.SharpnessLR(settle=-0.2), "settle must be a finite number >= 0, or None, got -0.2"),
        (lambda: sharpwise.SharpnessLR(settle=math.nan), "settle must be .*got nan"),
        (lambda: sharpwise.SharpnessLR(fixed={"emb": 2}), r"takes Emb, QK.*pos_emb, got 'emb' \(did you mean 'Emb'"),
        (lambda: sharpwise.SharpnessLR(fixed={"Emb": 0}), "the ratio of 'Emb' must be a finite number > 0, got 0"),
        (lambda: sharpwise.SharpnessLR(fixed={"Emb": "10"}), "the ratio of 'Emb' must be .*got '10'"),
        (lambda: sharpwise.SharpnessLR(fixed=3), "fixed must be a mapping such as .*got 3"),
        (lambda: sharpwise.SharpnessLR(fixed="Emb"), "fixed must be a mapping such as .*got 'Emb'"),
        (
            lambda: sharpwise.SharpnessLR(reference="FFN", normalize="geometric"),
            "reference='FFN' has a meaning under normalize='reference' alone",
        ),
        (lambda: sharpwise.SharpnessLR(start="warm-up"), "in \\(0, 1\\), or 'peak', got 'warm-up'"),
        (lambda: sharpwise.SharpnessLR(stop="peak"), "stop must be a whole number .*got 'peak'"),
        (lambda: sharpwise.SharpnessLR(by="layer"), "by must be one of type, module, got 'layer'"),
        (lambda: sharpwise.SharpnessLR(reference="norm"), "reference must be one of Emb, QK, .*got 'norm'"),
        (lambda: sharpwise.SharpnessLR(every=0), "every must be a whole number of steps >= 1, got 0"),
        (lambda: sharpwise.HeavyTailLR(every=-2), "every must be a whole number of steps >= 1, got -2"),
        (lambda: sharpwise.HeavyTailLR(every=2.5), "every must be .*got 2.5"),
        (lambda: sharpwise.HeavyTailLR(soft=-1), "soft must be a whole number of steps >= 0, got -1"),
        (lambda: sharpwise.HeavyTailLR(start=-1), r"start must be .*the training in \(0, 1\), or 'peak', got -1"),
        (lambda: sharpwise.HeavyTailLR(stop=1.5), "stop must be .*got 1.5"),
        (lambda: sharpwise.HeavyTailLR(stop=math.nan), "stop must be .*got nan"),
        (lambda: sharpwise.HeavyTailLR(start=None), "start must be .*got None"),
        (lambda: sharpwise.HeavyTailLR(low=0), "llr: low must be a finite number > 0, got 0"),
        (lambda: sharpwise.HeavyTailLR(high=-5), "high must be a finite number > 0, got -5"),
        (lambda: sharpwise.HeavyTailLR(high=math.inf), "high must be .*got inf"),
        (lambda: sharpwise.HeavyTailLR(least=1), "least must be a whole number >= 2, got 1"),
        (lambda: sharpwise.HeavyTailLR(convention="ww"), "convention must be one of hill, published, got 'ww'"),
        (lambda: sharpwise.HeavyTailLR(normalize="mean"), "normalize must be one of none, geometric, got 'mean'"),
        (lambda: sharpwise.HeavyTailLR(by="layer"), "by must be one of matrix, type, got 'layer'"),
        (lambda: sharpwise.GradientSNR(normalize="mean"), "normalize must be 'none' or 'max', got 'mean'"),
        (lambda: sharpwise.GradientSNR(decay="half"), "decay must be 'scaled' or 'base', got 'half'"),
        (lambda: sharpwise.PerRole({"q": -1}), "per_role: the ratio of 'q' must be a finite number > 0, got -1"),
        (lambda: sharpwise.PerRole({"q": 0}), "the ratio of 'q' must be .*got 0"),
        (lambda: sharpwise.PerRole({"q": "2"}), "the ratio of 'q' must be .*got '2'"),
        (lambda: sharpwise.PerRole({"q": 2}, default=0), "the ratio of 'default' must be .*got 0"),
        (lambda: sharpwise.PerRole(3), r"ratios must be a mapping such as .*got 3"),
        (lambda: Product((sharpwise.LayerDecay(),)), "product: it takes two factors or more, got 1"),
        (
            lambda: sharpwise.BlockwiseLR(floor=1e-5) * sharpwise.BlockwiseLR(floor=1e-4),
            r"one factor at most has a floor, got blockwise\(floor=1e-5\), blockwise\(floor=0.0001\)",
        ),
    ],
)  # fmt: skip
def test_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_phase_with_one_measurement():
    """Nothing follows it."""
    model = models.build("gpt2")
    for block_lr, says in (
        ("sharpness(start=4, stop=6, every=3)", "due at step 7 at the earliest, and it would stop at 6"),
        ("sharpness(start=peak, stop=5, every=3)", "due at step 6 at the earliest, and it would stop at 5"),
        ("sharpness(start=0.1, stop=0.29)", "due at step 300 .* stop at 290.*every than 200"),
    ):
        refuse(ValueError, says, partial(sharpwise.AdamW, model, block_lr=block_lr, total_steps=1000), model)
    sharpwise.AdamW(model, block_lr="sharpness(start=4, stop=7, every=3)")


def test_a_training_that_is_over_before_multipliers_move(caplog):
    with caplog.at_level(logging.WARNING, logger="sharpwise"):
        sharpwise.AdamW(models.build("gpt2"), block_lr="sharpness", total_steps=205)
        assert not caplog.records
        sharpwise.AdamW(models.build("gpt2"), block_lr="sharpness", total_steps=204)
    assert "of 204 steps none comes after the second measurement, due at step 204 at the" in caplog.text


def test_what_is_fixed_has_to_be_there():
    model = models.build("gpt2")
    says = (
        r"AdamW: sharpness: fixed=\{Head: 10\} is of a type that this model has not; it has Emb, QK, FFN, VO, Norm, pos"
    )
    refuse(ValueError, says, lambda: sharpwise.AdamW(model, block_lr="sharpness(start=0, fixed={Head: 10})"), model)
    reversed_ = "reversed(sharpness(start=0, fixed={Head: 10}))"
    refuse(ValueError, says, lambda: sharpwise.AdamW(model, block_lr=reversed_), model)


def test_occurrences_in_a_tied_table():
    model = models.build("gpt2")
    spelling = "sharpness(start=0, per_occurrence=True{})"
    says = r"for a table that is only looked up, and transformer.wte.weight is also lm_head.weight; measure the look-up"
    refuse(ValueError, says, lambda: sharpwise.AdamW(model, block_lr=spelling.format("")), model)
    lookup = spelling.format(", source=probe, tied=lookup")
    sharpwise.AdamW(model, block_lr=lookup, probe_batches=[BATCH])
    sharpwise.AdamW(models.build("llama"), block_lr=spelling.format(""))  # its head is not tied


@pytest.mark.parametrize(
    ("rule", "block_lr", "says"),
    [
        ("lion", "sharpness(start=0, source=centred)", "goes by both moments, which 'lion' does not keep; AdamW and"),
        ("sgd", "reversed(sharpness(start=0, source=directional))", "goes by both moments, which 'sgd' does not keep"),
        ("adamw", "sharpness(start=0, source=directional)", "source='directional' lacks batches to measure on"),
        ("lion", "sharpness(start=0, source=norm_11)", "source='norm_11' lacks batches to measure on"),
    ],
)
def test_sources_that_the_optimizer_has_not(rule, block_lr, says):
    model = models.build("gpt2")
    refuse(ValueError, says, lambda: sharpwise.create_optimizer(model, rule, block_lr=block_lr), model)


def test_no_mean_of_gradients_is_kept():
    model = models.build("gpt2")
    says = r"source='centred' tells the variance .*which betas=\(0.0, 0.9\) do not average; give a first beta above 0"
    block_lr = "sharpness(start=0, source=centred)"
    refuse(ValueError, says, lambda: sharpwise.AdamW(model, block_lr=block_lr, betas=(0.0, 0.9)), model)


def test_a_variance_that_is_not_positive(caplog):
    """Gradients that do not vary: the block keeps what it has, and that is said once."""
    model = tiny_model()
    block_lr = "sharpness(start=2, every=1, soft=0, source=centred, normalize=geometric, ema=0)"
    optimizer = sharpwise.AdamW(model, lr=1e-3, betas=(0.5, 0.999), block_lr=block_lr)
    name = "transformer.h.0.mlp.c_fc.weight"
    with caplog.at_level(logging.WARNING, logger="sharpwise"):
        for t in range(8):
            fill_gradients(model, t)
            if t > 4:  # the mean grows, so that m-hat is larger than the root of v-hat
                model.get_parameter(name).grad = torch.full_like(model.get_parameter(name), 10.0 * 4**t)
            optimizer.step()
            own = {key: value.clone() for key, value in optimizer.state[model.get_parameter(name)].items()}
            if t == 5:
                before = own
    assert own["block_lr_measured"] > 0 and torch.equal(own["block_lr_measured"], before["block_lr_measured"])
    lines = [r.getMessage() for r in caplog.records if "is not positive" in r.getMessage()]
    assert len(lines) == 1 and f"of {name}: they keep what was measured of them before" in lines[0], lines


def test_a_factor_that_is_none():
    with pytest.raises(TypeError, match=r"product: expected BlockLRs, such as BlockwiseLR\(\), got 'blockwise'"):
        Product((sharpwise.LayerDecay(), "blockwise"))
    with pytest.raises(TypeError):
        sharpwise.LayerDecay() * 2


@pytest.mark.parametrize(
    ("block_lr", "says"),
    [
        ("sharpness(start=0, reference=Head)", r"AdamW: sharpness: .*Head, which no trained.*one of Emb, Norm, QK"),
        ("reversed(sharpness(start=0, reference=Head)*layer_decay)", "reference must be one of"),
        ("per_role(ratios={gate: 2})", "AdamW: per_role: 'gate' is no block of this model; it has the types Emb.*glob"),
        ("per_role(ratios={'*.mlpp.*': 2})", r"'\*.mlpp.\*' is no block .*parameters such as transformer.wte.weight"),
        ("layer_decay*per_role(ratios={Head: 2})", "'Head' is no block of this model"),
        ("only(blockwise, types=Head)", "Head"),
    ],
)  # fmt: skip
def test_a_block_type_that_the_model_has_not(block_lr, says):
    model = models.build("gpt2")
    refuse(ValueError, says, lambda: sharpwise.AdamW(model, block_lr=block_lr), model)


def test_a_reference_that_is_not_trained():
    model = models.build("gpt2")
    for name, p in model.named_parameters():
        p.requires_grad_("ln_" not in name)
    says = r"relative to the sharpness of Norm, which no trained parameter .*must be one of Emb, QK, VO, FFN"
    refuse(ValueError, says, lambda: sharpwise.AdamW(model, block_lr="sharpness(start=0)"), model)


@pytest.mark.parametrize(
    ("block_lr", "key"),
    [
        ("sharpness", "start=0.02"),
        ("llr", "stop=0.2"),
        ("mean_matched(gradient_snr*llr(start=0.1, stop=80))", "start=0.1"),
    ],
)
def test_fractions_without_the_length(block_lr, key):
    model = models.build("gpt2")
    says = rf"AdamW: .*{key} is a fraction of the training.*total_steps= to the optimizer, or .* as a whole number of"
    refuse(ValueError, says, lambda: sharpwise.AdamW(model, block_lr=block_lr), model)
    sharpwise.AdamW(model, block_lr=block_lr, total_steps=100)


@pytest.mark.parametrize("total", [0, -5, 2.5, "100", True])
def test_bad_total_steps(total):
    model = models.build("gpt2")
    says = "AdamW: total_steps must be a whole number >= 1, got"
    refuse(ValueError, says, lambda: sharpwise.AdamW(model, block_lr="llr", total_steps=total), model)


def test_a_phase_that_stops_before_it_starts():
    model = models.build("gpt2")
    refuse(
        ValueError,
        "llr: it would stop at step 20, before it starts, at 30",
        lambda: sharpwise.AdamW(model, block_lr="llr(start=30)", total_steps=100),
        model,
    )


@pytest.mark.parametrize("rule", ["lion", "sgd", "sgd-sai"])
@pytest.mark.parametrize("wrap", ["{}", "reversed({})", "layer_decay*{}"])
def test_second_moment_under_a_rule_that_keeps_none(rule, wrap):
    model = models.build("gpt2")
    says = "which .* does not keep; AdamW and AdamMini do, and source=.probe. needs none"
    spelling = wrap.format("sharpness(start=0)")
    refuse(ValueError, says, lambda: sharpwise.create_optimizer(model, rule, block_lr=spelling), model)


def test_the_rules_that_keep_one_are_said():
    model = models.build("gpt2")
    refuse(ValueError, "(?i)adamw.*adam-?mini", lambda: sharpwise.Lion(model, block_lr="sharpness(start=0)"), model)


BATCH = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_a_probe_without_batches(rule):
    model = models.build("gpt2")
    says = "source='probe' lacks batches to measure on; give probe_batches=, a list of batches"
    refuse(ValueError, says, lambda: sharpwise.create_optimizer(model, rule, block_lr=PROBE), model)


def test_a_probe_without_a_model():
    model = models.build("gpt2")
    blocks = sharpwise.BlockMap.of(model)
    pairs = list(model.named_parameters())
    says = "source='probe' lacks the model; give the model, first or as model=$"
    refuse(
        ValueError,
        says,
        lambda: sharpwise.Lion(pairs, blocks=blocks, block_lr=PROBE, probe_batches=[BATCH]),
        model,
    )


def test_a_probe_with_an_empty_list():
    """Said when the optimizer is built, not at the first measurement, which may be hours later."""
    model = models.build("gpt2")
    says = "probe_batches|batches to measure on"
    refuse(ValueError, says, lambda: sharpwise.Lion(model, block_lr=PROBE, probe_batches=[]), model)


@pytest.mark.parametrize("wrong", [3, BATCH, (BATCH[:, :-1], BATCH[:, 1:]), {"input_ids": BATCH, "labels": BATCH}])
def test_a_probe_with_something_else_than_a_list(wrong):
    """One batch is taken as one, as `sharpwise.probes.sharpness` does, or refused: never cut in pieces."""
    model = models.build("gpt2")
    try:
        optimizer = sharpwise.Lion(model, lr=0.0, block_lr=PROBE, probe_batches=wrong)
    except (TypeError, ValueError) as error:
        assert "Lion" in str(error) and "probe_batches" in str(error), error
        return
    steps(optimizer, named(model), driver.gradients(named(model), 1))
    segments = sharpness(model, wrong, seed=0).select(quantity="sharpness", by="segment")
    own = [v for state in optimizer.state.values() for v in state["block_lr_measured"].view(-1).tolist()]
    assert sorted(own) == pytest.approx(sorted(e.value for e in segments), rel=1e-5, abs=1e-12)


def test_a_probe_whose_batch_does_not_fit_changes_nothing():
    model = models.build("gpt2")
    optimizer = sharpwise.Lion(model, block_lr=PROBE, probe_batches=[BATCH + 100])
    before = {name: p.detach().clone() for name, p in named(model)}
    with pytest.raises(ValueError, match="the input 110 is no token"):
        steps(optimizer, named(model), driver.gradients(named(model), 1))
    assert all(torch.equal(p, before[name]) for name, p in named(model))
    assert optimizer.param_groups[0]["block_lr_step"] == 0


def test_too_few_eigenvalues_are_listed_once(caplog):
    """All matrices of the tiny model have fewer than 50: multiplier 1, and one line."""
    model = tiny_model()
    with caplog.at_level(logging.WARNING, logger="sharpwise"):
        optimizer = sharpwise.AdamW(model, block_lr="llr(every=2, stop=6)")
        run(model, optimizer, range(3))
        optimizer.load_state_dict(optimizer.state_dict())
        run(model, optimizer, range(3, 6))
    assert {row["multiplier"] for row in optimizer.lr_multipliers() if row["type"] != "Emb"} == {1.0}
    lines = [record.getMessage() for record in caplog.records if "eigenvalues" in record.getMessage()]
    assert len(lines) == 1, lines
    assert "multiplier 1" in lines[0] and "transformer.h.1.mlp.c_proj.weight" in lines[0]
    assert "ln_1" not in lines[0] and "bias" not in lines[0] and "wte" not in lines[0]


@dataclass(frozen=True)
class Still(BlockLR):
    """Ours refuse a ratio of 0; nobody keeps users' own from it."""

    name = "still"

    def multipliers(self, segments, measured=None):
        return [float(segment.block_type != "Emb") for segment in segments]


def test_a_zero_that_moves_to_another_block():
    """An ablation may hand the multiplier 0 of a factor to any block, at any measurement."""
    model = tiny_model()
    following = sharpwise.SharpnessLR(start=0, every=1, soft=0, power=3, decay="base")
    block_lr = sharpwise.Reversed(following * Still())
    optimizer = sharpwise.AdamW(model, lr=1e-3, weight_decay=0.1, block_lr=block_lr)
    for _ in range(3):  # queries and keys are as sharp as norms now, so that the largest multiplier is the MLP's
        for name, p in named(model):
            p.grad = torch.full_like(p, 1.0 if "ln_" in name or "attn" in name else 1e-6)
        optimizer.step()
    assert {row["role"] for row in optimizer.lr_multipliers() if row["multiplier"] == 0} == {"up", "down"}
    assert all(p.isfinite().all() for p in model.parameters())
