"""What tests of several views of one parameter share: a rule that gives segments other rules, and layouts of models."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from sharpwise.block_lr import make_block_lr
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.options import Options, Storage
from sharpwise.rules import AdamMini, AdamW, Lion
from sharpwise.rules.base import Rule
from sharpwise.storage import BF16, FP32


@dataclass(frozen=True)
class Mixed(Rule):
    """Gives every role the rule that `by` names, and AdamW to others; its own arithmetic is never run."""

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    by: tuple[tuple[str, str], ...] = ()

    name: ClassVar[str] = "test-mixed"
    hyperparameters: ClassVar[tuple[str, ...]] = ("betas", "eps")
    second_moment: ClassVar[str | None] = "exp_avg_sq"

    @property
    def state(self):
        return {}

    def second_moment_decay(self, group):
        return float(group["betas"][1])

    def assign(self, segment):
        kind = dict(self.by).get(str(segment.role), "adamw")
        if kind.startswith("mini"):
            return AdamMini(self.betas, self.eps), kind.partition(" ")[2]
        return (Lion(self.betas) if kind == "lion" else AdamW(self.betas, self.eps)), "element"


MIXED = {"q": "lion", "k": "lion", "v": "adamw", "gate": "mini row", "up": "adamw"}
BLOCKS = {"q": "adamw", "k": "mini head", "v": "mini row", "gate": "lion", "up": "mini tensor"}
TURNED = {"q": "adamw", "k": "lion", "v": "adamw", "gate": "mini tensor", "up": "lion"}


def _ranges(dim, size, roles, **more):
    heads = {role: {"heads": 2} if role in ("q", "k", "v") else {} for role in roles}
    return [
        {"role": role, "dim": dim, "start": i * size, "length": size, **heads[role], **more}
        for i, role in enumerate(roles)
    ]


def layout(name, n=8):
    """(shape, override, dimensions whose order in memory is turned) of a parameter in ranges of n rows."""
    qkv, experts = ("q", "k", "v"), ("gate", "up")
    interleaved = [
        {"role": role, "start": i * (n // 2), "length": n // 2, "stride": 3 * n // 2, "count": 2, "heads": 2}
        for i, role in enumerate(qkv)
    ]
    turned = (0, 1) if name.startswith("strided") else None
    return {
        "rows": ((3 * n, n), _ranges(0, n, qkv), turned),
        "columns": ((n, 3 * n), _ranges(1, n, qkv), turned),
        "interleaved": ((3 * n, n), interleaved, turned),
        "experts by rows": ((2, 2 * n, n), _ranges(1, n, experts, stacked=True), turned),
        "experts by columns": ((2, n, 2 * n), _ranges(2, n, experts, stacked=True), turned),
        "bias": ((3 * n,), _ranges(0, n, qkv, bias=True), turned),
    }[name.removeprefix("strided ")]


LAYOUTS = ["rows", "columns", "interleaved", "experts by rows", "experts by columns", "bias"]
STRIDED = ["strided rows", "strided columns", "strided interleaved"]


class Model(nn.Module):
    """A parameter in segments, fused or each a parameter of its own, between a norm and a matrix."""

    def __init__(self, name, n=8, dtype=torch.float32, apart=False):
        super().__init__()
        shape, override, turned = layout(name, n)
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(n, generator=generator).to(dtype))
        whole = torch.randn(shape, generator=generator).to(dtype)
        self.last = nn.Parameter(torch.randn(n, n, generator=generator).to(dtype))
        self.blocks = {"first": "norm", "last": "o", "fused": override}
        self.name, self.n, self.turned, self.parts = name, n, turned, None
        if turned:
            whole = whole.transpose(*turned).contiguous().transpose(*turned)
        self.fused = nn.Parameter(whole)
        if apart:
            self.parts = segments_of(self)
            del self.fused, self.blocks["fused"]
            for own, fields in zip(self.parts, override, strict=True):
                rest = {k: v for k, v in fields.items() if k not in ("start", "length", "stride", "count")}
                self.blocks[str(own.role)] = rest
                self.register_parameter(str(own.role), nn.Parameter(own.take(whole).clone()))


def segments_of(model):
    """The segments of the fused parameter."""
    from sharpwise.blocks import BlockMap

    return BlockMap.of(model, trace=False, overrides=model.blocks)["fused"]


def optimizer_of(model, by, *, block_lr=None, storage="fp32", wd=0.1, lr=1e-2, first=None, **options):
    """The optimizer under test."""
    kept = Storage({"fp32": FP32, "bf16": BF16}[storage])
    options = Options(block_lr=make_block_lr(block_lr), storage=kept, **{"total_steps": 20, **options})
    return BlockOptimizer(
        model if first is None else first, Mixed(by=tuple(by.items())), lr=lr, weight_decay=wd, options=options,
        blocks=getattr(model, "blocks", None), model=model,
    )  # fmt: skip


def gradients(model, t, segments, bad=()):
    """The same for the fused parameter and its parts; a NaN at the steps `bad`."""
    generator = torch.Generator().manual_seed(100 + t)
    named = dict(model.named_parameters())
    for name in ("first", "last"):
        named[name].grad = torch.randn(named[name].shape, generator=generator).to(named[name].dtype)
    whole = torch.randn(layout(model.name, model.n)[0], generator=generator).to(named["first"].dtype)
    if t in bad:
        whole.view(-1)[-1] = float("nan")
    if model.parts is None:
        model.fused.grad = whole
    for own in segments if model.parts else ():
        named[str(own.role)].grad = own.take(whole).clone()


def train(model, optimizer, steps, segments, bad=()):
    """Steps on recorded gradients; returns both."""
    for t in steps:
        gradients(model, t, segments, bad)
        optimizer.step()
    return model, optimizer
