"""Several views of one parameter: segments that get different rules move as if they were parameters of their own."""

import itertools

import pytest
import torch
from engine.views import BLOCKS, LAYOUTS, MIXED, STRIDED, TURNED, Model, optimizer_of, segments_of, train

RULES = {"mixed": MIXED, "blocks": BLOCKS, "turned": TURNED}
GUARDS = {"plain": {}, "clip": {"max_grad_norm": 0.5}, "skip": {"on_nonfinite": "skip"}}
BLOCK_LRS = [
    None,
    "blockwise(qk=2, vo=3, ffn=4)",
    "sharpness(start=1, every=2, by=module, power=2)",
    "gradient_snr",
    "llr(every=2, stop=4, soft=2, least=4)*blockwise(qk=2)",
]


def by_of(rules, name):
    """A bias is no matrix: there by element."""
    return {role: "adamw" if name == "bias" and kind.startswith("mini") else kind for role, kind in rules.items()}


def near(got, want, tolerance, what):
    got, want = got.detach().double().reshape(-1), want.detach().double().reshape(-1)
    assert got.shape == want.shape, what
    if tolerance == 0:
        assert torch.equal(got, want), (what, float((got - want).abs().max()))
    else:
        assert (got - want).norm() <= tolerance * want.norm() + 1e-12, (what, float((got - want).norm()))


def agree(one, other, segments, tolerance):
    """The fused parameter and its parts, and the state of both."""
    (fused, optimizer), (apart, separate) = one, other
    for name in ("first", "last"):
        near(fused.get_parameter(name), apart.get_parameter(name), tolerance, name)
    held = optimizer.state[fused.fused]
    for own in segments:
        part = apart.get_parameter(str(own.role))
        near(own.take(fused.fused), part, tolerance, own.role)
        for key, value in separate.state[part].items():
            if key in held and held[key].shape == fused.fused.shape:
                near(own.take(held[key]), value, tolerance, (own.role, key))
            elif key == "step":
                assert held["step"] == value
            elif value.shape == part.shape or key == "exp_avg_sq":
                names = [n for n in held if n.startswith(f"{key}.") and str(own.role) in n.split(".")[1].split("+")]
                assert len(names) == 1, (key, own.role, sorted(held))
                if names[0] == f"{key}.{own.role}":
                    near(held[names[0]], value, tolerance, names)


def both(name, rules, *, n=8, steps=6, bad=(), dtype=torch.float32, **options):
    models = Model(name, n, dtype), Model(name, n, dtype, apart=True)
    segments = segments_of(models[0])
    runs = [train(m, optimizer_of(m, by_of(rules, name), **options), range(steps), segments, bad) for m in models]
    return (*runs, segments)


@pytest.mark.pairwise
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", [*LAYOUTS, *STRIDED])
@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
def test_parts_move_as_parameters_of_their_own(name, rules, guard, compiled):
    bad = (2,) if guard == "skip" else ()
    storages = itertools.cycle(("fp32", "bf16") if compiled is None or guard == "skip" else ("bf16", "fp32"))
    for block_lr, storage in zip(BLOCK_LRS, storages, strict=False):
        options = {**GUARDS[guard], "block_lr": block_lr, "storage": storage, "compile": compiled}
        one, other, segments = both(name, RULES[rules], bad=bad, **options)
        exact = compiled is False and guard != "clip" and block_lr not in (BLOCK_LRS[2], BLOCK_LRS[4])
        narrow = 1e-6 if storage == "fp32" else 1e-2
        agree(one, other, segments, 0 if exact else narrow)
        assert one[1].state[one[0].fused]["step"] == 5 + (not bad)
        assert other[1].skipped_steps == one[1].skipped_steps == len(bad)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", [*LAYOUTS, *STRIDED])
def test_stochastic_rounding_is_that_of_the_whole_parameter(name, rules):
    """Under each of its rules alone: its elements keep their numbers, and draw the same noise."""
    by = by_of(RULES[rules], name)
    segments = segments_of(Model(name))
    for compiled, block_lr in itertools.product((None, False), (None, BLOCK_LRS[1])):
        options = {"stochastic_rounding": True, "storage": "bf16", "compile": compiled, "block_lr": block_lr}
        options["max_grad_norm"] = 0.5

        def run(by, options=options):
            model = Model(name, dtype=torch.bfloat16)
            return train(model, optimizer_of(model, by, **options), range(4), segments)

        mixed, _ = run(by)
        for own in segments:
            whole, _ = run(dict.fromkeys(by, by[str(own.role)]))
            near(own.take(mixed.fused), own.take(whole.fused), 0, own.role)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rows", {}),
        ("rows", {"max_grad_norm": 0.5, "block_lr": BLOCK_LRS[2]}),
        ("columns", {}),
        ("columns", {"max_grad_norm": 0.5, "block_lr": BLOCK_LRS[1]}),
        ("interleaved", {"on_nonfinite": "skip"}),
        ("strided rows", {}),
        ("strided columns", {}),
        ("experts by rows", {}),
        ("experts by columns", {}),
        ("experts by columns", {"max_grad_norm": 0.5}),
        ("bias", {}),
    ],
)
@pytest.mark.parametrize("rules", ["mixed", "blocks"])
def test_compiled_parts_move_as_the_reference_moves_them(name, options, rules):
    one = both(name, RULES[rules], n=256, steps=3, compile=True, **options)[0]
    two, other, segments = both(name, RULES[rules], n=256, steps=3, compile=False, **options)
    agree(one, other, segments, 1e-6)
    for (key, p), q in zip(one[0].named_parameters(), two[0].parameters(), strict=True):
        near(p, q, 1e-6, key)


@pytest.mark.parametrize("n", [8, 256], ids=lambda n: f"n={n}")
@pytest.mark.parametrize("name", ["rows", "columns", "strided columns", "experts by columns"])
def test_compiled_parts_round_stochastically_as_the_reference(name, n):
    options = {"stochastic_rounding": True, "storage": "bf16", "n": n, "steps": 3, "dtype": torch.bfloat16}
    (one, _), *_ = both(name, MIXED, compile=True, **options)
    (two, _), *_ = both(name, MIXED, compile=False, **options)
    different = sum(int((p != q).sum()) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert different <= 1e-3 * sum(p.numel() for p in one.parameters()), different
