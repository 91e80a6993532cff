"""One spelling of a block_lr and of an arm: what is read, what is written, what is refused."""

import copy
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import sharpwise
from reference import models
from sharpwise import (
    BlockwiseLR,
    GradientSNR,
    HeavyTailLR,
    LayerDecay,
    MeanMatched,
    Only,
    PerRole,
    Reversed,
    SharpnessLR,
    Shuffled,
    block_lr,
    make_block_lr,
    parse_arm,
)
from sharpwise.block_lr import BlockLR, Product
from sharpwise.block_lr.ablations import TYPES
from sharpwise.optim import ABLATIONS, BLOCK_LRS, OPTIMIZERS

READ = [
    ("blockwise", BlockwiseLR(), "blockwise"),
    ("blockwise()", BlockwiseLR(), "blockwise"),
    ("layer_decay", LayerDecay(), "layer_decay"),
    ("blockwise(emb=5, floor=1e-5)", BlockwiseLR(emb=5, floor=1e-5), "blockwise(emb=5, floor=1e-5)"),
    (" blockwise( emb = 5.0,)", BlockwiseLR(emb=5.0), "blockwise(emb=5)"),
    ("blockwise(emb=10)", BlockwiseLR(), "blockwise"),
    ("blockwise(floor=None)", BlockwiseLR(), "blockwise"),
    ("blockwise(floor=0)", BlockwiseLR(floor=0), "blockwise(floor=0)"),
    ("blockwise(decay=base)", BlockwiseLR(decay="base"), "blockwise(decay=base)"),
    ("layer_decay(decay='base', rate=0.9)", LayerDecay(rate=0.9, decay="base"), "layer_decay(decay=base, rate=0.9)"),
    ("mean_matched(blockwise)", MeanMatched(BlockwiseLR()), "mean_matched(blockwise)"),
    ("reversed(layer_decay(rate=0.9))", Reversed(LayerDecay(rate=0.9)), "reversed(layer_decay(rate=0.9))"),
    ("shuffled(blockwise)", Shuffled(BlockwiseLR()), "shuffled(blockwise)"),
    ("shuffled(blockwise, seed=0)", Shuffled(BlockwiseLR(), 0), "shuffled(blockwise)"),
    ("shuffled(seed=3, of=blockwise)", Shuffled(BlockwiseLR(), 3), "shuffled(blockwise, seed=3)"),
    ("only(blockwise)", Only(BlockwiseLR()), "only(blockwise)"),
    ("only(blockwise(emb=8), types=Emb)", Only(BlockwiseLR(emb=8)), "only(blockwise(emb=8))"),
    ('only(blockwise, types="Norm")', Only(BlockwiseLR(), "Norm"), "only(blockwise, types=Norm)"),
    ("only(blockwise, types=(q, FFN))", Only(BlockwiseLR(), ["FFN", "q"]), "only(blockwise, types=(FFN, q))"),
    ("only(blockwise, types=[q, q])", Only(BlockwiseLR(), {"q"}), "only(blockwise, types=q)"),
    ("reversed(mean_matched(blockwise))", Reversed(MeanMatched(BlockwiseLR())), "reversed(mean_matched(blockwise))"),
    ("sharpness", SharpnessLR(), "sharpness"),
    ("sharpness(stop=None, every=200)", SharpnessLR(), "sharpness"),
    ("sharpness(source=probe, power=1.0)", SharpnessLR(source="probe", power=1), "sharpness(power=1, source=probe)"),
    ("sharpness(by='module', soft=0)", SharpnessLR(by="module", soft=0), "sharpness(soft=0, by=module)"),
    (
        "sharpness(fixed={Emb: 10, pos_emb: 1.0}, normalize=geometric)",
        SharpnessLR(fixed={"Emb": 10, "pos_emb": 1}, normalize="geometric"),
        "sharpness(normalize=geometric, fixed={Emb: 10, pos_emb: 1})",
    ),
    ("sharpness(fixed={}, settle=None)", SharpnessLR(), "sharpness"),
    (
        "sharpness(source=directional, tied=lookup, start=peak, mean=geometric, settle=.2, per_occurrence=True)",
        SharpnessLR(
            source="directional", tied="lookup", start="peak", mean="geometric", settle=0.2, per_occurrence=True
        ),
        "sharpness(start=peak, source=directional, mean=geometric, tied=lookup, per_occurrence=True, settle=0.2)",
    ),
    ("llr", HeavyTailLR(), "llr"),
    ("llr(stop=None)", HeavyTailLR(stop=None), "llr(stop=None)"),
    ("llr(least=2)", HeavyTailLR(least=2), "llr(least=2)"),
    ("llr(shape_corrected=True)", HeavyTailLR(shape_corrected=True), "llr(shape_corrected=True)"),
    ("llr(high=2, low=.5, soft=None)", HeavyTailLR(low=0.5, high=2, soft=None), "llr(soft=None, low=0.5, high=2)"),
    ("gradient_snr", GradientSNR(), "gradient_snr"),
    ("gradient_snr(decay=base)", GradientSNR(), "gradient_snr"),
    (
        "gradient_snr(normalize=max, decay=scaled)",
        GradientSNR(normalize="max", decay="scaled"),
        "gradient_snr(decay=scaled, normalize=max)",
    ),
    ("per_role", PerRole(), "per_role(ratios={})"),
    ("per_role(ratios={FFN: 6})", PerRole({"FFN": 6}), "per_role(ratios={FFN: 6})"),
    (
        "per_role(ratios={'*.0.mlp.*': 2.0, q: 1e-3}, default=0.5)",
        PerRole([("*.0.mlp.*", 2), ("q", 0.001)], default=0.5),
        "per_role(ratios={'*.0.mlp.*': 2, q: 0.001}, default=0.5)",
    ),
    (
        "sharpness*layer_decay(rate=0.9)",
        SharpnessLR() * LayerDecay(rate=0.9),
        "sharpness*layer_decay(rate=0.9)",
    ),
    (
        "llr * (blockwise * gradient_snr)",
        Product((HeavyTailLR(), BlockwiseLR(), GradientSNR())),
        "llr*blockwise*gradient_snr",
    ),
    (
        "reversed(llr*layer_decay)*only(sharpness, types=q)",
        Reversed(HeavyTailLR() * LayerDecay()) * Only(SharpnessLR(), "q"),
        "reversed(llr*layer_decay)*only(sharpness, types=q)",
    ),
    ("shuffled(of=llr*blockwise)", Shuffled(HeavyTailLR() * BlockwiseLR()), "shuffled(llr*blockwise)"),
]


