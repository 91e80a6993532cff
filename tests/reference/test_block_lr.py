"""Learning rates per block against the equations: ratios, both floors, both decays, fused matrices by rows."""

import pytest
import torch

import sharpwise
from reference import adam_mini, adamw, blockwise_lr, cuts, driver, layer_decay, lion, models, sgd

RATIOS = {"emb": 9.5, "qk": 7.25, "ffn": 5.5, "vo": 3.75, "norm": 1.5, "head": 0.5, "pos_emb": 2.25, "other": 4.0}
RULES = {
    "adamw": (adamw, sharpwise.AdamW, {"lr": 2e-3, "betas": (0.83, 0.961), "eps": 1e-4, "weight_decay": 0.23}),
    "adam-mini": (
        adam_mini,
        sharpwise.AdamMini,
        {"lr": 2e-3, "betas": (0.83, 0.961), "eps": 1e-4, "weight_decay": 0.23},
    ),
    "lion": (lion, sharpwise.Lion, {"lr": 7e-4, "betas": (0.8837, 0.9713), "weight_decay": 0.9}),
    "sgd": (
        sgd,
        sharpwise.SGD,
        {"lr": 0.02, "momentum": 0.9, "dampening": 0.9, "weight_decay": 0.4, "decoupled_weight_decay": True},
    ),
    "sgd, coupled": (sgd, sharpwise.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
}


def warm_up_and_decay(peak, t):
    """Rises through the floor of 0.3 peak, falls below it, is 0 twice, and rises to a new peak: 15 values."""
    parts = [0.0, 0.1, 0.5, 0.8, 1.0, 0.9, 0.7, 0.45, 0.3, 0.2, 0.0, 0.25, 0.6, 1.3, 0.65]
    return peak * parts[t]


def setup(model_name, rule_name, *, block_lr, reference, dtype=torch.float32, grouped=False, compiled=None, **more):
    rule, constructor, hyper = RULES[rule_name]
    model = models.build(model_name, dtype)
    named = list(model.named_parameters())
    pieces = driver.pieces_of(model_name, named)
    blocks = {name: cuts.mini_blocks(parts) for name, parts in pieces.items()} if rule is adam_mini else None
    if grouped:
        tensors = dict(named)
        matrices, vectors = driver.split_groups(named)
        second = {"lr": hyper["lr"] * 0.5, "weight_decay": 0.011}
        first = [
            {"params": [tensors[n] for n in matrices]},
            {"params": [tensors[n] for n in vectors], **second},
        ]
        groups = [(matrices, hyper), (vectors, {**hyper, **second})]
    else:
        first, groups = model, [(driver.names_of(named), hyper)]
    options = {"model": model, **more} if grouped else more
    optimizer = constructor(first, **hyper, **options, block_lr=block_lr, compile=compiled)
    twin = driver.Twin(rule, named, groups, pieces=pieces, block_lr=reference, blocks=blocks)
    return optimizer, named, twin, [group[1]["lr"] for group in groups]


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("decay", ["scaled", "base"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", models.BUILD)
def test_ratios(model, rule, decay, compiled):
    """Every role at its own ratio, fused q, k and v by rows (columns in a Conv1D)."""
    optimizer, named, twin, (lr,) = setup(
        model,
        rule,
        block_lr=sharpwise.BlockwiseLR(**RATIOS, decay=decay),
        reference=lambda: blockwise_lr.BlockwiseLR(RATIOS, decay=decay),
        compiled=compiled,
    )
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(lr, t)], steps=12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["gpt2", "gpt_neox"])
def test_ratios_in_other_dtypes(model, dtype):
    optimizer, named, twin, (lr,) = setup(
        model,
        "adamw",
        block_lr=sharpwise.BlockwiseLR(**RATIOS),
        reference=lambda: blockwise_lr.BlockwiseLR(RATIOS),
        dtype=dtype,
    )
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(lr, t)], steps=12)


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("decay", ["scaled", "base"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", ["gpt2", "gpt_neox"])
def test_floor(model, rule, decay, grouped):
    """A warm-up and decay through the floor and 0; every group remembers its own peak."""
    floor = RULES[rule][2]["lr"] * 0.3
    optimizer, named, twin, peaks = setup(
        model,
        rule,
        block_lr=sharpwise.BlockwiseLR(**RATIOS, floor=floor, decay=decay),
        reference=lambda: blockwise_lr.BlockwiseLR(RATIOS, floor=floor, decay=decay),
        grouped=grouped,
    )
    driver.run(optimizer, named, twin, lambda t: [warm_up_and_decay(peak, t) for peak in peaks], steps=15)


def test_floor_zero_is_no_floor():
    optimizer, named, twin, (peak,) = setup(
        "gpt2",
        "adamw",
        block_lr=sharpwise.BlockwiseLR(**RATIOS, floor=0.0),
        reference=lambda: blockwise_lr.BlockwiseLR(RATIOS),
    )
    driver.run(optimizer, named, twin, lambda t: [warm_up_and_decay(peak, t)], steps=15)


@pytest.mark.parametrize("cut_at", [3, 6, 12])
def test_peak_is_resumed(cut_at):
    """The peak is in the state dict: a run resumed while the rate falls keeps its multipliers."""
    floor = RULES["adamw"][2]["lr"] * 0.3
    options = {
        "block_lr": sharpwise.BlockwiseLR(**RATIOS, floor=floor),
        "reference": lambda: blockwise_lr.BlockwiseLR(RATIOS, floor=floor),
    }
    optimizer, named, twin, (peak,) = setup("gpt2", "adamw", **options)
    grads = driver.gradients(named, 15)
    driver.run(optimizer, named, twin, lambda t: [warm_up_and_decay(peak, t)], grads=grads[:cut_at])
    resumed, other, _, _ = setup("gpt2", "adamw", **options)
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for (_, p), (_, q) in zip(named, other, strict=True):
            q.copy_(p)
    driver.run(resumed, other, twin, lambda t: [warm_up_and_decay(peak, t + cut_at)], grads=grads[cut_at:])


@pytest.mark.parametrize("decay", ["scaled", "base"])
@pytest.mark.parametrize("rule", ["adamw", "adam-mini", "lion"])
@pytest.mark.parametrize("model", models.BUILD)
def test_layer_decay(model, rule, decay):
    n_layers = {"gpt2": models.GPT2, "llama": models.LLAMA, "gpt_neox": models.NEOX, "nanogpt": models.NANOGPT}[model]
    optimizer, named, twin, (lr,) = setup(
        model,
        rule,
        block_lr=sharpwise.LayerDecay(rate=0.65, decay=decay),
        reference=lambda: layer_decay.LayerDecay(0.65, n_layers["layers"], decay=decay),
    )
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(lr, t)], steps=12)


