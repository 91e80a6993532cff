"""What a user is told to do can be done: by options of the function that was called, and it helps."""

import logging
import re

import pytest
import torch
from reference import models
from reference.refusals import refuse, snapshot, stepped, unchanged
from torch import nn

import sharpwise
from sharpwise import BlockMap
from sharpwise.probes import UpdateSize
from sharpwise.testing import tiny_model


class Asking(nn.Module):
    """Of no family, and its forward cannot be guessed: a batch tells all, names tell nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(50, 16), nn.Linear(16, 48)
        self.c, self.d, self.e, self.f = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 50)

    def forward(self, numbers, scale):
        x = self.a(numbers) * scale
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.b(x).chunk(3, -1))
        x = x + self.c(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.f(x + self.e(self.d(x).relu()))


BATCH = (torch.arange(8)[None] % 50, torch.ones(()))


def said(error, do):
    with pytest.raises(error) as caught:
        do()
    return str(caught.value)


# Roles that are not known


@pytest.mark.parametrize(
    "make",
    [
        lambda model, **given: sharpwise.AdamMini(model, **given),
        lambda model, **given: sharpwise.AdamW(model, block_lr="blockwise", **given),
        lambda model, **given: sharpwise.AdamW(model.parameters(), model=model, block_lr="blockwise", **given),
        lambda model, **given: sharpwise.Lion(model, strict=True, **given),
    ],
)
def test_a_model_in_hand_needs_a_batch(make):
    model = Asking()
    message = said(ValueError, lambda: make(model))
    assert "its forward needs 'numbers', which cannot be guessed" in message
    assert "blocks=BlockMap.of(model, example=batch)" in message
    assert "pass the model" not in message and "overrides=" not in message
    make(model, blocks=BlockMap.of(model, example=BATCH))


def test_names_alone_need_the_model():
    model = models.build("llama")
    named = list(model.named_parameters())
    message = said(TypeError, lambda: sharpwise.AdamMini(named))
    assert "pass the model, AdamMini(model, ...) or model=model" in message
    assert "blocks=" not in message and "example" not in message  # both would be refused next
    sharpwise.AdamMini(named, model=model)
    says = "blocks= need the model too; pass it first, or as model=model"
    refuse(TypeError, says, lambda: sharpwise.AdamMini(named, blocks={"*.q_proj.weight": "q"}), model)


def test_a_map_with_gaps_is_told_of_maps():
    """Overrides in its place would lose what it knows."""
    model = Asking()
    model.more = nn.Parameter(torch.ones(3, 5))  # no batch shows what it does
    blocks = BlockMap.of(model, example=BATCH)
    message = said(ValueError, lambda: sharpwise.AdamMini(model, blocks=blocks))
    assert "blocks=BlockMap.of(model, overrides={'more': 'up'}, ...)" in message
    sharpwise.AdamMini(model, blocks=BlockMap.of(model, example=BATCH, overrides={"more": "up"}))


def holder(**parts):
    model = nn.Module()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        (holder(lookup=nn.Embedding(9, 4)), {"lookup.weight": "tok_emb"}),
        (holder(bags=nn.EmbeddingBag(9, 4)), {"bags.weight": "tok_emb"}),
        (holder(pos_table=nn.Embedding(9, 4)), {"pos_table.weight": "pos_emb"}),
        (holder(tok_emb=nn.Parameter(torch.ones(9, 4))), {"tok_emb": "tok_emb"}),
        (holder(gain=nn.Parameter(torch.ones(4))), {"gain": "norm"}),
        (holder(temperature=nn.Parameter(torch.ones(()))), {"temperature": "other"}),
        (holder(fc=nn.Linear(4, 8)), {"fc.weight": "up"}),
        (holder(lm_head=nn.Linear(4, 9)), {"lm_head.weight": "head"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_role_that_is_shown_fits(model, shown):
    message = said(ValueError, lambda: sharpwise.AdamW(model, block_lr="blockwise"))
    assert f"blocks={shown}" in message
    assert f"overrides={shown}" in said(ValueError, lambda: BlockMap.of(model, strict=True))
    sharpwise.AdamW(model, block_lr="blockwise", blocks={"*": "other"} | shown)


def test_heads_that_are_not_known():
    model = holder(mix=nn.Linear(6, 4, bias=False))
    message = said(TypeError, lambda: sharpwise.AdamMini(model, blocks={"mix.weight": "q"}))
    assert "say it: blocks={'mix.weight': {'role': 'q', 'heads': N}}" in message and "the model" not in message
    sharpwise.AdamMini(model, blocks={"mix.weight": {"role": "q", "heads": 2}})


def test_a_group_added_later_has_no_options():
    model = tiny_model()
    optimizer = sharpwise.AdamMini(model)
    more = {"params": [("adapter.weight", nn.Parameter(torch.ones(3, 3)))]}
    message = said(ValueError, lambda: optimizer.add_param_group(more))
    assert "adapter.weight, which the optimizer was built without" in message and "blocks=" not in message
    assert "adapter.weight" in said(ValueError, lambda: optimizer.add_param_group(more))  # the first left no trace


# Overrides


@pytest.mark.parametrize(
    ("glob", "says"),
    [
        ("*.wq.weight", r"closest: model\.layers\.\{0\.\.1\}\.self_attn\.q_proj\.weight"),
        ("model.layers.*.mlp.gate.weight", r"closest: model\.layers\.\{0\.\.1\}\.mlp\.gate_proj\.weight"),
        ("q_proj", r"did you mean '\*\.q_proj\.\*', which matches model\.layers\.\{0\.\.1\}\.self_attn\.q_proj"),
        ("self_attn.q_proj.weight", r"did you mean '\*\.self_attn\.q_proj\.weight'"),
        ("embed", r"did you mean '\*embed\*', which matches model\.embed_tokens\.weight"),
        ("_orig_mod.lm_head.weight", r"did you mean 'lm_head\.weight'"),
    ],
)
def test_the_nearest_to_an_override(glob, says):
    model = models.build("llama")
    says = rf"AdamW: override .* matches none of 21 parameters; {says}"
    refuse(ValueError, says, lambda: sharpwise.AdamW(model, blocks={glob: "q"}), model)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: sharpwise.AdamW(m, blocks={"*embed*": "emb"}), "did you mean 'tok_emb' or 'pos_emb'"),
        (lambda m: sharpwise.AdamW(m, blocks={"*q_proj*": "query"}), r"did you mean 'q'\?"),
        (lambda m: sharpwise.AdamW(m, no_decay="emb"), "got 'emb' .did you mean 'tok_emb' or 'pos_emb'"),
        (lambda m: sharpwise.AdamW(m, no_decay=("norms",)), r"got 'norms' .did you mean 'norm'\?"),
        (lambda m: sharpwise.AdamW(m, block_lr=sharpwise.PerRole({"ffn": 2})), r"'ffn' is no .*did you mean 'FFN'\?"),
        (lambda m: sharpwise.AdamW(m, block_lr="per_role(FFN=2)"), r"write per_role\(ratios=\{FFN: 2\}\)"),
        (lambda m: sharpwise.SharpnessLR(reference="norm"), r"got 'norm' .did you mean 'Norm'\?"),
        (lambda m: UpdateSize(m, select="ffn"), r"select='ffn' matches nothing .did you mean 'FFN'\?"),
        (lambda m: sharpwise.AdamW(m, block_lr="only(blockwise, types=emb)"), r"got 'emb' .did you mean 'Emb'\?"),
    ],
)
def test_names_of_roles_and_types(make, says):
    model = models.build("llama")
    refuse(ValueError, says, lambda: make(model), model)


# Arguments in the wrong place, or of the wrong kind


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: sharpwise.AdamW(m, betas=0.9), r"betas must be two numbers in \[0, 1\), such as .*, got 0\.9$"),
        (lambda m: sharpwise.Lion(m, betas=("a", "b")), r"betas must be two numbers .*, got \('a', 'b'\)$"),
        (lambda m: sharpwise.AdamW(m, eps="tiny"), "eps must be a finite number >= 0, got 'tiny'$"),
        (lambda m: sharpwise.SGD(m, momentum=None), "momentum must be a finite number >= 0, got None$"),
        (lambda m: sharpwise.AdamW(m, no_decay=3), r"no_decay takes names, such as \('norm', 'bias'\), got 3$"),
        (lambda m: sharpwise.AdamW(m, seed="x"), "seed must be a whole number, got 'x'$"),
        (lambda m: sharpwise.AdamW(m, blocks=["q"]), r"blocks must be a BlockMap, or roles by name .* got list$"),
        (lambda m: sharpwise.create_optimizer("adamw", m), r"got LlamaForCausalLM: .*optimizer\(model, 'adamw'\)$"),
        (lambda m: sharpwise.create_optimizer("lion", m.parameters()), r"got generator: .*optimizer\(model, 'lion'\)$"),
        (lambda m: sharpwise.create_optimizer(m, sharpwise.AdamW), "name must be text, .* got the class AdamW$"),
        (lambda m: sharpwise.AdamW("adamw"), "expected a model, .* got str$"),
        (lambda m: sharpwise.AdamW(m.named_parameters), "got the method named_parameters, not called$"),
        (lambda m: sharpwise.AdamW(type(m)), "got the class LlamaForCausalLM$"),
        (lambda m: sharpwise.AdamW({"params": list(m.parameters())}, model=m), r"one group outside .* \[group\]$"),
        (lambda m: sharpwise.AdamW([m, m]), r"got LlamaForCausalLM; several .*ModuleList\(\[\.\.\.\]\)$"),
        (lambda m: sharpwise.AdamW(m.named_parameters(), model="m"), "model must be a torch.nn.Module, got str$"),
        (lambda m: sharpwise.AdamW([{"params": 3}], model=m), r"params of a group are tensors or .* pairs, got int$"),
        (lambda m: sharpwise.AdamW([{"parms": []}], model=m), r"dict with 'params', .*, got a mapping of \['parms'\]$"),
        (lambda m: sharpwise.AdamW(m).add_param_group([]), "a parameter group is a dict with 'params', .*, got list$"),
        (lambda m: sharpwise.AdamW(m).add_param_group({}), r"a dict with 'params', .*, got a mapping of \[\]$"),
        (lambda m: sharpwise.AdamW(m).add_param_group({"params": ["a"]}), "expected tensors or .* pairs, got str$"),
        (lambda m: sharpwise.AdamW(m).load_state_dict("a.pt"), r"takes what state_dict\(\) gave, got str$"),
        (lambda m: sharpwise.AdamW(m, strict="yes"), "strict must be True or False, got 'yes'$"),
        (lambda m: sharpwise.AdamW(m, weigth_decay=0.1), r"weigth_decay \(did you mean 'weight_decay'\?\)"),
        (lambda m: sharpwise.create_optimizer(m, "sgd", betas=(0.9, 0.99)), "called betas; options are lr, momentum"),
        (lambda m: sharpwise.Reversed(sharpwise.BlockwiseLR), r"such as BlockwiseLR\(\), got the class BlockwiseLR$"),
    ],
)  # fmt: skip
def test_wrong_kinds(make, says):
    model = models.build("llama")
    message = said(TypeError, lambda: make(model))
    assert re.search(says, message), message
    assert "\n" not in message and "(embed_tokens)" not in message  # no model is printed


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: sharpwise.BlockwiseLR(m), r"got LlamaForCausalLM; .* by name, BlockwiseLR\(emb=\.\.\.\)$"),
        (lambda m: sharpwise.BlockwiseLR(10), r"got 10; arguments are given by name, BlockwiseLR\(emb=10\)"),
        (
            lambda m: sharpwise.AdamW(m, block_lr="blockwise+llr"),
            r"no block_lr; several are multiplied: blockwise\*llr;",
        ),
        (
            lambda m: sharpwise.AdamW(m, max_grad_norm="1"),
            "max_grad_norm must be a finite number > 0, or None, got '1'",
        ),
        (lambda m: sharpwise.AdamW(m, compile="max"), "compile must be None or True .*, or False .*, got 'max'"),
        (lambda m: sharpwise.AdamW(m, storage="pf32"), r"no storage is called 'pf32' \(did you mean 'fp32'\?\)"),
        (
            lambda m: sharpwise.AdamW(m).load_state_dict({"optimizer": {}}),
            r"state dict, which has 'state' and 'param_groups': it has \['optimizer'\]",
        ),
        (lambda m: sharpwise.AdamW(iter([])), r"a generator, such as model\.parameters\(\), can be read once"),
        (
            lambda m: sharpwise.AdamW([{"params": list(m.parameters()), "param_names": ["a"]}], model=m),
            "a group has 21 params and 1 param_names",
        ),
    ],
)
def test_wrong_values(make, says):
    model = models.build("llama")
    refuse(ValueError, says, lambda: make(model), model)


# Parameters that changed


def test_a_resized_embedding():
    model = models.build("llama")
    optimizer = stepped("adamw", model)
    state = optimizer.state_dict()
    blocks = BlockMap.of(model)
    model.resize_token_embeddings(40, mean_resizing=False)
    resized = r"resize_token_embeddings"
    for do in (
        optimizer.step,
        lambda: sharpwise.AdamW(model).load_state_dict(state),
    ):
        message = said(ValueError, do)
        assert re.search(resized, message), message
        assert "FSDP" not in message
    message = said(ValueError, lambda: sharpwise.AdamW(model, blocks=blocks))
    assert "before it was resized; make it anew: BlockMap.of(model)" in message
    sharpwise.AdamW(model, blocks=BlockMap.of(model))


def test_a_flattened_parameter():
    model = models.build("llama")
    optimizer = stepped("adamw", model)
    weight = model.lm_head.weight
    weight.data, weight.grad = weight.data.reshape(-1), None
    message = said(ValueError, optimizer.step)
    assert "FSDP2" in message and "resize" not in message


def test_a_map_without_the_frozen():
    model = models.build("llama")
    model.lm_head.weight.requires_grad_(False)
    message = said(ValueError, lambda: sharpwise.AdamW(model.parameters(), model=model, blocks=BlockMap.of(model)))
    assert "lacks lm_head.weight; make it of this model, with BlockMap.of(model, include_frozen=True)" in message
    sharpwise.AdamW(model.parameters(), model=model, blocks=BlockMap.of(model, include_frozen=True))


# Nothing to train


def test_a_frozen_model():
    model = models.build("llama").requires_grad_(False)
    message = said(ValueError, lambda: sharpwise.AdamW(model))
    assert "requires_grad is False for all 21" in message and "AdamW(model.parameters(), model=model)" in message
    sharpwise.AdamW(model.parameters(), model=model)
    assert "Module has no parameters" in said(ValueError, lambda: sharpwise.AdamW(nn.Module()))


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if "requires a gradient" in r.getMessage()]


def test_frozen_parameters_warn_once(caplog):
    model = models.build("llama").requires_grad_(False)
    optimizer = sharpwise.AdamMini(model.parameters(), model=model)
    for _ in range(3):
        optimizer.step()
    (line,) = warnings_in(caplog)
    assert line.startswith("AdamMini: none of its 21 parameters requires a gradient") and "requires_grad_(True)" in line


def test_parameters_frozen_on_the_way_warn_once(caplog):
    model = models.build("llama")
    optimizer = stepped("adamw", model)
    model.lm_head.weight.requires_grad_(False)
    optimizer.zero_grad()
    optimizer.step()  # some are trained, though none has a gradient now
    assert warnings_in(caplog) == []
    model.requires_grad_(False)
    for _ in range(3):
        optimizer.step()
    assert len(warnings_in(caplog)) == 1
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


# State of another rule

KEEPS = {
    "adamw": "element-wise Adam state",
    "adam-mini": "one moment per element and one per block",
    "lion": "one momentum per element",
    "sgd": "a running sum of gradients per element",
}


@pytest.mark.parametrize(("saved", "own"), [(a, b) for a in KEEPS for b in KEEPS if a != b])
@pytest.mark.parametrize("tagged", [True, False], ids=["ours", "torchs"])
def test_state_of_another_rule_says_what_each_keeps(saved, own, tagged):
    """Also where no group says which rule it was: torch's AdamW, Adam, SGD have no names for theirs."""
    state = stepped(saved, models.build("llama")).state_dict()
    if not tagged:
        for group in state["param_groups"]:
            del group["rule"]
    model = models.build("llama")
    optimizer = stepped(own, model)
    before = snapshot(model, optimizer)
    message = said(ValueError, lambda: optimizer.load_state_dict(state))
    unchanged(before, model, optimizer)
    assert f"{saved!r} keeps {KEEPS[saved]}" in message and f"{own!r} keeps {KEEPS[own]}" in message
    assert "start anew" in message
    assert ("or convert: exp_avg as it is" in message) == ({saved, own} == {"adamw", "adam-mini"})


