"""A step in a CUDA graph: what can be captured, and what is then fixed.

A replay runs the kernels that were captured, and nothing on the host. So gradients stay where they lay; the number of
the step, and hyperparameters that are tensors on the device, are read there; all other hyperparameters are frozen.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sharpwise.engine.options import Options
from sharpwise.engine.rehearsal import on_a_device
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView


def capturing() -> bool:
    """Whether what is launched now becomes a part of a CUDA graph."""
    return torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


def check(options: Options, moved_by: Sequence[tuple[str, Sequence[ParamView]]], scalars: StepScalars) -> None:
    """Raise RuntimeError for a step that cannot be captured, before anything is launched or written.

    Args:
        moved_by: names of back ends, and which views they move.
    """
    for name, views in moved_by:
        if name != "triton":
            raise cannot(f"{views[0].name} is moved by the back end {name!r}, see explain()")
        if cut := [view.name for view in views if view.shard.cut]:
            raise cannot(f"{cut[0]} is cut by a mesh")
        if any(not scalars.on_device(view) for view in views):
            raise cannot(
                "its scalars are worked out on the host; give lr as a tensor on the device, "
                "torch.tensor(lr, device='cuda'), or on_nonfinite='skip', and take a step before the capture"
            )
    if options.on_nonfinite == "raise":
        raise cannot("on_nonfinite='raise' reads the gradients' norm on the host; 'skip' does not")
    if options.block_lr is not None and (options.varies or options.block_lr.follows_lr):
        raise cannot(f"block_lr {options.block_lr.name!r} changes multipliers on the host")


def cannot(reason: str) -> RuntimeError:
    """The error about a step that cannot be captured."""
    return RuntimeError(f"this step cannot be captured in a CUDA graph: {reason}")


def fixed(view: ParamView) -> str:
    """What of a view's step a graph has fixed, in words."""
    names = [name for name in ("lr", "weight_decay", *view.rule.defaults) if name in view.group]
    frozen: list[Any] = [name for name in names if not on_a_device(view.group[name])]
    return f"captured: gradients stay where they are, {', '.join(frozen) or 'nothing else'} as in the capture"
