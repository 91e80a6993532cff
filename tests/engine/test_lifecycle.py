"""What happens to an optimizer between steps: state moved or recast, groups frozen, empty or added, settings saved."""

import copy
import gc
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import sharpwise
from sharpwise.testing import TinyGPT, fill_gradients, run, same, tiny_model


def saved(optimizer):
    """A state dict as a file gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("block_lr", [sharpwise.LayerDecay(rate=0.9), sharpwise.BlockwiseLR(emb=3.3, qk=2.7)])
def test_multipliers_that_fp32_does_not_hold_are_resumed_exactly(block_lr):
    whole, part = tiny_model(), tiny_model()
    steady, first = (sharpwise.AdamW(m, lr=1e-2, block_lr=block_lr) for m in (whole, part))
    run(whole, steady, range(4))
    run(part, first, range(2))
    second = sharpwise.AdamW(part, lr=1e-2, block_lr=block_lr)
    second.load_state_dict(saved(first))
    run(part, second, range(2, 4))
    assert same(whole, part)


@pytest.mark.parametrize("name", sharpwise.list_optimizers())
@pytest.mark.parametrize(
    "move",
    [
        lambda own: own.update({k: v.clone() for k, v in own.items()}),
        lambda own: [setattr(v, "data", v.data.clone()) for v in own.values()],
    ],
    ids=["new tensors", "new data"],
)
def test_state_moved_by_hand_is_found(name, move):
    """Offloading scripts move state tensors between steps, by either way."""
    models = [tiny_model() for _ in range(2)]
    first, second = (sharpwise.create_optimizer(m, name, lr=1e-2) for m in models)
    for step in range(4):
        run(models[0], first, [step])
        run(models[1], second, [step])
        for own in second.state.values():
            move(own)
    assert same(*models)
    assert all(
        torch.equal(a, b)
        for x, y in zip(first.state.values(), second.state.values(), strict=True)
        for a, b in zip(x.values(), y.values(), strict=True)
    )


@pytest.mark.parametrize("compile", [None, False])
@pytest.mark.parametrize("name", sharpwise.list_optimizers())
def test_data_of_parameters_exchanged_between_steps(name, compile):
    """Weights are loaded, averaged or offloaded by `p.data = ...`, too."""
    models = [tiny_model() if compile is False else TinyGPT(width=256, heads=16, vocabulary=300) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (sharpwise.create_optimizer(m, name, lr=1e-2, compile=compile) for m in models)
    for step in range(3):
        run(models[0], first, [step])
        run(models[1], second, [step])
        for p in models[1].parameters():
            p.data = p.data.clone()
    assert same(*models)


def test_memory_format_changed_after_a_step():
    def start():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Conv2d(3, 4, 3)

    ours, torchs = start(), start()
    first, second = sharpwise.AdamW(ours, lr=1e-2), torch.optim.AdamW(torchs.parameters(), lr=1e-2)
    for step in range(4):
        for model, optimizer in ((ours, first), (torchs, second)):
            fill_gradients(model, step)
            optimizer.step()
        if step == 1:
            ours.to(memory_format=torch.channels_last)
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


def test_parameters_exchanged_before_the_first_step_are_bound_anew():
    """As sharding does it: the objects in param_groups are replaced, under the same names."""
    model, plain = tiny_model(), tiny_model()
    optimizer, twin = sharpwise.AdamMini(model, lr=1e-2), sharpwise.AdamMini(plain, lr=1e-2)
    optimizer.state_dict()  # allocates; no step has been taken
    new = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    for step in range(2):
        run(plain, twin, [step])
        fill_gradients(model, step)
        for p, q in new.items():
            q.grad = p.grad
        optimizer.step()
    assert all(torch.equal(new[p], q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(RuntimeError, match="exchanged after the first step"):
        optimizer.step()


def test_frozen_parameters_in_groups_hold_no_state_until_they_train():
    model = tiny_model()
    parameters = list(model.parameters())
    for p in parameters[:2]:
        p.requires_grad_(False)
    optimizer = sharpwise.AdamW([{"params": parameters}], model=model, lr=1e-2)
    run(model, optimizer, range(2), skip=["transformer.wte.weight", "transformer.wpe.weight"])
    assert not any(p in optimizer.state for p in parameters[:2])
    parameters[0].requires_grad_(True)
    run(model, optimizer, range(2, 4), skip=["transformer.wpe.weight"])
    assert optimizer.state[parameters[0]]["step"] == 2
    assert optimizer.state[parameters[2]]["step"] == 4
    optimizer.load_state_dict(saved(optimizer))


@pytest.mark.parametrize("empty_first", [False, True])
def test_empty_groups(empty_first):
    """The Trainer's groups of an adapter are one full and one empty."""
    model = tiny_model()
    groups = [{"params": list(model.parameters())}, {"params": [], "weight_decay": 0.0}]
    optimizer = sharpwise.AdamMini(groups[::-1] if empty_first else groups, model=model, lr=1e-2)
    run(model, optimizer, range(2))
    optimizer.load_state_dict(saved(optimizer))
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("decay", ["scaled", "base"])
def test_no_decay_of_a_part_of_a_fused_matrix(decay):
    model = tiny_model()
    block_lr = sharpwise.BlockwiseLR(decay=decay)
    optimizer = sharpwise.AdamW(model, lr=0.01, weight_decay=0.5, no_decay=("v",), block_lr=block_lr)
    weight = model.get_parameter("transformer.h.0.attn.c_attn.weight")
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    keeps = 1 - 0.01 * 0.5 * (8 if decay == "scaled" else 1)
    assert torch.allclose(weight[:32], before[:32] * keeps, rtol=1e-6)
    assert torch.equal(weight[32:], before[32:])