def test_what_converts_does():
    """As the message says: exp_avg as it is, and the mean of exp_avg_sq over each block."""
    model = models.build("llama")
    state = stepped("adamw", model).state_dict()
    mini = sharpwise.AdamMini(model, cut="tensor")
    fresh = mini.state_dict()
    for group, new in zip(state["param_groups"], fresh["param_groups"], strict=True):
        group["rule"] = new["rule"]
        for index in group["params"]:
            own = state["state"][index]
            own["exp_avg_sq"] = own["exp_avg_sq"].mean().reshape(1)
    mini.load_state_dict(state)
    assert mini.state[model.lm_head.weight]["step"] == 2


def test_blocks_cut_in_another_way():
    model = models.build("llama")
    state = stepped("adam-mini", model).state_dict()
    message = said(ValueError, lambda: sharpwise.AdamMini(model, cut="tensor").load_state_dict(state))
    assert "its blocks were cut differently; give cut=, v_by= and blocks= as they were" in message


def test_what_was_frozen_between_saving_and_loading():
    """AdamW(model) takes what requires a gradient; what the message says to do instead loads."""
    model = models.build("llama")
    state = stepped("adamw", model).state_dict()
    model.lm_head.weight.requires_grad_(False)
    fewer = sharpwise.AdamW(model)
    message = said(ValueError, lambda: fewer.load_state_dict(state))
    assert "has 'lm_head.weight', which is not here" in message and "frozen when this optimizer was built" in message
    assert "AdamW(model.parameters(), model=model) takes all" in message
    sharpwise.AdamW(model.parameters(), model=model).load_state_dict(state)
    state = fewer.state_dict()
    model.lm_head.weight.requires_grad_(True)
    message = said(ValueError, lambda: sharpwise.AdamW(model).load_state_dict(state))
    assert "lacks 'lm_head.weight', which is here" in message
    assert "frozen when the optimizer that saved it was built" in message