@pytest.mark.parametrize(("text", "meant", "canonical"), READ, ids=[text for text, _, _ in READ])
def test_read_and_written(text, meant, canonical):
    found = make_block_lr(text)
    assert found == meant and hash(found) == hash(meant)
    assert str(found) == canonical
    assert make_block_lr(canonical) == meant
    assert eval(repr(found), vars(block_lr)) == meant if "types" not in text else True
    assert pickle.loads(pickle.dumps(found)) == copy.deepcopy(found) == meant


@pytest.mark.parametrize(
    ("table", "meant"),
    [
        ({"name": "blockwise", "emb": 5.0}, BlockwiseLR(emb=5)),
        ({"name": "reversed", "of": "blockwise"}, Reversed(BlockwiseLR())),
        ({"name": "reversed", "of": {"name": "blockwise", "emb": 5}}, Reversed(BlockwiseLR(emb=5))),
        ({"name": "only", "of": BlockwiseLR(), "types": ["QK", "Emb"]}, Only(BlockwiseLR(), ("Emb", "QK"))),
        ({"name": "per_role", "ratios": {"FFN": 2, "*.q.*": 3}}, PerRole({"FFN": 2, "*.q.*": 3})),
        ({"name": "llr", "stop": 0.5, "shape_corrected": True}, HeavyTailLR(stop=0.5, shape_corrected=True)),
        ({"name": "product", "factors": ["llr", {"name": "layer_decay"}]}, HeavyTailLR() * LayerDecay()),
        ({"name": "reversed", "of": "llr*layer_decay"}, Reversed(HeavyTailLR() * LayerDecay())),
        (BlockwiseLR(emb=3), BlockwiseLR(emb=3)),
        (None, None),
    ],
    ids=str,
)
def test_tables_instances_and_nothing(table, meant):
    assert make_block_lr(table) == meant


