"""The usual mistakes with hosts get one sentence: what was got, and what to do."""

import functools
import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from first_contact.test_hf_trainer import DATA, arguments, trainer
from first_contact.tiny import gpt2, loss_of

import sharpwise
from sharpwise.integrations.hf import Factory, set_optimizer

ALWAYS: Any = {"lr": 1e-2}
TO_DO = r"\(model, lr=\.\.\.\)\. In a Trainer: sharpwise\.integrations\.hf\.set_optimizer\("

# A class, or something else, where a factory or an optimizer is needed


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((sharpwise.AdamMini, ALWAYS), rf"AdamMini: tensors have no names.*model=model.*{TO_DO[25:]}"),
        ((functools.partial(sharpwise.Lion, lr=1e-2), {}), rf"Lion: no model was given; call Lion{TO_DO}"),
        ((sharpwise.AdamW8bit, ALWAYS), rf"AdamW8bit: no model was given; call AdamW8bit{TO_DO}"),
        ((Factory, ALWAYS), r"Factory: name must be that of an optimizer, got none; pass it: .*'name': 'adam-mini'"),
        ((Factory, {"name": sharpwise.Lion}), r"Factory: name must be that of an optimizer, got the class Lion"),
        ((Factory(), {"name": "lion"}), r"Factory: no lr was given.*pass them"),
    ],
    ids=["class", "partial", "function", "no name", "class as name", "neither lr nor arguments"],
)
def test_what_is_no_factory(tmp_path: Path, given: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        trainer(tmp_path, gpt2(), optimizer_cls_and_kwargs=given).create_optimizer()


def test_a_factory_that_was_called_once_too_often_serves(tmp_path: Path) -> None:
    made = trainer(tmp_path, gpt2(), optimizer_cls_and_kwargs=(Factory(), {"name": "lion", "lr": 1e-2}))
    assert isinstance(made.create_optimizer(), sharpwise.Lion)


def test_a_class_in_place_of_an_optimizer(tmp_path: Path) -> None:
    says = rf"AdamMini: an optimizer is needed here, got the class, which has no {{}}; build one: AdamMini{TO_DO}"
    with pytest.raises(AttributeError, match=says.format("param_groups")):
        trainer(tmp_path, gpt2(), optimizers=(sharpwise.AdamMini, None)).train()
    with pytest.raises(TypeError, match="is not an Optimizer"):  # torch's own
        torch.optim.lr_scheduler.ExponentialLR(sharpwise.AdamMini, 0.9)  # type: ignore[arg-type]

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt2()

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> Any:
            return {"optimizer": sharpwise.AdamMini}

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with pytest.raises(AttributeError, match=says.format("state")):
        host = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
        host.fit(Module(), torch.utils.data.DataLoader([torch.zeros(1, 4, dtype=torch.long)], batch_size=None))


def test_an_instance_lacks_nothing_of_that() -> None:
    optimizer = sharpwise.AdamW(gpt2())
    assert len(optimizer.param_groups) == 1 and optimizer.state is not None
    bare = object.__new__(sharpwise.AdamW)
    with pytest.raises(AttributeError, match="'AdamW' object has no attribute 'state'"):
        bare.state  # noqa: B018
    assert not hasattr(sharpwise.AdamW, "param_groups")


# An optimizer of another model


def test_an_optimizer_of_a_copy_says_once_that_nothing_moves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sharpwise"):
        trainer(tmp_path, gpt2(), optimizers=(sharpwise.AdamMini(gpt2(), lr=1e-2), None)).train()
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("sharpwise")]
    assert "AdamMini: none of its parameters has a gradient" in said and "the very model that is trained" in said


# A checkpoint of another optimizer


