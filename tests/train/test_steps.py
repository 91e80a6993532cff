"""The loop against one that is written out here in plain PyTorch, to the bit."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpwise
from sharpwise.train.data import Tokens, even_starts, window_starts
from sharpwise.train.models import load_model
from sharpwise.train.schedule import KINDS, Schedule
from sharpwise.train.steps import Plan, Step, step_seed, train_steps
from train.kill_rig import Tiny

VOCABULARY, CONTEXT, TOTAL, PEAK = 64, 16, 10, 3e-3


def tokens(count: int, seed: int) -> np.ndarray:
    """Text of which the next letter can be learned: each is the one before plus 1 or 5."""
    chance = np.random.default_rng(seed)
    return (np.cumsum(chance.choice([1, 5], count)) % VOCABULARY).astype(np.uint16)


TEXT, HELD_OUT = tokens(3000, 1), tokens(300, 2)
# In pieces, as large data are: windows cross them.
TRAIN, VALIDATION = Tokens([TEXT[:1000], TEXT[1000:1010], TEXT[1010:]]), Tokens([HELD_OUT])


def plan(**other: Any) -> Plan:
    own: dict[str, Any] = {
        "schedule": Schedule("cosine", TOTAL, warmup=3, floor=0.1),
        "peak": PEAK,
        "sequences": 6,
        "micro": 2,
        "context": CONTEXT,
        "seed": 5,
        "validation_every": 4,
        "validation_sequences": 5,
    }
    return Plan(**(own | other))


def adamw(model: nn.Module, **other: Any) -> Any:
    return sharpwise.AdamW(model, on_nonfinite="skip", **other)


def trained(own: Plan, model: nn.Module | None = None, optimizer: Any = None, **other: Any) -> list[Step]:
    torch.manual_seed(0)
    model = model or Tiny(VOCABULARY)
    return list(train_steps(model, optimizer or adamw(model), TRAIN, VALIDATION, own, **other))


def plain_loop(own: Plan, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """What the loop is to do, without any of its parts but the functions that say which windows and which seed."""
    done = []
    for step in range(1, TOTAL + 1):
        starts = window_starts(len(TEXT), seed=own.seed, step=step, sequences=own.sequences, context=CONTEXT)
        windows = torch.from_numpy(np.stack([TEXT[s : s + CONTEXT + 1] for s in starts]).astype(np.int64))
        torch.manual_seed(step_seed(own.seed, step))
        lr = PEAK * (
            step / 3 if step <= 3 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 1 - 3) / (TOTAL - 3)))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        total, parts = torch.zeros(()), own.sequences // own.micro
        for i in range(parts):
            part = windows[i * own.micro : (i + 1) * own.micro]
            loss = F.cross_entropy(model(part[:, :-1]).reshape(-1, VOCABULARY), part[:, 1:].reshape(-1)) / parts
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        done.append({"loss": float(total), "lr": lr, "grad_norm": float(norm)})
        if step % own.validation_every == 0 or step == TOTAL:
            model.eval()
            spacing = ((len(HELD_OUT) - 1) // CONTEXT // own.validation_sequences) * CONTEXT
            losses = []
            for i in range(own.validation_sequences):
                window = torch.from_numpy(HELD_OUT[i * spacing : i * spacing + CONTEXT + 1].astype(np.int64))[None]
                with torch.no_grad():
                    losses.append(float(F.cross_entropy(model(window[:, :-1])[0], window[0, 1:])))
            done[-1]["validation_loss"] = sum(losses) / len(losses)
            model.train()
    return done


@pytest.mark.parametrize("micro", [2, 6])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_loop_is_a_plain_one_to_the_bit(name, micro) -> None:
    own = plan(micro=micro)
    torch.manual_seed(0)
    mine = Tiny(VOCABULARY)
    other = copy.deepcopy(mine)
    if name == "sgd":  # torch's
        expected = plain_loop(own, other, torch.optim.SGD(other.parameters(), 1.0, momentum=0.9))
        optimizer = sharpwise.SGD(mine, momentum=0.9, on_nonfinite="skip", compile=False)
    else:  # the package's; that it is torch's but for the last bits is tested elsewhere
        expected = plain_loop(own, other, sharpwise.AdamW(other))
        optimizer = adamw(mine)
    steps = list(train_steps(mine, optimizer, TRAIN, VALIDATION, own))
    assert [s.step for s in steps] == list(range(1, TOTAL + 1))
    for step, wanted in zip(steps, expected, strict=True):
        assert step.loss == wanted["loss"]
        assert step.lr == wanted["lr"]
        assert step.grad_norm == pytest.approx(wanted["grad_norm"], rel=1e-5)
        assert step.tokens == step.step * 6 * CONTEXT
        assert step.finite
        assert step.seconds > 0
        if "validation_loss" in wanted:
            assert step.validation_loss == pytest.approx(wanted["validation_loss"], rel=1e-6)
        else:
            assert step.validation_loss is None
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))


def test_against_torchs_adamw() -> None:
    torch.manual_seed(0)
    model = Tiny(VOCABULARY)
    expected = plain_loop(plan(), copy.deepcopy(model), torch.optim.SGD(model.parameters()))[0]
    torch.manual_seed(0)
    other = Tiny(VOCABULARY)
    wanted = plain_loop(plan(), other, torch.optim.AdamW(other.parameters()))
    steps = trained(plan())
    assert steps[0].loss == expected["loss"]
    assert [s.loss for s in steps] == pytest.approx([w["loss"] for w in wanted], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_learning_rate_of_every_step_is_that_of_the_schedule(kind) -> None:
    schedule = Schedule(kind, TOTAL, warmup=2, floor=0.2, decay=3 if kind == "wsd" else 0)
    steps = trained(plan(schedule=schedule))
    assert [s.lr for s in steps] == [PEAK * schedule.factor(i) for i in range(TOTAL)]


def test_every_group_gets_the_learning_rate() -> None:
    torch.manual_seed(0)
    model = Tiny(VOCABULARY)
    named = list(model.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "weight_decay": 0.0}]
    optimizer = sharpwise.AdamW(groups, model=model, on_nonfinite="skip")
    last = list(train_steps(model, optimizer, TRAIN, VALIDATION, plan()))[-1]
    assert [group["lr"] for group in optimizer.param_groups] == [last.lr, last.lr]


class Seen(nn.Module):
    """Another model, and what it was given; without dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = load_model("gpt2-tiny", settings={"vocab_size": VOCABULARY, "n_layer": 1})
        self.training_inputs: list[Tensor] = []
        self.validation_inputs: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Any:
        (self.training_inputs if self.training else self.validation_inputs).append(inputs.clone())
        return self.inner(inputs)


