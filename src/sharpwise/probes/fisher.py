"""Block sharpness by the Gauss-Newton-Bartlett estimator.

    S(b) = Tr(F_b) / n_b        F = 1/N sum_t E_{y ~ p_t} [g_t(y) g_t(y)^T],    g_t(y) = d/dp of -log p_t(y)
    S(b) ~ N |G_b|^2 / n_b      G = 1/N sum_t g_t(y_t),    one label y_t drawn from the model's own softmax per token

Labels drawn independently given the inputs have E g_t = 0, so that the cross terms of |G|^2 vanish in the mean and the
estimate is unbiased at the cost of one gradient. For the cross-entropy of a softmax F is the Gauss-Newton matrix.

| symbol | meaning |
|---|---|
| b, n_b | a block, here a segment or a union of segments; its elements |
| N | tokens of a batch that have a target |
| p_t | softmax of the logits at token t |

Sequences as the unit: B |G_b|^2 / n_b with B sequences, as where the paper's B counts them. It differs from the value
per token by the number of tokens of a sequence. With true labels the same formula is the empirical Fisher matrix; as
then E g_t is not 0, it also holds (N-1) |mean gradient|^2 and what tokens of a text have in common, and grows with N.

References: Wang et al., The Sharpness Disparity Principle in Transformers, arXiv 2502.19002; Liu et al., Sophia, arXiv
2305.14342, section 2.3 (the estimator); Martens, arXiv 1412.1193 (Fisher and Gauss-Newton).
Departs: the paper leaves open whether labels are drawn, and what B counts; here both are arguments, and said in the
result. The geometric mean is over segments, weighted by their elements, not over elements, of which many are zero.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sharpwise.blocks import BlockMap
from sharpwise.blocks.map import Blocks
from sharpwise.probes.batches import IGNORED, Batch, check_micro
from sharpwise.probes.estimate import Cost, Estimate, Measurement
from sharpwise.probes.gather import Groups, square_sums
from sharpwise.probes.monte_carlo import Draws, check_count, check_rtol, not_reached
from sharpwise.probes.parts import by_name, trained_now
from sharpwise.probes.second_moment import sharpness_from_optimizer
from sharpwise.probes.subject import Subject, Tied

Labels = Literal["sampled", "true"]
Unit = Literal["token", "sequence"]

_WHO = "sharpness"
_ROUNDING = 1e-12


def sharpness(
    model: nn.Module,
    batches: Any,
    *,
    blocks: Blocks = None,
    labels: Labels = "sampled",
    unit: Unit = "token",
    micro: int | None = None,
    samples: int = 1,
    rtol: float | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    tied: Tied = "both",
) -> Measurement:
    """Sharpness per segment, type and role, in a layer and over all, each with a 95% interval.

    What is independent: batches, if there are several; then the interval is for the text that they were drawn from, and
    each counts as one draw, whatever `samples` is. With a single batch label draws are independent, and the interval is
    for the Fisher matrix on that batch. Batches weigh by their tokens (sequences).

    Args:
        model: causal language model in any state; it and its gradients are left as they were. Dropout is off meanwhile.
        batches: one batch or an iterable of them. A batch is int64 tokens [sequences, context + 1]; or a pair (inputs,
            targets) of int64 [sequences, context], with -100 for targets that do not count; or a mapping with
            `input_ids` and `labels` (and `attention_mask`, ...) as for Hugging Face models.
        blocks: the model's map, or overrides for it.
        labels: drawn from the model's softmax, or those of the text (the empirical Fisher matrix).
        unit: what N counts.
        micro: sequences per forward and backward pass, None for all of a batch; memory is that of a training step
            with as many.
        samples: label draws per batch, at most.
        rtol: stop as soon as every type is known to this relative error, after ten draws at least.
        max_batches: stop after so many.
        seed: of the label draws.
        tied: of a tied embedding, through "both" uses at once, or through the "lookup" or the output "head" alone: the
            other one is a constant then. Both add up only in the mean over tokens that are looked up and predicted
            independently.

    Returns:
        Quantity "sharpness" by segment, layer (of its types and roles), type, role and for the model; and "sharpness,
        geometric mean" by type and for the model: exp(sum n_b log S(b) / sum n_b) over the segments b but those that do
        not matter to the loss, as biases of keys (S(b) below 1e-12 of the largest, which is what rounding leaves).

    Raises:
        TypeError, ValueError: for bad arguments, a batch that does not fit the model, or no target that counts.
        FloatingPointError: for a loss that is not finite.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> found = sharpness(model, torch.tensor([[0, 1, 2, 3, 4]]), samples=20)
        >>> [(e.of, e.samples, e.unit) for e in found.select(by="model", quantity="sharpness")]
        [('model', 20, 'per token')]
    """
    _check_arguments(labels, unit, micro, samples, rtol, max_batches)
    started = time.perf_counter()
    subject = Subject(model, blocks, _WHO, tied)
    run = _Run(subject, labels, unit, micro, seed)
    columns = run.groups.indices("type")
    stream = itertools.islice(subject.batches(batches), max_batches)
    for batch, single in _with_single(stream):
        if single:
            run.draw_labels(batch, samples, lambda draws: draws.enough(rtol, columns))
        else:
            run.draw_batch(batch, samples)
            if run.draws.enough(rtol, columns):
                break
    warnings = run.warnings()
    if rtol is not None:
        remedy = "take more samples" if run.batches == 1 else "take more batches"
        warnings += not_reached(_WHO, rtol, run.draws.relative_error(columns), len(run.draws), remedy)
    settings = {
        "labels": labels,
        "unit": unit,
        "batches": run.batches,
        "samples": samples,
        "tokens": run.tokens,
        "interval_over": "batches" if run.batches > 1 else "label draws",
        "seed": seed,
        "rtol": rtol,
        **({} if tied == "both" else {"tied": tied}),
    }
    cost = Cost(time.perf_counter() - started, run.gradients)
    return Measurement(_WHO, run.estimates(), settings=settings, cost=cost, warnings=warnings)


def sharpness_by_name(
    model: nn.Module, batches: Any, blocks: BlockMap, *, seed: int = 0, tied: Tied = "both"
) -> dict[str, list[float]]:
    """The sharpness of what is trained now: by name of the parameter, one value per segment.

    Raises:
        ValueError: as `sharpness`.
    """
    trained = trained_now(model, blocks)
    found = sharpness(model, batches, blocks=trained, seed=seed, tied=tied)
    return by_name(found.select(quantity="sharpness"), trained)


class _Run:
    """Draws as they come in, float64 [groups] each."""

    def __init__(self, subject: Subject, labels: Labels, unit: Unit, micro: int | None, seed: int) -> None:
        self.subject, self.labels, self.unit, self.micro = subject, labels, unit, micro
        self.generator = torch.Generator(subject.device).manual_seed(seed)
        self.groups = Groups(subject.segments)
        self.draws = Draws("positive")
        self.batches, self.tokens, self.gradients = 0, 0, 0.0
        self.counts: set[int] = set()

    def draw_labels(self, batch: Batch, samples: int, enough: Callable[[Draws], bool]) -> None:
        """A single batch: every draw of its labels is one."""
        self._note(batch)
        for _ in range(samples):
            self.draws.add(self._values(batch))
            if enough(self.draws):
                break

    def draw_batch(self, batch: Batch, samples: int) -> None:
        """One of several batches: the mean over draws of its labels."""
        self._note(batch)
        mean = np.mean([self._values(batch) for _ in range(samples)], axis=0)
        self.draws.add(mean, weight=self._count(batch))

    def _note(self, batch: Batch) -> None:
        self.batches += 1
        self.tokens += batch.tokens
        self.counts.add(self._count(batch))

    def _count(self, batch: Batch) -> int:
        return batch.tokens if self.unit == "token" else batch.sequences

    def _values(self, batch: Batch) -> np.ndarray:
        squares = gradient_squares(self.subject, batch, self.labels, self.micro, self.generator)
        self.gradients += 1
        return self._count(batch) * self.groups.means(squares)

    def estimates(self) -> Iterator[Estimate]:
        """Arithmetic means of all groups, and geometric ones."""
        mean, error = self.draws.interval()
        about = {"samples": len(self.draws), "unit": f"per {self.unit}"}
        yield from self.groups.estimates("sharpness", mean, error, **about)  # type: ignore[arg-type]
        geometric, error = self._geometric(mean)
        yield from self.groups.estimates(
            "sharpness, geometric mean",
            geometric,
            error,
            by=("model", "type"),
            **about,  # type: ignore[arg-type]
        )

    def _geometric(self, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Per group, from the segments' means; the interval by linearization: d log S = sum w_b d S_b / S_b."""
        own = self.groups.indices("segment")
        some = mean[own] > _ROUNDING * mean[own].max()
        weights = self.groups.matrix * np.where(some, self.groups.sizes, 0.0)
        weights /= np.maximum(weights.sum(1, keepdims=True), 1.0)
        safe = np.where(some, mean[own], 1.0)
        value = np.where(weights.any(1), np.exp(weights @ np.log(safe)), 0.0)
        linear = Draws("positive")
        for row, weight in zip(self.draws.rows, self.draws.weights, strict=True):
            linear.add(value * (weights @ np.where(some, row[own] / safe, 0.0)), weight)
        return value, linear.interval()[1]

    def warnings(self) -> list[str]:
        """What the values do not say themselves."""
        if self.labels == "true" and len(self.counts) > 1:
            return [
                f"{_WHO}: batches have {min(self.counts)} to {max(self.counts)} {self.unit}s; with true labels the "
                "value grows with that number, so that it is not of one kind"
            ]
        return []


