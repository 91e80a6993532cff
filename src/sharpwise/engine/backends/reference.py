"""The reference: the step of one view in torch operations, as the equations stand. It takes every view there is.

Every tensor is seen as a view whose *rows* run along one dimension. Vectors of one number per row come shaped to
broadcast against the view. Where speed counts, small tensors of a device are moved together, as one vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.backends.base import Backend, Found, Spec, row_step
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView, compute_dtype
from sharpwise.rules.base import Rule, add
from sharpwise.storage import Dense
from sharpwise.storage.dense import mix, step_key

CHUNK = 1 << 22
"""Elements per call: temporaries stay below 16 MiB, and tensors up to this size round exactly as torch's do."""
PIECE = 1 << 17
"""As CHUNK, on a CPU where speed counts: temporaries that stay in the cache. Larger ones also go back to the system
with every call, and getting them anew costs more than the step itself."""
SMALL = 1 << 14
"""Tensors up to this many elements are moved together where speed counts, on a device."""


class Noise(NamedTuple):
    """Global element numbers (their sum broadcasts to the view) and the key of this step, for stochastic rounding."""

    row: Tensor
    column: Tensor
    key: Tensor


def update(
    rule: Rule,
    s: Mapping[str, Any],
    p: Tensor,
    g: Tensor,
    stored: Sequence[Tensor],
    row_step: Tensor | None = None,
    row_decay: Tensor | None = None,
    noise: Noise | None = None,
) -> None:
    """Move p and its element state by one step, in place.

    Scalars besides the rule's own: `step` (lr * multiplier / bias correction), `decay` (1 - lr wd), and, where asked
    for, `clip` (factor on the gradient), `ok` (0: keep everything as it was), `weight_decay` (coupled).
    """
    names = [name for name, kind in rule.state.items() if kind == "element"]
    dtype = compute_dtype(p.dtype)
    x, g, *old = (Dense.of(t.dtype).decode({"": t}, dtype) for t in (p, g, *stored))
    if "clip" in s:
        g = g * s["clip"]
    if "weight_decay" in s:
        g = add(g, x, s["weight_decay"])
    new, numerator, denominator = rule.direction(g, dict(zip(names, old, strict=True)), s)
    if row_decay is not None:
        x = x * row_decay
    elif "decay" in s:
        x = x * s["decay"]
    step = s["step"] if row_step is None else row_step
    if denominator is None:
        x = add(x, numerator, -step)
    elif isinstance(step, float):
        x = torch.addcdiv(x, numerator, denominator, value=-step)
    else:
        x = x - (step * numerator) / denominator
    store(p, x, s, noise, 0)
    for slot, (name, tensor) in enumerate(zip(names, stored, strict=True), start=1):
        store(tensor, new[name], s, noise, slot)


def store(target: Tensor, value: Tensor, s: Mapping[str, Any], noise: Noise | None, slot: int) -> None:
    """Round and write one tensor, of which `slot` is the number, unless the step is not taken."""
    rounds = noise is not None and target.dtype == torch.bfloat16
    own = (noise.row + noise.column, mix(noise.key + slot)) if noise is not None and rounds else None
    rounded = Dense.of(target.dtype).encode(value, own)[""]
    target.copy_(torch.where(s["ok"] != 0, rounded, target) if "ok" in s else rounded)


def noise_of(view: ParamView, t: Any) -> Noise:
    """What stochastic rounding needs at step t."""
    return Noise(*_index(view), _keys([view], t))


def _flat_noise(views: Sequence[ParamView], t: Any) -> Noise:
    """The same of views one after the other, as a vector."""
    numbers = [(row + column).reshape(-1) for row, column in map(_index, views)]
    owner = [torch.full_like(index, i) for i, index in enumerate(numbers)]
    index = torch.cat(numbers)
    return Noise(index, index.new_zeros(1), _keys(views, t).view(-1)[torch.cat(owner)])


def _index(view: ParamView) -> tuple[Tensor, Tensor]:
    if "index" not in view.kept:
        view.kept["index"] = view.element_index(view.device)
    found: tuple[Tensor, Tensor] = view.kept["index"]
    return found


def _keys(views: Sequence[ParamView], t: Any) -> Tensor:
    names = torch.tensor([view.key for view in views], dtype=torch.int64, device="cpu")
    names = names.to(views[0].device, non_blocking=True)
    step = t.long() if isinstance(t, Tensor) else int(t)
    key: Tensor = (names + step_key(step, int(views[0].group["seed"]))) & 0xFFFFFFFF
    return key.view(-1, 1)