def test_micro_batches_have_the_same_windows_and_losses() -> None:
    runs = {}
    for micro in (1, 2, 3, 6):
        model = Seen()
        runs[micro] = model, trained(plan(micro=micro), model)
        assert {len(x) for x in model.training_inputs} == {micro}
    whole, steps = runs[6]
    for micro in (1, 2, 3):
        model, others = runs[micro]
        assert torch.equal(torch.cat(model.training_inputs), torch.cat(whole.training_inputs))
        assert [s.loss for s in others] == pytest.approx([s.loss for s in steps], abs=1e-6)
        assert [s.grad_norm for s in others] == pytest.approx([s.grad_norm for s in steps], rel=1e-4)
        mine, other = ([s.validation_loss for s in own if s.validation_loss] for own in (others, steps))
        assert mine == pytest.approx(other, abs=1e-6)


def test_validation_is_always_on_the_same_windows() -> None:
    model = Seen()
    steps = trained(plan(validation_every=1), model)
    assert all(s.validation_loss is not None for s in steps)
    times = len(model.validation_inputs) // 3  # 5 windows by twos
    assert times == TOTAL
    each = [torch.cat(model.validation_inputs[3 * i : 3 * i + 3]) for i in range(times)]
    assert all(torch.equal(x, each[0]) for x in each)
    starts = even_starts(len(HELD_OUT), 5, CONTEXT)
    assert torch.equal(each[0], torch.from_numpy(VALIDATION.windows(starts, CONTEXT)))
    others = Seen()
    trained(plan(validation_every=1, seed=9, micro=1), others)
    assert torch.equal(torch.cat(others.validation_inputs[:5]), each[0])  # nor does the seed change it
    assert not torch.equal(others.training_inputs[0], model.training_inputs[0][:1])


def test_validation_changes_nothing() -> None:
    often, seldom = trained(plan(validation_every=1)), trained(plan(validation_every=0))
    assert [s.loss for s in often] == [s.loss for s in seldom]
    assert [s.step for s in seldom if s.validation_loss is not None] == [TOTAL]


