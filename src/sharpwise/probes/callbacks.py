"""Probes in a training loop, at a cadence: what a run notes down with its metrics."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sharpwise.blocks import BlockMap, Role, canonical_name
from sharpwise.probes.estimate import Measurement
from sharpwise.probes.noise_scale import GradientSNR, NoiseScale
from sharpwise.probes.update_size import UpdateSize, angles

Notes = dict[str, dict[str, float]]


class Probes:
    """What a step did to each block: sizes of updates, noise of gradients, sharpness; nothing on most steps.

    Call in this order: `after_micro_batch` after each backward pass, where a step accumulates several; `before_step`
    when the gradients of the step are complete, and not clipped; `after_step` after the optimizer's step.

    `after_step` gives, where something is due, values by name:

    - "update_rms" by role: root mean square of the update, in units of the weights;
      "update_relative": its norm over that of the weights; "update_angle": the mean angle of a neuron, in radians.
    - "gradient_signal", "gradient_noise" by block type and for the "model": |G|^2, and S of one sequence, of this step;
      "noise_scale": the ratio of their averages over the steps that were noted, in sequences. From micro-batches where
      the step has several, else from the gradient's product with the optimizer's momentum, where it has one.
    - "gradient_snr", "critical_batch": likewise of the batch, from the momentum alone.
    - "sharpness" by block type: that of the optimizer's second moment (`fisher.sharpness_from_optimizer`).

    What is not defined is left out: a line of metrics holds numbers only. A run that was stopped goes on with the same
    values if `state_dict` was in its checkpoint.

    Args:
        model, optimizer: that train. Momentum is known of optimizers whose state is an `exp_avg`.
        blocks: the map of the model's segments.
        sequences: per step; 0 where it is not known, and there is no noise then.
        tokens: per step; 0 where it is not known, and sharpness is in units of 1/tokens then.
        updates_every, noise_every, sharpness_every: steps from one to the next, 0 for none; before the first of them
            at steps that are powers of two. Those of updates keep a copy of the weights during the optimizer's step,
            those of noise a copy of the gradients where micro-batches are used.
        last: the step after which everything is due once more; 0 for none.
        micro_batches: whether the gradients of micro-batches can be seen: not so where processes exchange them only in
            the last backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        blocks: BlockMap,
        *,
        sequences: int = 0,
        tokens: int = 0,
        updates_every: int = 50,
        noise_every: int = 50,
        sharpness_every: int = 50,
        last: int = 0,
        micro_batches: bool = True,
    ) -> None:
        self.model, self.optimizer, self.blocks, self.last = model, optimizer, blocks, last
        self.updates_every, self.noise_every, self.sharpness_every = updates_every, noise_every, sharpness_every
        self.sequences, self.tokens, self.micro_batches = sequences, tokens, micro_batches
        self._sizes = UpdateSize(model, blocks)
        self._noise = NoiseScale(model, blocks, decay=0.9)
        self._snr = GradientSNR(model, blocks, batch_size=max(sequences, 1), decay=0.9)
        self._weight: float | None = None
        self._drawn: tuple[bool, bool] = (False, False)

    def due(self, every: int, step: int) -> bool:
        """Whether something is due at a step: before the first multiple at powers of two, where updates change most."""
        early = step < every and step.bit_count() == 1
        return every > 0 and (early or step % every == 0 or step == self.last)

    def after_micro_batch(self, step: int, sequences: int) -> None:
        """After each backward pass: how many sequences it was of; the gradients accumulate to their mean."""
        if self.micro_batches and sequences < self.sequences and self.due(self.noise_every, step):
            self._noise.after_micro_batch(sequences)

    def before_step(self, step: int) -> None:
        """Right before the optimizer's step, with the gradients as they came."""
        self._drawn = (False, False)
        if self.sequences and self.due(self.noise_every, step):
            momentum, weight = momentum_of(self.model, self.optimizer, self._weight)
            self._drawn = (self._noise.after_step(), bool(momentum) and self._snr.add(momentum, weight))
        if self.due(self.updates_every, step):
            self._sizes.before()

    def after_step(self, step: int) -> Notes:
        """After it: what is due, {} on most steps."""
        self._follow_clipping()
        notes: Notes = {}
        if self.due(self.updates_every, step) and self._sizes.before_state:
            notes |= self._updates()
        if any(self._drawn):
            notes |= self._gradients()
        if self.due(self.sharpness_every, step):
            notes |= _sharpness(self.optimizer, self.tokens)
        return {name: values for name, values in notes.items() if values}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"noise": self._noise.state_dict(), "snr": self._snr.state_dict(), "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        self._noise.load_state_dict(state["noise"])
        self._snr.load_state_dict(state["snr"])
        self._weight = state["weight"]

    # -- what is noted ---------------------------------------------------------------------------------------------

    def _updates(self) -> Notes:
        """By role, from one pass over the weights; a whole `Measurement` takes three times as long."""
        sums: dict[Role, list[float]] = {}
        for segment, rows in zip(self._sizes.segments, self._sizes.rows(), strict=True):
            w, d, _ = rows.sum(1).tolist()
            known = angles(*rows)[rows[[0, 2]].amin(0) > 0] if segment.is_matrix else rows[0, :0]
            own = [d, w, segment.numel, float(known.sum()), len(known)]
            sums[segment.role] = [a + b for a, b in zip(sums.get(segment.role, [0.0] * 5), own, strict=True)]
        self._sizes.let_go()
        notes: Notes = {"update_rms": {}, "update_relative": {}, "update_angle": {}}
        for role, (d, w, n, angle, neurons) in sums.items():
            if not math.isfinite(d + w):
                continue
            notes["update_rms"][str(role)] = math.sqrt(d / n)
            if w > 0:
                notes["update_relative"][str(role)] = math.sqrt(d / w)
            if neurons:
                notes["update_angle"][str(role)] = angle / neurons
        return notes

    def _gradients(self) -> Notes:
        from_micro, from_momentum = self._drawn
        notes: Notes = {}
        if from_micro:
            last = {group.of: pair for group, pair in self._noise.last.items()}
        else:  # of the momentum's, the noise is that of the batch
            last = {group.of: (s, n * self.sequences) for group, (s, n) in self._snr.last.items()}
        notes["gradient_signal"] = {of: s for of, (s, _) in last.items()}
        notes["gradient_noise"] = {of: n for of, (_, n) in last.items()}
        if from_micro:
            notes["noise_scale"] = _values(self._noise.measure(), "noise scale")
        if from_momentum:
            found = self._snr.measure()
            notes["gradient_snr"] = _values(found, "gradient SNR")
            notes["critical_batch"] = _values(found, "critical batch size")
        return notes

    def _follow_clipping(self) -> None:
        """What an average of clipped gradients weighs: the same average of what clipping has left of each."""
        b, _ = _average(self.optimizer)
        most = getattr(getattr(self.optimizer, "options", None), "max_grad_norm", None)
        norm = getattr(self.optimizer, "grad_norm", None)
        if b is None or not self.noise_every:
            return
        left = 1.0
        if most and norm is not None:
            value = float(norm)
            if not math.isfinite(value):
                return  # the step was skipped
            left = min(1.0, most / value) if value > 0 else 1.0
        if self._weight is None:
            steps = max(_steps_taken(self.optimizer) - 1, 0)
            self._weight = (1 - b**steps) * left  # those before were not seen: as if clipped alike
        self._weight = b * self._weight + (1 - b) * left


