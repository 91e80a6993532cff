"""The battery: what every optimizer, per-block learning rate and storage must do. Public, so that others test theirs.

    from sharpwise.testing import check_optimizer
    check_optimizer(lambda first, **kw: MyOptimizer(first, lr=1e-2, **kw))

Each check is a function in `CHECKS`; it raises AssertionError with what went wrong.
"""

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpwise.block_lr import BlockLR
from sharpwise.blocks import BlockMap
from sharpwise.engine import BlockOptimizer
from sharpwise.optim import BLOCK_LRS, COMBINES, STORAGES, create_optimizer
from sharpwise.storage.check import check_storage

EXAMPLES = {
    "llr": "llr(every=4, stop=4, soft=2, least=4)",
    "per_role": "per_role(ratios={FFN: 3, q: 2})",
    "sharpness": "sharpness(start=1, every=3, by=module, power=2, normalize=geometric)",
}
"""Spellings with which a block_lr does in a few steps of a tiny model what it does in a training; others go by name."""

_PLACE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Of all that is made here, whatever the defaults: the battery may be run under any."""

Make = Callable[..., BlockOptimizer]
"""(first, **options) -> optimizer, where `first` is what constructors take."""


class TinyGPT(nn.Module):
    """Parameters of a two-layer transformer under nanoGPT's names: fused qkv, tied head, a frozen and an empty one.

    Args:
        width: of the residual stream.
        heads: of attention, a divisor of it.
        vocabulary: tokens.
    """

    def __init__(self, width: int = 16, heads: int = 2, vocabulary: int = 11) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width, **_PLACE),
                "wpe": nn.Embedding(8, width, **_PLACE),
                "h": nn.ModuleList(_Block(width, heads) for _ in range(2)),
                "ln_f": nn.LayerNorm(width, **_PLACE),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False, **_PLACE)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, **_PLACE)
        self.attn = _linear(c_attn=(width, 3 * width), c_proj=(width, width))
        self.attn.n_head = heads  # type: ignore[assignment]
        self.ln_2 = nn.LayerNorm(width, **_PLACE)
        self.mlp = _linear(c_fc=(width, 4 * width), c_proj=(4 * width, width))


def _linear(**sizes: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*size, **_PLACE) for name, size in sizes.items()})


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A TinyGPT with weights of a seed, the global random state left alone.

    Args:
        dtype: of the parameters.
        seed: of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyGPT().to(dtype)


def fill_gradients(model: nn.Module, step: int, skip: Sequence[str] = ()) -> None:
    """Gradients that depend on (parameter, step) alone, as recorded ones do.

    Args:
        model: gets them.
        step: its number.
        skip: names of parameters that get none.
    """
    for i, (name, p) in enumerate(model.named_parameters()):
        generator = torch.Generator("cpu").manual_seed(1000 * step + i)
        p.grad = None if name in skip else torch.randn(p.shape, generator=generator, **_PLACE).to(p.dtype) * 0.1


def run(model: nn.Module, optimizer: BlockOptimizer, steps: Sequence[int], skip: Sequence[str] = ()) -> None:
    """Steps with the gradients of these step numbers.

    Args:
        model, optimizer: what is stepped.
        steps: numbers of the steps.
        skip: names of parameters without a gradient.
    """
    for step in steps:
        fill_gradients(model, step, skip)
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same bits."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# -- checks of a whole optimizer -------------------------------------------------------------------------------------


def check_types_and_shapes_stay(make: Make) -> None:
    """Steps change no dtype, shape or object of parameters and state."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = tiny_model(dtype)
        optimizer = make(model)
        optimizer.init_state()
        before = {id(t): (t.dtype, t.shape) for own in optimizer.state.values() for t in own.values()}
        start = copy.deepcopy(model)
        run(model, optimizer, range(3))
        after = {id(t): (t.dtype, t.shape) for own in optimizer.state.values() for t in own.values()}
        assert before == after, f"{dtype}: state tensors were exchanged or changed their type"
        assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters()), f"{dtype}: bad parameters"
        assert not same(start, model), f"{dtype}: nothing moved"
        assert all(own["step"].dtype == torch.float32 and own["step"].dim() == 0 for own in optimizer.state.values())


def check_resume_is_exact(make: Make) -> None:
    """Saved, loaded with weights_only, with parameters in another order: bit for bit as if never interrupted."""
    for dtype in (torch.float32, torch.bfloat16):
        whole, part = tiny_model(dtype), tiny_model(dtype)
        steady, first = make(whole), make(part)
        run(whole, steady, range(6))
        run(part, first, range(3))
        file = io.BytesIO()
        torch.save({"model": part.state_dict(), "optimizer": first.state_dict()}, file)
        saved = torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True)
        resumed = tiny_model(dtype, seed=1)
        resumed.load_state_dict(saved["model"])
        groups = [{"params": list(resumed.parameters())[::-1]}]
        second = make(groups, model=resumed)
        second.load_state_dict(saved["optimizer"])
        run(resumed, second, range(3, 6))
        assert same(whole, resumed), f"{dtype}: resumed differs from uninterrupted"


