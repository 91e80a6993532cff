"""OLMo-core 3.0: our `OptimConfig`, against the package, or a stand-in for its base where that does not import.

The stand-in has what its documentation says: a registry, the fields, and `build_groups` of tensors without names.
"""

import importlib
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from first_contact.tiny import gpt2, plain_loop

import sharpwise


@dataclass
class StandIn:
    group_overrides: Any = None
    compile: bool = False
    fixed_fields: tuple[str, ...] = ("initial_lr",)

    registered: ClassVar[dict[str, type]] = {}

    @classmethod
    def register(cls, name: str) -> Any:
        return lambda kind: cls.registered.setdefault(name, kind)

    def build_groups(self, model: torch.nn.Module, strict: bool = True) -> list[dict[str, Any]]:
        left = {n: p for n, p in model.named_parameters() if p.requires_grad}
        groups = []
        for own in self.group_overrides or []:
            names = [n for n in left if any(fnmatch(n, pattern) for pattern in own.params)]
            assert names or not strict
            groups.append({"params": [left.pop(n) for n in names], **own.opts})
        return [*groups, {"params": list(left.values())}]


@dataclass
class Override:
    params: list[str]
    opts: dict[str, Any]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> type:
    try:
        importlib.import_module("olmo_core.optim")
    except ImportError:
        package, optim = ModuleType("olmo_core"), ModuleType("olmo_core.optim")
        optim.OptimConfig = StandIn  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "olmo_core", package)
        monkeypatch.setitem(sys.modules, "olmo_core.optim", optim)
        monkeypatch.delitem(sys.modules, "sharpwise.integrations.olmo_core", raising=False)
    return importlib.import_module("sharpwise.integrations.olmo_core").SharpwiseConfig


def test_it_builds_the_optimizer_of_the_model_in_groups_of_olmo(config: type) -> None:
    model = gpt2()
    overrides = [Override(["*wte*", "*wpe*"], {"weight_decay": 0.0})]
    own = config(name="adam-mini", lr=1e-2, options={"betas": (0.9, 0.95), "block_lr": "blockwise"})
    own.group_overrides = overrides
    optimizer = own.build(model)
    assert isinstance(optimizer, sharpwise.AdamMini)
    assert [(len(g["params"]), g["weight_decay"], g["initial_lr"], g["betas"]) for g in optimizer.param_groups] == [
        (2, 0.0, 1e-2, (0.9, 0.95)),
        (26, 0.1, 1e-2, (0.9, 0.95)),
    ]
    assert optimizer.blocks == sharpwise.AdamMini(model).blocks


def test_fixed_fields_are_kept_when_state_is_loaded(config: type) -> None:
    optimizer = config(name="adamw", lr=1e-2).build(gpt2())
    other_model = gpt2()
    other = config(name="adamw", lr=5e-2).build(other_model)
    plain_loop(other_model, other)
    optimizer.load_state_dict(other.state_dict())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["initial_lr"]) == (5e-2, 1e-2)


def test_compile_is_refused(config: type) -> None:
    with pytest.raises(ValueError, match=r"compiles its own step.*leave it out"):
        config(name="adamw", compile=True).build(gpt2())
