"""Every bad input is a typed error that says what is wrong, and changes nothing."""

import math

import pytest
import torch
from reference import driver, models
from reference.refusals import every_rule, make, refuse, same, snapshot, stepped, unchanged
from torch import nn

import sharpwise

# Construction


@every_rule
def test_override_that_matches_nothing(rule):
    model = models.build("llama")
    refuse(ValueError, r"(?s)\*\.wq\.weight.*match", lambda: make(rule, model, blocks={"*.wq.weight": "q"}), model)


def test_override_with_an_unknown_role():
    model = models.build("llama")
    refuse(ValueError, "query", lambda: make("adamw", model, blocks={"*q_proj*": "query"}), model)


@every_rule
def test_parameter_given_twice(rule):
    model = models.build("llama")
    p, q = model.lm_head.weight, model.model.norm.weight
    says = r"(?i)twice|more than one|duplicate|again"
    refuse(ValueError, says, lambda: make(rule, [p, q, p], model=model), model)
    refuse(ValueError, says, lambda: make(rule, [{"params": [p]}, {"params": [q, p]}], model=model), model)
    named = [("lm_head.weight", p), ("model.norm.weight", q)]
    refuse(ValueError, says, lambda: make(rule, [*named, ("lm_head.weight", p)], model=model), model)
    # One name on two tensors: refused as such, or because the name is another tensor's in the model.
    refuse(ValueError, r"lm_head\.weight", lambda: make(rule, [*named, ("lm_head.weight", q)], model=model), model)
    refuse(ValueError, says, lambda: make(rule, [*named, ("model.norm.weight", q)]), model)


def test_parameter_added_twice():
    model = models.build("llama")
    optimizer = stepped("adamw", model)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"(?i)twice|more than one|duplicate|already"):
        optimizer.add_param_group({"params": [model.lm_head.weight]})
    unchanged(before, model, optimizer)


@every_rule
def test_names_that_do_not_belong_to_the_model(rule):
    model = models.build("llama")
    p = model.lm_head.weight
    refuse(ValueError, "not_there.weight", lambda: make(rule, [("not_there.weight", p)], model=model), model)
    # A name of the model on another of its tensors.
    refuse(
        ValueError,
        r"model\.norm\.weight|lm_head\.weight",
        lambda: make(rule, [("model.norm.weight", p)], model=model),
        model,
    )


@every_rule
def test_tensors_that_do_not_belong_to_the_model(rule):
    model = models.build("llama")
    stranger = nn.Parameter(torch.randn(3, 5))
    refuse(ValueError, r"(?s)3.*5", lambda: make(rule, [model.lm_head.weight, stranger], model=model), model)
    refuse(ValueError, r"(?s)3.*5", lambda: make(rule, [{"params": [stranger]}], model=model), model)


@every_rule
def test_tensors_without_a_model(rule):
    model = models.build("llama")
    name = {"adamw": "AdamW", "adam-mini": "AdamMini", "lion": "Lion", "sgd": "SGD"}[rule]
    line = rf"{name}\(groups, model=model, lr=\.\.\.\)"
    refuse(TypeError, line, lambda: make(rule, list(model.parameters())), model)
    refuse(TypeError, line, lambda: make(rule, [{"params": list(model.parameters())}]), model)


@every_rule
def test_nothing_to_optimize(rule):
    model = models.build("llama")
    refuse(ValueError, r"(?i)no .*param|empty", lambda: make(rule, [], model=model), model)
    refuse(ValueError, r"(?i)no .*param|empty", lambda: make(rule, []), model)


@every_rule
def test_first_argument_of_another_kind(rule):
    model = models.build("llama")
    refuse(TypeError, "int", lambda: make(rule, 3), model)
    refuse(TypeError, r"(?i)tensor|param", lambda: make(rule, model.lm_head.weight), model)


@every_rule
@pytest.mark.parametrize("lr", [-1e-3, math.nan, math.inf], ids=str)
def test_bad_lr(rule, lr):
    model = models.build("llama")
    refuse(ValueError, r"lr", lambda: make(rule, model, lr=lr), model)
    refuse(ValueError, r"lr", lambda: make(rule, model, lr=torch.tensor(lr)), model)
    groups = [{"params": [model.lm_head.weight], "lr": lr}]
    refuse(ValueError, r"lr", lambda: make(rule, groups, model=model), model)


@pytest.mark.parametrize("rule", ["adamw", "adam-mini", "lion"])
@pytest.mark.parametrize(
    "betas", [(-0.1, 0.9), (1.0, 0.9), (0.9, 1.0), (0.9, -0.01), (math.nan, 0.9), (0.9, 1.5)], ids=str
)
def test_bad_betas(rule, betas):
    model = models.build("llama")
    refuse(ValueError, r"beta", lambda: make(rule, model, betas=betas), model)
    groups = [{"params": [model.lm_head.weight], "betas": betas}]
    refuse(ValueError, r"beta", lambda: make(rule, groups, model=model), model)