def test_keys_of_schedulers_survive_loading():
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-2)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    run(model, optimizer, range(2))
    fresh = sharpwise.AdamW(model, lr=1e-2)
    fresh.load_state_dict(saved(optimizer))
    torch.optim.lr_scheduler.StepLR(fresh, 2, last_epoch=1)


def test_loading_takes_no_tensor_of_the_saved_dict():
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=torch.tensor(1e-2))
    run(model, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    other = sharpwise.AdamW(tiny_model(), lr=1e-3)
    other.load_state_dict(state)
    other.param_groups[0]["lr"].fill_(5.0)
    assert float(state["param_groups"][0]["lr"]) == pytest.approx(1e-2)


def test_a_value_that_cannot_be_loaded_changes_nothing():
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-2)
    run(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"].zero_()
    state["state"][max(state["state"])]["step"] = "three"
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert all(torch.equal(v, after["state"][i][k]) for i, own in before["state"].items() for k, v in own.items())


def test_seed_and_skipped_steps_are_saved():
    models = [tiny_model(torch.bfloat16) for _ in range(2)]
    options = {"lr": 1e-2, "stochastic_rounding": True, "on_nonfinite": "skip"}
    first = sharpwise.AdamW(models[0], seed=3, **options)
    fill_gradients(models[0], 0)
    next(iter(models[0].parameters())).grad[0, 0] = float("inf")
    first.step()
    assert first.skipped_steps == 1
    second = sharpwise.AdamW(models[1], seed=4, **options)
    second.load_state_dict(saved(first))
    assert second.skipped_steps == 1 and copy.deepcopy(first).skipped_steps == 1
    run(models[0], first, range(3))
    run(models[1], second, range(3))
    assert same(*models)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_the_count_of_skipped_steps(copied):
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-2, on_nonfinite="skip")
    run(model, optimizer, range(1))
    next(iter(model.parameters())).grad[0, 0] = float("nan")
    optimizer.step()
    assert copied(optimizer).skipped_steps == 1 == optimizer.skipped_steps


def test_skipped_steps_are_counted_across_moved_state():
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-2, on_nonfinite="skip")
    for count in range(1, 3):
        fill_gradients(model, 0)
        next(iter(model.parameters())).grad[0, 0] = float("nan")
        optimizer.step()
        for own in optimizer.state.values():
            own.update({k: v.clone() for k, v in own.items()})
        assert optimizer.skipped_steps == count
    run(model, optimizer, range(1))
    assert optimizer.skipped_steps == 2


