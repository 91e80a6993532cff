"""Hugging Face Trainer: an optimizer passed in, one built by the factory, and a run that is resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from first_contact.tiny import STEPS, assert_same_weights, assert_trained, batches, gpt2

import sharpwise
from sharpwise.integrations.hf import Factory

DATA = [{"input_ids": row, "labels": row} for tokens in batches() for row in tokens]


def trainer(folder: Path, model: torch.nn.Module, **optimizer: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=3,
        save_steps=10,
        seed=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=DATA, **optimizer)


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
    with pytest.raises(TypeError, match=r"AdamMini: tensors have no names.*model=model"):
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