@pytest.mark.parametrize("model", models.BUILD)
def test_multipliers_are_the_ratios(model):
    """`state["lr_multiplier"]` has one ratio per segment in row order; the table says the same."""
    optimizer, named, twin, _ = setup(
        model,
        "adamw",
        block_lr=sharpwise.BlockwiseLR(**RATIOS),
        reference=lambda: blockwise_lr.BlockwiseLR(RATIOS),
    )
    optimizer.init_state()
    table = list(optimizer.lr_multipliers())
    for name, p in named:
        want = [RATIOS[blockwise_lr.RATIO_OF_ROLE[piece.role]] for piece in twin.pieces[name]]
        assert optimizer.state[p]["lr_multiplier"].tolist() == want, name
        rows = [row for row in table if row["name"] == name]
        assert [row["multiplier"] for row in rows] == want
        assert [row["role"] for row in rows] == [piece.role for piece in twin.pieces[name]]
        assert [row["layer"] for row in rows] == [piece.layer for piece in twin.pieces[name]]


@pytest.mark.parametrize("decay", ["scaled", "base"])
@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
def test_matrices_of_one_shape_that_are_cut_differently(compiled, decay):
    """The same multipliers on other rows: halves, thirds by turns, and columns."""
    model = torch.nn.Module()
    for name in "abc":
        model.register_parameter(name, torch.nn.Parameter(torch.ones(12, 12)))
    halves = [{"role": "q", "length": 6}, {"role": "k", "start": 6, "length": 6}]
    turns = [
        {"role": "q", "length": 3, "stride": 6, "count": 2},
        {"role": "k", "start": 3, "length": 3, "stride": 6, "count": 2},
    ]
    blocks = {"a": halves, "b": turns, "c": [{**part, "dim": 1} for part in halves]}
    block_lr = sharpwise.PerRole({"q": 2, "k": 3}, decay=decay)
    hyper = {"lr": 0.125, "weight_decay": 0.5, "decoupled_weight_decay": True}
    optimizer = sharpwise.SGD(model, **hyper, blocks=blocks, block_lr=block_lr, compile=compiled)
    for p in model.parameters():
        p.grad = torch.full_like(p, 4.0)
    optimizer.step()
    m = {name: torch.empty(12) for name in "abc"}
    m["a"][:6], m["a"][6:] = 2.0, 3.0
    m["b"] = torch.tensor([2.0, 2, 2, 3, 3, 3, 2, 2, 2, 3, 3, 3])
    m["c"] = m["a"]
    for name, p in model.named_parameters():
        want = (1 - 0.0625 * (m[name] if decay == "scaled" else 1.0) - 0.5 * m[name]).expand(12, 12)
        assert torch.equal(p, want if name == "c" else want.T), name


def test_defaults_are_the_papers():
    optimizer, named, twin, (lr,) = setup(
        "nanogpt", "adamw", block_lr="blockwise", reference=lambda: blockwise_lr.BlockwiseLR({})
    )
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(lr, t)], steps=3)
    optimizer, named, twin, (lr,) = setup(
        "nanogpt",
        "adamw",
        block_lr="layer_decay",
        reference=lambda: layer_decay.LayerDecay(0.75, models.NANOGPT["layers"]),
    )
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(lr, t)], steps=3)


def test_layer_decay_without_layers():
    """An embedding and a head: one step apart."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False))
    blocks = {"0.weight": "tok_emb", "1.weight": "head"}
    optimizer = sharpwise.SGD(model, lr=1.0, block_lr=sharpwise.LayerDecay(rate=0.5), blocks=blocks)
    assert [row["multiplier"] for row in optimizer.lr_multipliers()] == [0.5, 1.0]


def test_reference_of_the_floor():
    """The formula at its corners, by hand: peak 1, floor 0.25, ratio 8."""
    reference = blockwise_lr.BlockwiseLR({"qk": 8}, floor=0.25)
    for lr, want in [(0.1, 0.8), (0.5, 4.0), (1.0, 8.0), (0.625, 0.25 + 7.75 / 2), (0.25, 0.25), (0.0, 0.0)]:
        reference.observe(lr)
        assert reference.rates("q", 0, lr) == (want, want)
    assert [
        layer_decay.multiplier(role, layer, 2, 0.5)
        for role, layer in [("tok_emb", None), ("q", 0), ("norm", 1), ("norm", None), ("head", None)]
    ] == [0.125, 0.25, 0.5, 1.0, 1.0]