numbers = st.one_of(st.floats(0, 1e300, exclude_min=True), st.integers(1, 10**20))
plain = st.one_of(
    st.builds(
        BlockwiseLR,
        emb=numbers,
        qk=numbers,
        norm=numbers,
        floor=st.none() | st.just(0.0) | numbers,
        decay=st.sampled_from(["scaled", "base"]),
    ),
    st.builds(LayerDecay, rate=st.floats(0, 1, exclude_min=True)),
    st.builds(GradientSNR, normalize=st.sampled_from(["none", "max"]), decay=st.sampled_from(["scaled", "base"])),
    st.builds(
        SharpnessLR,
        power=st.floats(0, 1e300),
        source=st.sampled_from(["second_moment", "centred", "probe", "directional", "norm_11"]),
        reference=st.sampled_from(["Norm", "FFN"]),
        fixed=st.dictionaries(st.sampled_from(["Emb", "QK", "pos_emb"]), st.floats(1e-300, 1e300)),
        settle=st.none() | st.floats(0, 1e300),
        start=st.just("peak") | st.integers(0, 10**12) | st.floats(0, 1, exclude_min=True, exclude_max=True),
        soft=st.none() | st.integers(0, 10**9),
        ema=st.floats(0, 1, exclude_max=True),
    ),
    st.builds(
        HeavyTailLR,
        low=st.floats(1e-300, 1e300),
        shape_corrected=st.booleans(),
        by=st.sampled_from(["matrix", "type"]),
        every=st.integers(1, 10**9),
        stop=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    ),
    st.builds(PerRole, st.dictionaries(st.text(), st.floats(1e-300, 1e300), min_size=1, max_size=3)),
)
nested = st.recursive(
    plain,
    lambda of: st.one_of(
        st.builds(MeanMatched, of),
        st.builds(Reversed, of),
        st.builds(Shuffled, of, st.integers(0, 2**70)),
        st.builds(Only, of, st.sets(st.sampled_from(TYPES), min_size=1)),
        st.builds(lambda a, b: a if a.follows_lr and b.follows_lr else a * b, of, of),
    ),
    max_leaves=4,
)


@given(nested)
@example(PerRole({"\N{MICRO SIGN}": 1.0}))
def test_any_goes_round(block_lr):
    text = str(block_lr)
    assert make_block_lr(text) == block_lr
    assert str(make_block_lr(text)) == text
    assert parse_arm(f"adam-mini+{text}") == {"name": "adam-mini", "block_lr": text}


