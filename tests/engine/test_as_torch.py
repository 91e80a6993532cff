"""What scripts do with torch's optimizers, and expect of any other."""

import copy
import logging

import pytest
import torch
from reference.rig import bit_equal, through_disk
from torch import nn

import sharpwise
from sharpwise import optim
from sharpwise.testing import fill_gradients, run, same, tiny_model


def pair():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    return model, copy.deepcopy(model)


def steps(model, optimizer, which):
    for step in which:
        fill_gradients(model, step)
        optimizer.step()


# Steps


@pytest.mark.parametrize("name", sharpwise.list_optimizers())
def test_a_step_at_rate_zero_without_gradient_counts_once_training_has_begun(name):
    model = tiny_model()
    own_aux = {"aux_lr": None} if name in ("adamh", "muonh") else {}  # theirs is a ratio to lr
    optimizer = sharpwise.create_optimizer(model, name, lr=0.0, **own_aux)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert {float(own["step"]) for own in optimizer.state.values()} == {0.0}, "the step of checkpointing"
    optimizer.param_groups[0]["lr"] = 1e-2
    run(model, optimizer, [0])
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    optimizer.param_groups[0]["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert {float(own["step"]) for own in optimizer.state.values()} == {2.0}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_rate_of_zero_in_between_is_as_in_torch():
    ours, theirs = pair()
    one = sharpwise.AdamW(ours, lr=1e-2, compile=False)
    two = torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False)
    for step, (lr, zero) in enumerate([(1e-2, False), (0.0, True), (0.0, False), (1e-2, True), (1e-2, False)]):
        for model, optimizer in ((ours, one), (theirs, two)):
            fill_gradients(model, step)
            for p in model.parameters():
                p.grad *= 0 if zero else 1
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    bit_equal(ours, theirs)


@pytest.mark.parametrize("name", sharpwise.list_optimizers())
@pytest.mark.parametrize("options", [{}, {"compile": False}, {"max_grad_norm": 1.0}], ids=str)
def test_parameters_without_elements_keep_finite_state(name, options):
    model = nn.Module()
    for i, shape in enumerate([(0,), (0, 4), (4, 0), (), (4, 4)]):
        model.register_parameter(f"p{i}", nn.Parameter(torch.full(shape, 0.5)))
    blocks = {f"p{i}": "up" if i in (1, 2, 4) else "norm" for i in range(5)}
    optimizer = sharpwise.create_optimizer(model, name, lr=1e-2, blocks=blocks, **options)
    steps(model, optimizer, range(3))
    assert all(value.isfinite().all() for own in optimizer.state.values() for value in own.values())


def test_a_compiled_step_is_the_step_and_says_where_to_call_it(caplog):
    ours, theirs = pair()
    one, two = sharpwise.AdamMini(ours, lr=1e-2, cut="tensor"), sharpwise.AdamMini(theirs, lr=1e-2, cut="tensor")
    compiled = torch.compile(one.step, backend="eager")
    with caplog.at_level(logging.WARNING, "sharpwise"):
        for step in range(3):
            fill_gradients(ours, step)
            compiled()
        assert sum("torch.compile" in record.getMessage() for record in caplog.records) == 1
    steps(theirs, two, range(3))
    bit_equal(ours, theirs)
    assert int(one.state[ours[0].weight]["step"]) == 3
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compiles itself[^$]*call optimizer.step\(\) outside"):
        torch.compile(one.step, backend="eager", fullgraph=True)()


def test_a_whole_training_step_may_be_compiled():
    ours, theirs = pair()
    one, two = (sharpwise.AdamW(model, lr=1e-2) for model in (ours, theirs))

    def train(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(train, backend="eager")
    for step in range(3):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        compiled(ours, one, x)
        train(theirs, two, x)
    bit_equal(ours, theirs)


# Construction


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_of_parameters_is_refused(kind):
    model, _ = pair()
    with pytest.raises(TypeError, match=r"order.*list"):
        sharpwise.AdamW(kind(model.parameters()), lr=1e-2, model=model)
    with pytest.raises(TypeError, match=r"order.*list"):
        sharpwise.AdamW([{"params": kind(model.parameters())}], lr=1e-2, model=model)
    optimizer = sharpwise.AdamW(list(model[0].parameters()), lr=1e-2, model=model)
    with pytest.raises(TypeError, match=r"order.*list"):
        optimizer.add_param_group({"params": kind(model[1].parameters())})
    assert len(optimizer.param_groups) == 1


def test_the_table_is_read_by_the_name_of_the_optimizer(monkeypatch):
    """SGD-SaI runs the rule of SGD, and has a row of its own."""
    model = tiny_model()
    sharpwise.SGDSaI(model, lr=1e-2, block_lr="blockwise", storage="bf16")
    with pytest.raises(ValueError, match=r"first gradient already"):
        sharpwise.SGDSaI(model, lr=1e-2, block_lr="gradient_snr")
    monkeypatch.setitem(optim.COMBINES, "sgd-sai", ((), ("fp32",)))
    for option in ({"block_lr": "blockwise"}, {"storage": "bf16"}):
        with pytest.raises(ValueError, match=r"SGDSaI: sgd-sai .*not supported"):
            sharpwise.SGDSaI(model, lr=1e-2, **option)
        sharpwise.SGD(model, lr=1e-2, **option)
    sharpwise.SGDSaI(model, lr=1e-2)


# State


def test_state_that_others_put_there_is_kept_saved_and_loaded():
    """A wrapper keeps its own tensors in `optimizer.state`, before the first step too."""
    model, twin = pair()
    optimizer = sharpwise.SGD(model, lr=1e-2, momentum=0.9)
    for p in model.parameters():
        optimizer.state[p]["z"] = p.detach().clone()
        optimizer.state[p]["note"] = {"since": 3}
    steps(model, optimizer, range(3))
    assert all(own.keys() == {"z", "note", "step", "momentum_buffer"} for own in optimizer.state.values())
    saved = through_disk(optimizer.state_dict())
    twin.load_state_dict(model.state_dict())
    again = sharpwise.SGD(twin, lr=1e-2, momentum=0.9)
    again.load_state_dict(saved)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["z"], again.state[q]["z"])
        assert again.state[q]["note"] == {"since": 3}
    for one, other in ((model, optimizer), (twin, again)):
        steps(one, other, range(3, 5))
    bit_equal(model, twin)