def test_dropout_is_a_function_of_seed_and_step() -> None:
    losses = [s.loss for s in trained(plan())]
    torch.rand(7)  # whatever was drawn in between
    assert [s.loss for s in trained(plan())] == losses
    other = trained(plan(seed=6))
    assert all(a != b.loss for a, b in zip(losses, other, strict=True))
    assert len({step_seed(seed, step) for seed in range(30) for step in range(30)}) == 900


@pytest.mark.parametrize("start", [1, 4, 9, 10])
def test_going_on_is_the_same_to_the_bit(start) -> None:
    torch.manual_seed(0)
    whole = Tiny(VOCABULARY)
    expected = list(train_steps(whole, adamw(whole, block_lr="blockwise"), TRAIN, VALIDATION, plan()))
    torch.manual_seed(0)
    model = Tiny(VOCABULARY)
    optimizer = adamw(model, block_lr="blockwise")
    first = list(itertools.islice(train_steps(model, optimizer, TRAIN, VALIDATION, plan()), start))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.manual_seed(77)
    again = Tiny(VOCABULARY)
    optimizer = adamw(again, block_lr="blockwise")
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    rest = list(train_steps(again, optimizer, TRAIN, VALIDATION, plan(), start=start))
    for step, wanted in zip([*first, *rest], expected, strict=True):
        assert (step.step, step.loss, step.lr, step.grad_norm, step.validation_loss) == (
            wanted.step, wanted.loss, wanted.lr, wanted.grad_norm, wanted.validation_loss,
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_autocast_multiplies_in_bf16_and_keeps_weights() -> None:
    torch.manual_seed(0)
    model = Tiny(VOCABULARY)
    optimizer, seen = adamw(model), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    steps = trained(plan(autocast=True), model, optimizer)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact = trained(plan())
    assert steps[0].loss != exact[0].loss
    assert [s.loss for s in steps] == pytest.approx([s.loss for s in exact], abs=0.02)


def test_what_is_called_in_place_of_the_model() -> None:
    torch.manual_seed(0)
    model = Tiny(VOCABULARY)
    called = []

    def forward(inputs: Tensor) -> Tensor:
        called.append(inputs.shape)
        return model(inputs)

    assert [s.loss for s in trained(plan(), model, forward=forward)] == [s.loss for s in trained(plan())]
    assert len(called) == 3 * TOTAL + 3 * 3  # validations after steps 4, 8 and 10


class Bad(Tiny):
    """Something is not finite in training call number `at`; by `how`."""

    def __init__(self, at: int, how: str) -> None:
        super().__init__(VOCABULARY)
        self.left, self.how = at, how

    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        self.left -= self.training
        if self.left or not self.training:
            return logits
        if self.how == "loss":
            return logits * math.nan
        if self.how == "gradient":
            logits.register_hook(lambda g: g * math.inf)
            return logits
        # The target that never comes: the loss is infinite, and yet its gradient is finite.
        return logits.masked_fill(torch.ones_like(logits).cumsum(-1) > VOCABULARY // 2, -math.inf)


@pytest.mark.parametrize("how", ["loss", "gradient", "impossible target"])
def test_a_step_that_is_not_finite_leaves_the_weights(how) -> None:
    torch.manual_seed(0)
    model = Bad(3 * 2 + 2, how)  # in the second part of the third step
    optimizer = adamw(model, weight_decay=0.1)
    before, after = [], []
    for step in train_steps(model, optimizer, TRAIN, VALIDATION, plan(validation_every=1)):
        before.append(after[-1] if after else None)
        after.append([p.detach().clone() for p in model.parameters()])
        assert step.finite == (step.step != 3)
        assert (step.validation_loss is None) == (step.step == 3)
    for i in range(1, TOTAL):
        same = all(torch.equal(a, b) for a, b in zip(before[i], after[i], strict=True))
        assert same == (i == 2)
    assert all(p.isfinite().all() for p in after[-1])
    assert optimizer.skipped_steps == 1


def test_an_early_end_leaves_no_thread() -> None:
    import threading

    before = threading.active_count()
    torch.manual_seed(0)
    model = Tiny(VOCABULARY)
    running = train_steps(model, adamw(model), TRAIN, VALIDATION, plan())
    next(running)
    running.close()
    assert threading.active_count() == before


def test_a_model_that_gives_something_else() -> None:
    class Last(Tiny):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs)[:, -1]

    with pytest.raises(ValueError, match="were they of the last position alone"):
        trained(plan(), Last(VOCABULARY))
