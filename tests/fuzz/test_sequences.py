"""Random optimizers over random models, through random sequences of what happens in trainings.

Each case runs twice side by side, by whatever path the library takes and by the reference (`compile=False`), and the
two must agree after every event; only the first is saved, loaded and copied. A case is a seed: `-k 17` is cases 850
to 899, and `case(seed)` runs one alone.
"""

import copy
import math
import random
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from engine.views import Mixed
from reference.rig import through_disk
from torch import nn

import sharpwise
from sharpwise.block_lr.base import NOTHING, BlockLR
from sharpwise.combinations import engine_arguments
from sharpwise.engine import BlockOptimizer
from sharpwise.optim import COMBINES
from sharpwise.testing import EXAMPLES

CASES, AT_ONCE = 2000, 50
SHAPES = [
    (),
    (0,),
    (1,),
    (7,),
    (0, 4),
    (4, 0),
    (1, 1),
    (1, 9),
    (5, 3),
    (12, 8),
    (24, 8),
    (3, 4, 5),
    (70, 65),
    (260, 256),
]
# Norm-relative, after up to 24 events; a rounding to half precision that falls the other way is one unit of it.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ROLES = ["tok_emb", "q", "k", "v", "o", "up", "down", "norm", "head", "other"]


class Model(nn.Module):
    """Parameters of any shape, type and layout, one of them perhaps under two names."""

    def __init__(self, draw):
        super().__init__()
        self.blocks = {}
        generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
        mixed = draw.choice([torch.float32, torch.float32, None, torch.bfloat16, torch.float16, torch.float64])
        for i in range(draw.randint(1, 7)):
            shape = draw.choice(SHAPES[:-1] if draw.random() < 0.9 else SHAPES)
            dtype = mixed or draw.choice(list(TOLERANCE))
            value = torch.randn(shape, generator=generator).to(dtype)
            if value.dim() == 2 and draw.random() < 0.2:
                value = value.t().contiguous().t()  # strided
            self.register_parameter(f"p{i}", nn.Parameter(value))
            role = "norm" if i == 0 else draw.choice(ROLES if len(shape) == 2 else ["norm", "other"])
            self.blocks[f"p{i}"] = {"role": role, "heads": 1} if role in ("q", "k") else role
            if i and shape in ((12, 8), (24, 8)) and draw.random() < 0.5:
                self.blocks[f"p{i}"] = fused(shape, draw.random() < 0.5)
        if draw.random() < 0.2:
            self.tied = nn.Module()
            self.tied.again = self.p0


@dataclass(frozen=True)
class ByTable(BlockLR):
    """A multiplier per role, also 0; or one of at least 0.1 that falls with the learning rate."""

    table: tuple[tuple[str, float], ...] = ()
    falls: bool = False

    name: ClassVar[str] = "by_table"

    def multipliers(self, segments, measured=NOTHING):
        return [dict(self.table).get(str(s.role), 1.0) for s in segments]

    def effective(self, multiplier, lr, peak):
        return multiplier if not self.falls or not peak else max(multiplier, 0.1) * lr / peak

    @property
    def follows_lr(self):
        return self.falls


def fused(shape, by_column):
    """A parameter of several roles, in ranges of its rows or of its columns."""
    roles = ("up", "gate") if by_column or shape[0] % 3 else ("q", "k", "v")
    length = shape[by_column] // len(roles)
    heads = {"heads": 2} if roles[0] == "q" else {}
    return [
        {"role": role, "dim": int(by_column), "start": i * length, "length": length, **heads}
        for i, role in enumerate(roles)
    ]


def options_of(draw, name):
    """Options of an optimizer, all that the table allows."""
    lrs, storages = COMBINES["adamw" if name == "mixed" else name]
    options = {"lr": 10.0 ** -draw.uniform(1.5, 4), "weight_decay": draw.choice([0.0, 0.1])}
    block_lr = draw.choice([None, None, *lrs])
    if block_lr:
        options["block_lr"] = {**EXAMPLES, "per_role": "per_role(ratios={norm: 2})"}.get(block_lr, block_lr)
        if block_lr == "per_role" and draw.random() < 0.7:
            table = tuple((role, draw.choice([0.0, 0.5, 1.0, 3.0])) for role in ROLES)
            options["block_lr"] = ByTable(draw.choice(["scaled", "base"]), table, draw.random() < 0.5)
        options["total_steps"] = 40
    options["storage"] = draw.choice(storages)
    options["stochastic_rounding"] = draw.random() < 0.2
    options["no_decay"] = draw.choice([(), ("norm", "bias"), ("q", "up")])
    options["max_grad_norm"] = draw.choice([None, None, 0.5, 100.0])
    options["on_nonfinite"] = draw.choice(["ignore", "skip", "raise"])
    if name == "sgd":
        options["momentum"] = draw.choice([0.0, 0.9])
        # Coupled decay is for whole parameters, and q and up are parts of some.
        options["decoupled_weight_decay"] = draw.random() < 0.5 or "q" in options["no_decay"]
    if name == "mixed":
        rules = ["adamw", "lion", "mini row", "mini tensor"]
        options["by"] = tuple((role, draw.choice(rules)) for role in ROLES if role != "norm")
    if name == "adam-mini":
        options["cut"] = draw.choice([None, "tensor", "element"])
    options["cautious_decay"] = options.get("decoupled_weight_decay", True) and draw.random() < 0.3
    return options


