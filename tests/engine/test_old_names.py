"""State saved under the names that a block_lr had before the first release: loaded, resumed = uninterrupted.

`OLD` is what that version saved after three steps of `gradients`, the first two block_lrs in the middle of a ramp.
"""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import sharpwise
from sharpwise.engine import BlockOptimizer
from sharpwise.testing import same

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torch's, of its checkpoints

NAMES = ["norm", "up", "down", "gate"]
SHARPNESS = "sharpness(start=1, every=4, soft=4, power=1, max_ratio=2, ema=0)"
LLR = "llr(stop=0, soft=6, least=4)"
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sharpness": (sharpwise.AdamW, {"betas": (0.5, 0.75), "block_lr": SHARPNESS}),
    "llr": (sharpwise.AdamW, {"betas": (0.5, 0.75), "block_lr": LLR}),
    "sgd-sai": (sharpwise.SGDSaI, {"momentum": 0.5}),
}

ADAMW = {"lr": 0.125, "weight_decay": 0.25, "betas": (0.5, 0.75), "eps": 1e-8, "rule": "adamw"}
SGD = {"lr": 0.125, "weight_decay": 0.25, "momentum": 0.5, "dampening": None, "nesterov": False, "rule": "sgd"}
GROUPS: dict[str, dict[str, Any]] = {
    "sharpness": {**ADAMW, "block_lr": SHARPNESS, "lr_step": 3, "lr_switch": (1, 4)},
    "llr": {**ADAMW, "block_lr": LLR, "lr_step": 3, "lr_switch": (0, 6)},
    "sgd-sai": {**SGD, "block_lr": "gradient_snr", "lr_step": 3, "lr_switch": (0, 0)},
}

MOMENTS = [
    {"exp_avg": [1.5, 5.0], "exp_avg_sq": [6.25, 19.0]},
    {
        "exp_avg": [[0.09375, 0.3125, 0.53125, 0.75]] * 4,
        "exp_avg_sq": [[0.0244140625, 0.07421875, 0.1962890625, 0.390625]] * 4,
    },
    {
        "exp_avg": [[0.1875, 0.625, 1.0625, 1.5]] * 4,
        "exp_avg_sq": [[0.09765625, 0.296875, 0.78515625, 1.5625]] * 4,
    },
    {"exp_avg": [[0.75, 2.5, 4.25, 6.0]] * 4, "exp_avg_sq": [[1.5625, 4.75, 12.5625, 25.0]] * 4},
]
MOMENTUM = [
    {"momentum_buffer": [1.0, 5.0]},
    {"momentum_buffer": [[0.0625, 0.3125, 0.5625, 0.8125]] * 4},
    {"momentum_buffer": [[0.125, 0.625, 1.125, 1.625]] * 4},
    {"momentum_buffer": [[0.5, 2.5, 4.5, 6.5]] * 4},
]
MEASURED = {
    "sharpness": [(1.0, 8.0), (2.0, 0.09375), (2.0, 0.375), (2.0, 6.0)],
    "llr": [(1.0, 0.0), (5.0, 1.480898380279541), (2.142856434603536, 1.206099271774292), (1.0, 1.096179723739624)],
    "sgd-sai": [(2.0, 2.0), *[(4.381780624389648, 4.381780624389648)] * 3],
}
"""Where the multiplier of each parameter goes, and what was measured of it."""


def old(case: str) -> dict[str, Any]:
    state = {}
    for i, (own, (to, measured)) in enumerate(
        zip(MOMENTUM if case == "sgd-sai" else MOMENTS, MEASURED[case], strict=True)
    ):
        state[i] = {"step": torch.tensor(3.0), **{key: torch.tensor(value) for key, value in own.items()}}
        for key, value in {
            "lr_multiplier": [to],
            "lr_after": [[to]],
            "lr_before": [[1.0]],
            "lr_measured": [[measured]],
        }.items():
            state[i][key] = torch.tensor(value, dtype=torch.float64)
    group = {**GROUPS[case], "decoupled_weight_decay": True, "param_names": NAMES, "params": [0, 1, 2, 3]}
    return {"state": state, "param_groups": [group]}