def saved(folder: Path, **changes: Any) -> str:
    """A checkpoint of the Trainer's own optimizer."""
    own = arguments(folder, max_steps=2, save_steps=2, warmup_steps=0, **changes)
    transformers.Trainer(model=gpt2(), args=own, train_dataset=DATA).train()
    return str(folder / "checkpoint-2")


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_adamw_goes_on_with_the_trainers_own(tmp_path: Path, weight_decay: float) -> None:
    """Its groups have no names: ours are the same two, in the same order."""
    changes = {"max_steps": 6, "save_steps": 3, "optim": "adamw_torch", "weight_decay": weight_decay}
    whole, ours, theirs = gpt2(), gpt2(), gpt2()
    transformers.Trainer(model=whole, args=arguments(tmp_path / "a", **changes), train_dataset=DATA).train()
    first = str(tmp_path / "a" / "checkpoint-3")
    second = transformers.Trainer(model=ours, args=arguments(tmp_path / "b", **changes), train_dataset=DATA)
    set_optimizer(second, "adamw", compile=False)
    second.train(resume_from_checkpoint=first)
    assert {float(own["step"]) for own in second.optimizer.state.values()} == {6.0}
    for p, q in zip(ours.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)  # keys' biases have no gradient but rounding

    changes["max_steps"] = 8
    back = transformers.Trainer(model=theirs, args=arguments(tmp_path / "c", **changes), train_dataset=DATA)
    back.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-6"))
    assert {float(own["step"]) for own in back.optimizer.state.values()} == {8.0}


@pytest.mark.parametrize(
    ("optim", "name", "error", "says"),
    [
        ("adamw_torch", "adam-mini", ValueError, r"'adamw' keeps .*'adam-mini' keeps .*resume_from_checkpoint"),
        ("adamw_torch", "muon", ValueError, r"has \['exp_avg', 'exp_avg_sq', 'step'\].*'adamw' keeps .*'muon' keeps"),
        ("adafactor", "adamw", TypeError, r"may be of another optimizer: adamw: eps must .*resume_from_checkpoint"),
        ("adafactor", "lion", ValueError, r"'exp_avg_sq_row'.*saved by another rule.*resume_from_checkpoint"),
        ("sgd", "adam-mini", ValueError, r"has no state, and its groups lack betas, eps: it is of another optimizer"),
        ("sgd", "muon", ValueError, r"has no state, and its groups lack aux_betas.*: it is of another optimizer"),
    ],
)
def test_a_run_of_the_trainers_own_optimizer_is_not_resumed_by_another(
    tmp_path: Path, optim: str, name: str, error: type[Exception], says: str
) -> None:
    checkpoint = saved(tmp_path, optim=optim)
    model = gpt2()
    made = trainer(tmp_path / "b", model)
    set_optimizer(made, name)
    with pytest.raises(error, match=says):
        made.train(resume_from_checkpoint=checkpoint)


def test_state_without_names_in_other_groups_is_not_guessed() -> None:
    """By position alone every tensor below would get the state of another, of the same shape."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(3)))
    first, *rest = model.parameters()
    theirs = torch.optim.AdamW([{"params": rest, "lr": 1e-2}, {"params": [first]}], lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    theirs.step()
    ours = sharpwise.AdamW(model, lr=1e-3)
    with pytest.raises(ValueError, match=r"without names, in groups of 2, 1; here they are in groups of 3.*Build this"):
        ours.load_state_dict(theirs.state_dict())
    fits = sharpwise.AdamW([{"params": rest, "lr": 1e-2}, {"params": [first]}], model=model, lr=1e-3)
    fits.load_state_dict(theirs.state_dict())
    assert fits.param_groups[0]["lr"] == 1e-2


# DeepSpeed


def test_only_stages_of_zero_are_refused(tmp_path: Path) -> None:
    class Plugin:
        zero_stage = 2

    made = trainer(tmp_path, gpt2())
    made.args.deepspeed_plugin = Plugin()
    with pytest.raises(ValueError, match=r"DeepSpeed, got stage 2 of ZeRO from `accelerate launch`.*FSDP2"):
        set_optimizer(made, "adam-mini")
    Plugin.zero_stage = 0  # leaves every parameter whole
    set_optimizer(made, "adam-mini")
