"""Whether a step is taken, and by what its gradients are multiplied: clipping, non-finite gradients, a GradScaler."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpwise.engine.backends import Backends
from sharpwise.engine.norms import SquareSum
from sharpwise.engine.options import Options
from sharpwise.engine.scalars import on_device
from sharpwise.engine.view import ParamView
from sharpwise.shards import local


class Scaling:
    """What a GradScaler says of the gradients of a step: how they are scaled, and whether one is not finite.

    Attributes:
        factor: that undoes the scale, None if there is none; ok: whether to step (False, True or a device tensor).

    Args:
        read: whether the host has to know both, wherever they are.
    """

    def __init__(self, scale: Tensor | None, found_inf: Tensor | None, read: bool) -> None:
        on_host = read or all(t is None or t.device.type == "cpu" for t in (scale, found_inf))
        factor = None if scale is None else scale.double().reciprocal()
        self.factor = factor if factor is None or not on_host else float(factor)
        ok: Any = True if found_inf is None else found_inf == 0
        self.ok = bool(ok) if on_host else ok
        self.decided_by_device = isinstance(self.ok, Tensor)


class Guard:
    """Decides from the sum of all squares.

    Args:
        on_host: whether the host reads what it decides by.
        backends: asked for a kernel that decides on a device; None: torch operations do.

    Attributes:
        squares: sum of g*g in the last step, without the scale of a loss; None if it was not read.
        taken: in fp32 whether the last step was taken, where a kernel has worked that out.
    """

    def __init__(self, options: Options, on_host: bool, backends: Backends | None) -> None:
        self.options, self.on_host = options, on_host
        self.squares: SquareSum | None = None
        self.taken: Tensor | None = None
        self._backends = backends
        self._kernel: Any = None
        self._asked: torch.device | None = None
        self._skipped: Tensor | int = 0

    @property
    def skipped(self) -> int:
        """Steps left out since this was made, or since they were noted."""
        return int(self._skipped) + (0 if self._kernel is None else int(self._kernel.skipped))

    def note_skipped(self) -> int:
        """`skipped`, which begins anew."""
        found, self._skipped = self.skipped, 0
        if self._kernel is not None:
            self._kernel.skipped.zero_()
        return found

    def decide(self, total: SquareSum | None, scaling: Scaling | None, active: Sequence[ParamView]) -> tuple[Any, Any]:
        """Whether to step (True, False, or a device tensor), and the factor on the gradients (None: 1).

        Raises:
            FloatingPointError: under on_nonfinite="raise".
        """
        self.taken = None
        if total is not None:
            total = total.on_host() if self.on_host else total
            self.squares = total = total if scaling is None else total.times(scaling.factor)
        options, ok = self.options, True if scaling is None else scaling.ok
        if scaling is None and total is not None and (kernel := self._on_device(total)) is not None:
            self.taken = kernel.taken if kernel.skips else None
            found: tuple[Any, Any] = kernel(total.values)
            return found
        clip = None if total is None or options.max_grad_norm is None else self._clip(total, options.max_grad_norm)
        if scaling is not None and scaling.factor is not None:
            scale = on_device(scaling.factor, clip.device) if isinstance(clip, Tensor) else scaling.factor
            clip = scale if clip is None else clip * scale
        if total is None or options.on_nonfinite == "ignore":
            return ok, clip
        if options.on_nonfinite == "skip" and not self.on_host:
            finite = torch.isfinite(total.values)
            self._skipped = self._skipped + ~finite
            return (ok and finite if isinstance(ok, bool) else finite & on_device(ok, finite.device)), clip
        if math.isfinite(total.values):
            return ok, clip
        if options.on_nonfinite == "skip":
            self._skipped = self._skipped + 1
            return False, clip
        if ok is not True and not bool(ok):  # the scaler leaves it out, as it looks for a scale
            return False, clip
        raise FloatingPointError(_not_finite(active))

    def _clip(self, total: SquareSum, most: float) -> Any:
        """The factor that brings the norm to `most`, in the unit of the sum: the norm itself may be beyond fp64."""
        if self.on_host and type(total.unit) is float and total.unit:
            factor = most / total.unit / (math.sqrt(total.values) + 1e-6 / total.unit)
            return 1.0 if factor > 1.0 else factor  # NaN stays
        clip = torch.clamp(most / total.unit / (total.values.sqrt() + 1e-6 / total.unit), max=1.0)
        return float(clip) if self.on_host else clip

    def _on_device(self, total: SquareSum) -> Any:
        """What decides in one launch, where there is such a kernel for the device; else None."""
        device, options = total.values.device, self.options
        plain = not isinstance(total.unit, Tensor) and total.unit == 1.0
        if self.on_host or self._backends is None or options.on_nonfinite == "raise" or not plain:
            return None
        if self._asked != device:
            self._skipped = self.skipped if self._kernel is not None else self._skipped
            self._asked = device
            self._kernel = self._backends.guard(device, options.max_grad_norm, options.on_nonfinite == "skip")
        return self._kernel


def decided_by_host(views: Sequence[ParamView]) -> bool:
    """Whether the host reads what it decides by: some are on the CPU, where there is nothing to wait for."""
    return any(view.device.type == "cpu" for view in views)


def _not_finite(active: Sequence[ParamView]) -> str:
    params = {view.name: view.param for view in active}
    names = [name for name, p in params.items() if not torch.isfinite(local(p.grad)).all()]  # type: ignore[arg-type]
    return (
        f"gradients are not finite: {', '.join(names[:5]) or 'on another rank'}"
        f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}; nothing was changed. "
        f"on_nonfinite='skip' leaves such steps out, 'ignore' takes them as torch does"
    )
