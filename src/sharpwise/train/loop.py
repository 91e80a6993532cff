"""The training loop: plain PyTorch, one device, everything that a report needs written down as it goes."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sharpwise.train.data import Corpus, sample_batch, validation_batch
from sharpwise.train.schedule import warmup_cosine


@dataclass(frozen=True)
class LoopSettings:
    """How a run goes, apart from its model, data and optimizer.

    Args:
        steps: optimizer steps.
        sequences: windows per step.
        context: tokens per window.
        warmup: steps of linear warm-up.
        floor: what the cosine leaves of the peak learning rate at the end, a fraction.
        seed: of the order of the data.
        evaluations: how often the validation loss is measured, evenly spaced, the last time after the last step.
        validation_sequences: windows in the fixed validation batch.
        autocast: bf16 autocast; None takes it where the CPU multiplies bf16 natively (elsewhere it is slower).
    """

    steps: int = 500
    sequences: int = 16
    context: int = 128
    warmup: int = 50
    floor: float = 0.1
    seed: int = 0
    evaluations: int = 6
    validation_sequences: int = 192
    autocast: bool | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, repetitions counted."""
        return self.steps * self.sequences * self.context


@dataclass
class Record:
    """What a run did. `x` values are steps, counted from 1; losses are in nats per token.

    `stopped_at` is the step whose loss was not finite, None for a run that reached its end. `final_loss` is the
    validation loss after the last step, None if there is none. `learning_rates` holds, for every role, the learning
    rate times the block's multiplier at `learning_rate_steps` (blocks of one role are taken to have one multiplier).
    `tokens_per_second` of whole steps and `step_ms` of `optimizer.step()` are those that the quickest tenth of the
    steps keep to: other work on the machine can only slow the rest. Evaluations do not count.
    """

    train_steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    learning_rate_steps: list[int] = field(default_factory=list)
    learning_rates: dict[str, list[float]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    stopped_at: int | None = None
    final_loss: float | None = None
    tokens_per_second: float | None = None
    step_ms: float | None = None
    state_bytes: int | None = None


def train(
    model: nn.Module,
    optimizer: Any,
    corpus: Corpus,
    settings: LoopSettings,
    on_step: Callable[[int, float], None] | None = None,
) -> Record:
    """Train `model` on `corpus` and say what happened; the same arguments give the same losses, bit for bit.

    Args:
        model: maps int64 tokens [sequences, context] to logits, or to an output with `.logits` (Hugging Face).
        optimizer: an optimizer of this package; its lr is the peak of the schedule. Clipping is its `max_grad_norm`.
        corpus: from `prepare`.
        settings: see there.
        on_step: called after every step with its number, from 1, and its training loss.
    """
    scheduler = warmup_cosine(optimizer, warmup=settings.warmup, total=settings.steps, floor=settings.floor)
    record = Record()
    validation = validation_batch(corpus.validation, sequences=settings.validation_sequences, context=settings.context)
    evaluate_at = {math.ceil(settings.steps * i / settings.evaluations) for i in range(1, settings.evaluations + 1)}
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16_autocast(settings.autocast))
    step_seconds: list[float] = []
    optimizer_seconds: list[float] = []
    model.train()
    for step in range(1, settings.steps + 1):
        started = time.perf_counter()
        inputs, targets = sample_batch(
            corpus.train, seed=settings.seed, step=step, sequences=settings.sequences, context=settings.context
        )
        with autocast():
            loss = _loss(model, inputs, targets)
        value = loss.item()
        if not math.isfinite(value):
            record.stopped_at = step
            break
        loss.backward()
        before = time.perf_counter()
        optimizer.step()
        optimizer_seconds.append(time.perf_counter() - before)
        if (step - 1) % max(1, settings.steps // 60) == 0 or step == settings.steps:
            _note_learning_rates(record, optimizer, step)
        optimizer.zero_grad()
        scheduler.step()
        step_seconds.append(time.perf_counter() - started)
        record.train_steps.append(step)
        record.train_loss.append(value)
        if step in evaluate_at:
            with torch.no_grad(), autocast():
                loss_there = _evaluate(model, *validation, sequences=settings.sequences)
            if not math.isfinite(loss_there):
                record.stopped_at = step
                break
            record.validation_steps.append(step)
            record.validation_loss.append(loss_there)
        if on_step:
            on_step(step, value)
    if record.stopped_at is None and record.validation_loss:
        record.final_loss = record.validation_loss[-1]
    if record.train_steps:
        record.tokens_per_second = settings.sequences * settings.context / _quick(step_seconds)
        record.step_ms = _quick(optimizer_seconds) * 1e3
        record.state_bytes = optimizer.state_bytes()
    return record


def _quick(seconds: list[float]) -> float:
    """The tenth percentile."""
    return sorted(seconds)[len(seconds) // 10]


def bf16_autocast(wanted: bool | None) -> bool:
    """Whether to run forward passes under bf16 autocast; None asks the CPU."""
    if wanted is not None:
        return wanted
    # Without native bf16 products oneDNN emulates them, slower than fp32.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    output = model(inputs)
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _evaluate(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, *, sequences: int) -> float:
    """Mean loss over all windows, `sequences` at a time so that memory stays that of training."""
    model.eval()
    total = 0.0
    for x, y in zip(inputs.split(sequences), targets.split(sequences), strict=True):
        total += _loss(model, x, y).item() * len(x)
    model.train()
    return total / len(inputs)


def _note_learning_rates(record: Record, optimizer: Any, step: int) -> None:
    rows: Sequence[dict[str, Any]] = optimizer.lr_multipliers()
    by_role = {}
    for row in rows:
        by_role[str(row["role"])] = float(row["lr"])
        record.types[str(row["role"])] = str(row["type"])
    record.learning_rate_steps.append(step)
    for role, lr in by_role.items():
        record.learning_rates.setdefault(role, []).append(lr)
