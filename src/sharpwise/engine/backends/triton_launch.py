"""Kernels are built and launched, and tables uploaded here, and nowhere else.

A device that computes nothing replaces `build` and `launch`.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

WARPS = 4


@cache
def absent() -> str:
    """Why Triton cannot be used, or ""."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a build for another Python, another libc
        return f"triton cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""


def interpreted() -> bool:
    """Whether kernels are interpreted, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refused(device: torch.device) -> str:
    """Why no kernel of ours runs on a device, or ""."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"not for {device.type}"
    return absent()


def launch(kernel: Any, grid: int, args: Sequence[Tensor], constants: Mapping[str, Any], device: torch.device) -> None:
    """Run `grid` programs."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(grid,)](*args, **constants, num_warps=WARPS, enable_fp_fusion=False)


def build(kernel: Any, args: Sequence[torch.dtype], constants: Mapping[str, Any], device: torch.device) -> None:
    """Compile a kernel for arguments of these types; an interpreter needs none of it."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel.warmup(*args, grid=(1,), **constants, num_warps=WARPS, enable_fp_fusion=False)


def check_not_captured() -> None:
    """Raise RuntimeError where a step would be captured in a CUDA graph."""
    if torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a step cannot be captured in a CUDA graph: its scalars come from the host each time")


def upload(values: "np.ndarray[Any, Any]", device: torch.device, into: Tensor | None = None) -> Tensor:
    """Numbers on a device: a copy that the host does not wait for.

    Pinned memory comes from torch's own cache, which gives it out again only when the copy is done.
    """
    host = torch.from_numpy(values)
    if device.type == "cuda":
        host = host.pin_memory()
    if into is None:
        return host.to(device, non_blocking=True)
    return into.copy_(host, non_blocking=True)