def by_name(saved: dict[str, Any]) -> dict[str, Any]:
    """As `get_optimizer_state_dict` gives it."""
    state = {NAMES[i]: own for i, own in saved["state"].items()}
    return {"state": state, "param_groups": [{**group, "params": NAMES} for group in saved["param_groups"]]}


def build(case: str) -> tuple[nn.Module, BlockOptimizer]:
    model = nn.Module()
    model.norm = nn.Parameter(torch.ones(2))
    for power, name in enumerate(NAMES[1:], start=1):
        setattr(model, name, nn.Parameter(torch.diag(2.0 ** -(torch.arange(4.0) ** power))))
    return model, optimizer_of(case, model, lr=0.125, weight_decay=0.25)


def optimizer_of(case: str, model: nn.Module, **settings: Any) -> BlockOptimizer:
    make, options = OPTIMIZERS[case]
    return make(model, blocks={name: name for name in NAMES}, compile=False, **options, **settings)


def gradients(model: nn.Module, step: int) -> None:
    """Few bits each: moments are exact, the same on any machine."""
    for size, p in zip((4.0, 0.25, 0.5, 2.0), model.parameters(), strict=True):
        p.grad = (torch.arange(p.numel()).view(p.shape) % 4 - 1.0 + step % 3) * size


def run(model: nn.Module, optimizer: BlockOptimizer, steps: range) -> list[list[float]]:
    """Steps; the multipliers at each."""
    found = []
    for step in steps:
        gradients(model, step)
        optimizer.step()
        found.append([row["multiplier"] for row in optimizer.lr_multipliers()])
    model.zero_grad()
    return found


