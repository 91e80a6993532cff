"""Runs a sharpwise optimizer on recorded random gradients beside a reference, and compares after every step."""

import math

import numpy as np
import torch

from reference import cuts, sharpness_lr
from reference.measured_lr import Follows

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def gradients(named, steps, seed=1, missing=(3, 7)):
    """Recorded gradients: [{name: tensor or None}] per step, of widely different scale per parameter and step.

    Some elements and rows are exactly zero, and one parameter has no gradient at the steps `missing`. Not at the first
    unless asked for: small tensors move together only as long as all have taken the same number of steps.
    """
    generator = torch.Generator().manual_seed(seed)
    recorded = []
    for t in range(steps):
        grads = {}
        for number, (name, p) in enumerate(named):
            g = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            g *= 10.0 ** (number % 5 - 3) * (1 + math.cos(1.3 * t + number) * 0.9)
            if g.dim() > 1:
                g[t % g.shape[0]] = 0  # tokens that do not occur
            if number == 1 and t in missing:
                g = None
            grads[name] = None if g is None else g.to(p.dtype)
        recorded.append(grads)
    return recorded


def clipped(grads, max_norm):
    """Gradients times min(1, max_norm / (norm of all of them + 1e-6)), in float64."""
    whole = {name: g.double() for name, g in grads.items() if g is not None}
    norm = math.sqrt(math.fsum(float((g * g).sum()) for g in whole.values()))
    return {name: whole[name] * min(1.0, max_norm / (norm + 1e-6)) if name in whole else None for name in grads}


def schedule(base, t):
    """A learning rate that changes every step."""
    return base * (0.4 + abs(math.sin(1.7 * t + 0.3)))


def as_array(tensor):
    """float64 copy."""
    return tensor.detach().double().numpy().copy()


def error(got, want, scale=0.0):
    """Norm-relative error of a tensor against an array (absolute where that is zero); norms count at least `scale`."""
    got = as_array(got)
    assert got.shape == want.shape, (got.shape, want.shape)
    assert np.isfinite(want).all()
    norm = max(np.linalg.norm(want), scale)
    distance = np.linalg.norm(got - want)
    return distance / norm if norm else distance


def bf16_ulps(got, want):
    """Largest distance, in bf16 units in the last place, between a bf16 tensor and an array rounded to bf16.

    Below that a millionth of the largest element is forgiven: sums of bf16 numbers cancel in fp64, and almost in fp32.
    """
    if not want.size:
        return 0.0
    rounded = torch.from_numpy(want).to(torch.bfloat16).double().numpy()
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(rounded), 2.0**-126))) - 7)
    distance = np.abs(as_array(got) - rounded) - 1e-6 * np.max(np.abs(want))
    return max(0.0, float(np.max(distance / ulp)))


class Twin:
    """The reference's copy of the parameters and state.

    Args:
        rule: a module of this package with `init`, `step` and `STATE`.
        named: the parameters of the model under test.
        pieces: {name: [cuts.Piece]}; only needed for multipliers and Adam-mini.
        groups: [(names, hyperparameters with lr)]; every parameter in exactly one.
        block_lr: function () -> reference of the block_lr, one per group (each has its own peak); one that follows
            measurements (`measured_lr.Follows`) looks at `p`, `grads` and `second_moment`, and is the same for all.
        blocks: {name: list of index arrays} for Adam-mini.
    """

    def __init__(self, rule, named, groups, *, pieces=None, block_lr=None, blocks=None):
        self.rule, self.pieces, self.blocks = rule, pieces, blocks
        self.seen = {}
        self.history = {}
        self.p = {name: as_array(p) for name, p in named}
        extra = (lambda name: {"blocks": blocks[name]}) if blocks else (lambda name: {})
        self.extra = extra
        for name, p in self.p.items():
            self.scale(name, "p", p)
        self.state = {name: rule.init(p, **extra(name)) for name, p in self.p.items()}
        self.groups = [(list(names), dict(hyper), block_lr() if block_lr else None) for names, hyper in groups]
        assert sorted(n for names, _, _ in self.groups for n in names) == sorted(self.p)

    def scale(self, name, key, value):
        """The largest norm so far. A few numbers may pass through zero: what they were measures their rounding."""
        self.seen[name, key] = max(self.seen.get((name, key), 0.0), float(np.linalg.norm(value)))
        return self.seen[name, key]

    @property
    def measured(self):
        """What follows measurements: one for all groups, or none."""
        return list({id(policy): policy for _, _, policy in self.groups if isinstance(policy, Follows)}.values())

    def second_moment(self, name):
        """v / (1 - b2^t), one number per element as in the flattened parameter; None before the first step."""
        state = self.state[name]
        if state["step"] == 0:
            return None
        b2 = next(hyper["betas"][1] for names, hyper, _ in self.groups if name in names)
        v = np.empty(self.p[name].size)
        if self.blocks is None:
            v[:] = state["exp_avg_sq"].ravel()
        else:
            for index, of_block in zip(self.blocks[name], state["exp_avg_sq"].ravel(), strict=True):
                v[index] = of_block
        return v / (1 - b2 ** state["step"])

    def variance(self, name):
        """Of the gradients of each element of the flattened parameter so far; None before the second step."""
        found = self.history.get(name, [])
        betas = next(hyper["betas"] for names, hyper, _ in self.groups if name in names)
        return sharpness_lr.variance(np.array(found), *betas) if len(found) > 1 else None

    def rates(self, name, policy, lr):
        """Learning rates of update and decay: numbers, or arrays of the parameter's shape."""
        if policy is None:
            return lr, lr
        update, decay = np.full(self.p[name].size, np.nan), np.full(self.p[name].size, np.nan)
        for number, piece in enumerate(self.pieces[name]):
            measured = isinstance(policy, Follows)
            own = policy.rates_at(name, number, lr) if measured else policy.rates(piece.role, piece.layer, lr)
            update[piece.index], decay[piece.index] = own
        assert not np.isnan(update).any()
        return update.reshape(self.p[name].shape), decay.reshape(self.p[name].shape)

    def step(self, grads, lrs):
        """One step of every parameter that has a gradient; lrs: one per group."""
        self.grads = {name: None if g is None else as_array(g) for name, g in grads.items()}
        for policy in self.measured:
            policy.measure(self)
        for name, g in self.grads.items():
            if g is not None and self.measured:
                self.history.setdefault(name, []).append(g.ravel())
        for (names, hyper, policy), lr in zip(self.groups, lrs, strict=True):
            if policy is not None:
                policy.observe(lr)
            for name in names:
                if grads[name] is None:
                    continue
                update_lr, decay_lr = self.rates(name, policy, lr)
                self.p[name], self.state[name] = self.rule.step(
                    self.p[name],
                    as_array(grads[name]),
                    self.state[name],
                    lr=update_lr,
                    decay_lr=decay_lr,
                    **{key: value for key, value in hyper.items() if key != "lr"},
                    **self.extra(name),
                )


