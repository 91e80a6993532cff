"""The loop on a model that trains in milliseconds, and on one that diverges."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sharpwise.table import Table
from sharpwise.train.data import Corpus
from sharpwise.train.loop import LoopSettings, Record, train

SETTINGS = LoopSettings(
    steps=20, sequences=4, context=8, warmup=4, evaluations=4, validation_sequences=6, autocast=False
)


class Bigram(nn.Module):
    """Logits of the next token from the last one, as a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens)


class Optimizer(torch.optim.SGD):
    """The smallest optimizer with what the loop asks of one."""

    def lr_multipliers(self) -> Table:
        lr = self.param_groups[0]["lr"]
        return Table(("role", "type", "multiplier", "lr"), [("tok_emb", "Emb", 2.0, 2 * lr)])

    def state_bytes(self) -> int:
        return 0


def _corpus() -> Corpus:
    tokens = (np.arange(600) * 7 % 16).astype(np.uint16)
    return Corpus(tokens[:500], tokens[500:], 16, {})


class Explosive(Bigram):
    """Not finite from its call number `at` on, of those in training or of those in evaluation."""

    def __init__(self, at: int, *, training: bool = True) -> None:
        super().__init__()
        self.left, self.when = at, training

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.left -= self.training == self.when
        return super().forward(tokens) * (float("inf") if self.left <= 0 and self.training == self.when else 1.0)


def _run(lr: float, model: Bigram | None = None, on_step=None) -> Record:
    model = model or Bigram()
    return train(model, Optimizer(model.parameters(), lr=lr), _corpus(), SETTINGS, on_step)


def test_a_run_is_written_down_and_repeats_bit_for_bit() -> None:
    seen = []
    record = _run(5.0, on_step=lambda step, loss: seen.append((step, loss)))
    assert seen == list(zip(record.train_steps, record.train_loss, strict=True))
    assert record.train_steps == list(range(1, 21))
    assert record.validation_steps == [5, 10, 15, 20]
    assert record.final_loss == record.validation_loss[-1] < record.train_loss[0]
    assert record.stopped_at is None
    assert record.tokens_per_second is not None
    assert record.tokens_per_second > 0
    assert record.types == {"tok_emb": "Emb"}
    again = _run(5.0)
    assert (again.train_loss, again.validation_loss) == (record.train_loss, record.validation_loss)


def test_learning_rates_over_time_are_those_of_the_schedule_times_the_multiplier() -> None:
    record = _run(0.5)
    rates = record.learning_rates["tok_emb"]
    assert record.learning_rate_steps == list(range(1, 21))
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[-1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 15 / 16)) / 2)


def test_a_diverged_run_stops_and_says_where() -> None:
    record = _run(1.0, model=Explosive(1))
    assert record.stopped_at == 1
    assert record.final_loss is None
    assert record.train_loss == []
    assert record.tokens_per_second is None


def test_a_run_that_overflows_on_its_way_keeps_what_it_had() -> None:
    record = _run(1.0, model=Explosive(8))
    assert record.stopped_at == 8
    assert record.final_loss is None
    assert record.train_steps == list(range(1, 8))
    assert all(math.isfinite(loss) for loss in record.train_loss)
    assert record.validation_steps == [5]


def test_a_validation_loss_that_is_not_finite_ends_the_run_too() -> None:
    record = _run(1.0, model=Explosive(1, training=False))
    assert record.stopped_at == 5
    assert record.final_loss is None
    assert record.validation_loss == []
