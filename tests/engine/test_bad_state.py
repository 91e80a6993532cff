"""State dicts that do not fit are refused by name, and change nothing."""

import copy

import pytest
import torch
from reference import models
from reference.refusals import RULES, every_rule, make, snapshot, stepped, unchanged


def refuse_state(error, match, optimizer, model, state):
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=match):
        optimizer.load_state_dict(state)
    unchanged(before, model, optimizer)


@every_rule
def test_state_dict_of_another_model(rule):
    model = models.build("llama")
    optimizer = stepped(rule, model)
    other = stepped(rule, models.build("gpt2")).state_dict()
    refuse_state(ValueError, r"embed_tokens|wte", optimizer, model, other)


@every_rule
def test_state_dict_of_a_model_of_another_size(rule):
    """The same names with other shapes."""
    model = models.build("llama")
    optimizer = stepped(rule, model)
    wide = models.llama(head_dim=10)
    other = stepped(rule, wide).state_dict()
    refuse_state(ValueError, r"q_proj", optimizer, model, other)


@pytest.mark.parametrize(("rule", "other"), [(a, b) for a in RULES for b in RULES if a != b])
def test_state_dict_of_another_rule(rule, other):
    model = models.build("llama")
    optimizer = stepped(rule, model)
    state = stepped(other, models.build("llama")).state_dict()
    refuse_state(ValueError, r"(?i)adamw|adam_?-?mini|lion|sgd|exp_avg|momentum", optimizer, model, state)


@pytest.mark.parametrize("rule", ["lion", "sgd", "adam-mini"])
def test_state_dict_of_torchs_adamw_under_another_rule(rule):
    model = models.build("llama")
    optimizer = stepped(rule, model)
    other = models.build("llama")
    torchs = torch.optim.AdamW(other.parameters())
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    torchs.step()
    refuse_state(ValueError, r"(?i)adam|exp_avg|momentum", optimizer, model, torchs.state_dict())


@every_rule
def test_state_dict_without_one_parameter(rule):
    """The state of a model that lacks a parameter: the message names it."""
    model, smaller = models.build("llama"), models.build("llama")
    optimizer = stepped(rule, model)
    named = [(name, p) for name, p in smaller.named_parameters() if name != "model.norm.weight"]
    partial = make(rule, [p for _, p in named], model=smaller)
    partial.init_state()
    refuse_state(ValueError, r"model\.norm\.weight", optimizer, model, partial.state_dict())


@every_rule
def test_state_dict_with_one_parameter_too_many(rule):
    model, larger = models.build("llama"), models.build("llama")
    named = [(name, p) for name, p in model.named_parameters() if name != "model.norm.weight"]
    optimizer = make(rule, [p for _, p in named], model=model)
    optimizer.init_state()
    refuse_state(ValueError, r"model\.norm\.weight", optimizer, model, stepped(rule, larger).state_dict())


@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq", "step"])
def test_state_dict_without_one_entry(entry):
    model = models.build("llama")
    optimizer = stepped("adamw", model)
    state = copy.deepcopy(optimizer.state_dict())
    first = next(iter(state["state"]))
    del state["state"][first][entry]
    refuse_state(ValueError, entry, optimizer, model, state)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.to("meta"), "map_location"),
        (lambda t: t.to_sparse(), "dense"),
        (lambda t: t.to(torch.complex64), "real"),
    ],
    ids=["meta", "sparse", "complex"],
)
@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq"])
def test_values_that_cannot_be_copied(change, says, entry):
    """Found before the first of them is: the state of the others stays as well."""
    model = models.build("llama")
    optimizer = stepped("adamw", model)
    state = copy.deepcopy(optimizer.state_dict())
    for own in state["state"].values():
        own["exp_avg"].zero_()
    last = state["state"][max(state["state"])]
    last[entry] = change(last[entry])
    refuse_state(ValueError, rf"{entry} of .*{says}", optimizer, model, state)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["param_groups"][0].pop("params"),
        lambda s: s.update(state=[]),
        lambda s: s.update(param_groups=None),
        lambda s: s["state"].update({0: 5}),
        lambda s: s.update(state={str(i): own for i, own in s["state"].items()}),
        lambda s: s["state"].update({10_000: s["state"][0]}),
    ],
    ids=["no params", "a list of state", "no groups", "a number for state", "numbers as text", "of no parameter"],
)
@every_rule
def test_damaged_state_dict(rule, change):
    model = models.build("llama")
    optimizer = stepped(rule, model)
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    refuse_state(ValueError, "is damaged", optimizer, model, state)


def test_state_dict_of_something_else():
    model = models.build("llama")
    optimizer = stepped("adamw", model)
    refuse_state((ValueError, TypeError), r"(?i)state|param_groups", optimizer, model, {"weights": {}})
