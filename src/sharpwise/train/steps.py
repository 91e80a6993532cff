"""The training loop: plain PyTorch, a step at a time. What happens to a step's numbers is the caller's (`run.py`)."""

import hashlib
import math
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from sharpwise.model_facts import logits_of
from sharpwise.probes.callbacks import Notes, Probes
from sharpwise.train.data import Tokens, even_starts, window_starts
from sharpwise.train.diagnostics import multipliers_by_role
from sharpwise.train.schedule import Schedule
from sharpwise.train.world import ALONE, World, passes_of, share_of


@dataclass(frozen=True)
class Plan:
    """How a run goes, apart from its model, data and optimizer; see `config.py` for what the numbers mean.

    Args:
        schedule: of the learning rate, over the whole run.
        peak: the learning rate where the schedule is 1.
        sequences, micro, context: windows per step (of all processes), windows per forward pass, tokens per window.
        seed: of the order of the data and of dropout.
        device: where the model is.
        autocast: run the forward pass under bf16 autocast.
        validation_every: steps from one validation to the next; 0 for the last step only.
        validation_sequences: windows of a validation.
        diagnostics_every: steps between measurements of update sizes and multipliers; 0 for none.
        world: the processes that share the windows of every step and of validation.
    """

    schedule: Schedule
    peak: float
    sequences: int
    micro: int
    context: int
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: bool = False
    validation_every: int = 0
    validation_sequences: int = 128
    diagnostics_every: int = 0
    world: World = ALONE

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.sequences * self.context

    def due(self, every: int, step: int) -> bool:
        """Whether something is due after `step`: every so many steps, and after the last."""
        return step == self.schedule.total or (every > 0 and step % every == 0)