def make(run, groups):
    """The optimizer of a run; a mixed one gives every role a rule of its own."""
    options = {**run.options, "model": run.model, "blocks": run.model.blocks, "compile": run.compiled}
    if run.name != "mixed":
        return sharpwise.create_optimizer(groups, run.name, **options)
    lr, wd, by = (options.pop(key) for key in ("lr", "weight_decay", "by"))
    rest = {"strict": False, "seed": 0, "probe_batches": None, "total_steps": 40, "block_lr": None}
    return BlockOptimizer(
        groups, Mixed(by=by), lr=lr, weight_decay=wd, **engine_arguments("Mixed", "adamw", **(rest | options))
    )


class Run:
    """One of the two: a model, its optimizer, and how to build that anew."""

    def __init__(self, seed, name, options, compiled):
        draw = random.Random(seed)
        self.model = Model(draw)
        self.frozen_at_start = {n for n, _ in self.model.named_parameters() if n != "p0" and draw.random() < 0.1}
        self.later = [n for n, _ in self.model.named_parameters()][-1:] if draw.random() < 0.3 else []
        for n, p in self.model.named_parameters():
            p.requires_grad_(n not in self.frozen_at_start)
        if len(self.later) == len(list(self.model.parameters())):
            self.later = []
        self.name, self.options, self.compiled = name, options, compiled
        self.added = False
        self.optimizer = self.build()

    def build(self):
        first = [p for n, p in self.model.named_parameters() if self.added or n not in self.later]
        groups = [{"params": first}]
        return make(self, groups)

    def add_group(self):
        if self.later and not self.added:
            self.optimizer.add_param_group({"params": [self.model.get_parameter(n) for n in self.later], "lr": 3e-3})
            self.later, self.added = [], True

    def reload(self):
        """As another process would go on; groups that were added are one group more there too."""
        saved = through_disk({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})
        sizes = [len(g["params"]) for g in self.optimizer.param_groups]
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        groups = []
        for size in sizes:
            groups.append({"params": parameters[:size]})
            parameters = parameters[size:]
        self.model.load_state_dict(saved["model"])
        self.optimizer = make(self, groups)
        self.optimizer.load_state_dict(saved["optimizer"])


def gradients(run, seed, kind):
    """The same for both runs: of one scale per parameter, some missing, or with a NaN in one."""
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    bad = draw.randrange(8)
    for i, p in enumerate(run.model.parameters()):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float32) * 10.0 ** draw.uniform(-2, 1)
        if kind == "nan" and i == bad % len(list(run.model.parameters())) and g.numel():
            g.view(-1)[0] = math.nan
        missing = draw.random() < 0.1
        p.grad = None if missing or not p.requires_grad else g.to(p.dtype)


def step(run):
    """Whether it was taken, or refused for a gradient that is not finite."""
    try:
        run.optimizer.step()
    except FloatingPointError:
        return False
    return True


def agree(one, other, seed, event):
    for (name, p), (_, q) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        a, b = p.detach().double(), q.detach().double()
        bound = TOLERANCE[p.dtype]
        if one.options["storage"] == "bf16":
            bound = max(bound, 3e-2)
        assert torch.equal(a.isnan(), b.isnan()), (seed, event, name)
        a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
        assert torch.equal(a.isinf(), b.isinf()), (seed, event, name)
        distance = (a - b)[~a.isinf()].norm()
        assert distance <= bound * b[~b.isinf()].norm() + 1e-7, (seed, event, name, float(distance))
        if event[1] not in ("step", "nan"):
            continue  # saving allocates what a changed setting asks for; the other does so at its next step
        own, theirs = one.optimizer.state.get(p, {}), other.optimizer.state.get(q, {})
        assert not own or not theirs or own.keys() == theirs.keys(), (seed, event, name)
        assert float(own.get("step", 0)) == float(theirs.get("step", 0)), (seed, event, name)
        for key, value in own.items() if theirs else ():
            assert value.shape == theirs[key].shape, (seed, event, name, key)
            assert value.dtype == theirs[key].dtype, (seed, event, name, key)
    assert one.optimizer.skipped_steps == other.optimizer.skipped_steps, (seed, event)