def run(optimizer, named, twin, lrs, *, steps=12, grads=None, tolerance=None, max_norm=None):
    """Steps both, and compares every parameter and every state tensor after every step.

    Args:
        lrs: function t -> [lr per group], t from 0; set on `param_groups`, as a scheduler does.
        max_norm: the reference is given gradients that are clipped to it; the optimizer clips by itself.
    """
    dtype = named[0][1].dtype
    grads = grads or gradients(named, steps)
    for t, recorded in enumerate(grads):
        rates = lrs(t)
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        for name, p in named:
            p.grad = None if recorded[name] is None else recorded[name].clone()
            if dtype is torch.bfloat16:  # rounding is per step: the reference starts from the stored parameter
                twin.p[name] = as_array(p)
            for key in twin.rule.STATE:  # and from the stored state
                own = optimizer.state[p].get(key) if key in twin.state[name] else None
                if own is not None and own.dtype is torch.bfloat16:
                    twin.state[name][key] = as_array(own)
        optimizer.step()
        twin.step(recorded if max_norm is None else clipped(recorded, max_norm), rates)
        compare(optimizer, named, twin, f"step {t + 1}", tolerance or TOLERANCE.get(dtype, 1e-6))


def compare(optimizer, named, twin, when, tolerance):
    """Parameters, moments, step counts and multipliers of both are equal to the tolerance."""
    for policy in twin.measured:
        compare_multipliers(optimizer, named, policy, when, max(tolerance, getattr(policy.source, "tolerance", 1e-6)))
    for name, p in named:
        if p.dtype is torch.bfloat16:
            assert bf16_ulps(p, twin.p[name]) <= 1, f"{name}, {when}"
        else:
            bad = error(p, twin.p[name], twin.scale(name, "p", twin.p[name]))
            assert bad <= tolerance, f"{name}, {when}: {bad:.2e}"
        state, want = optimizer.state[p], twin.state[name]
        if want["step"] == 0:
            continue
        assert float(state["step"]) == want["step"], f"{name}, {when}"
        assert state["step"].dtype is torch.float32 and state["step"].dim() == 0, name
        for key in twin.rule.STATE:
            if key not in want:
                continue
            if state[key].dtype is torch.bfloat16:
                bad = bf16_ulps(state[key], want[key])
                assert bad <= 1, f"{name} {key}, {when}: {bad} ulps"
                continue
            bad = error(state[key], want[key], twin.scale(name, key, want[key]))
            assert bad <= tolerance, f"{name} {key}, {when}: {bad:.2e}"


def compare_multipliers(optimizer, named, policy, when, tolerance):
    """Those of the last step, in the table, and in the state those where they are going."""
    table = {}
    for row in optimizer.lr_multipliers():
        table.setdefault(row["name"], []).append(row["multiplier"])
    now, after = policy.multipliers()
    for name, p in named:
        assert np.allclose(table[name], now[name], rtol=tolerance, atol=0), (name, when, table[name], now[name])
        going = optimizer.state[p]["lr_multiplier"].tolist()
        assert np.allclose(going, after[name], rtol=tolerance, atol=0), (name, when, going, after[name])


def names_of(named):
    """The names."""
    return [name for name, _ in named]


def split_groups(named):
    """Two groups, as training scripts make them: matrices, and the rest."""
    matrices = [name for name, p in named if p.dim() > 1]
    return matrices, [name for name, p in named if p.dim() <= 1]


def pieces_of(model_name, named):
    """The literal index sets of a model's parameters; raises KeyError for a parameter that they forget."""
    return cuts.pieces(model_name, names_of(named))
