"""Gradient noise: the simple noise scale (McCandlish et al., arXiv 1812.06162) and the signal-to-noise ratio.

    E|g_m|^2 = |G|^2 + S/m            a gradient g_m of m samples, G its expectation, S = tr Cov of one sample's
    |G|^2 = (n |g_n|^2 - m |g_m|^2) / (n - m),  S = (|g_m|^2 - |g_n|^2) / (1/m - 1/n)     from m and n samples
    B = S / |G|^2                     the simple noise scale, an estimate of the critical batch size, in samples

    E<g_t, M_{t-1}> = (1 - b^{t-1}) |G|^2,  M <- b M + (1-b) g    of steps, whose noise is independent
    phi = |G|^2 / (|g_t|^2 - |G|^2)   the signal-to-noise ratio of a batch of n;  B = n / phi

Signal and noise are averaged over steps, with weights decay^age, and then divided: the mean of single ratios is
meaningless. Both are unbiased (the second while G drifts slowly), unlike |M|^2 / (|g|^2 - |M|^2), six times too large
at phi = 0.01. Gradients must be those before clipping; a sample is what the caller counts, here a sequence.

| symbol | name |
|---|---|
| g_m, g_n | small, big |
| G, S | signal, noise |
| M | momentum |
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpwise.blocks import BlockMap
from sharpwise.blocks.map import Blocks, blocks_for
from sharpwise.blocks.segment import segment_sums
from sharpwise.probes.estimate import By, Cost, Estimate, Measurement, t_quantile
from sharpwise.probes.parts import Group, groups, named_parameters, whole

Gradients = Mapping[str, Tensor]


def two_batch(small: Any, big: Any, m: float, n: float) -> tuple[Any, Any]:
    """Unbiased |G|^2 and S from squared norms of gradients of m and of n samples (numbers or tensors).

    Raises:
        ValueError: the sizes are not positive, or the same.
    """
    if not (m > 0 and n > 0 and m != n):
        raise ValueError(f"two different numbers of samples are needed, got {m:g} and {n:g}")
    return (n * big - m * small) / (n - m), (small - big) / (1 / m - 1 / n)


class _Draws:
    """Pairs of signal and noise, one per step, of groups of segments; what both estimators have in common."""

    probe: str

    def __init__(self, model: nn.Module, blocks: Blocks, by: Iterable[By], decay: float, keep: int) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"{type(self).__name__}: decay must be in (0, 1], got {decay!r}")
        self.model, self.blocks = model, blocks_for(model, blocks, type(self).__name__)
        self.decay, self._by = decay, tuple(by)
        self.groups = groups(self.blocks.segments, self._by)
        self._draws: deque[list[list[float]]] = deque(maxlen=keep)
        named_parameters(model, self.blocks)

    def __len__(self) -> int:
        return len(self._draws)

    @property
    def last(self) -> dict[Group, tuple[float, float]]:
        """Signal and noise of the latest step, {} before the first."""
        return dict(zip(self.groups, zip(*self._draws[-1], strict=True), strict=True)) if self._draws else {}

    def _put(self, signal: Tensor, noise: Tensor) -> bool:
        """Keep the draw of a step, values by group; False where it is not finite and does not count."""
        drawn = torch.stack([signal, noise]).tolist()
        if not all(math.isfinite(x * x) for values in drawn for x in values):  # errors are made of squares
            return False
        self._draws.append(drawn)
        return True

    def _grouped(self, per_segment: Tensor) -> Tensor:
        return torch.stack([per_segment[list(group.members)].sum() for group in self.groups])

    def _gradients(self) -> dict[str, Tensor]:
        return gradients_of(self.model, self.blocks)

    def _products(self, a: Gradients, b: Gradients) -> Tensor:
        """Inner products by group, fp64 on the CPU; a gradient that is missing counts as zero."""
        sums = []
        for name in self.blocks.names():
            if name in a and name in b:
                sums += segment_sums(whole(a[name]).float() * whole(b[name]).float(), self.blocks[name])
            else:
                sums += [torch.zeros((), dtype=torch.float64, device="cpu")] * len(self.blocks[name])
        return self._grouped(torch.stack([x.cpu() for x in sums]))

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint: the draws, not a momentum of its own."""
        return {"draws": [list(map(list, pair)) for pair in self._draws]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, of the same groups."""
        draws = state["draws"]
        if any(len(values) != len(self.groups) for pair in draws for values in pair):
            raise ValueError(f"draws of other groups than these {len(self.groups)}")
        self._draws.clear()
        self._draws.extend(draws)

    def _mean(self, index: int, which: int) -> tuple[float, float | None]:
        return weighted_ratio([pair[which][index] for pair in self._draws], [1.0] * len(self), self.decay)

    def _ratio(self, index: int, top: int) -> tuple[float, float | None] | None:
        """Mean of one over mean of the other; None where a mean is not positive, and there is no ratio."""
        tops, bottoms = ([pair[which][index] for pair in self._draws] for which in (top, 1 - top))
        if not (_mean(tops, self.decay) > 0 and _mean(bottoms, self.decay) > 0):
            return None
        return weighted_ratio(tops, bottoms, self.decay)

    def _estimate(self, index: int, quantity: str, found: tuple[float, float | None], unit: str) -> Estimate:
        group = self.groups[index]
        return Estimate(
            quantity,
            group.by,
            group.of,
            *found,
            layer=group.layer,
            samples=len(self),
            elements=group.elements,
            unit=unit,
        )

    def _measurement(self, estimates: list[Estimate], warnings: list[str], **settings: Any) -> Measurement:
        if not self._draws:
            raise ValueError(f"{self.probe}: nothing was added yet, or no gradient was finite")
        settings = {"decay": self.decay, "steps": len(self), **settings}
        return Measurement(self.probe, estimates, settings=settings, cost=Cost(), warnings=warnings)


class NoiseScale(_Draws):
    """The simple noise scale from gradients of two batch sizes, such as those of micro-batches and their mean.

    Args:
        model: whose gradients they are.
        blocks: the map of its segments, or overrides for the one that is made.
        by: of what to give values; "layer" is a block type or a role within a layer.
        decay: of the weight of a step, per step that is added; 1 weighs all alike.
        keep: the latest so many steps count.
        unit: what a sample is.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> noise = NoiseScale(model, by=("model",))
        >>> for pair in ((1.0, 3.0), (0.0, 2.0)):  # gradients of two samples each
        ...     noise.add([{"weight": torch.tensor([[g]])} for g in pair], samples=2)
        >>> found = noise.measure()
        >>> found.value(quantity="gradient noise")  # 2 samples of each gradient: 2 * ((3-1)/2)^2 * 2
        4.0
    """

    probe = "noise scale"

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks = None,
        *,
        by: Iterable[By] = ("model", "type"),
        decay: float = 0.95,
        keep: int = 64,
        unit: str = "sequence",
    ) -> None:
        super().__init__(model, blocks, by, decay, keep)
        self.unit = unit
        self._so_far: dict[str, Tensor] = {}
        self._micro: list[tuple[Tensor, int]] = []

    def add(self, micro_gradients: Sequence[Gradients], samples: int | Sequence[int]) -> None:
        """One step: the mean gradients of its micro-batches, by canonical name, and how many samples each has.

        Raises:
            ValueError: fewer than two micro-batches.
        """
        if len(micro_gradients) < 2:
            raise ValueError(f"{type(self).__name__}: two micro-batches or more are needed, got {len(micro_gradients)}")
        counts = list(samples) if isinstance(samples, Sequence) else [samples] * len(micro_gradients)
        total: dict[str, Tensor] = {}
        for gradients, count in zip(micro_gradients, counts, strict=True):
            for name, g in gradients.items():
                total[name] = total.get(name, 0) + g.detach().float() * (count / sum(counts))
        smalls = [self._products(gradients, gradients) for gradients in micro_gradients]
        self.add_squares(smalls, self._products(total, total), counts)

    def add_squares(self, smalls: Sequence[Tensor], big: Tensor, counts: Sequence[int]) -> bool:
        """One step: squared norms, by group (`groups`), of the gradients of micro-batches and of all.

        Returns False where they (or their squares) are not finite, and do not count. The micro-batches may differ in
        size: the mean of their 1/m takes the place of 1/m.
        """
        small = torch.stack(list(smalls)).mean(0)
        m = len(counts) / math.fsum(1 / count for count in counts)
        return self._put(*two_batch(small, big, m, sum(counts)))

    @torch.no_grad()
    def after_micro_batch(self, samples: int) -> None:
        """Within a step that accumulates: call it after each backward pass. The accumulated gradient has to become the
        mean over the step, as it does where each loss is divided. Keeps a copy of the gradients."""
        now = self._gradients()
        change = {name: g.float() - self._so_far[name] if name in self._so_far else g for name, g in now.items()}
        self._micro.append((self._products(change, change), samples))
        self._so_far = {name: g.detach().clone().float() for name, g in now.items()}

    @torch.no_grad()
    def after_step(self) -> bool:
        """After the last of them, before clipping: whether there was something to add."""
        micro, gradients = self._micro, self._so_far
        self._micro, self._so_far = [], {}
        if len(micro) < 2:
            return False
        n = sum(count for _, count in micro)
        # What a micro-batch has added is its mean gradient times its share.
        smalls = [squares * (n / count) ** 2 for squares, count in micro]
        return self.add_squares(smalls, self._products(gradients, gradients), [count for _, count in micro])

    def measure(self) -> Measurement:
        """By group: "gradient signal" |G|^2, "gradient noise" S of one sample, and "noise scale" B = S / |G|^2, in
        samples. Errors are those of means over steps, to first order for B. Where signal or noise does not come out
        positive there is no B; the warnings say so, and where the signal is not above its error.

        Raises:
            ValueError: nothing was added.
        """
        estimates, warnings = [], []
        for i, group in enumerate(self.groups if self._draws else ()):
            signal, noise, B = self._mean(i, 0), self._mean(i, 1), self._ratio(i, 1)
            estimates.append(self._estimate(i, "gradient signal", signal, ""))
            estimates.append(self._estimate(i, "gradient noise", noise, f"per {self.unit}"))
            if B is None:
                warnings.append(f"{group.of}: no noise scale: {_why(signal[0], noise[0])}")
                continue
            estimates.append(self._estimate(i, "noise scale", B, f"{self.unit}s"))
            if signal[1] is None or signal[1] > signal[0]:
                warnings.append(f"{group.of}: the signal is not known to be above zero; its noise scale is a guess")
        return self._measurement(estimates, warnings, unit=self.unit)


class GradientSNR(_Draws):
    """The signal-to-noise ratio of the gradient of a batch, from what it has in common with those of steps before.

    Args:
        model: whose gradients they are.
        blocks: the map of its segments, or overrides for the one that is made.
        batch_size: samples of a step.
        beta: of the average of gradients that it keeps (a copy in fp32), where `add` is not given one.
        by, decay, keep, unit: as in `NoiseScale`. Draws of consecutive steps share most of their momentum, so that
            errors are too small unless there are some steps between.
    """

    probe = "gradient SNR"

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks = None,
        *,
        batch_size: int,
        beta: float = 0.9,
        by: Iterable[By] = ("model", "type"),
        decay: float = 0.98,
        keep: int = 64,
        unit: str = "sequence",
    ) -> None:
        super().__init__(model, blocks, by, decay, keep)
        if batch_size < 1 or not 0 <= beta < 1:
            raise ValueError(
                f"{type(self).__name__}: batch_size must be >= 1 and beta in [0, 1), got {batch_size!r} and {beta!r}"
            )
        self.batch_size, self.beta, self.unit = batch_size, beta, unit
        self._momentum: dict[str, Tensor] = {}
        self._weight = 0.0

    @torch.no_grad()
    def add(self, momentum: Gradients | None = None, weight: float | None = None) -> bool:
        """One step, with its gradients in place and not clipped yet; whether there was something to add.

        Args:
            momentum: the optimizer's average of gradients of the steps before, by canonical name; None takes its own,
                which has something to say from the second call on. Then every step has to be added.
            weight: of that average: sum of (1 - b) b^i c_i over the steps, c_i what clipping has left of a gradient.
        """
        g = self._gradients()
        squares = self._products(g, g)
        if not bool(squares.isfinite().all()):
            return False
        if momentum is not None:
            return self._draw(g, squares, momentum, 1.0 if weight is None else weight)
        added = self._draw(g, squares, self._momentum, self._weight)
        for name, value in g.items():
            m = self._momentum.setdefault(name, torch.zeros_like(value, dtype=torch.float32))
            m.lerp_(value.float(), 1 - self.beta)
        self._weight = self.beta * self._weight + 1 - self.beta
        return added

    def _draw(self, g: Gradients, squares: Tensor, momentum: Gradients, weight: float) -> bool:
        if not weight > 0:
            return False
        signal = self._products(g, momentum) / weight
        return self._put(signal, squares - signal)

    def measure(self) -> Measurement:
        """By group: "gradient SNR" phi of the batch, and "critical batch size" n / phi in samples. Where signal or
        noise does not come out positive there are none, and the warnings say so.

        Raises:
            ValueError: nothing was added.
        """
        estimates, warnings = [], []
        for i, group in enumerate(self.groups if self._draws else ()):
            phi, B = self._ratio(i, 0), self._ratio(i, 1)
            if phi is None or B is None:
                why = _why(self._mean(i, 0)[0], self._mean(i, 1)[0])
                warnings.append(f"{group.of}: no signal-to-noise ratio: {why}")
                continue
            B = (B[0] * self.batch_size, None if B[1] is None else B[1] * self.batch_size)
            estimates.append(self._estimate(i, "gradient SNR", phi, f"per {self.batch_size} {self.unit}s"))
            estimates.append(self._estimate(i, "critical batch size", B, f"{self.unit}s"))
        return self._measurement(estimates, warnings, unit=self.unit, batch_size=self.batch_size)


def gradients_of(model: nn.Module, blocks: BlockMap) -> dict[str, Tensor]:
    """Gradients by canonical name, of the parameters that have one."""
    found = named_parameters(model, blocks)
    return {name: p.grad.detach() for name, p in found.items() if p.grad is not None}


def _why(signal: float, noise: float) -> str:
    if signal == 0 and noise == 0:
        return "all its gradients are zero"
    what = "signal" if signal <= 0 else "noise"
    return f"its {what} does not come out above zero; more steps are needed"


def _mean(draws: Sequence[float], decay: float) -> float:
    weights = [decay**age for age in range(len(draws) - 1, -1, -1)]
    return math.fsum(w * x for w, x in zip(weights, draws, strict=True)) / math.fsum(weights)


def weighted_ratio(tops: Sequence[float], bottoms: Sequence[float], decay: float) -> tuple[float, float | None]:
    """Ratio of weighted means of pairs, oldest first, weights decay^age, and half of its 95% interval to first order.

    The interval is that of Student's t with as many degrees of freedom as the weights leave, None from one pair; with
    decay 1 and bottoms 1 it is that of the mean.
    """
    n = len(tops)
    weights = [decay**age for age in range(n - 1, -1, -1)]
    total = math.fsum(weights)
    bottom = _mean(bottoms, decay)
    ratio = _mean(tops, decay) / bottom
    if n < 2:
        return ratio, None
    shares = [w / total for w in weights]
    squares = math.fsum(w * w for w in shares)
    spread = math.fsum((w * (a - ratio * b)) ** 2 for w, a, b in zip(shares, tops, bottoms, strict=True))
    freedom = max(round(1 / squares - 1), 1)
    return ratio, t_quantile(freedom) * math.sqrt(spread / (1 - squares)) / bottom


__all__ = ["GradientSNR", "NoiseScale", "two_batch", "weighted_ratio"]
