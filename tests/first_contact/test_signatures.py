"""Signatures serve hosts that read them, editors that complete them, and checkers that check them: all constructors."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from first_contact.tiny import gpt2

import sharpwise
from sharpwise.combinations import COMMON, PRESETS
from sharpwise.named import MuonOptions
from sharpwise.optim import OPTIMIZERS

NAMED = [sharpwise.AdamH, sharpwise.AdamW8bit, sharpwise.LionA, sharpwise.LionAR, sharpwise.Muon8bit, sharpwise.MuonH]
every_constructor = pytest.mark.parametrize("kind", [*OPTIMIZERS.values(), *NAMED], ids=lambda kind: kind.__name__)


def kept(kind: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """What litgpt 0.5.13 keeps of the arguments in its file (`litgpt.utils.instantiate_torch_optimizer`)."""
    known = set(inspect.signature(kind).parameters)
    return {key: value for key, value in given.items() if key in known}


@every_constructor
def test_a_host_that_filters_by_signature_keeps_every_option(kind: Callable[..., Any]) -> None:
    parameters = inspect.signature(kind).parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    given = {"lr": 3e-3, "weight_decay": 0.2, "fused": True, "max_grad_norm": 1.0}
    group = kind(gpt2().parameters(), **kept(kind, given)).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (3e-3, 0.2)
    assert set(COMMON) <= set(parameters)


@pytest.mark.parametrize("kind", NAMED, ids=lambda kind: kind.__name__)
def test_a_named_one_shows_the_defaults_that_it_has(kind: Callable[..., Any]) -> None:
    (preset,) = (own for name, own in PRESETS.items() if name.replace("-", "") == kind.__name__.lower())
    optimizer = kind(gpt2())
    shown = inspect.signature(kind).parameters
    base = inspect.signature(type(optimizer)).parameters
    for key in ("storage", "control", "aux_lr"):
        assert shown[key].default == preset.get(key, base[key].default)
    options = {key: value for key, value in preset.items() if key != "name"}
    same = sharpwise.create_optimizer(gpt2(), preset["name"], lr=shown["lr"].default, **options)
    assert str(optimizer.options) == str(same.options)
    assert repr(optimizer.rule).replace("(0.9, 0.9)", "[0.9, 0.9]") == repr(same.rule)  # as a configuration has them
    left = {name for name, p in base.items() if p.kind is p.KEYWORD_ONLY} - set(shown)
    assert not left


def test_the_options_of_muon_are_those_of_its_signature() -> None:
    own = {name for name, p in inspect.signature(sharpwise.Muon).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(MuonOptions.__annotations__) | set(COMMON) == own


@every_constructor
def test_an_interpreter_completes_every_option(kind: Callable[..., Any]) -> None:
    """jedi, which IPython and Jupyter complete with."""
    jedi = pytest.importorskip("jedi")
    found = jedi.Interpreter(f"sharpwise.{kind.__name__}(model, ", [{"sharpwise": sharpwise, "model": gpt2()}])
    completed = {own.name.removesuffix("=") for own in found.complete() if own.name.endswith("=")}
    assert set(inspect.signature(kind).parameters) - {"params"} <= completed


@pytest.mark.slow
def test_a_checker_knows_every_option_and_its_type(tmp_path: Path) -> None:
    """pyright, as in editors: what is right passes, a wrong type of each option is found, and a wrong name."""
    pytest.importorskip("pyright")
    lines = ["import sharpwise, torch", "model = torch.nn.Linear(2, 2)"]
    wrong = set()
    for kind in [*OPTIMIZERS.values(), *NAMED]:
        call = f"sharpwise.{kind.__name__}(model, "
        lines += [f"{call}lr=1e-3, storage='bf16', seed=1, block_lr='blockwise')", f"{call}lrr=1e-3)"]
        wrong.add(len(lines))
        for name, p in inspect.signature(kind).parameters.items():
            if p.annotation is not Any:
                lines.append(f"{call}{name}=1j)" if name != "params" else f"{call}1j, *())")
                wrong.add(len(lines)) if name != "params" else lines.pop()
    script = tmp_path / "calls.py"
    script.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(script)]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False).stdout
    if " - error: " not in told:
        pytest.skip(f"pyright does not run here: {told[-200:]}")
    found = {int(line) for line in re.findall(r"calls\.py:(\d+):\d+ - error: ", told)}
    assert found == wrong


def test_litgpt_builds_what_its_file_names() -> None:
    """The line of its YAML file, with the model's generator of parameters, as its pretraining passes them."""
    build = pytest.importorskip("litgpt.utils").instantiate_torch_optimizer
    model = gpt2()
    line = {
        "class_path": "sharpwise.AdamMini",
        "init_args": {"lr": 3e-3, "betas": (0.9, 0.95), "block_lr": "blockwise"},
    }
    optimizer = build(line, model.parameters(), fused=False)
    assert isinstance(optimizer, sharpwise.AdamMini)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["block_lr"]) == (3e-3, "blockwise")
    assert optimizer.blocks == sharpwise.AdamMini(model).blocks
    assert isinstance(build("sharpwise.AdamW8bit", gpt2().parameters(), lr=3e-3), sharpwise.AdamW)


@pytest.mark.parametrize("name", ["AdamMini", "Muon8bit"])
def test_verl_builds_what_its_configuration_names(name: str) -> None:
    """A stand-in for `verl.workers.config.optimizer.build_optimizer` (0.9.1), which needs ray to be imported."""

    def build_optimizer(parameters: Any, module: str, kind: str, override: dict[str, Any]) -> torch.optim.Optimizer:
        arguments: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.2}
        if "adam" in kind.lower():
            arguments["betas"] = (0.9, 0.99)
        return getattr(__import__(module), kind)(parameters, **arguments | override)

    optimizer = build_optimizer(gpt2().parameters(), "sharpwise", name, {"block_lr": "blockwise"})
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