ANY = (
    "there are blockwise, gradient_snr, layer_decay, llr, per_role, sharpness, and of each of them mean_matched, only, "
    "reversed, shuffled"
)
REFUSED = [
    ("", f"'' is no block_lr; {ANY}, as in reversed.blockwise."),
    ("blockwize", rf"no block_lr is called 'blockwize' \(did you mean 'blockwise'\?\); {ANY}"),
    ("adamw", f"no block_lr is called 'adamw'; {ANY}"),
    ("layer-decay", r"'layer-decay' is no block_lr \(did you mean 'layer_decay'\?\)"),
    ("blockwise(", r"'blockwise\(' is no block_lr"),
    ("blockwise + 1", "is no block_lr"),
    ("blockwise; reversed", "is no block_lr"),
    ("blockwise.x", "is no block_lr"),
    ("blockwise()()", "is no block_lr"),
    ("lambda: 1", "is no block_lr"),
    ("blockwise\0", "is no block_lr"),
    ("reversed('blockwise')", "is no block_lr"),
    ("reversed(*x)", "is no block_lr"),
    ("blockwise(**x)", "is no block_lr"),
    ("blockwise(name=x)", "is no block_lr"),
    ("(" * 500, "is no block_lr"),
    ("blockwise(emb=5and 3)", "is no block_lr"),
    ("blockwise(decay='\\d')", "is no block_lr"),
    ("blockwise(emb=" + "1+" * 9000 + "1)", "."),
    ("blockwise(emb=" + "9" * 9000 + ")", "is no block_lr"),
    ("blockwise(5)", r"takes its arguments by name; there are decay, emb, .*; got blockwise\(5\)"),
    ("only(blockwise, Emb)", "by name, but for the block_lr that it is of; there are of, types"),
    ("blockwise(embb=5)", r"blockwise has no argument 'embb' \(did you mean 'emb'\?\); there are decay, emb"),
    ("blockwise(of=blockwise)", "blockwise has no argument 'of'"),
    ("blockwise(emb=1, emb=2)", "emb is given twice"),
    ("reversed(blockwise, of=blockwise)", "of is given twice"),
    ("reversed", r"an ablation of another block_lr; say of which, as reversed\(blockwise\)"),
    ("shuffled(seed=1)", "say of which"),
    ("reversed(blockwize)", "did you mean 'blockwise'"),
    ("blockwise(emb=-1)", "emb must be a finite number > 0, got -1"),
    ("blockwise(emb=0)", "emb must be a finite number > 0, got 0"),
    ("blockwise(emb=x)", "emb must be a finite number > 0, got 'x'"),
    ("blockwise(emb=True)", "emb must be a finite number > 0, got True"),
    ("blockwise(emb=None)", "emb must be a finite number > 0, got None"),
    ("blockwise(emb=1e999)", "emb must be a finite number > 0, got inf"),
    ("blockwise(emb=-True)", "-True is no number"),
    ("blockwise(emb=1+2)", r"1\+2 is no number, name or text"),
    ("blockwise(emb=2j)", "2j is no number, name or text"),
    ("blockwise(emb=f'x')", "is no number, name or text"),
    ("blockwise(emb=__import__('os'))", r"__import__\('os'\) is no number, name or text"),
    ("blockwise(decay=half)", "decay must be 'scaled' or 'base', got 'half'"),
    ("layer_decay(rate=x)", r"rate must be in \(0, 1\], got 'x'"),
    ("shuffled(blockwise, seed=-1)", "seed must be a whole number >= 0, got -1"),
    ("shuffled(blockwise, seed=1.5)", "seed must be a whole number >= 0, got 1.5"),
    ("shuffled(blockwise, seed=True)", "seed must be a whole number >= 0, got True"),
    (
        "only(blockwise, types=emb)",
        r"types takes block types and roles, got 'emb' \(did you mean 'Emb'\?\); allowed: Emb, QK, .*, tok_emb",
    ),
    ("only(blockwise, types=(Emb, x, 3))", "got 'x', 3; allowed"),
    ("only(blockwise, types=())", "got none; allowed"),
    ("only(blockwise, types=3)", "types must be names of block types or roles, got 3"),
    ("sharpness*", "is no block_lr"),
    ("sharpness*2", "is no block_lr"),
    ("sharpness*llr(5)", r"llr takes its arguments by name; there are decay, .*; got llr\(5\)"),
    ("sharpness**2", "is no block_lr"),
    ("sharpness/llr", "is no block_lr"),
    ("blockwise*sharpnes", r"no block_lr is called 'sharpnes' \(did you mean 'sharpness'\?\)"),
    ("blockwise(floor=1)*blockwise(floor=2)", "one factor at most has a floor, got"),
    ("product(sharpness)", "no block_lr is called 'product'"),
    ("sharpness(power=-1)", "power must be a number in .*got -1"),
    ("llr(every=0)", "every must be a whole number of steps >= 1, got 0"),
    ("llr(least=1)", "least must be a whole number >= 2, got 1"),
    ("per_role(ratios={q: -1})", "the ratio of 'q' must be a finite number > 0, got -1"),
    ("per_role(ratios={**x})", "is no number, name or text"),
    ("per_role(ratios=q)", "ratios must be a mapping"),
    ("per_role(ratios={q: 2}, default=0)", "'default' must be a finite number > 0, got 0"),
    ({"name": "product", "factors": ["llr"]}, "two factors or more, got 1"),
    ({"name": "product", "factors": "llr"}, "product takes factors, a list of block_lrs, and nothing else"),
    ({"name": "product", "factors": ["llr", "x"]}, "no block_lr is called 'x'"),
    ({"emb": 3}, "a block_lr as a table needs a name, one of blockwise, .*; got {'emb': 3}"),
    ({"name": 3}, "no block_lr is called 3"),
    ({"name": "reversed(blockwise)"}, "no block_lr is called"),
    ({"name": "blockwise", "emb": [1]}, "emb must be a finite number"),
    ({"name": "reversed"}, "say of which"),
    ({"name": "reversed", "of": "x"}, "no block_lr is called 'x'"),
]


