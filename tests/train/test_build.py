"""From configurations to models, optimizers and plans."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sharpwise.block_lr import GradientSNR, make_block_lr
from sharpwise.optim import BLOCK_LRS, COMBINES
from sharpwise.rotated import Rotated
from sharpwise.testing import EXAMPLES
from sharpwise.train import build as build_module
from sharpwise.train.build import Built, build
from sharpwise.train.config import OptimizerConfig
from sharpwise.train.config_file import make_config, set_keys
from sharpwise.train.optimizer import as_code, build_optimizer
from sharpwise.train.profile import WARM_UP, profile_steps
from train.kill_rig import Tiny, settings
from train.run_rig import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


def built(data: Path, *assignments: str) -> Built:
    return build(make_config(set_keys(settings(data, {"name": "adamw"}), assignments)))


@pytest.mark.parametrize("name", COMBINES)
def test_every_combination_by_configuration(name) -> None:
    """Any optimizer, block_lr and storage; that they train is tested by killing them."""
    block_lrs, storages = COMBINES[name]
    for block_lr in ("", *block_lrs, *({"name": found} for found in block_lrs)):
        spelled = EXAMPLES.get(block_lr, block_lr) if isinstance(block_lr, str) else block_lr
        for storage in storages:
            optimizer = make_config({"optimizer": {"name": name, "block_lr": spelled, "storage": storage}}).optimizer
            found = build_optimizer(optimizer, Tiny(300), steps=100)
            options = found.options
            wanted = make_block_lr(spelled) if spelled else None
            if name == "sgd-sai":
                wanted = GradientSNR() if wanted is None else GradientSNR() * wanted
            assert options.block_lr == wanted
            assert found.options.storage.format.name == storage
            assert (options.max_grad_norm, options.on_nonfinite) == (1.0, "skip")
            assert found.param_groups[0]["lr"] == optimizer.lr


@pytest.mark.parametrize(("rule", "own"), [("adamw", "adamw"), ("adasgd", "blockwise-adam"), ("sgd", "sgd")])
def test_a_rotated_rule_by_configuration(rule: str, own: str) -> None:
    optimizer = make_config({"optimizer": {"name": "rotated", "rule": rule}}).optimizer
    found = build_optimizer(optimizer, Tiny(300), steps=100)
    assert isinstance(found, Rotated) and found.rule.name == own
    assert f"create_optimizer(model, 'rotated', lr=0.001, rule={rule!r}" in as_code(optimizer)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"rule": "lion"}, "Rotated: no rule is called 'lion'; there are adasgd, adamw, sgd"),
        ({"block_lr": "blockwise"}, "Rotated: a rotation mixes what a block_lr tells apart; leave block_lr out"),
        ({"control": "angular"}, "Rotated: a rotation mixes the rows that a control bounds; leave control out"),
    ],
)
def test_what_a_rotation_cannot_have_is_said(table: dict[str, Any], says: str) -> None:
    optimizer = make_config({"optimizer": {"name": "rotated", **table}}).optimizer
    with pytest.raises(ValueError, match=says):
        build_optimizer(optimizer, Tiny(300), steps=100)


def test_arguments_arrive() -> None:
    table = {
        "name": "adam-mini",
        "lr": 0.5,
        "betas": [0.8, 0.9],
        "eps": 1e-6,
        "weight_decay": 0.3,
        "v_by": "tensor",
        "no_decay": ["norm", "bias"],
        "max_grad_norm": 0.0,
        "block_lr": {"name": "layer_decay", "rate": 0.5, "decay": "base"},
    }
    own = make_config({"optimizer": table}).optimizer
    found = build_optimizer(own, Tiny(300))
    assert (found.rule.betas, found.rule.eps, found.rule.v_by) == ((0.8, 0.9), 1e-6, "tensor")
    assert (found.param_groups[0]["lr"], found.param_groups[0]["weight_decay"]) == (0.5, 0.3)
    assert found.no_decay == {"norm", "bias"}
    assert found.options.max_grad_norm is None
    assert found.options.block_lr == BLOCK_LRS["layer_decay"](rate=0.5, decay="base")
    said = as_code(own)
    assert said.startswith("sharpwise.create_optimizer(model, 'adam-mini', lr=0.5, betas=(0.8, 0.9), ")
    assert "layer_decay" in said
    assert "0.5" in said.partition("block_lr=")[2]
    assert "max_grad_norm" not in said


def test_the_defaults_are_those_of_the_constructor() -> None:
    for name in COMBINES:
        own = make_config({"optimizer": {"name": name}}).optimizer
        assert own.lr is not None
        assert build_optimizer(own, Tiny(300)).defaults["weight_decay"] == own.options["weight_decay"]
    assert OptimizerConfig().lr is None


def test_the_same_seed_is_the_same_model(data) -> None:
    for name in ("gpt2-tiny", "train.kill_rig:build"):
        first, again, other = (built(data, f"model.name={name}", f"seed={seed}").model for seed in (1, 1, 2))
        weights = [list(model.parameters()) for model in (first, again, other)]
        assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


def test_precisions_of_weights(data) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16-autocast", torch.float32), ("bf16", torch.bfloat16)):
        found = built(data, "model.name=llama-tiny", f"compute.precision={precision}")
        assert {p.dtype for p in found.model.parameters()} == {dtype}
        assert found.plan.autocast == (precision == "bf16-autocast")
        # Rotations stay exact, as where transformers loads such a model.
        rotations = {b.dtype for name, b in found.model.named_buffers() if "inv_freq" in name}
        assert rotations == {torch.float32}
    found = built(data, "compute.precision=bf16")
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("native", [True, False])
def test_bf16_where_the_processor_has_it(data, monkeypatch, native) -> None:
    monkeypatch.setattr(build_module, "cpu_multiplies_bf16", lambda: native)
    own = settings(data, {}) | {"compute": {"device": "cpu", "threads": 1}}
    found = build(make_config(own))
    assert found.config.compute.precision == ("bf16-autocast" if native else "fp32")


def test_threads(data) -> None:
    before = torch.get_num_threads()
    try:
        built(data, "compute.threads=2")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_steps_that_are_fractions(data) -> None:
    plan = built(data, "schedule.steps=200", "schedule.warmup=0.05", "schedule.kind=wsd", "schedule.decay=0.25").plan
    assert (plan.schedule.total, plan.schedule.warmup, plan.schedule.decay) == (200, 10, 50)
    plan = built(data, "schedule.steps=200", "schedule.warmup=7", "schedule.kind=wsd", "schedule.decay=9").plan
    assert (plan.schedule.warmup, plan.schedule.decay) == (7, 9)
    own: dict[str, Any] = {key: value for key, value in settings(data, {}).items() if key != "schedule"}
    assert build(make_config(own)).plan.schedule.total == 1000
    own["schedule"] = {"tokens": 64 * 50 + 63}
    plan = build(make_config(own)).plan
    assert (plan.schedule.total, plan.schedule.warmup) == (50, 5)


def test_activation_checkpointing_of_a_model_that_has_no_switch(data) -> None:
    with pytest.raises(ValueError, match="Tiny has no switch for activation checkpointing"):
        built(data, "model.activation_checkpointing=true")


def test_a_function_that_asks_for_what_it_needs(data) -> None:
    with pytest.raises(ValueError, match="the function has no parameter 'width'"):
        built(data, "model.settings.width=8")
    model = built(data, "model.name=train.kill_rig:Tiny", "model.settings.width=8").model
    assert model.get_parameter("embed_tokens.weight").shape == (300, 8)


class Opaque(Tiny):
    """With a table in the middle that neither names nor dataflow explain."""

    def __init__(self, vocab_size: int = 300) -> None:
        super().__init__(vocab_size)
        self.unheard_of = torch.nn.Parameter(torch.ones(3, 5))


def test_a_run_is_told_what_a_run_can_do(data) -> None:
    """It has no option that says what a parameter is."""
    with pytest.raises(ValueError, match="nothing explains unheard_of") as caught:
        built(data, "model.name=train.test_build:Opaque", "optimizer.name=adam-mini")
    said = str(caught.value)
    assert "`sharpwise blocks train.test_build:Opaque --explain unheard_of`" in said
    assert "in the table [optimizer], cut='tensor'" in said and "example=" not in said
    assert built(data, "model.name=train.test_build:Opaque", "optimizer.name=adam-mini", "optimizer.cut=tensor")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.block_lr={name = [1]}", r"no block_lr is called \[1\]"),
        ("optimizer.block_lr=[1]", "optimizer.block_lr: expected text or a table"),
        ("optimizer.name=[1]", r"no optimizer is called \[1\]"),
        ("seed=9223372036854775808", r"seed must be below 2\^63"),
        ("seed=99999999999999999999999999", r"seed must be below 2\^63"),
        ("optimizer.lr=nan", "optimizer.lr must be at least 0"),
    ],
)
def test_values_of_strange_kinds(data, assignment, message) -> None:
    with pytest.raises(ValueError, match=message):
        built(data, assignment)


def test_the_largest_seed(data) -> None:
    assert built(data, "seed=9223372036854775807").plan.seed == 2**63 - 1


# --- where a step's time goes ----------------------------------------------------------------------------------------


def test_a_profile(data) -> None:
    found = profile_steps(built(data, "validation.every=1", "schedule.steps=40"), 6)
    assert found.steps == 6
    assert [name for name, _ in found.phases] == ["data", "forward", "backward", "optimizer", "the rest"]
    times = dict(found.phases)
    assert all(ms >= 0 for ms in times.values())
    assert found.tokens_per_second == pytest.approx(64 / found.step_ms * 1e3)
    own = [ms for _, ms, _ in found.operators]
    assert own == sorted(own, reverse=True)
    assert 0 < len(own) <= 12
    calls = {name: count for name, _, count in found.operators}
    assert calls["aten::addmm"] % 2 == 0  # two passes a step, and no validation among them


def test_a_profile_that_does_not_fit(data) -> None:
    with pytest.raises(ValueError, match=f"the run has {WARM_UP} steps; a profile of 10 needs 25"):
        profile_steps(built(data, f"schedule.steps={WARM_UP}"), 10)
    with pytest.raises(ValueError, match="at least one step, got 0"):
        profile_steps(built(data), 0)
