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