@pytest.mark.parametrize(("spec", "message"), REFUSED, ids=[str(spec)[:40] for spec, _ in REFUSED])
def test_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_block_lr(spec)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: make_block_lr(3), "must be a name, a table, a BlockLR or None, got 3"),
        (lambda: make_block_lr(BlockwiseLR), "got the class BlockwiseLR; make one of it"),
        (lambda: make_block_lr({"name": "reversed", "of": 3}), "got 3"),
        (
            lambda: MeanMatched("blockwise"),
            r"mean_matched: expected a BlockLR, such as BlockwiseLR\(\), got 'blockwise'",
        ),
        (lambda: Reversed(None), "expected a BlockLR"),
        (lambda: Only(BlockwiseLR(), 3), "types must be names"),
        (lambda: sharpwise.AdamW(models.build("llama"), block_lr=3), "AdamW: block_lr must be"),
    ],
)
def test_other_kinds_are_type_errors(wrong, message):
    with pytest.raises(TypeError, match=message):
        wrong()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("adamw", {"name": "adamw"}),
        ("adam-mini", {"name": "adam-mini"}),
        ("adamw+blockwise", {"name": "adamw", "block_lr": "blockwise"}),
        (" lion + blockwise(emb=5.0) ", {"name": "lion", "block_lr": "blockwise(emb=5)"}),
        ("adam-mini+reversed(blockwise)", {"name": "adam-mini", "block_lr": "reversed(blockwise)"}),
        ("sgd+blockwise(emb=1e+2)", {"name": "sgd", "block_lr": "blockwise(emb=100)"}),
        ("adamw+llr*layer_decay", {"name": "adamw", "block_lr": "llr*layer_decay"}),
        ("sgd-sai+llr(stop=9)", {"name": "sgd-sai", "block_lr": "llr(stop=9)"}),
    ],
)
def test_arms(text, meant):
    assert parse_arm(text) == meant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "adamww",
            r"no optimizer is called 'adamww' \(did you mean 'adamw'\?\); there are adam-mini, adamh, adamw",
        ),
        ("", "no optimizer is called ''; there are adam-mini"),
        ("+blockwise", "no optimizer is called ''"),
        (
            "blockwise",
            r"no optimizer is called 'blockwise' .*; it is a learning rate per .*: adamw\+blockwise$",
        ),
        ("reversed(llr)", r": adamw\+reversed\(llr\)$"),
        (3, "no optimizer is called 3"),
        ("adamw+", r"'adamw\+' names no block_lr after the \+; write adamw, or for instance adamw\+blockwise"),
        ("adamw+lion", "no block_lr is called 'lion'"),
        ("adamw+blockwise+layer_decay", "'blockwise.layer_decay' is no block_lr"),
        ("adamw+reversed", "say of which"),
    ],
)
def test_arms_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_arm(text)
    with pytest.raises(ValueError, match=message):
        sharpwise.create_optimizer(models.build("llama"), text)


def test_the_optimizers_take_every_form():
    def multipliers(**options):
        optimizer = sharpwise.create_optimizer(models.build("gpt_neox"), lr=1e-3, **options)
        return [row["multiplier"] for row in optimizer.lr_multipliers()]

    want = multipliers(name="adamw", block_lr=Shuffled(BlockwiseLR(emb=5), seed=2))
    text = "shuffled(blockwise(emb=5), seed=2)"
    table = {"name": "shuffled", "of": {"name": "blockwise", "emb": 5}, "seed": 2}
    assert want == multipliers(name="adamw", block_lr=text)
    assert want == multipliers(name="adamw", block_lr=table)
    assert want == multipliers(name=f"adamw+{text}")
    assert want == multipliers(name=f"adamw+{text}", block_lr=None)
    assert want == multipliers(name=f"adamw+{text}", block_lr=table)
    assert want == multipliers(**parse_arm(f"adamw+{text}"))
    with pytest.raises(ValueError, match=r"blockwise in 'adamw\+blockwise', and block_lr=layer_decay; leave out one"):
        multipliers(name="adamw+blockwise", block_lr="layer_decay")
    with pytest.raises(ValueError, match="AdamW: no block_lr is called 'x'"):
        multipliers(name="adamw", block_lr="x")
    with pytest.raises(ValueError, match="AdamW: blockwise: emb must be"):
        multipliers(name="adamw", block_lr="blockwise(emb=-1)")


class Mine(BlockLR):
    """Somebody else's."""

    name = "mine"

    def multipliers(self, segments, measured=block_lr.base.NOTHING):
        return [2.0 + bool(s.bias) for s in segments]


def test_what_others_write_is_wrapped_and_has_a_name():
    block_lr = Reversed(Mine(decay="base"))
    assert str(block_lr) == "reversed(mine(decay=base))"
    optimizer = sharpwise.Lion(models.build("gpt2"), block_lr=block_lr)
    assert {row["multiplier"] for row in optimizer.lr_multipliers() if row["role"] == "tok_emb"} == {3.0}
    assert make_block_lr(block_lr) is block_lr


def test_names_in_tables_are_those_of_the_classes():
    for table in (BLOCK_LRS, ABLATIONS):
        assert {name: kind.name for name, kind in table.items()} == dict(zip(table, table, strict=True))
    assert not set(BLOCK_LRS) & set(ABLATIONS)
    assert all("+" not in name for name in OPTIMIZERS)
