"""Optimizers of other libraries, `module:class`, in a run: as in a plain loop, stopped and gone on with, refused."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from sharpwise.blocks import BlockMap
from sharpwise.measure.probing import Text, updates
from sharpwise.measure.subject import open_subject
from sharpwise.train.build import Built, build
from sharpwise.train.checkpoint import Checkpoints, read_checkpoint
from sharpwise.train.config import OptimizerConfig
from sharpwise.train.config_file import differences, make_config, to_toml
from sharpwise.train.foreign import Foreign
from sharpwise.train.optimizer import as_code, build_optimizer
from sharpwise.train.run import run
from sharpwise.train.steps import _batch, step_seed, step_starts, token_loss, train_steps
from train.kill_rig import Tiny, settings
from train.run_rig import assert_same, changed, lines, prepare, stop_after

RADAM = {"name": "torch.optim:RAdam", "lr": 3e-3, "betas": [0.8, 0.9], "weight_decay": 0.3}
OWN = '''
import torch

class Halving(torch.optim.Optimizer):
    """Steps of lr, of half of it, and so on: what it was is in its state, as a tensor, a number and a text."""

    def __init__(self, params, lr, *, factor=0.5, kept=None):
        super().__init__(params, {"lr": lr, "factor": factor, "betas": None})
        self.kept = kept

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                own = self.state[p]
                own.setdefault("now", torch.ones(()))
                own["count"] = own.get("count", 0) + 1
                own["last"] = f"step {own['count']}"
                if self.kept:
                    own["kept"] = {self.kept}
                p.sub_(p.grad * own["now"] * group["lr"])
                own["now"].mul_(group["factor"] if own["count"] % 5 == 0 else 1)

class NoLr(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {})

class Function(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.param_groups[0]["of"] = print

class Modes(torch.optim.SGD):
    def train(self): ...
    def eval(self): ...

class Needs(torch.optim.SGD):
    def __init__(self, params, lr, rank, *, size, **more):
        super().__init__(params, lr)

class Broken(torch.optim.SGD):
    def __init__(self, params, lr):
        raise RuntimeError("no device")

class NoRate(torch.optim.SGD):
    def __init__(self, params, step_size=1.0):
        super().__init__(params, step_size)

not_a_class = torch.optim.SGD
class Other: ...
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory."""
    (tmp_path / "own_optimizers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return "own_optimizers"


def built(data: Path, optimizer: dict[str, Any], **tables: Any) -> Built:
    return build(make_config(changed(settings(data, optimizer), **tables)))


def test_a_run_is_that_of_a_plain_loop(data: Path) -> None:
    options = {**RADAM, "no_decay": ["norm", "bias"], "max_grad_norm": 0.5}
    mine, other = (built(data, options, batch={"micro": 4}) for _ in range(2))
    steps = list(train_steps(mine.model, mine.optimizer, mine.data.train, mine.data.validation, mine.plan))
    model, plan = other.model.train(), other.plan
    named = list(model.named_parameters())
    spared = [p for name, p in named if "norm" in name or name.endswith("bias")]
    rest = [p for _, p in named if not any(p is one for one in spared)]
    assert len(spared) == 12 and len(rest) == 8
    plain = torch.optim.RAdam(
        [{"params": rest}, {"params": spared, "weight_decay": 0.0}], lr=3e-3, betas=(0.8, 0.9), weight_decay=0.3
    )
    for step in range(1, plan.schedule.total + 1):
        for group in plain.param_groups:
            group["lr"] = plan.peak * plan.schedule.factor(step - 1)
        torch.manual_seed(step_seed(plan.seed, step))
        x, y = _batch(other.data.train, step_starts(other.data.train, plan, step), plan)
        loss = token_loss(model(x), x, y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_([*rest, *spared], 0.5)
        plain.step()
        plain.zero_grad()
        assert (steps[step - 1].loss, steps[step - 1].grad_norm) == (loss.item(), norm.item())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), mine.model.parameters(), strict=True))
    assert min(step.grad_norm or 0 for step in steps) > 0.5  # each was clipped


