"""The named constructors and `create_optimizer`.

All constructors take the same first argument, and the same options after their own: `combinations.CommonOptions`. Every
option is in every signature and docstring, where editors, `help()` and `inspect.signature` find it.
"""

import fnmatch
from collections.abc import Mapping
from typing import Any, Literal, Unpack, final

from torch import Tensor

from sharpwise import rules
from sharpwise.arms import parse_arm, split_arm
from sharpwise.block_lr import GradientSNR
from sharpwise.block_lr.spelling import ABLATIONS, BLOCK_LRS
from sharpwise.blocks import Cut
from sharpwise.blockwise import AdaSGD, BlockwiseAdam
from sharpwise.combinations import COMBINES, PRESETS, STORAGES, CommonOptions, engine_arguments, with_common_options
from sharpwise.controls.rms_clip import check_clip
from sharpwise.engine import BlockOptimizer
from sharpwise.hints import kind_of
from sharpwise.rotated import Rotated
from sharpwise.rules import adapm, muon
from sharpwise.rules.adapm import Momentum, SecondMoment
from sharpwise.rules.muon import Method, Scale
from sharpwise.storage import Format

__all__ = [
    "ABLATIONS", "BLOCK_LRS", "COMBINES", "CONSTRUCTORS", "OPTIMIZERS", "PRESETS", "SGD", "STORAGES", "AdaPM", "AdaSGD",
    "AdamMini", "AdamW", "BlockwiseAdam", "Lion", "Muon", "SGDSaI", "create_optimizer", "list_optimizers", "parse_arm",
    "split_arm",
]  # fmt: skip


@final
@with_common_options
class AdamW(BlockOptimizer):
    """AdamW: `sharpwise.rules.adamw`. State: two numbers per element.

    In bf16 the second moment stops moving where 1 - b2 is below its last bit (b2 > 0.99), unless it is rounded
    stochastically.

    Args:
        params: a model, (name, tensor) pairs, or parameter groups or tensors, then with `model=`.
        lr: step size, in units of the parameter per step (the update of an element is at most about lr).
        betas: decay rates of the first and the second moment, in [0, 1).
        eps: added to the root of the second moment after its bias correction, in units of the gradient.
        weight_decay: decoupled; an element shrinks by lr * weight_decay per step.
        **options: of all optimizers.

    Raises:
        TypeError, ValueError: for arguments out of range or parameters that cannot be placed.

    Example:
        >>> import torch, sharpwise
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = sharpwise.AdamW(model, lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.01,
        **options: Unpack[CommonOptions],
    ) -> None:
        rule = rules.AdamW(betas, eps)
        common = engine_arguments("AdamW", "adamw", options, lr)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, **common)


@final
@with_common_options
class AdamMini(BlockOptimizer):
    """Adam-mini: `sharpwise.rules.adam_mini`. State: one number per element, and one per block.

    Use AdamW's hyperparameters as a start; its stable range of lr and warm-up is narrower.
    Biases move as in AdamW, and what is said there of bf16 is true of theirs.

    Args:
        params: a model, (name, tensor) pairs, or parameter groups or tensors, then with `model=`.
        lr: step size, in units of the parameter per step (the update of an element is at most about lr).
        betas: decay rates of the first and the second moment, in [0, 1).
        eps: added to the root of the second moment after its bias correction, in units of the gradient.
        weight_decay: decoupled; an element shrinks by lr * weight_decay per step.
        v_by: cut of the value projection, "row" or "tensor".
        cut: None (by role), or one cut for all: "tensor" (models that are no transformers) or "element" (AdamW).
        **options: of all optimizers.

    Raises:
        TypeError: where heads are needed and not known; ValueError: for roles not known, or arguments out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.01,
        *,
        v_by: Cut = "row",
        cut: Cut | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        rule = rules.AdamMini(betas, eps, v_by, cut)
        common = engine_arguments("AdamMini", "adam-mini", options, lr)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, **common)


