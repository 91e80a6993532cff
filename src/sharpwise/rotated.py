"""A rule in a randomly rotated basis (Xie et al., arXiv 2410.08198, section 4).

    w~ = R^T w,   g~ = R^T g;   the rule moves w~ by g~;   w <- w + R (w~_new - w~)

R is a product of Kronecker form: of every matrix W~ = U^T W V (vectors: U^T w), or, over the whole model, of the vector
of all parameters. A dimension of more than 1024 is permuted and turned as an array of two or three shorter ones; what
is left over of it joins in a second round.

Departs: from the released code, which trains R w~ from w~ = w_0: its network begins as another one, near dead. Here the
function at step 0 is that of the model. SGD is then the same as without, but for rounding; Adam is not.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Unpack, final

import torch
from torch import Tensor

from sharpwise import rules
from sharpwise.combinations import CommonOptions, engine_arguments, with_common_options
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.step import Stepper
from sharpwise.hints import nearest
from sharpwise.rules import Rule
from sharpwise.shards import is_dtensor

LONGEST = 1024
"""Of a dimension that is turned by one dense matrix."""
BY = ("matrix", "model")
RULES: dict[str, type[Rule]] = {"adasgd": rules.BlockwiseAdam, "adamw": rules.AdamW, "sgd": rules.SGD}


class Round(NamedTuple):
    """A permutation of a dimension, then rotations of the array that its first elements make up."""

    order: Tensor
    back: Tensor
    turns: list[Tensor]

    def __call__(self, x: Tensor, transposed: bool) -> Tensor:
        """Turn the first dimension of [n, columns], or (transposed) turn it back."""
        x = x if transposed else x[self.order]
        sizes = [len(turn) for turn in self.turns]
        n = math.prod(sizes)
        array = x[:n].view(*sizes, -1)
        for mode, turn in enumerate(self.turns):
            array = torch.tensordot(turn.mT if transposed else turn, array, ([1], [mode])).movedim(0, mode)
        x = torch.cat((array.reshape(n, -1), x[n:]))
        return x[self.back] if transposed else x


def turning(n: int, seed: str, like: Tensor) -> list[Round]:
    """A random rotation of a dimension of n, the same on every machine, for tensors of the kind of `like`."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(seed.encode()))
    if n <= LONGEST:
        sizes, rounds = [n], 1
    elif n <= LONGEST**2:
        sizes, rounds = [math.isqrt(n), n // math.isqrt(n)], 2
    else:
        first = round(n ** (1 / 3))
        second = math.isqrt(n // first)
        sizes, rounds = [first, second, n // (first * second)], 2
    found = []
    for _ in range(rounds):
        order = torch.randperm(n, generator=generator, device="cpu") if rounds > 1 else torch.arange(n, device="cpu")
        turns = [_orthogonal(size, generator).to(like) for size in sizes]
        found.append(Round(order.to(like.device), order.argsort().to(like.device), turns))
    return found


def _orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Uniformly distributed, fp64."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu"))
    return q * r.diagonal().sign()


def turned(x: Tensor, rounds: Sequence[Round], back: bool = False) -> Tensor:
    """Turn the first dimension of [n, columns], or turn it back."""
    for one in reversed(rounds) if back else rounds:
        x = one(x, back)
    return x


@final
@with_common_options
class Rotated(BlockOptimizer):
    """Adam, AdaSGD or SGD in a randomly rotated basis.

    Equations: `sharpwise.rotated`. State: that of the rule; weights and gradients are held twice during a step.

    Args:
        params: a model, (name, tensor) pairs, or parameter groups or tensors, then with `model=`; fp32 or fp64.
        rule: "adamw", "adasgd" or "sgd".
        lr: as the rule has it.
        weight_decay: decoupled.
        betas, eps: of "adamw" and "adasgd". momentum: of "sgd".
        by: "matrix", every parameter on its own; or "model", all elements of all parameters, in one group, which then
            all need gradients.
        rotation_seed: of the rotation.
        **options: of all optimizers.

    Raises:
        ValueError: for parameters that are sharded, a block_lr, a control, or arguments out of range.

    Example:
        >>> import torch, sharpwise
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = sharpwise.Rotated(model, "adamw", lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        rule: str = "adamw",
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.0,
        by: Literal["matrix", "model"] = "matrix",
        rotation_seed: int = 0,
        **options: Unpack[CommonOptions],
    ) -> None:
        if rule not in RULES:
            raise ValueError(
                f"Rotated: no rule is called {rule!r}{nearest(str(rule), RULES)}; there are {', '.join(RULES)}"
            )
        if by not in BY:
            raise ValueError(f"Rotated: by must be one of {', '.join(BY)}, got {by!r}")
        if type(rotation_seed) is not int:
            raise TypeError(f"Rotated: rotation_seed must be a whole number, got {rotation_seed!r}")
        if options.get("block_lr") is not None:
            raise ValueError("Rotated: a rotation mixes what a block_lr tells apart; leave block_lr out")
        if options.get("aux_lr") is not None:
            raise ValueError("Rotated: a rotation mixes what has two learning rates; leave aux_lr out")
        if options.get("control") is not None:
            raise ValueError("Rotated: a rotation mixes the rows that a control bounds; leave control out")
        if by == "model" and options.get("no_decay"):
            raise ValueError("Rotated: by='model' mixes what decays with what does not; leave no_decay out")
        own: Rule = rules.SGD(momentum) if rule == "sgd" else rules.AdamW(betas, eps)
        own = rules.BlockwiseAdam(betas, eps, "model") if rule == "adasgd" else own
        self._rotation = f"{by}, seed {rotation_seed}"
        common = engine_arguments("Rotated", rule, options, lr)
        super().__init__(params, own, lr=lr, weight_decay=weight_decay, **common)
        self.defaults["rotation"] = self._rotation

    def _reset(self) -> None:
        super()._reset()
        self._rounds: dict[Any, list[Round]] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of all optimizers.

        Raises:
            ValueError: for a parameter that is sharded, or neither fp32 nor fp64; for a second group by="model".
        """
        if isinstance(param_group, dict):
            self.defaults.setdefault("rotation", getattr(self, "_rotation", ""))
        super().add_param_group(param_group)
        self._check()

    def _check(self) -> None:
        if self._by == "model" and len(self.param_groups) > 1:
            raise ValueError("Rotated: by='model' turns all parameters together, whose settings are those of one group")
        for name, param, _ in self._parameters():
            if is_dtensor(param):
                raise ValueError(
                    f"Rotated: {name} is sharded over a mesh, and a rotation takes all of its elements, which no "
                    f"process has; train in one process, or with replicas (DDP)"
                )
            if param.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"Rotated: {name} is in {str(param.dtype)[6:]}, which rounds what is turned there and back at "
                    f"every step; train parameters in fp32, under autocast if need be"
                )

    @property
    def _by(self) -> str:
        return str(self.defaults["rotation"]).partition(",")[0]

    def _move(self, stepper: Stepper, grads: list[Tensor | None]) -> None:
        """A step of the stepper in the rotated basis."""
        found = [(name, p, g) for (name, p), g in zip(stepper.named, grads, strict=True) if g is not None]
        if self._by == "model" and len(found) < len(grads):
            lacking = next(n for (n, _), g in zip(stepper.named, grads, strict=True) if g is None)
            raise ValueError(
                f"Rotated: by='model' turns all parameters together, and {lacking} has no gradient; freeze it before "
                f"the optimizer is built, or take by='matrix'"
            )
        names, params = [name for name, _, _ in found], [p for _, p, _ in found]
        before = [p.detach().clone() for p in params]
        try:
            begin = self._turned(names, before)
            own = iter(self._turned(names, [g.to(p.dtype) for _, p, g in found]))
            torch._foreach_copy_(params, begin)
            super()._move(stepper, [None if g is None else next(own) for g in grads])
            change = self._turned(names, [p - w for p, w in zip(params, begin, strict=True)], back=True)
            end = [w + d for w, d in zip(before, change, strict=True)]
        except BaseException:
            torch._foreach_copy_(params, before)
            raise
        torch._foreach_copy_(params, end)

    def _turned(self, names: Sequence[str], tensors: Sequence[Tensor], back: bool = False) -> list[Tensor]:
        if self._by == "model":
            sizes = [t.numel() for t in tensors]
            whole = torch.cat([t.reshape(-1) for t in tensors])[:, None]
            parts = turned(whole, self._rounds_of("", len(whole), whole), back).view(-1).split(sizes)
            return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]
        return [self._matrix(name, t, back) for name, t in zip(names, tensors, strict=True)]

    def _matrix(self, name: str, x: Tensor, back: bool) -> Tensor:
        """W~ = U^T W V, or back."""
        if not x.numel():
            return x
        matrix = x.reshape(len(x), -1) if x.dim() else x.view(1, 1)
        rows, columns = matrix.shape
        matrix = turned(matrix, self._rounds_of(f"{name} rows", rows, x), back)
        if columns > 1:
            matrix = turned(matrix.mT, self._rounds_of(f"{name} columns", columns, x), back).mT
        return matrix.reshape(x.shape)

    def _rounds_of(self, what: str, n: int, like: Tensor) -> list[Round]:
        key = what, n, like.dtype, like.device
        if key not in self._rounds:
            self._rounds[key] = turning(n, f"{self.defaults['rotation']}: {what}", like)
        return self._rounds[key]