def test_frozen_parameters_stay_out() -> None:
    model = Tiny(30)
    model.embed_tokens.requires_grad_(False)
    found = build_optimizer(make_config({"optimizer": RADAM}).optimizer, model)
    assert len(found.param_groups[0]["params"]) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("name", ["torch.optim:RAdam", "own_optimizers:Halving"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(data: Path, tmp_path: Path, own: str, name: str) -> None:
    given = settings(data, {"name": name, "lr": 3e-2})
    run(given, tmp_path / "whole")
    assert run(given, tmp_path / "run", **stop_after(7)).state == "interrupted"
    assert run(None, tmp_path / "run", **stop_after(9), trust_code=True).state == "interrupted"
    assert run(given, tmp_path / "run").state == "finished"
    assert_same(tmp_path / "run", tmp_path / "whole")
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.1
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    parameters = facts["parameters"]
    assert facts["explained"]["rows"] == []
    assert facts["state_bytes"] == (8 * parameters + 4 * 20 if "RAdam" in name else 4 * 20)
    assert facts["optimizer"].startswith(f"{name.replace(':', '.')}(model.parameters(), lr=0.03)")
    noted = next(line for line in lines(tmp_path / "run") if "multipliers" in line)
    assert set(noted["multipliers"].values()) == {1.0} and "update_rms" in noted
    assert not {"sharpness", "gradient_snr"} & set(noted)  # what is called exp_avg may be something else


def test_what_a_run_measures_of_its_checkpoints(data: Path, tmp_path: Path) -> None:
    run(settings(data, RADAM), tmp_path / "run", **stop_after(7))
    with pytest.raises(ValueError, match=r"import torch\.optim .* call RAdam\(lr=0\.003, betas=.* trust_code=True"):
        open_subject(tmp_path / "run")
    subject = open_subject(tmp_path / "run", trust_code=True)
    for step in (subject.steps[-1], 0, subject.steps[-1]):
        found = updates(subject, step, Text(1, 4))
        assert {one.probe for one in found} and all(math.isfinite(e.value) for e in found[1])


def test_a_step_with_a_nan_is_left_out() -> None:
    model = nn.Linear(3, 3)
    optimizer = Foreign(torch.optim.Adam(model.parameters(), lr=0.1), BlockMap.of(model), 1.0)
    before = model.weight.clone()
    for bad in (math.nan, math.inf):
        model.weight.grad, model.bias.grad = torch.ones(3, 3), torch.tensor([1.0, bad, 1.0])
        optimizer.step()
        assert not math.isfinite(float(optimizer.grad_norm)) and torch.equal(model.weight, before)
    assert optimizer.state_bytes() is None
    model.bias.grad = torch.ones(3)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(12**0.5) and not torch.equal(model.weight, before)
    assert optimizer.state_bytes() == 2 * 4 * 12 + 2 * 4
    optimizer.zero_grad()
    assert model.weight.grad is None


def test_bytes_of_state_are_those_that_are_held() -> None:
    model, table = nn.Linear(4, 4), torch.zeros(256)
    optimizer = Foreign(torch.optim.SGD(model.parameters(), lr=0.1), BlockMap.of(model))
    assert optimizer.state_bytes() is None
    optimizer.inner.state[model.weight] = {
        "codes": torch.zeros(16, dtype=torch.uint8), "of": [{"table": table}], "step": 3,
        "quantized": TwoTensor(torch.zeros(16), torch.zeros(16)),
    }  # fmt: skip
    optimizer.inner.state[model.bias] = {"table": table}
    assert optimizer.state_bytes() == 16 + 4 * 256 + 2 * 64


def test_state_of_tensors_of_its_own_kind_is_saved_where_it_can_be_loaded(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = Foreign(torch.optim.SGD(model.parameters(), lr=0.1), BlockMap.of(model))
    for value, p in enumerate(model.parameters()):
        optimizer.inner.state[p] = {"of": TwoTensor(torch.full((4,), float(value)), torch.zeros(4))}
    with pytest.raises(ValueError, match=r"holds a TwoTensor \(state\.0\.of\)"):
        optimizer.state_dict()
    with torch.serialization.safe_globals([TwoTensor]):
        Checkpoints(tmp_path).save(1, {"optimizer": optimizer.state_dict()}, {})
        found = read_checkpoint(tmp_path, 1)
        assert found.state is not None
        assert [own["of"].a[0].item() for own in found.state["optimizer"]["state"].values()] == [0, 1]


def test_what_no_checkpoint_can_hold_is_told(data: Path, tmp_path: Path, own: str) -> None:
    given = settings(data, {"name": f"{own}:Halving", "lr": 1e-2, "kept": "x"})
    with pytest.raises(ValueError, match=r"the state of Halving holds a set \(state\.0\.kept\); a checkpoint holds"):
        run(given, tmp_path / "run")
    with pytest.raises(ValueError, match=r"Function holds a builtin_function_or_method \(param_groups\.0\.of\)"):
        built(data, {"name": f"{own}:Function", "lr": 1e-2})  # before anything is trained


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "nowhere.optim:Adam8bit"}, r"no module 'nowhere\.optim' here or .*; install the package that has it"),
        ({"name": "torch.optim:RAdm"}, r"torch\.optim:RAdm: module 'torch\.optim' has no 'RAdm'"),
        ({"name": "own_optimizers:Other"}, "is the class Other, expected a class derived from torch.optim.Optimizer"),
        ({"name": "torch:ones"}, r"torch:ones is .*, expected a class derived from torch\.optim\.Optimizer"),
        ({"betaz": [0.9, 0.9]}, r"optimizer\.betaz: torch\.optim:RAdam takes no such argument \(did you mean 'betas'"),
        ({"betas": [2.0, 0.9]}, r"torch\.optim:RAdam: its constructor raised ValueError: Invalid beta"),
        ({"name": "own_optimizers:Needs"}, "own_optimizers:Needs needs rank, size; say optimizer.rank"),
        ({"name": "own_optimizers:Broken"}, "its constructor raised RuntimeError: no device"),
        ({"name": "own_optimizers:NoLr"}, "its groups have no lr, which the schedule sets"),
        (
            {"name": "own_optimizers:NoRate"},
            r"optimizer\.lr: own_optimizers:NoRate takes no such .*; it takes step_size",
        ),
        ({"name": "own_optimizers:Modes"}, r"has train\(\) and eval\(\), which this loop does not call"),
        ({"name": "torch.optim:LBFGS"}, r"its step needs closure, and this loop calls step\(\) alone"),
        ({"no_decay": ["nrom"]}, r"no_decay takes roles and 'bias', got 'nrom'"),
        ({"no_decay": "norm", "name": "own_optimizers:Halving"}, r"optimizer\.no_decay: .* takes no weight_decay"),
    ],
)
def test_what_cannot_be_driven(data: Path, own: str, optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(data, {"name": "torch.optim:RAdam", "lr": 1e-3, **optimizer})


def test_a_part_of_a_parameter_has_no_decay_of_its_own(data: Path) -> None:
    with pytest.raises(ValueError, match=r"RAdam: 'q' takes a part of .*c_attn.*, which holds q, k and v"):
        built(data, {**RADAM, "no_decay": ["q"]}, model={"name": "gpt2-tiny"})


def test_several_processes_take_one_of_sharpwise(data: Path) -> None:
    world: Any = SimpleNamespace(size=2, together=lambda do: do())
    with pytest.raises(ValueError, match=r"torch\.optim:RAdam is of another library, and trains in one process here"):
        build(make_config(settings(data, RADAM)), world)


def test_in_a_configuration() -> None:
    config = make_config({"optimizer": RADAM})
    assert config.optimizer.options == {"betas": [0.8, 0.9], "weight_decay": 0.3}
    assert make_config({"optimizer": {**RADAM, "no_decay": ["norm"]}}).optimizer.options["no_decay"] == ["norm"]
    assert 'name = "torch.optim:RAdam"' in to_toml(config) and "betas = [" in to_toml(config)
    other = make_config({"optimizer": {**RADAM, "eps": 1e-6}})
    assert differences(config, other) == ["optimizer.eps: the run has nothing, now it is 1e-06"]
    for table, message in (
        ({"name": "torch.optim:RAdam"}, "optimizer.lr: say one"),
        ({**RADAM, "block_lr": "blockwise"}, "optimizer.block_lr: torch.optim:RAdam is of another library"),
        (
            {"name": "torch.optim:RAdam+blockwise", "lr": 1},
            "expected module:class, .*; a block_lr is for the optimizers",
        ),
        ({"name": "torch.optim:", "lr": 1}, "optimizer.name: got 'torch.optim:', expected module:class"),
        ({"name": "torch-optim:RAdam", "lr": 1}, "optimizer.name: got 'torch-optim:RAdam', expected module:class"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config({"optimizer": table})


def test_as_code() -> None:
    own = OptimizerConfig("torch.optim:RAdam", 1e-3, options={"betas": [0.8, 0.9], "no_decay": ["norm", "bias"]})
    assert as_code(own, 100) == (
        "torch.optim.RAdam(model.parameters(), lr=0.001, betas=(0.8, 0.9))  # no decay of norm, bias; gradients "
        "clipped to 1"
    )