@every_rule
@pytest.mark.parametrize("weight_decay", [-0.1, math.nan], ids=str)
def test_bad_weight_decay(rule, weight_decay):
    model = models.build("llama")
    refuse(ValueError, "weight_decay", lambda: make(rule, model, weight_decay=weight_decay), model)


@pytest.mark.parametrize(
    ("rule", "options", "says"),
    [
        ("adamw", {"eps": -1e-8}, "eps"),
        ("adam-mini", {"eps": math.nan}, "eps"),
        ("adam-mini", {"cut": "heads"}, r"(?s)(?=.*heads).*element"),
        ("adam-mini", {"v_by": "column"}, r"(?s)(?=.*column).*row"),
        ("sgd", {"momentum": -0.5}, "momentum"),
        ("sgd", {"momentum": math.nan}, "momentum"),
        ("sgd", {"nesterov": True, "momentum": 0.0}, "(?i)nesterov"),
        ("sgd", {"nesterov": True, "dampening": 0.1}, "(?i)nesterov"),
        ("adamw", {"storage": "fp8"}, r"(?s)(?=.*fp8).*bf16"),
        ("adamw", {"on_nonfinite": "stop"}, r"(?s)(?=.*stop).*skip"),
        ("adamw", {"block_lr": "blokwise"}, r"(?s)(?=.*blokwise).*blockwise"),
        ("adamw", {"max_grad_norm": -1.0}, "max_grad_norm"),
        ("adamw", {"max_grad_norm": math.nan}, "max_grad_norm"),
        ("adamw", {"no_decay": ("norms",)}, r"(?s)(?=.*norms).*norm\b"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_bad_options(rule, options, says):
    model = models.build("llama")
    refuse(ValueError, says, lambda: make(rule, model, **options), model)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"emb": -1}, "emb"),
        ({"qk": math.nan}, "qk"),
        ({"floor": -1e-4}, "floor"),
        ({"floor": math.nan}, "floor"),
        ({"decay": "both"}, r"(?s)(?=.*both).*base"),
    ],
    ids=str,
)
def test_bad_blockwise_lr(arguments, says):
    with pytest.raises(ValueError, match=says):
        sharpwise.BlockwiseLR(**arguments)


@pytest.mark.parametrize("rate", [-0.5, 0.0, math.nan, math.inf])
def test_bad_layer_decay(rate):
    with pytest.raises(ValueError, match="rate"):
        sharpwise.LayerDecay(rate=rate)


def test_unknown_names():
    model = models.build("llama")
    with pytest.raises(ValueError, match=r"(?s)(?=.*adamww).*adamw"):
        sharpwise.create_optimizer(model, "adamww")


# Roles that a part distinguishes and the map does not know


