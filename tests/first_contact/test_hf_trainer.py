"""Hugging Face Trainer: an optimizer passed in, one that the Trainer builds, and a run that is resumed."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from first_contact.tiny import STEPS, assert_same_weights, assert_trained, batches, gpt2

import sharpwise
from sharpwise.integrations.hf import Factory, create_optimizer, set_optimizer

DATA = [{"input_ids": row, "labels": row} for tokens in batches() for row in tokens]


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "save_steps": 10,
        "seed": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**settings | changes)


def trainer(folder: Path, model: torch.nn.Module, **optimizer: Any) -> transformers.Trainer:
    return transformers.Trainer(model=model, args=arguments(folder), train_dataset=DATA, **optimizer)


def test_trainer_with_our_adamw_equals_trainer_with_torchs(tmp_path: Path) -> None:
    ours, theirs = gpt2(), gpt2()
    trainer(tmp_path / "a", ours, optimizers=(sharpwise.AdamW(ours, lr=1e-2, compile=False), None)).train()
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=False)
    trainer(tmp_path / "b", theirs, optimizers=(reference, None)).train()
    assert_same_weights(ours, theirs)
    assert_trained(ours, gpt2())


@pytest.mark.parametrize("name", ["adam-mini", "adamw"])
def test_factory_equals_the_optimizer_passed_in_and_a_resumed_run_the_whole_one(tmp_path: Path, name: str) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1, "block_lr": "blockwise"}
    passed, built, resumed = gpt2(), gpt2(), gpt2()
    optimizer = sharpwise.create_optimizer(passed, name, **options)
    trainer(tmp_path / "a", passed, optimizers=(optimizer, None)).train()
    assert_trained(passed, gpt2())

    kwargs = {"name": name, **options}
    trainer(tmp_path / "b", built, optimizer_cls_and_kwargs=(Factory, kwargs)).train()
    assert_same_weights(built, passed)

    second = trainer(tmp_path / "b", resumed, optimizer_cls_and_kwargs=(Factory, kwargs))
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-10"))
    assert_same_weights(resumed, passed)


def test_a_class_with_the_model_equals_the_optimizer_passed_in(tmp_path: Path) -> None:
    passed, built = gpt2(), gpt2()
    trainer(tmp_path / "a", passed, optimizers=(sharpwise.AdamMini(passed, lr=1e-2), None)).train()
    made = trainer(tmp_path / "b", built, optimizer_cls_and_kwargs=(sharpwise.AdamMini, {"model": built, "lr": 1e-2}))
    made.train()
    assert isinstance(made.optimizer.optimizer, sharpwise.AdamMini)
    assert_same_weights(built, passed)
    assert_trained(built, gpt2())


def test_a_class_without_the_model_is_told_what_it_lacks(tmp_path: Path) -> None:
    made = trainer(tmp_path, gpt2(), optimizer_cls_and_kwargs=(sharpwise.AdamMini, {"lr": 1e-2}))
    with pytest.raises(TypeError, match=r"AdamMini: tensors have no names.*In a Trainer: .*set_optimizer\("):
        made.create_optimizer()


class Freezes(transformers.TrainerCallback):
    """Freezes the first layer at one step and lets it go at another."""

    def __init__(self, layer: torch.nn.Module, begin: int, end: int) -> None:
        self.layer, self.begin, self.end = layer, begin, end

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.layer.requires_grad_(not self.begin <= state.global_step < self.end)


def test_a_run_resumed_while_a_layer_is_frozen_is_the_whole_one(tmp_path: Path) -> None:
    def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
        return sharpwise.AdamW(list(model.parameters()), lr=1e-2, model=model)

    whole, resumed = gpt2(), gpt2()
    callbacks = [Freezes(model.transformer.h[0], 7, 13) for model in (whole, resumed)]
    trainer(tmp_path / "a", whole, optimizers=(optimizer_of(whole), None), callbacks=callbacks[:1]).train()
    resumed.transformer.h[0].requires_grad_(False)
    second = trainer(tmp_path / "b", resumed, optimizers=(optimizer_of(resumed), None), callbacks=callbacks[1:])
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert_same_weights(resumed, whole)


NUMBERS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "weight_decay": 0.2,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-4,
    "max_steps": 6,
}


def test_set_optimizer_takes_the_numbers_of_the_arguments_and_equals_the_trainers_own(tmp_path: Path) -> None:
    """AdamW at `TrainingArguments`, biases and norms spared, is what the Trainer builds by itself."""
    ours, theirs = gpt2(), gpt2()
    own = arguments(tmp_path / "b", **NUMBERS, optim="adamw_torch")
    transformers.Trainer(model=theirs, args=own, train_dataset=DATA).train()
    made = transformers.Trainer(model=ours, args=arguments(tmp_path / "a", **NUMBERS), train_dataset=DATA)
    set_optimizer(made, "adamw", compile=False)
    made.train()
    assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.2, 0.0]
    for name, p in theirs.named_parameters():  # the Trainer's own goes tensor list by tensor list, and rounds otherwise
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=0, atol=1e-6)
    assert_trained(ours, gpt2())


def test_what_is_given_goes_before_the_arguments(tmp_path: Path) -> None:
    own = arguments(tmp_path, **NUMBERS)
    optimizer = create_optimizer(gpt2(), "adam-mini", own, lr=1e-3, betas=(0.7, 0.6), no_decay=("norm",))
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.7, 0.6), 1e-4, 0.2)


def test_a_preset_keeps_its_decay_where_the_arguments_have_their_default(tmp_path: Path) -> None:
    model = gpt2()
    assert create_optimizer(model, "lionar", arguments(tmp_path)).param_groups[0]["weight_decay"] == 0.1
    own = arguments(tmp_path, weight_decay=0.3)
    assert create_optimizer(model, "lionar", own).param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize(("name", "lost"), [("muon", "adam_beta1, adam_beta2, adam_epsilon"), ("lion", "adam_epsilon")])
def test_numbers_that_an_optimizer_does_not_have_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, lost: str
) -> None:
    with caplog.at_level(logging.WARNING, "sharpwise.integrations.hf"):
        create_optimizer(gpt2(), name, arguments(tmp_path, **NUMBERS, optim="adafactor"))
    assert f"{lost} of TrainingArguments not used: the optimizer is {name}, which has " in caplog.text
    assert f"optim=adafactor of TrainingArguments not used: the optimizer is {name}" in caplog.text
    assert "total_steps" not in caplog.text
    caplog.clear()
    create_optimizer(gpt2(), name, arguments(tmp_path))
    assert not caplog.records


def test_a_block_lr_with_phases_learns_of_the_steps(tmp_path: Path) -> None:
    assert create_optimizer(gpt2(), "adamw+llr", arguments(tmp_path)).options.total_steps == STEPS


def test_a_factory_without_the_arguments_says_what_it_lacks(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TypeError, match=r"no lr was given.*\(Factory, \{'args': args, 'name': 'adamw'\}\)"):
        Factory()(gpt2(), name="adamw")
    Factory()(gpt2(), name="adamw", lr=1e-3)
    assert "weight_decay and adam_* of TrainingArguments have no effect" in caplog.text


def test_mistakes_with_a_trainer_are_told_before_it_trains(tmp_path: Path) -> None:
    model = gpt2()
    with pytest.raises(ValueError, match=r"has an optimizer, AdamW; call this before"):
        set_optimizer(trainer(tmp_path, model, optimizers=(sharpwise.AdamW(model), None)), "adam-mini")
    with pytest.raises(TypeError, match=r"expected a transformers.Trainer.*got"):
        set_optimizer(model, "adam-mini")
    made = trainer(tmp_path, model)
    with pytest.raises(ValueError, match=r"no optimizer is called 'adam-mimi'"):
        set_optimizer(made, "adam-mimi")
    with pytest.raises(TypeError, match=r"name must be text, such as 'adam-mini', got"):
        set_optimizer(made, sharpwise.AdamMini)  # type: ignore[arg-type]
    made.args.deepspeed = "zero3.json"
    with pytest.raises(ValueError, match=r"DeepSpeed, got deepspeed='zero3.json'.*FSDP2"):
        set_optimizer(made, "adam-mini")


@pytest.mark.parametrize("name", ["lion", "adam-mini"])
def test_a_run_of_another_optimizer_is_not_resumed(tmp_path: Path, name: str) -> None:
    short = arguments(tmp_path, max_steps=1, save_steps=1)
    first = transformers.Trainer(model=gpt2(), args=short, train_dataset=DATA)
    set_optimizer(first, "adamw")
    first.train()
    second = trainer(tmp_path, gpt2())
    set_optimizer(second, name)
    with pytest.raises(ValueError, match=rf"'adamw' keeps .*'{name}' keeps .*start anew"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