@final
@with_common_options
class AdaPM(BlockOptimizer):
    """AdaPM: `sharpwise.rules.adapm`. State: the momentum of a fifth of the matrices or less, and a second moment.

    The gradient itself stands for the momentum of embeddings, head and attention output, thin factors for that of
    queries, keys and MLP; values, norms and biases keep theirs. With `second_moment="block"` about a twentieth of
    AdamW's state. A matrix whose factors would not be smaller than itself keeps its momentum; `explain()` shows what
    each does.

    Args:
        params: a model, (name, tensor) pairs, or parameter groups or tensors, then with `model=`.
        lr: step size, in units of the parameter per step (the update of a matrix has a root mean square of at most lr).
        betas: decay rates of the first and the second moment, in [0, 1).
        eps: added to the root of the second moment after its bias correction, in units of the gradient.
        weight_decay: decoupled; an element shrinks by lr * weight_decay per step.
        rank: of the factors, a whole number of 1 or more.
        momentum: by role "none", "full" or "low_rank", where it is not as above; or one of these words for all.
        debias: weight of what factors leave out: None for 1 / (1 - betas[0]), unbiased; 1 is momentum, 0 factors alone.
        second_moment: "element", Adam's, or "block", Adam-mini's.
        clip: the largest root mean square of the update of a matrix before lr; None for no bound, nor with a `control`.
        **options: of all optimizers.

    Raises:
        TypeError, ValueError: as `AdamW`; also for roles not known, and for blocks by head without their number.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.01,
        *,
        rank: int = 16,
        momentum: Mapping[str, Momentum] | Momentum | None = None,
        debias: float | None = None,
        second_moment: SecondMoment = "element",
        clip: float | None = 1.0,
        **options: Unpack[CommonOptions],
    ) -> None:
        by_role = adapm.momentum_of("AdaPM", momentum)
        rule = rules.AdaPM(betas, eps, rank, by_role, debias, second_moment)
        common = engine_arguments("AdaPM", "adapm", options, lr, control=check_clip("AdaPM", clip))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, **common)
        adapm.list_kept_in_full("AdaPM", rule, self.blocks.segments)


@final
@with_common_options
class Lion(BlockOptimizer):
    """Lion: `sharpwise.rules.lion`. State: one number per element. Every element moves by exactly lr.

    Against AdamW, lr is best 3 to 10 times smaller, and the decay larger.

    Args:
        params: a model, (name, tensor) pairs, or parameter groups or tensors, then with `model=`.
        lr: step size, in units of the parameter per step.
        betas: weights of the momentum in the direction, and of the past in the momentum, in [0, 1).
        weight_decay: decoupled; an element shrinks by lr * weight_decay per step.
        nesterov: the direction is of the momentum after the step.
        **options: of all optimizers.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float | Tensor = 0.0,
        *,
        nesterov: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        rule = rules.Lion(betas, nesterov)
        common = engine_arguments("Lion", "lion", options, lr)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, **common)


@final
@with_common_options
class Muon(BlockOptimizer):
    """Muon: `sharpwise.rules.muon`. State: one number per element of a hidden matrix, two of everything else.

    The projections of attention and MLP, each part of a fused one and each expert alone, move by orthogonalized
    momentum; embeddings, head, router, norms, biases and what no source explains by AdamW. `explain()` shows which.
    `aux_lr` is that of the AdamW half, `scale="original"` needs one. Updates of matrices have a root mean square of
    about 0.2 lr, as AdamW's have, unless `scale="original"`. Sharded matrices come together at one owner,
    and so do plain ones of a DistributedDataParallel model: each is worked on once in the world.

    Args:
        params: a model, (name, tensor) pairs, or parameter groups or tensors, then with `model=`.
        lr: step size of the matrices: AdamW's values serve; with `scale="original"` about 0.02, of the spectral norm.
        momentum: mu, what is kept of the momentum per step, in [0, 1).
        weight_decay: decoupled; an element shrinks by lr * weight_decay per step.
        nesterov: look ahead by one step of momentum.
        aux_betas: decay rates of its first and second moment, in [0, 1).
        aux_eps: added to the root of its second moment after the bias correction, in units of the gradient.
        aux_weight_decay: of the AdamW half; None for weight_decay.
        scale: "match_rms_adamw", 0.2 sqrt(max(rows, columns)), or "original", sqrt(max(1, rows / columns)).
        heavy_ball: momentum sums gradients, in place of averaging them.
        method: of orthogonalizing, "newton_schulz" or "polar_express".
        ns_steps: of Newton-Schulz; Polar Express always takes 5.
        normalize_rows: NorMuon, rows of the update at one root mean square, by a running mean of their squares.
        beta2: of that mean, in [0, 1).
        per_head: every head of q, k and v is a matrix of its own.
        precision: of the products, "fp32" or "bf16"; None for bf16 on CUDA, fp32 elsewhere.
        bf16_exchange: matrices travel between processes in bf16.
        process_group: processes that hold the same plain parameters and share the work; None for those of a DDP model.
        aux_storage: of the state of the AdamW half; None for `storage`, or fp32 where that is in 8 bits.
        **options: of all optimizers.

    Raises:
        TypeError, ValueError: as `AdamW`; also for roles not known, and for `per_head` without a number of heads.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float | Tensor = 0.1,
        nesterov: bool = True,
        *,
        aux_betas: tuple[float, float] = (0.9, 0.95),
        aux_eps: float = 1e-8,
        aux_weight_decay: float | None = None,
        scale: Scale = "match_rms_adamw",
        heavy_ball: bool = False,
        method: Method = "newton_schulz",
        ns_steps: int = 5,
        normalize_rows: bool = False,
        beta2: float = 0.95,
        per_head: bool = False,
        precision: Literal["fp32", "bf16"] | None = None,
        bf16_exchange: bool = False,
        process_group: Any = None,
        aux_storage: str | Format | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        ratio = muon.aux_lr_ratio("Muon", lr, options.pop("aux_lr", None), scale)
        rule = rules.Muon(
            momentum, nesterov, ratio, aux_betas, aux_eps, aux_weight_decay, beta2, heavy_ball, scale, method, ns_steps,
            normalize_rows, per_head, precision, bf16_exchange,
        )  # fmt: skip
        common = engine_arguments("Muon", "muon", options, lr, aux_storage=aux_storage)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, process_group=process_group, **common)
        muon.list_left_out("Muon", self.blocks.segments)


@final
@with_common_options
class SGD(BlockOptimizer):
    """SGD with momentum: `sharpwise.rules.sgd`, equal to torch's. State: one number per element, none without momentum.


    Args:
        params: a model, (name, tensor) pairs, or parameter groups or tensors, then with `model=`.
        lr: in units of the parameter per unit of gradient.
        momentum: what is kept of the running sum of gradients, per step.
        dampening: of the gradient in that sum; None is 1 - momentum.
        weight_decay: added to the gradient, as in torch, unless `decoupled_weight_decay`.
        nesterov: look ahead by one step of momentum; needs momentum, and no dampening.
        decoupled_weight_decay: decay as AdamW does: an element shrinks by lr * weight_decay per step.
        **options: of all optimizers.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float | None = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        rule = rules.SGD(momentum, dampening, nesterov)
        common = engine_arguments("SGD", "sgd", options, lr, decoupled=decoupled_weight_decay)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, **common)