def test_moments_that_were_put_there_before_the_first_step_are_used():
    model, _ = pair()
    optimizer = sharpwise.AdamW(model, lr=1e-2)
    optimizer.state[model[0].weight]["exp_avg"] = torch.ones(6, 4)
    fill_gradients(model, 0)
    optimizer.step()
    gradient = model[0].weight.grad
    torch.testing.assert_close(optimizer.state[model[0].weight]["exp_avg"], 0.9 + 0.1 * gradient)


def test_an_empty_entry_does_not_give_a_frozen_parameter_state():
    """Wrappers ask `state[p]` of every parameter, which makes an entry."""
    model, _ = pair()
    model[1].requires_grad_(False)
    optimizer = sharpwise.AdamW(list(model.parameters()), lr=1e-2, model=model)
    assert not optimizer.state[model[1].weight]
    fill_gradients(model, 0, ["1.weight", "1.bias"])
    optimizer.step()
    assert not optimizer.state[model[1].weight]


def test_a_state_dict_that_names_a_parameter_twice_is_refused():
    model, _ = pair()
    optimizer = sharpwise.AdamW(model, lr=1e-2)
    steps(model, optimizer, range(2))
    names, numbers = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    names["param_groups"][0]["param_names"][1] = "0.weight"
    numbers["param_groups"][0]["params"][1] = 0
    for bad in (names, numbers):
        with pytest.raises(ValueError, match="twice"):
            optimizer.load_state_dict(bad)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_of_torchs_sgd_goes_on(momentum, nesterov):
    if nesterov and not momentum:
        pytest.skip("needs momentum")
    settings = {"lr": 1e-2, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.1}
    settings["dampening"] = 0.0 if nesterov else 0.3
    theirs, ours = pair()
    old = torch.optim.SGD(theirs.parameters(), foreach=False, **settings)
    steps(theirs, old, range(3))
    ours.load_state_dict(theirs.state_dict())
    new = sharpwise.SGD(ours, lr=1e-2, compile=False)
    new.load_state_dict(through_disk(old.state_dict()))
    assert {key: new.param_groups[0][key] for key in settings} == settings
    for model, optimizer in ((theirs, old), (ours, new)):
        steps(model, optimizer, range(3, 6))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_state_of_torchs_adam_goes_on_where_it_means_the_same():
    theirs, ours = pair()
    old = torch.optim.Adam(theirs.parameters(), lr=1e-2, foreach=False)
    steps(theirs, old, range(3))
    ours.load_state_dict(theirs.state_dict())
    new = sharpwise.AdamW(ours, lr=1e-2, compile=False)
    new.load_state_dict(through_disk(old.state_dict()))
    assert new.param_groups[0]["weight_decay"] == 0
    for model, optimizer in ((theirs, old), (ours, new)):
        steps(model, optimizer, range(3, 6))
    bit_equal(ours, theirs)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1), lambda m: sharpwise.AdamW(m, lr=1e-2)),
        (
            lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
            lambda m: sharpwise.SGD(m, lr=1e-2, momentum=0.9, decoupled_weight_decay=True),
        ),
        (
            lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
            lambda m: sharpwise.SGDSaI(m, lr=1e-2),
        ),
        (
            lambda p: sharpwise.SGD(list(p), lr=1e-2, momentum=0.9, weight_decay=0.1, decoupled_weight_decay=True),
            lambda m: sharpwise.SGD(m, lr=1e-2, momentum=0.9),
        ),
    ],
    ids=["Adam", "SGD", "SGD to SGD-SaI", "decoupled SGD to coupled"],
)
def test_state_that_decays_in_another_way_says_why_it_is_not_loaded(theirs, ours):
    first, second = pair()
    old = theirs(first.named_parameters())
    steps(first, old, range(2))
    new = ours(second)
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(ValueError, match=r"coupled.*coupled.*weight_decay"):
        new.load_state_dict(old.state_dict())
    assert str(new.state_dict()) == str(before)
    saved = old.state_dict()
    saved["param_groups"][0]["weight_decay"] = 0.0
    new.load_state_dict(saved)


def test_a_state_dict_without_decay_in_its_groups_loads():
    """Ours of before groups said how they decay."""
    model, twin = tiny_model(), tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-2)
    run(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["decoupled_weight_decay"]
    twin.load_state_dict(model.state_dict())
    again = sharpwise.AdamW(twin, lr=1e-2)
    again.load_state_dict(saved)
    for one, other in ((model, optimizer), (twin, again)):
        run(one, other, range(2, 4))
    assert same(model, twin)