def test_a_load_that_fails_leaves_the_count_of_skipped_steps():
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-2, on_nonfinite="skip")
    run(model, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    next(iter(model.parameters())).grad[0, 0] = float("nan")
    optimizer.step()
    state["state"][0]["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(state)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("loads", ["never", "before", "inside"])
@pytest.mark.parametrize("name", sharpwise.list_optimizers())
def test_training_goes_on_from_state_made_in_inference_mode(name, loads):
    """Validation loops save checkpoints there, also the first after a run was resumed."""
    models = [tiny_model() for _ in range(2)]
    optimizers = [sharpwise.create_optimizer(model, name, lr=1e-2) for model in models]
    if loads != "never":
        run(models[0], optimizers[0], range(2))
        run(models[1], optimizers[1], range(2))
    state = copy.deepcopy(optimizers[0].state_dict())
    if loads == "before":
        optimizers[0].load_state_dict(state)
    with torch.inference_mode():
        if loads == "inside":
            optimizers[0].load_state_dict(state)
        elif loads == "never":
            optimizers[0] = sharpwise.create_optimizer(models[0], name, lr=1e-2)
        optimizers[0].state_dict()
    for model, optimizer in zip(models, optimizers, strict=True):
        run(model, optimizer, range(2, 4))
    assert same(*models)


@pytest.mark.parametrize("name", sharpwise.list_optimizers())
def test_a_schedule_may_miss_zero_by_rounding(name):
    model = tiny_model()
    optimizer = sharpwise.create_optimizer(model, name, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, end_factor=0.0, total_iters=7)
    for t in range(7):
        run(model, optimizer, range(t, t + 1))
        schedule.step()
    assert -1e-15 < schedule.get_last_lr()[0] < 0
    before = copy.deepcopy(model)
    run(model, optimizer, range(7, 8))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("compile", [None, False])
@pytest.mark.parametrize("name", sharpwise.list_optimizers())
def test_numbers_of_numpy_are_numbers(name, compile):
    models = [tiny_model() for _ in range(2)]
    optimizers = [sharpwise.create_optimizer(model, name, lr=1e-2, compile=compile) for model in models]
    for model, optimizer, number in zip(models, optimizers, (float, np.float32), strict=True):
        run(model, optimizer, range(1))
        own = {"momentum": number(0.5)} if "sgd" in name else {"betas": (number(0.5), number(0.75))}
        optimizer.param_groups[0].update({"lr": number(0.25), "weight_decay": number(0.5), **own})
        run(model, optimizer, range(1, 3))
    assert same(*models)


@pytest.mark.parametrize("step", [3, torch.tensor(3)], ids=["number", "int64"])
@pytest.mark.parametrize("name", sharpwise.list_optimizers())
def test_a_step_that_cannot_be_counted_on_moves_nothing(name, step):
    model = tiny_model()
    optimizer = sharpwise.create_optimizer(model, name, lr=1e-2)
    run(model, optimizer, range(1))
    optimizer.state[list(model.parameters())[-1]]["step"] = step
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"'step' of .* must be a floating point tensor"):
        run(model, optimizer, range(1, 2))
    assert same(model, before)


@pytest.mark.parametrize(("key", "value"), [("lr", "1e-2"), ("weight_decay", "0.1"), ("lr", None)])
def test_settings_that_are_no_numbers(key, value):
    with pytest.raises(TypeError, match=f"{key} must be a number"):
        sharpwise.AdamW(tiny_model(), **{key: value})


def test_keywords_of_torch_are_answered():
    with pytest.raises(TypeError, match=r"AdamW: no option is called foreach.*leave out"):
        sharpwise.AdamW(tiny_model(), foreach=True)
    with pytest.raises(ValueError, match="maximize=True"):
        model = tiny_model()
        sharpwise.AdamW([{"params": list(model.parameters()), "maximize": True}], model=model)


def test_a_group_that_is_refused_leaves_nothing():
    """Neither the group nor what its names were: another tensor may be called so."""
    weight, other, taken = (nn.Parameter(torch.zeros(3, n)) for n in (3, 4, 5))
    optimizer = sharpwise.AdamW([("weight", weight)], lr=1e-2)
    for wrong in ([("x", taken), ("y", taken)], [("x", taken), ("y", weight)], [("x", taken * 2)]):
        with pytest.raises(ValueError, match=r"twice|more than one|non-leaf"):
            optimizer.add_param_group({"params": wrong})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("x", other)]})
    other.grad = torch.ones_like(other)
    optimizer.step()
    assert (other < 0).all()


def test_a_group_added_later_is_checked_as_the_first():
    model = tiny_model()
    optimizer = sharpwise.AdamMini(model, lr=1e-2)
    with pytest.raises(ValueError, match="strange"):
        optimizer.add_param_group({"params": [("strange.weight", nn.Parameter(torch.ones(3, 3)))]})
    assert len(optimizer.param_groups) == 1
    run(model, optimizer, range(1))


@pytest.mark.parametrize("name", sharpwise.list_optimizers())
def test_a_step_leaves_nothing_that_only_the_garbage_collector_finds(name):
    model = TinyGPT(width=64, heads=4, vocabulary=64)
    optimizer = sharpwise.create_optimizer(model, name, lr=1e-2)
    run(model, optimizer, range(2))
    fill_gradients(model, 2)
    gc.collect()
    gc.disable()
    try:
        optimizer.step()
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_temporaries_stay_small():
    """A matrix of 8 chunks: no eager path holds more than a chunk's worth of fp64 at a time."""
    from sharpwise.engine.backends.reference import CHUNK
    from sharpwise.engine.norms import row_squares

    g = torch.randn(8 * 2048, CHUNK // 2048)
    exact = (g.double() ** 2).sum(1)
    assert torch.equal(row_squares(g, 1), exact)
    assert torch.allclose(row_squares(g, 0), (g.double() ** 2).sum(0), rtol=1e-14)


def test_rounding_follows_the_global_element():
    """Row and column parts of the element numbers, for every layout, add up to the place in memory."""
    from sharpwise.engine.layout import Layouts
    from sharpwise.engine.views import views_of
    from sharpwise.rules import AdamW

    shapes = [((), 0, False), ((5,), 0, False), ((5, 7), 0, False), ((5, 7), 1, False), ((4, 3, 2), 0, False)]
    shapes += [((3, 5, 7), 1, True), ((3, 5, 7), 2, True)]
    for shape, dim, stacked in shapes:
        segment = sharpwise.blocks.Segment("w", shape, dim=dim, stacked=stacked)
        group = {"betas": (0.9, 0.99), "eps": 0.0}
        (view,) = views_of("w", torch.zeros(shape), group, (segment,), AdamW(), Layouts())
        row, column = view.element_index(torch.device("cpu"))
        whole = (row + column).expand(view.shape).reshape(-1)
        assert torch.equal(whole, torch.arange(whole.numel())), (shape, dim)
        assert row.numel() + column.numel() <= max(2, 2 * max(shape, default=1) ** 2)