class Strange(nn.Module):
    """No family knows these names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 6))
        self.second = nn.Parameter(torch.randn(6))


@every_rule
def test_unknown_role_under_blockwise_lr(rule):
    model = Strange()
    options = {"cut": "tensor"} if rule == "adam-mini" else {}
    refuse(
        ValueError,
        r"(?s)first.*blocks",
        lambda: make(rule, model, block_lr=sharpwise.BlockwiseLR(), **options),
        model,
    )
    optimizer = make(rule, model, block_lr=sharpwise.BlockwiseLR(), blocks={"first": "up", "second": "norm"}, **options)
    assert [row["multiplier"] for row in optimizer.lr_multipliers()] == [6, 1]


def test_unknown_role_under_adam_mini():
    model = Strange()
    refuse(ValueError, r"(?s)first.*(blocks|cut)", lambda: make("adam-mini", model), model)


@every_rule
def test_unknown_role_when_strict(rule):
    model = Strange()
    options = {"cut": "tensor"} if rule == "adam-mini" else {}
    refuse(ValueError, r"(?s)first.*blocks", lambda: make(rule, model, strict=True, **options), model)


@every_rule
def test_named_parameters_alone(rule):
    """They carry no head counts and no roles: refused by what needs those, and only by that."""
    model = models.build("llama")
    named = list(model.named_parameters())
    says = r"embed_tokens.*q_proj.*pass the model, \w+\(model, \.\.\.\) or model=model"
    refuse(TypeError, says, lambda: make(rule, named, block_lr=sharpwise.BlockwiseLR()), model)
    if rule == "adam-mini":
        refuse(TypeError, says, lambda: make(rule, named), model)
    else:
        make(rule, named)


# Gradients


@every_rule
def test_sparse_gradients(rule):
    model = nn.Module()
    model.table = nn.Embedding(5, 3, sparse=True)
    options = {"cut": "tensor"} if rule == "adam-mini" else {}
    optimizer = make(rule, model, **options)
    model.table.weight.grad = torch.ones(5, 3)
    optimizer.step()
    before = snapshot(model, optimizer)
    model.table.weight.grad = None
    model.table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"(?s)table\.weight.*sparse|sparse.*table\.weight"):
        optimizer.step()
    unchanged(before, model, optimizer)


@every_rule
def test_sparse_gradient_at_the_first_step(rule):
    model = nn.Module()
    model.a = nn.Parameter(torch.randn(4))
    model.table = nn.Embedding(5, 3, sparse=True)
    options = {"cut": "tensor"} if rule == "adam-mini" else {}
    optimizer = make(rule, model, **options)
    before = snapshot(model)
    (model.table(torch.tensor([1])).sum() + model.a.sum()).backward()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    unchanged(before, model)


@every_rule
def test_complex_parameters(rule):
    model = nn.Module()
    model.z = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    options = {"cut": "tensor"} if rule == "adam-mini" else {}

    def construct_and_step():
        optimizer = make(rule, model, **options)
        model.z.grad = torch.ones_like(model.z)
        optimizer.step()

    refuse(TypeError, r"(?s)z.*complex|complex.*z", construct_and_step, model)


@every_rule
def test_integer_parameters(rule):
    model = nn.Module()
    model.n = nn.Parameter(torch.arange(3), requires_grad=False)
    refuse(TypeError, r"int64 for n", lambda: make(rule, [("n", model.n)], model=model), model)


BAD = [math.nan, math.inf, -math.inf]


@every_rule
@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("value", BAD, ids=str)
def test_nonfinite_gradients_raise(rule, value, compiled):
    model = models.build("gpt2")
    optimizer = stepped(rule, model, on_nonfinite="raise", compile=compiled)
    before = snapshot(model, optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.transformer.h[1].mlp.c_fc.weight.grad[3, 4] = value
    model.transformer.ln_f.bias.grad[2] = value
    with pytest.raises(FloatingPointError, match=r"(?s)h\.1\.mlp\.c_fc\.weight.*ln_f\.bias"):
        optimizer.step()
    unchanged(before, model, optimizer)


@every_rule
@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("clip", [None, 1.0], ids=lambda c: f"clip={c}")
@pytest.mark.parametrize("value", BAD, ids=str)
def test_nonfinite_gradients_skip(rule, value, clip, compiled):
    model = models.build("gpt2")
    optimizer = stepped(rule, model, on_nonfinite="skip", max_grad_norm=clip, compile=compiled)
    before = snapshot(model, optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.transformer.h[0].attn.c_attn.bias.grad[5] = value
    optimizer.step()
    # A count of skipped steps may be kept in the groups; weights, moments and step counters may not change.
    weights, state = snapshot(model, optimizer)
    assert same(weights, before[0])
    assert same(state["state"], before[1]["state"])


@every_rule
def test_nonfinite_at_the_first_step(rule):
    """Skipped, the first step leaves nothing: the run after it is the run without it."""
    plain, skipped = models.build("gpt2"), models.build("gpt2")
    optimizers = []
    for model in (plain, skipped):
        optimizer = make(rule, model, on_nonfinite="skip")
        named = list(model.named_parameters())
        if model is skipped:
            for _, p in named:
                p.grad = torch.full_like(p, math.nan)
            optimizer.step()
        for recorded in driver.gradients(named, 3):
            for name, p in named:
                p.grad = recorded[name]
            optimizer.step()
        optimizers.append(optimizer)
    assert same(snapshot(plain)[0], snapshot(skipped)[0])
    assert same(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])


@every_rule
def test_nonfinite_is_ignored_as_torch_does(rule):
    model = models.build("llama")
    optimizer = stepped(rule, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.lm_head.weight.grad[2, 3] = math.nan
    optimizer.step()
    weight = model.lm_head.weight
    if rule == "lion":  # torch.sign(NaN) is 0: the weight is spared, the moment is not
        moment = optimizer.state[weight]["exp_avg"]
        assert moment[2, 3].isnan() and moment.isnan().sum() == 1
    elif rule == "adam-mini":  # the row is a block
        assert weight[2].isnan().all() and weight.isnan().sum() == weight.shape[1]
    else:
        assert weight[2, 3].isnan() and weight.isnan().sum() == 1
    assert not any(p.isnan().any() for p in model.parameters() if p is not weight)


@every_rule
@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1e-3])
def test_bad_lr_written_by_a_schedule(rule, lr):
    """Caught at the step that would use it, before any weight moves."""
    model = models.build("llama")
    optimizer = stepped(rule, model)
    optimizer.param_groups[0]["lr"] = lr
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lr must be a finite number >= 0"):
        optimizer.step()
    unchanged(before, model)


@pytest.mark.parametrize("key", ["weigth_decay", "weight_deacy", "beta"])
def test_a_setting_of_a_group_that_is_misspelled(key):
    """Others keep things in groups too: what is almost a setting is none of these."""
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=f"AdamW: a group has '{key}', which nothing reads; did you mean '"):
        sharpwise.AdamW([{"params": [model.weight], key: 0.5}], model=model, lr=1e-3)
    theirs = {"initial_lr": 1e-3, "max_momentum": 0.9, "name": "all", "lr_scale": 2.0, "min_lr": 0.0, 3: None}
    optimizer = sharpwise.AdamW([{"params": [model.weight], **theirs}], model=model, lr=1e-3)
    assert theirs.items() <= optimizer.param_groups[0].items()
