"""Lightning: `configure_optimizers` returns our optimizer and a torch scheduler; the step gets a closure."""

import sys
from typing import Any

import lightning
import pytest
import torch
from first_contact.tiny import assert_same_weights, assert_trained, batches, gpt2, loss_of, plain_loop

import sharpwise


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)


class Module(lightning.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name_of_optimizer = name
        self.model = gpt2().train()
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = loss_of(self.model, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = sharpwise.create_optimizer(self.model, self.name_of_optimizer, lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}


@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_lightning_equals_the_plain_loop(name: str) -> None:
    module, plain = Module(name), gpt2()
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    losses = plain_loop(plain, sharpwise.create_optimizer(plain, name, lr=1e-2), schedule)
    assert module.losses == losses
    assert_same_weights(module.model, plain)
    assert_trained(plain, gpt2())


# lightning 2.6 calls jsonargparse 4.53 by names that it will drop
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning", "ignore::DeprecationWarning:jsonargparse")
@pytest.mark.parametrize("name", ["AdamMini", "Muon"])
def test_the_command_line_names_the_class(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """`LightningCLI` passes the generator of the module's parameters: their names begin with `model.`."""
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    class Bare(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt2().train()

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return loss_of(self.model, batch)

    numbers = {"lr": "1e-2", "weight_decay": "0.2", "block_lr": "blockwise"}
    options = [f"--optimizer.{key}={value}" for key, value in numbers.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", f"--optimizer=sharpwise.{name}", *options])
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    cli = LightningCLI(
        Bare,
        run=False,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults={"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, **quiet},
    )
    cli.trainer.fit(cli.model, torch.utils.data.DataLoader(batches(), batch_size=None))
    plain = gpt2()
    optimizer = getattr(sharpwise, name)(plain, lr=1e-2, weight_decay=0.2, block_lr="blockwise")
    (built,) = cli.trainer.optimizers
    assert [s.role for s in built.blocks.segments] == [s.role for s in optimizer.blocks.segments]
    plain_loop(plain, optimizer)
    assert_same_weights(cli.model.model, plain)
