"""SharpnessLR by the probe: the multipliers that its equation gives for what `sharpwise.probes.sharpness` finds."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import sharpwise
from reference import driver, models, sharpness_lr
from reference.blockwise_lr import RATIO_OF_ROLE
from reference.rig import BARE, named, steps
from sharpwise.probes import Curvature, calibrate, norm_11, sharpness

BATCHES = [torch.randint(0, 13, (2, 7), generator=torch.Generator().manual_seed(i)) for i in range(2)]


class Tiny(nn.Module):
    """Returns logits; nothing of Hugging Face's."""

    def __init__(self):
        super().__init__()
        self.wte, self.ln_f = nn.Embedding(13, 8), nn.LayerNorm(8)
        self.mlp, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 13)

    def forward(self, x):
        x = self.wte(x)
        return self.lm_head(self.ln_f(x + torch.tanh(self.mlp(x))))


TINY = {"wte.*": "tok_emb", "ln_f.*": "norm", "mlp.*": "up", "lm_head.*": "head"}


def found(model, seed, overrides=None):
    """S of every segment, in the order of the map; NaN where the probe finds nothing."""
    blocks = sharpwise.BlockMap.of(model, overrides=overrides)
    values = [
        e.value for e in sharpness(model, BATCHES, blocks=blocks, seed=seed).select(quantity="sharpness", by="segment")
    ]
    assert len(values) == len(blocks.segments)
    return np.array([v if v > 0 else np.nan for v in values]), blocks


def ratios(S, blocks, settled=True, **source):
    """The reference's multipliers of measured S."""

    class Part:
        def __init__(self, segment):
            self.role, self.index = str(segment.role), np.arange(segment.numel)

    pieces = {i: [Part(segment)] for i, segment in enumerate(blocks.segments)}
    reference = sharpness_lr.Sharpness(pieces, **source)
    reference.S, reference.settled[:] = S, settled
    return reference.multipliers()


@pytest.mark.parametrize("by", ["type", "module"])
@pytest.mark.parametrize("rule", BARE)
@pytest.mark.parametrize("name", ["llama", "tiny"])
def test_multipliers_follow_the_probe(name, rule, by):
    """Measured at steps 0 and 2 with the weights of then, averaged in the logarithm; gradients are left alone."""
    model = (models.build("llama") if name == "llama" else Tiny()).train()
    overrides = TINY if name == "tiny" else None
    constructor, hyper = BARE[rule]
    block_lr = sharpwise.SharpnessLR(source="probe", start=0, every=2, stop=3, soft=0, power=0.4, by=by, ema=0.25)
    options = {"blocks": overrides} if overrides else {}
    optimizer = constructor(model, **hyper, block_lr=block_lr, probe_batches=BATCHES, **options)
    S = None
    for t, recorded in enumerate(driver.gradients(named(model), 4)):
        if t in (0, 2):
            now, blocks = found(copy.deepcopy(model), t, overrides)
            S = now if S is None else np.exp(0.25 * np.log(S) + 0.75 * np.log(now))
            S = np.where(np.isnan(S), now, S)
        for parameter, p in named(model):
            p.grad = None if recorded[parameter] is None else recorded[parameter].clone()
        grads = {parameter: p.grad for parameter, p in named(model)}
        random = torch.get_rng_state()
        optimizer.step()
        for parameter, p in named(model):
            assert p.grad is grads[parameter], "another gradient"
            assert p.grad is None or torch.equal(p.grad, recorded[parameter]), "the gradient changed"
        assert model.training and torch.equal(random, torch.get_rng_state())
        got = [row["multiplier"] for row in optimizer.lr_multipliers()]
        want = ratios(S, blocks, settled=t >= 2, power=0.4, by=by)
        assert np.allclose(got, want, rtol=1e-5, atol=0), (t, got, want)
    assert len(set(np.round(got, 4))) > 2


def test_the_probe_goes_with_products_and_ablations():
    model = models.build("llama")
    spelling = "reversed(sharpness(source=probe, start=0, every=1, stop=1, soft=0, ema=0)*layer_decay(rate=0.8))"
    optimizer = sharpwise.Lion(model, lr=0.0, block_lr=spelling, probe_batches=BATCHES)
    steps(optimizer, named(model), driver.gradients(named(model), 2))
    twin = models.build("llama")
    S, blocks = found(twin, 1)
    own = ratios(S, blocks)
    depth = [row["multiplier"] for row in sharpwise.AdamW(twin, block_lr="layer_decay(rate=0.8)").lr_multipliers()]
    values, rank = np.unique(np.round(own * depth, 9), return_inverse=True)
    got = [row["multiplier"] for row in optimizer.lr_multipliers()]
    assert np.allclose(got, values[::-1][rank], rtol=1e-5)


