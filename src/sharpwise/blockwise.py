"""Constructors of Adam with one second moment per block of any partition."""

from typing import Any, Unpack, final

from torch import Tensor

from sharpwise import rules
from sharpwise.blocks import Cut
from sharpwise.blocks.segment import SPANNING
from sharpwise.combinations import CommonOptions, engine_arguments, with_common_options
from sharpwise.engine import BlockOptimizer


@final
@with_common_options
class BlockwiseAdam(BlockOptimizer):
    """Adam with one second moment per block: `sharpwise.rules.blockwise_adam`. State: one number per element, and one
    per block.

    Args:
        params: a model, (name, tensor) pairs, or parameter groups or tensors, then with `model=`.
        lr: step size, in units of the parameter per step.
        betas: decay rates of the first and the second moment, in [0, 1).
        eps: added to the root of the second moment after its bias correction, in units of the gradient.
        weight_decay: decoupled; an element shrinks by lr * weight_decay per step.
        cut: "element" (AdamW), "row", "head" (nearly Adam-mini), "tensor", "layer", "role" or "model" (AdaSGD).
        **options: of all optimizers.

    Raises:
        TypeError: where heads are needed and not known; ValueError: for roles or layers not known, or arguments out of
            range.

    Example:
        >>> import torch, sharpwise
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = sharpwise.BlockwiseAdam(model, lr=1e-3, cut="row")
        >>> optimizer.init_state()
        >>> optimizer.state[model.weight]["exp_avg_sq"].shape
        torch.Size([4])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.01,
        *,
        cut: Cut = "tensor",
        **options: Unpack[CommonOptions],
    ) -> None:
        rule = rules.BlockwiseAdam(betas, eps, cut)
        common = engine_arguments("BlockwiseAdam", "blockwise-adam", options, lr)
        block_lr = common["options"].block_lr
        if cut in SPANNING and block_lr is not None and "second_moment" in {s.measures for s in block_lr.sources}:
            raise ValueError(
                f"BlockwiseAdam: block_lr={block_lr} goes by the second moment of every part of the model, and cut by "
                f"{cut} many share one; take source='probe', or another cut"
            )
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, **common)


@final
@with_common_options
class AdaSGD(BlockOptimizer):
    """SGD with momentum, over the root mean square of all gradients: `BlockwiseAdam` with the model as one block.

    State: one number per element, and one per part of a parameter with one role, the same everywhere.

    Args:
        params: a model, (name, tensor) pairs, or parameter groups or tensors, then with `model=`.
        lr: step size, in units of the parameter per step (the update has at most about that root mean square).
        betas: decay rates of the momentum and of the mean square, in [0, 1).
        eps: added to the root of the mean square after its bias correction, in units of the gradient.
        weight_decay: decoupled; an element shrinks by lr * weight_decay per step.
        **options: of all optimizers.

    Raises:
        TypeError, ValueError: as `AdamW`.
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
        rule = rules.BlockwiseAdam(betas, eps, "model")
        common = engine_arguments("AdaSGD", "adasgd", options, lr)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, **common)