def momentum_of(model: nn.Module, optimizer: Any, weight: float | None = None) -> tuple[dict[str, Tensor], float]:
    """The optimizer's average of gradients by canonical name, and its weight; ({}, 0) where it has none yet.

    The weight is that given, else as if no gradient had been clipped.
    """
    b, key = _average(optimizer)
    if b is None:
        return {}, 0.0
    state = optimizer.state
    found = {
        canonical_name(name): state[p][key]
        for name, p in model.named_parameters()
        if p in state and isinstance(state[p].get(key), Tensor)
    }
    if weight is None:
        weight = 1 - b ** _steps_taken(optimizer)
    return found, weight


def _average(optimizer: Any) -> tuple[float | None, str]:
    """The decay of the optimizer's average of gradients, and its name in the state; None where it keeps none."""
    if not optimizer.state:  # nor does it matter what its groups have
        return None, ""
    decays = {}
    for group in optimizer.param_groups:
        if "betas" not in group:
            return None, ""
        # Lion's average is the second; Adam's and its kin's the first.
        decays[float(group["betas"][1 if group.get("rule") == "lion" else 0])] = True
    return (next(iter(decays)), "exp_avg") if len(decays) == 1 else (None, "")


def _steps_taken(optimizer: Any) -> int:
    steps = (float(own["step"]) for own in optimizer.state.values() if "step" in own)
    return int(max(steps, default=0.0))


def _sharpness(optimizer: Any, tokens: int) -> Notes:
    from sharpwise.probes.fisher import sharpness_from_optimizer

    try:
        found = sharpness_from_optimizer(optimizer, tokens=tokens or None)
    except (TypeError, ValueError):  # most rules keep no second moment
        return {}
    return {"sharpness": _values(found.select(by="type"), "sharpness")}


def _values(found: Measurement, quantity: str) -> dict[str, float]:
    chosen = (e for e in found if e.quantity == quantity and e.layer is None)
    return {e.of: e.value for e in chosen if math.isfinite(e.value)}


__all__ = ["Probes", "momentum_of"]