@final
@with_common_options
class SGDSaI(BlockOptimizer):
    """SGD-SaI: SGD with momentum, each block at the rate that its first gradient says: `block_lr.gradient_snr`.

    State: one number per element, half of AdamW's. A `block_lr` comes on top, as a factor.

    Args:
        params: a model, (name, tensor) pairs, or parameter groups or tensors, then with `model=`.
        lr: in units of the parameter per unit of gradient, over about sqrt(elements of the block).
        momentum: m <- momentum m + (1 - momentum) g, from m = g.
        weight_decay: decoupled; an element shrinks by lr * weight_decay per step, whatever its block.
        normalize: "none" (as released), or "max": the largest multiplier is 1 (the paper's Algorithm 1).
        **options: of all optimizers.

    Raises:
        TypeError, ValueError: as `AdamW`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float | Tensor = 1e-2,
        *,
        normalize: Literal["none", "max"] = "none",
        **options: Unpack[CommonOptions],
    ) -> None:
        rule = rules.SGD(momentum, None, False)
        common = engine_arguments("SGDSaI", "sgd-sai", options, lr, own_lr=GradientSNR(normalize=normalize))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, **common)


OPTIMIZERS: dict[str, type[BlockOptimizer]] = {
    "adam-mini": AdamMini,
    "adamw": AdamW,
    "adapm": AdaPM,
    "adasgd": AdaSGD,
    "blockwise-adam": BlockwiseAdam,
    "lion": Lion,
    "muon": Muon,
    "sgd": SGD,
    "sgd-sai": SGDSaI,
}
"""Every optimizer of the tables by its one spelling."""
CONSTRUCTORS: dict[str, type[BlockOptimizer]] = {**OPTIMIZERS, "rotated": Rotated}
"""The same, and those of `combinations.APART`."""


def list_optimizers(pattern: str = "*") -> list[str]:
    """Names that `create_optimizer` takes, by glob.

    Args:
        pattern: with `*` and `?`, as file names have them.

    >>> list_optimizers("adam*")
    ['adam-mini', 'adamh', 'adamw', 'adamw-8bit']
    """
    return sorted(fnmatch.filter([*CONSTRUCTORS, *PRESETS], pattern))


def create_optimizer(params: Any, name: str, **kwargs: Any) -> BlockOptimizer:
    """An optimizer by name, with its constructor's arguments.

    Args:
        params: as in `AdamW`.
        name: one of `list_optimizers()`, or a whole arm as `parse_arm` reads it.
        **kwargs: as the constructor takes them.

    Raises:
        ValueError: for an unknown name, or an arm whose block_lr is not the one in `kwargs`.
        TypeError: for a model or a constructor in place of the name.
    """
    given: Any = name
    if callable(given) or (isinstance(params, str) and not isinstance(given, str)):
        do = f": the model comes first, create_optimizer(model, {params!r})" if isinstance(params, str) else ""
        raise TypeError(f"create_optimizer: name must be text, such as 'adamw', got {kind_of(given)}{do}")
    settings = split_arm({**kwargs, "name": name})
    return CONSTRUCTORS[settings.pop("name")](params, **settings)