@pytest.mark.parametrize("cut_at", [1, 2, 3])
def test_resumed_in_mid_run(cut_at):
    """The probe's labels are drawn by the step, so that a resumed run draws the same."""
    make = lambda m: sharpwise.Lion(  # noqa: E731
        m, lr=1e-3, block_lr="sharpness(source=probe, start=0, every=2, soft=3)", probe_batches=BATCHES
    )
    whole, part, resumed = (models.build("llama", seed=s) for s in (0, 0, 5))
    grads = driver.gradients(named(whole), 5)
    one, two = make(whole), make(part)
    steps(one, named(whole), grads)
    steps(two, named(part), grads[:cut_at])
    three = make(resumed)
    resumed.load_state_dict(part.state_dict())
    three.load_state_dict(two.state_dict())
    steps(three, named(resumed), grads[cut_at:])
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llama", "tiny"])
def test_calibrate(name):
    """Fixed ratios, to three digits, for the types that are there; the model stays as it is."""
    model = models.build("llama") if name == "llama" else Tiny()
    overrides = TINY if name == "tiny" else None
    before = copy.deepcopy(model.state_dict())
    S, blocks = found(copy.deepcopy(model), 0, overrides)
    fixed = calibrate(model, BATCHES, blocks=blocks, power=0.4, max_ratio=6.0)
    want = ratios(S, blocks, power=0.4, max_ratio=6.0)
    kinds = {RATIO_OF_ROLE[str(s.role)]: r for s, r in zip(blocks.segments, want, strict=True)}
    for kind in ("emb", "qk", "ffn", "vo", "norm", "head", "pos_emb", "other"):
        assert getattr(fixed, kind) == pytest.approx(kinds.get(kind, 1.0), rel=5.1e-3), kind
        assert getattr(fixed, kind) == float(f"{getattr(fixed, kind):.3g}")
    assert fixed.floor is None and sharpwise.make_block_lr(str(fixed)) == fixed
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    got = {row["multiplier"] for row in sharpwise.AdamW(model, block_lr=fixed, blocks=blocks).lr_multipliers()}
    assert got == {float(f"{r:.3g}") for r in want}


def test_calibrate_on_a_map_of_more_than_is_trained():
    model = models.build("llama")
    blocks = sharpwise.BlockMap.of(model)
    model.model.embed_tokens.requires_grad_(False)
    fixed = calibrate(model, BATCHES, blocks=blocks)
    assert fixed == calibrate(model, BATCHES) and fixed.emb == 1.0


def test_calibrate_of_other_statistics_and_maps():
    model = models.build("gpt2")
    fixed = calibrate(model, BATCHES, normalize="geometric", max_ratio=4, tied="lookup", fixed={"VO": 2})
    sizes = dict.fromkeys(("emb", "qk", "ffn", "norm", "pos_emb"), 0)
    for s in sharpwise.BlockMap.of(model):
        if (kind := RATIO_OF_ROLE[str(s.role)]) != "vo":
            sizes[kind] += s.numel
    logs = sum(n * np.log(getattr(fixed, kind)) for kind, n in sizes.items())
    assert fixed.vo == 2 and abs(logs) < 5e-3 * sum(sizes.values())
    others = [
        calibrate(model, BATCHES, normalize="geometric", max_ratio=1e3, tied=tied).emb for tied in ("both", "head")
    ]
    assert others[0] != fixed.emb != others[1]
    rows = calibrate(model, BATCHES, source="norm_11", max_ratio=1e9, power=1)
    one = norm_11(Curvature(model, BATCHES, "gauss-newton"), samples=20).select(by="type")
    assert rows.qk == pytest.approx(max(one.value(of="Norm") / one.value(of="QK"), 1), rel=5.1e-3)


def test_calibrate_keeps_the_decay():
    model = models.build("llama")
    assert calibrate(model, BATCHES, decay="base").decay == "base"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"by": "module"}, "calibrate gives one ratio per type, got by='module'"),
        ({"source": "centred"}, "calibrate has a model and no optimizer, got source='centred'; leave it out"),
        ({"source": "directional"}, "got source='directional'"),
        ({"power": -1}, "power must be"),
        ({"reference": "Other"}, "Other, which no trained parameter"),
    ],
)
def test_calibrate_refuses(settings, says):
    with pytest.raises(ValueError, match=says):
        calibrate(models.build("llama"), BATCHES, **settings)


def test_the_reference_type_has_1():
    """Also Emb, whose positions are a type of their own."""
    blocks = sharpwise.BlockMap.of(models.build("gpt2"))
    S = [{"tok_emb": 4.0, "pos_emb": 400.0}.get(str(segment.role), 1.0) for segment in blocks.segments]
    block_lr = sharpwise.SharpnessLR(reference="Emb")
    multipliers = block_lr.multipliers(blocks.segments, {block_lr: S})
    assert dict(zip([str(s.role) for s in blocks.segments], multipliers, strict=True))["tok_emb"] == 1.0


def test_the_probe_goes_with_a_pickle():
    model = models.gpt2()
    optimizer = sharpwise.Lion(model, lr=1e-4, block_lr="sharpness(source=probe, start=0)", probe_batches=BATCHES)
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert other.options.probe is optimizer.options.probe is not None