def gradient_squares(
    subject: Subject, batch: Batch, labels: Labels, micro: int | None, generator: torch.Generator | None
) -> np.ndarray:
    """|gradient of the mean loss over the tokens of a batch|^2 per segment, float64 [segments]; parameters' `grad`
    is not touched.

    Raises:
        FloatingPointError: for a loss or a gradient that is not finite.
    """
    # Leaves of their own on the parameters' memory: gradients add up in them, and no hook of the user's is called.
    leaves = {name: p.detach().requires_grad_() for name, p in subject.trained.items()}
    tokens = batch.tokens

    def work(inside: nn.Module) -> None:
        for part in batch.split(micro):
            logits = subject.logits(inside, part)
            targets = part.targets.flatten()
            direction = loss_direction(logits.detach(), targets, labels, generator)
            if not bool(direction.sum().isfinite()):
                raise FloatingPointError(_not_finite(batch, "loss", f"at {_bad(direction)} of {len(targets)} tokens"))
            logits.backward(direction.div_(tokens).to(logits.dtype))

    subject.run(work, leaves)
    found = square_sums([leaf.grad for leaf in leaves.values()], subject.parts)
    if not np.isfinite(found).all():
        worst = subject.segments[int(np.argmin(np.isfinite(found)))].name
        raise FloatingPointError(_not_finite(batch, "gradient", f"in {worst}"))
    return found