def case(seed):
    """One random optimizer through a random training, by two paths."""
    draw = random.Random(seed)
    name = draw.choice([*sorted(COMBINES), "mixed"])
    options = options_of(draw, name)
    runs = [Run(seed, name, options, compiled) for compiled in (True if draw.random() < 0.15 else None, False)]
    began = [p.detach().clone() for p in runs[0].model.parameters()]
    events = ["step"] * 6 + ["nan", "lr 0", "lr back", "group", "freeze", "reload", "numbers", "save", "copy"]
    events += ["memory", "state", "counts", "device"]
    assert len(began) == len(list(runs[1].model.parameters()))
    for number in range(draw.randint(4, 24)):
        event, own = draw.choice(events), draw.randrange(1 << 30)
        if event == "nan" and options["on_nonfinite"] == "ignore" and draw.random() < 0.8:
            event = "step"  # one NaN, and little is left to compare
        taken = []
        for run in runs:
            choice = random.Random(own)
            group = choice.choice(run.optimizer.param_groups)
            if event in ("step", "nan"):
                gradients(run, own, event)
                taken.append(step(run))
            elif event in ("lr 0", "lr back"):
                for each in run.optimizer.param_groups:
                    each["lr"] = 0.0 if event == "lr 0" else options["lr"]
            elif event == "group":
                run.add_group()
            elif event == "freeze":
                for name, p in run.model.named_parameters():
                    p.requires_grad_(name == "p0" or choice.random() < 0.8)
            elif event == "numbers":
                change(choice, group)
            elif event == "counts":
                write_counts(choice, run)
            elif event == "device":
                gradients(run, own, "step")
                step_decided_by_a_device(run, torch.tensor(choice.random() < 0.5))
            elif run is runs[1]:
                pass  # the reference is never interrupted
            elif event == "memory":
                for p in run.model.parameters():
                    if choice.random() < 0.5:
                        p.data = p.data.clone()
            elif event == "state":
                exchange_state(choice, run)
            elif event == "reload":
                run.reload()
            elif event == "save":
                run.optimizer.state_dict()
            else:
                assert copy.deepcopy(run.optimizer).state_dict().keys() == run.optimizer.state_dict().keys()
        assert len(set(taken)) <= 1, (seed, number, event, taken)
        agree(*runs, seed, (number, event))


def write_counts(choice, run):
    """Somebody writes the counts in place, or puts tensors of another type there."""
    run.optimizer.init_state()
    for _, p in run.model.named_parameters():
        draw, t = choice.random(), float(choice.randrange(1, 9))
        own = run.optimizer.state.get(p, {})
        if "step" not in own or draw < 0.5 or own["step"] == 0:
            continue
        if draw < 0.75:
            own["step"].fill_(t)
        else:
            own["step"] = torch.tensor(t, dtype=choice.choice([torch.float32, torch.float64]))


def exchange_state(choice, run):
    """Tensors of state are replaced by copies, some of which lie otherwise in memory."""
    for own in run.optimizer.state.values():
        for key, value in list(own.items()):
            if choice.random() < 0.3:
                turned = value.dim() == 2 and choice.random() < 0.5
                own[key] = value.t().contiguous().t() if turned else value.clone()


def step_decided_by_a_device(run, ok):
    """As a GradScaler of gradients on a device has it."""
    said = types.SimpleNamespace(factor=None, ok=ok, decided_by_device=True)
    run.optimizer._scaling = lambda *_: said
    try:
        run.optimizer.step()
    finally:
        del run.optimizer._scaling


def change(choice, group):
    """Another number for one of the hyperparameters."""
    key = choice.choice([k for k in ("weight_decay", "betas", "eps", "momentum", "dampening") if k in group])
    if key == "betas":
        group[key] = (choice.choice([0.0, 0.8, 0.95]), choice.choice([0.9, 0.99, 0.999]))
    elif key == "dampening":
        group[key] = group[key] if group[key] is None or group["nesterov"] else choice.choice([0.0, 0.5])
    else:
        group[key] = choice.choice({"weight_decay": [0.0, 0.3], "eps": [1e-8, 1e-4], "momentum": [0.0, 0.5, 0.9]}[key])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CASES, AT_ONCE), ids=lambda first: str(first // AT_ONCE))
def test_two_paths_agree_through_whatever_happens(first):
    for seed in range(first, first + AT_ONCE):
        case(seed)