def check_missing_gradients(make: Make) -> None:
    """A parameter without a gradient stays, state and step count included, and joins later."""
    model, name = tiny_model(), "transformer.h.0.ln_1.weight"
    optimizer = make(model)
    parameter = dict(model.named_parameters())[name]
    before = parameter.detach().clone()
    run(model, optimizer, range(2), skip=[name])
    assert torch.equal(before, parameter), "moved without a gradient"
    assert optimizer.state[parameter]["step"] == 0, "counted a step without a gradient"
    run(model, optimizer, range(2, 4))
    assert not torch.equal(before, parameter), "did not move once it had a gradient"
    assert optimizer.state[parameter]["step"] == 2, "lost count"


def check_frozen_tied_and_empty(make: Make) -> None:
    """Frozen parameters stay out, tied ones count once, empty ones do no harm."""
    model = tiny_model()
    frozen = model.get_parameter("transformer.wpe.weight")
    frozen.requires_grad_(False)
    model.get_submodule("transformer").register_parameter("empty", nn.Parameter(torch.empty(0, 64, **_PLACE)))
    optimizer = make(model, blocks={"transformer.empty": "other"})
    before = frozen.detach().clone()
    run(model, optimizer, range(2))
    assert torch.equal(before, frozen), "a frozen parameter moved"
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    assert "transformer.wpe.weight" not in names and "lm_head.weight" not in names, names