@dataclass
class _Flat:
    """Small views of one class that move together, as one vector."""

    views: list[ParamView]
    sizes: list[int]
    of_segment: Tensor
    of_view: Tensor

    @staticmethod
    def of(views: list[ParamView]) -> "_Flat":
        sizes = [view.numel for view in views]
        device = views[0].device
        numbers = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        of_view = torch.arange(len(views), device="cpu").repeat_interleave(numbers)
        pieces, start = [], 0
        for view, n in zip(views, sizes, strict=True):
            own = view.layout.segment_of_row
            spread = torch.zeros(n, dtype=torch.int64, device=device)
            if own is not None:
                spread = own.view(view.row_shape).expand(view.shape).reshape(n)
            pieces.append(spread + start)
            start += len(view.segments)
        return _Flat(views, sizes, torch.cat(pieces), of_view.to(device))

    def cat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the views as one vector, a copy."""
        return torch.cat([t.reshape(-1) for t in tensors])

    def scatter(self, vector: Tensor, targets: Sequence[Tensor]) -> None:
        """The other way round."""
        pieces = vector.split(self.sizes)
        torch._foreach_copy_(list(targets), [p.view(t.shape) for p, t in zip(pieces, targets, strict=True)])


class Reference(Backend):
    """Eager torch operations.

    Args:
        fast: small tensors together, large ones in pieces that fit the cache; else each as torch's own loop does.
    """

    name: ClassVar[str] = "reference"

    def __init__(self, fast: bool) -> None:
        self.fast = fast
        self._flats: dict[tuple[int, ...], _Flat] = {}

    def refuses(self, spec: Spec) -> str:
        return ""

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        together: dict[Any, list[int]] = {}
        for i, (view, g) in enumerate(zip(views, grads, strict=True)):
            if self.fast and _is_small(view):
                kind = scalars.class_key(view), view.param.dtype, g.dtype, view.n_blocks
                together.setdefault(kind, []).append(i)
            else:
                self._one(view, g, scalars, found)
        for own in together.values():
            if len(own) == 1:
                self._one(views[own[0]], grads[own[0]], scalars, found)
            else:
                self._together([views[i] for i in own], [grads[i] for i in own], scalars, found)

    def _one(self, view: ParamView, g: Tensor, scalars: StepScalars, found: Found) -> None:
        step = row_step(view, scalars, found)
        decay, s = scalars.row_decay(view), scalars.named(view)
        noise = noise_of(view, scalars.t(view)) if scalars.stochastic else None
        p, g, stored = view.parameter(), view.rows_of(g), view.stored()
        rule = found.rules.get(id(view), view.rule)
        size = PIECE if self.fast and p.device.type == "cpu" else CHUNK
        size = max(1, size * p.shape[0] // max(view.numel, 1)) if rule is view.rule else max(1, p.shape[0])
        for i in range(0, p.shape[0], size):
            j = slice(i, i + size)
            own = None if noise is None else Noise(_cut(noise.row, j), noise.column, noise.key)
            update(rule, s, p[j], g[j], [t[j] for t in stored], _cut(step, j), _cut(decay, j), own)
        view.write_back(p, stored)

    def _together(self, views: list[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        key = tuple(map(id, views))
        if key not in self._flats:
            self._flats = {**dict(list(self._flats.items())[-7:]), key: _Flat.of(views)}
        flat = self._flats[key]
        if id(views[0]) in found.rates:
            step: Any = torch.cat([found.rates[id(view)] for view in views])[flat.of_view]
        else:
            step = scalars.spread(views, "rate", flat.of_segment)
        decay = scalars.spread(views, "decay", flat.of_segment)
        s = {k: v for k, v in scalars.named(views[0]).items() if k not in ("step", "decay")}
        s["step"] = step
        if not isinstance(decay, Tensor) or not decay.dim():
            s["decay"], decay = decay, None
        by_row = isinstance(step, Tensor) and step.dim() == 1
        noise = _flat_noise(views, scalars.t(views[0])) if scalars.stochastic else None
        own = [view.rows_of(g) if view.part else g for view, g in zip(views, grads, strict=True)]
        p, g = flat.cat([view.parameter() for view in views]), flat.cat(own)
        held = list(zip(*(view.stored() for view in views), strict=True))
        stored = [flat.cat(tensors) for tensors in held]
        update(views[0].rule, s, p, g, stored, step if by_row else None, decay, noise)
        flat.scatter(p, [view.parameter() for view in views])
        for vector, tensors in zip(stored, held, strict=True):
            flat.scatter(vector, tensors)


def _is_small(view: ParamView) -> bool:
    # The size of the whole parameter decides, not of the shard: all processes must sum in the same order.
    small = view.param.numel() <= SMALL and view.n_blocks <= 1 and not view.rule.reductions
    return small and not view.copied and view.contiguous and view.device.type not in ("cpu", "meta")


def _cut(tensor: Tensor | None, rows: slice) -> Any:
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[rows]