def through_disk(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def load_file(model: nn.Module, optimizer: BlockOptimizer, saved: dict[str, Any], folder: Any) -> BlockOptimizer:
    optimizer.load_state_dict(through_disk(saved))
    return optimizer


def load_by_name(model: nn.Module, optimizer: BlockOptimizer, saved: dict[str, Any], folder: Any) -> BlockOptimizer:
    saved = by_name(saved)
    saved["param_groups"][0]["lr_switch"] = list(saved["param_groups"][0]["lr_switch"])  # as gathering leaves it
    optimizer.load_state_dict(through_disk(saved))
    return optimizer


def load_torchs(model: nn.Module, optimizer: BlockOptimizer, saved: dict[str, Any], folder: Any) -> BlockOptimizer:
    set_optimizer_state_dict(model, optimizer, through_disk(by_name(saved)))
    return optimizer


def load_merged(model: nn.Module, optimizer: BlockOptimizer, saved: dict[str, Any], folder: Any) -> BlockOptimizer:
    """Beside the names that the optimizer has now, as where torch broadcasts what rank 0 has read."""
    here = optimizer.state_dict()
    state = {i: {**here["state"][i], **own} for i, own in saved["state"].items()}
    groups = [{**a, **b} for a, b in zip(here["param_groups"], saved["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return optimizer


def load_folder(model: nn.Module, optimizer: BlockOptimizer, saved: dict[str, Any], folder: Any) -> BlockOptimizer:
    """A folder of torch.distributed.checkpoint, made one file of."""
    dcp.save({"optimizer": by_name(saved)}, checkpoint_id=folder / "old", no_dist=True)
    dcp_to_torch_save(folder / "old", folder / "old.pt")
    found = torch.load(folder / "old.pt", weights_only=False)
    set_optimizer_state_dict(model, optimizer, found["optimizer"])
    return optimizer


def load_pickle(model: nn.Module, optimizer: BlockOptimizer, saved: dict[str, Any], folder: Any) -> BlockOptimizer:
    """A pickled optimizer holds its own parameters: those of the model take their place."""
    parameters = dict(model.named_parameters())
    held = {
        **optimizer.__getstate__(),
        "state": {parameters[NAMES[i]]: own for i, own in saved["state"].items()},
        "param_groups": [{**group, "params": list(parameters.values())} for group in saved["param_groups"]],
        "defaults": {
            **{k: v for k, v in optimizer.defaults.items() if k not in NEW},
            "lr_step": 0,
            "lr_switch": (0, 0),
        },
    }
    found, model_of_it = pickle.loads(pickle.dumps((Pickled(type(optimizer), held), model)))
    model.norm, model.up, model.down, model.gate = (model_of_it.get_parameter(name) for name in NAMES)
    assert {"block_lr_step", "multiplier_ramp"} <= found.defaults.keys()
    return found


class Pickled:
    """Pickles as an optimizer of that type with that content."""

    def __init__(self, kind: type, held: dict[str, Any]) -> None:
        self.kind, self.held = kind, held

    def __reduce__(self) -> Any:
        return object.__new__, (self.kind,), self.held


FORMS = {
    "state dict": load_file,
    "by name": load_by_name,
    "set_optimizer_state_dict": load_torchs,
    "merged": load_merged,
    "folder": load_folder,
    "pickle": load_pickle,
}
OLD = {"lr_before", "lr_after", "lr_measured", "lr_step", "lr_switch"}
NEW = {
    *("multiplier_from", "multiplier_to", "block_lr_measured", "block_lr_settled", "block_lr_step", "multiplier_ramp")
}


def follow_the_first(optimizer: BlockOptimizer) -> None:
    """As that version did: multipliers follow the first measurement, as if there had been another before."""
    optimizer.init_state()
    for own in optimizer.state.values():
        own["block_lr_settled"].fill_(1.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_resumed_is_uninterrupted(case: str, form: str, tmp_path: Any) -> None:
    whole, steady = build(case)
    follow_the_first(steady)
    run(whole, steady, range(3))
    wanted = run(whole, steady, range(3, 10))
    model, first = build(case)
    follow_the_first(first)
    run(model, first, range(3))
    saved = old(case)
    given = copy.deepcopy(saved)
    second = FORMS[form](model, optimizer_of(case, model, lr=1.0), given, tmp_path)
    assert run(model, second, range(3, 10)) == wanted
    assert same(whole, model)
    for one, two in zip(steady.state_dict()["state"].values(), second.state_dict()["state"].values(), strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[key]) for key, value in one.items())
    one, two = (optimizer.state_dict()["param_groups"] for optimizer in (steady, second))
    assert one == two
    assert all(torch.equal(v, given["state"][i][k]) for i, own in saved["state"].items() for k, v in own.items())
    assert given["param_groups"] == saved["param_groups"]  # what was given is as it was


@pytest.mark.parametrize("how", ["full_state_dict", "flatten_optimizer_state_dict"])
def test_what_torch_matches_by_its_keys_is_refused_and_changes_nothing(how: str) -> None:
    """Before we are asked. A full state dict loads without `set_optimizer_state_dict`."""
    model, optimizer = build("sharpness")
    run(model, optimizer, range(5))
    before = copy.deepcopy(optimizer.state_dict())
    saved = by_name(old("sharpness"))
    if how == "flatten_optimizer_state_dict":
        flat = {f"state.{name}.{key}": value for name, own in saved["state"].items() for key, value in own.items()}
        group = saved["param_groups"][0]
        saved = flat | {f"param_groups.{name}.{k}": v for name in NAMES for k, v in group.items() if k != "params"}
    with pytest.raises(KeyError, match="lr_step"):
        set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(**{how: True}))
    after = optimizer.state_dict()
    assert all(torch.equal(v, after["state"][i][k]) for i, own in before["state"].items() for k, v in own.items())
    assert before["param_groups"] == after["param_groups"]


def test_what_is_saved_now_has_the_new_names() -> None:
    for case in OPTIMIZERS:
        model, optimizer = build(case)
        run(model, optimizer, range(3))
        for saved in (optimizer.state_dict(), get_optimizer_state_dict(model, optimizer)):
            keys = {key for part in (*saved["state"].values(), *saved["param_groups"]) for key in part}
            assert keys >= NEW and not keys & OLD


def test_keys_of_others_stay() -> None:
    """Only all old names together are those of a block_lr."""
    model, optimizer = build("sharpness")
    run(model, optimizer, range(3))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr_step"] = 7
    optimizer.load_state_dict(through_disk(saved))
    assert (optimizer.param_groups[0]["lr_step"], optimizer.param_groups[0]["block_lr_step"]) == (7, 3)