def check_schedulers_and_tensor_lr(make: Make) -> None:
    """lr is read live: a scheduler, a tensor filled in place and a float set by hand do the same."""
    models = [tiny_model() for _ in range(3)]
    optimizers = [make(model) for model in models]
    base = float(optimizers[0].param_groups[0]["lr"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: 1.0 / (1 + step))
    tensor = torch.tensor(base, dtype=torch.float64, device="cpu")
    for group in optimizers[1].param_groups:
        group["lr"] = tensor
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            run(model, optimizer, [step])
        scheduler.step()
        tensor.fill_(base * (1.0 / (2 + step)))
        for group in optimizers[2].param_groups:
            group["lr"] = base * (1.0 / (2 + step))
    assert same(models[0], models[2]), "a scheduler and a float set by hand differ"
    assert same(models[0], models[1]), "a tensor lr and a float differ"


def check_groups(make: Make) -> None:
    """Groups keep their own lr, and a group may join later."""
    model, twin = tiny_model(), tiny_model()
    parameters = list(model.parameters())
    optimizer = make([{"params": parameters[:4]}, {"params": parameters[4:6], "lr": 0.0}], model=model)
    fixed = [p.detach().clone() for p in parameters[4:6]]
    run(model, optimizer, range(2))
    assert all(torch.equal(p, q) for p, q in zip(parameters[4:6], fixed, strict=True)), "lr=0 of a group is not kept"
    optimizer.add_param_group({"params": parameters[6:]})
    run(model, optimizer, range(2, 4))
    assert optimizer.state[parameters[-1]]["step"] == 2
    if optimizer.options.varies or any(view.joint for view in optimizer._bind().views):
        return  # what is measured, and blocks that span parameters, depend on what is there
    whole = make([{"params": list(twin.parameters())}], model=twin)
    run(twin, whole, range(4))
    assert torch.equal(parameters[0], next(iter(twin.parameters()))), "groups change the update of a parameter"


def check_copies(make: Make) -> None:
    """deepcopy and pickle carry everything."""
    model = tiny_model()
    optimizer = make(model)
    run(model, optimizer, range(2))
    pair = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    run(model, optimizer, range(2, 5))
    for other, its in (pair, pickled):
        run(other, its, range(2, 5))
        assert same(model, other), "a copy goes another way"


def check_closure_and_hooks(make: Make) -> None:
    """A closure runs once with gradients on, its loss is returned; step hooks run."""
    model = tiny_model()
    optimizer, calls = make(model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in model.parameters())
        loss.backward()  # type: ignore[union-attr]
        calls.append("closure")
        return loss  # type: ignore[return-value]

    loss = optimizer.step(closure)
    assert calls == ["pre", "closure", "post"], calls
    assert isinstance(loss, Tensor) and loss > 0


def check_dummy_step_leaves_no_trace(make: Make) -> None:
    """The step with lr 0 and zero gradients that checkpointing makes changes nothing, the step count included."""
    plain, probed = tiny_model(), tiny_model()
    a, b = make(plain), make(probed)
    rates = [group["lr"] for group in b.param_groups]
    for group in b.param_groups:
        group["lr"] = 0.0
    for p in probed.parameters():
        p.grad = torch.zeros_like(p)
    b.step()
    assert all(own["step"] == 0 for own in b.state.values()), "the dummy step was counted"
    for group, lr in zip(b.param_groups, rates, strict=True):
        group["lr"] = lr
    run(plain, a, range(3))
    run(probed, b, range(3))
    assert same(plain, probed), "the dummy step left a trace"


def check_skip_and_raise(make: Make) -> None:
    """Non-finite gradients under "skip" and "raise" change nothing: parameters, state, step."""
    for how in ("skip", "raise"):
        model = tiny_model()
        optimizer = make(model, on_nonfinite=how)
        run(model, optimizer, range(2))
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        fill_gradients(model, 2)
        list(model.parameters())[3].grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
        if how == "raise":
            try:
                optimizer.step()
                raise AssertionError("non-finite gradients were not reported")
            except FloatingPointError:
                pass
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
        after = (model.state_dict(), optimizer.state_dict()["state"])
        for key, value in before[0].items():
            assert torch.equal(value, after[0][key]), f"{how}: {key} changed"
        for i, own in before[1].items():
            assert all(torch.equal(value, after[1][i][key]) for key, value in own.items()), f"{how}: state changed"


def check_no_recompilation(make: Make) -> None:
    """A second step, and another lr, compile nothing new; compiled agrees with eager to 1e-6 of the norm."""
    for clip in (10.0, None):
        model, twin = tiny_model(), tiny_model()
        for m in (model, twin):
            with torch.random.fork_rng():
                torch.manual_seed(5)
                m.get_submodule("transformer").add_module("wide", nn.Linear(256, 384, **_PLACE))
        options: dict[str, Any] = {"blocks": {"transformer.wide.*": "up"}, "max_grad_norm": clip}
        fast, slow = make(model, compile=True, **options), make(twin, compile=False, **options)
        run(model, fast, range(1))
        run(twin, slow, range(1))
        built = fast.compiled_graphs
        assert built > 0, "nothing was compiled"
        for group in fast.param_groups + slow.param_groups:
            group["lr"] = group["lr"] * 0.5
        run(model, fast, range(1, 4))
        assert fast.compiled_graphs == built, f"compiled again: {built} graphs, then {fast.compiled_graphs}"
        run(twin, slow, range(1, 4))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            error = ((p - q).norm() / q.norm()).item()
            assert error <= 1e-6, f"clip {clip}: compiled differs from eager by {error:.2e} of the norm"


CHECKS: tuple[Callable[[Make], None], ...] = (
    check_types_and_shapes_stay,
    check_resume_is_exact,
    check_missing_gradients,
    check_frozen_tied_and_empty,
    check_schedulers_and_tensor_lr,
    check_groups,
    check_copies,
    check_closure_and_hooks,
    check_dummy_step_leaves_no_trace,
    check_skip_and_raise,
)
"""Every check that takes no compiler."""


def check_optimizer(make: Make) -> None:
    """All of `CHECKS`, on anything that is built as the named constructors are."""
    for check in CHECKS:
        check(make)


def check_rule(name: str, **options: Any) -> None:
    """The battery for a rule by its name, with these options."""
    check_optimizer(lambda first, **more: create_optimizer(first, name, **{**options, **more}))


def check_block_lr(block_lr: BlockLR) -> None:
    """One finite multiplier >= 0 per segment; neutral at its peak; usable with AdamW in every respect."""
    blocks = BlockMap.of(tiny_model())
    values = block_lr.multipliers(blocks.segments)
    assert len(values) == len(blocks.segments), f"{len(values)} multipliers for {len(blocks.segments)} segments"
    assert all(0 <= m < float("inf") for m in values), values
    assert all(block_lr.effective(m, 1e-3, 1e-3) == m for m in values), (
        "at the peak, multipliers are as they were given"
    )
    check_rule("adamw", block_lr=block_lr)
    if block_lr.sources:
        check_measured(block_lr)


def check_measured(block_lr: BlockLR, steps: int = 8) -> None:
    """Multipliers that follow a measurement are finite, positive and the same after a resume at any step.

    Args:
        block_lr: one that measures.
        steps: how many are taken.
    """
    model = tiny_model()
    optimizer = create_optimizer(model, "adamw", lr=1e-3, block_lr=block_lr)
    saved, seen = [], []
    for step in range(steps):
        saved.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        run(model, optimizer, [step])
        seen.append(_multipliers(optimizer))
    assert all(0 < m < float("inf") for now in seen for m in now), seen
    assert any(now != seen[0] for now in seen) or set(seen[0]) != {1.0}, "nothing was measured"
    for begin, (weights, state) in enumerate(saved):
        again = tiny_model(seed=1)
        again.load_state_dict(weights)
        other = create_optimizer(again, "adamw", lr=1e-3, block_lr=block_lr)
        other.load_state_dict(state)
        for step in range(begin, steps):
            run(again, other, [step])
            assert _multipliers(other) == seen[step], f"resumed at {begin}, other from step {step} on"
        assert same(again, model), f"resumed at {begin}: other weights"


def _multipliers(optimizer: BlockOptimizer) -> list[Any]:
    return [row["multiplier"] for row in optimizer.lr_multipliers()]


__all__ = [
    "BLOCK_LRS",
    "CHECKS",
    "COMBINES",
    "EXAMPLES",
    "STORAGES",
    "TinyGPT",
    "check_block_lr",
    "check_measured",
    "check_no_recompilation",
    "check_optimizer",
    "check_rule",
    "check_storage",
    "fill_gradients",
    "run",
    "same",
    "tiny_model",
]