@dataclass
class Step:
    """What one step did. Losses are in nats per token.

    `loss` is the mean over the tokens of the step before its update, `grad_norm` the global norm before clipping
    (None where the optimizer does not know it). `finite` says whether both are: if not, the optimizer has left the
    weights as they were. `validation_loss` is that after the update. `multipliers` and `updates` are of roles.
    `seconds` is the time of the whole step, `optimizer_seconds` that of its update (None where the device works on
    while the host goes ahead); validation counts in neither.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float | None
    finite: bool
    seconds: float
    optimizer_seconds: float | None
    validation_loss: float | None = None
    multipliers: dict[str, float | list[float]] = field(default_factory=dict)
    notes: Notes = field(default_factory=dict)


def train_steps(
    model: nn.Module,
    optimizer: Any,
    train: Tokens,
    validation: Tokens,
    plan: Plan,
    *,
    start: int = 0,
    forward: Callable[[Tensor], Any] | None = None,
    probes: Probes | None = None,
) -> Generator[Step, None, None]:
    """Train, and give every step when it is done. The same arguments give the same numbers, bit for bit.

    A step depends on nothing but the state of model and optimizer, the arguments and its number: to go on after step
    `start`, load both and pass it.

    Args:
        model: maps int64 tokens [sequences, context] to logits (`model_facts.logits_of`).
        optimizer: of this package, with on_nonfinite="skip", so that a bad step leaves the weights as they are; or
            `foreign.Foreign`.
        train, validation: tokens from `open_tokens`.
        plan: see there.
        start: steps that were taken already.
        forward: called in place of the model, such as a compiled one.
    """
    forward = model if forward is None else forward
    autocast = partial(torch.autocast, plan.device.type, torch.bfloat16, enabled=plan.autocast)
    held_out = _share(validation, even_starts(len(validation), plan.validation_sequences, plan.context), plan)
    batches = _Prefetched(train, plan)
    model.train()
    try:
        for step in range(start + 1, plan.schedule.total + 1):
            began = time.perf_counter()
            lr = plan.peak * plan.schedule.factor(step - 1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Dropout too is a function of the step, and of the share.
            _seed(step_seed(plan.seed, step, plan.world.share), plan.device)
            with record_function("data"):
                windows = batches.of(step)
            after_pass = None if probes is None else partial(probes.after_micro_batch, step)
            loss = _accumulate(model, forward, windows, plan, autocast, after_pass)
            if probes is not None:
                probes.before_step(step)
            before = time.perf_counter()
            with record_function("optimizer"):
                optimizer.step()
            optimizer_seconds = time.perf_counter() - before if plan.device.type == "cpu" else None
            optimizer.zero_grad()
            norm = None if optimizer.grad_norm is None else float(optimizer.grad_norm)
            value = loss.item()
            done = Step(
                step, step * plan.tokens_per_step, value, lr, norm,
                math.isfinite(value) and (norm is None or math.isfinite(norm)),
                time.perf_counter() - began, optimizer_seconds,
            )  # fmt: skip
            if plan.diagnostics_every > 0 and plan.due(plan.diagnostics_every, step):
                done.multipliers = multipliers_by_role(optimizer)
            if probes is not None:
                done.notes = probes.after_step(step)
            if done.finite and plan.due(plan.validation_every, step):
                done.validation_loss = _evaluate(model, forward, held_out, plan, autocast)
            yield done
    finally:
        batches.close()


def step_seed(seed: int, step: int, share: int = 0) -> int:
    """A seed for torch's generator, another one for every step of every run and share of its windows."""
    text = f"{seed} {step} {share}" if share else f"{seed} {step}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators that the model draws from; `torch.manual_seed` takes a millisecond where CUDA is not used."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def token_loss(output: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token, in fp32."""
    return F.cross_entropy(logits_of(output, inputs).float().flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Windows:
    """This process's windows of a step or of validation: int64 [n, context], of which `own` count among `all`.

    Every process takes the same number of passes, as those that hold parts of a model must; where that is one too many,
    one last window is there for that alone.
    """

    inputs: Tensor
    targets: Tensor
    own: int
    all: int

    def passes(self, micro: int) -> Generator[tuple[Tensor, Tensor, int, bool], None, None]:
        """Inputs, targets, how many of them count, and whether they are the last."""
        for start in range(0, len(self.inputs), micro):
            part = slice(start, start + micro)
            x = self.inputs[part]
            yield x, self.targets[part], len(x) if start < self.own else 0, start + micro >= len(self.inputs)


def _accumulate(
    model: nn.Module,
    forward: Callable[[Tensor], Any],
    windows: Windows,
    plan: Plan,
    autocast: Callable[[], AbstractContextManager[Any]],
    after_pass: Callable[[int], object] | None = None,
) -> Tensor:
    """Gradients of the mean loss over the windows of all processes, `micro` at a time; that loss, on the device."""
    world = plan.world
    total = torch.zeros((), device=windows.inputs.device)
    for x, y, count, last in windows.passes(plan.micro):
        world.before_pass(model, last)
        with record_function("forward"), autocast():
            loss = token_loss(forward(x), x, y) / (windows.all / count if count else math.inf)
        with record_function("backward"):
            # Gradients may be finite where the loss is not, as that of a token with the logit -inf: not so from here.
            loss.backward(torch.where(loss.detach().isfinite(), 1.0, math.nan))
        if after_pass is not None:
            after_pass(count)
        total += loss.detach()
    world.sum_gradients(model)
    return world.sum(total)


@torch.no_grad()
def _evaluate(
    model: nn.Module,
    forward: Callable[[Tensor], Any],
    windows: Windows,
    plan: Plan,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Mean loss over the windows of all processes, `micro` at a time, so that memory stays that of training."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for x, y, count, _ in windows.passes(plan.micro):
        with autocast():
            total += token_loss(forward(x), x, y).double().cpu() * count
    plan.world.rest(model)
    model.train()
    return float(plan.world.sum(total)) / windows.all


def _share(tokens: Tokens, starts: Any, plan: Plan) -> Windows:
    """Of the windows of all processes, those of this one."""
    world = plan.world
    own = starts[share_of(len(starts), world.share, world.shares)]
    filled = own
    if -(-len(own) // plan.micro) < passes_of(len(starts), plan.micro, world.shares):
        filled = np.concatenate([own, starts[:1]])
    return Windows(*_batch(tokens, filled, plan), len(own), len(starts))


def _batch(tokens: Tokens, starts: Any, plan: Plan) -> tuple[Tensor, Tensor]:
    """Inputs and targets on the device, int64 [len(starts), context]."""
    windows = torch.from_numpy(tokens.windows(starts, plan.context + 1))
    if plan.device.type == "cuda":
        windows = windows.pin_memory().to(plan.device, non_blocking=True)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class _Prefetched:
    """The batches of the steps, each read while the one before it is trained on."""

    def __init__(self, tokens: Tokens, plan: Plan) -> None:
        self.tokens, self.plan = tokens, plan
        self._reader = ThreadPoolExecutor(1, "data")
        self._next: tuple[int, Future[Windows]] | None = None

    def of(self, step: int) -> Windows:
        """Those of one step."""
        ready = self._next[1].result() if self._next and self._next[0] == step else self._read(step)
        self._next = (step + 1, self._reader.submit(self._read, step + 1))
        return ready

    def _read(self, step: int) -> Windows:
        return _share(self.tokens, step_starts(self.tokens, self.plan, step), self.plan)

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown()


def step_starts(tokens: Tokens, plan: Plan, step: int) -> Any:
    """Where the windows of a step start, int64 [sequences]."""
    return window_starts(len(tokens), seed=plan.seed, step=step, sequences=plan.sequences, context=plan.context)