def loss_direction(logits: Tensor, targets: Tensor, labels: Labels, generator: torch.Generator | None) -> Tensor:
    """Gradient of the summed cross-entropy with respect to the logits: softmax - onehot, 0 where targets are ignored.

    Labels are drawn by inverting the cumulated softmax: one pass and a binary search, where `torch.multinomial` takes
    two to seven times as long. The same softmax then is the gradient, so that the loss itself is never computed.

    Args:
        logits: [tokens, vocabulary].
        targets: int64 [tokens], IGNORED where none counts; for labels="sampled" only that matters.

    Returns:
        [tokens, vocabulary] in fp32 or better; NaN in tokens whose loss is not finite.
    """
    p = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = _invert(p, generator) if labels == "sampled" else targets.clamp(min=0)[:, None]
    impossible = logits.gather(1, chosen).isneginf()
    p.scatter_add_(1, chosen, torch.where(impossible, torch.nan, -1.0).to(p.dtype))
    ignored = targets == IGNORED
    return p.masked_fill_(ignored[:, None], 0.0) if bool(ignored.any()) else p


def _invert(p: Tensor, generator: torch.Generator | None) -> Tensor:
    cumulated = p.cumsum(-1)
    u = torch.rand(len(p), 1, dtype=p.dtype, device=p.device, generator=generator) * cumulated[:, -1:]
    # right=True: never a token of probability 0, also not for u = 0; the bound is for u that rounding made 1.
    return torch.searchsorted(cumulated, u, right=True).clamp_(max=p.shape[1] - 1)


def _with_single(stream: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Every batch, and whether it is the only one."""
    first = next(stream)
    second = next(stream, None)
    yield first, second is None
    if second is not None:
        yield from ((batch, False) for batch in itertools.chain([second], stream))


def _check_arguments(
    labels: str, unit: str, micro: int | None, samples: int, rtol: float | None, max_batches: int | None
) -> None:
    if labels not in ("sampled", "true"):
        raise ValueError(f"{_WHO}: labels must be 'sampled' or 'true', got {labels!r}")
    if unit not in ("token", "sequence"):
        raise ValueError(f"{_WHO}: unit must be 'token' or 'sequence', got {unit!r}")
    check_micro(micro, _WHO)
    check_count(_WHO, samples=samples, max_batches=max_batches)
    check_rtol(rtol, _WHO)
    if labels == "true" and samples > 1:
        raise ValueError(f"{_WHO}: true labels are the same at every draw; got samples={samples}, give more batches")


def _bad(direction: Tensor) -> int:
    return int((~direction.isfinite()).any(1).sum())


def _not_finite(batch: Batch, what: str, where: str) -> str:
    return f"{_WHO}: the {what} is not finite on {batch.name}, {where}; are the weights? Or take a wider dtype"


__all__ = ["Labels", "Unit", "gradient_squares", "loss_direction", "sharpness", "sharpness_from_optimizer"]
