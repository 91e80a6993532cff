"""Kernels are built and launched, and tables uploaded here, and nowhere else.

A device that computes nothing replaces `build` and `launch`.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpwise.engine.backends.base import check_own, first_line
from sharpwise.engine.capture import cannot, capturing

WARPS = 4


@cache
def absent() -> str:
    """Why Triton cannot be used, or ""."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a build for another Python, another libc
        return f"triton cannot be imported: {first_line(error)}"
    return ""


def interpreted() -> bool:
    """Whether kernels are interpreted, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refused(device: torch.device) -> str:
    """Why no kernel of ours runs on a device, or ""."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"not for {device.type}"
    return absent() or (_folder_refused() if device.type == "cuda" else "")


def _folder_refused() -> str:
    """Why kernels are not to be kept where Triton keeps them, and loads code from, or ""."""
    from triton import knobs

    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_own(folder.resolve(), 0o022, "kernels")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"kernels are kept in {folder}, which cannot be written")
    except OSError as error:
        return str(error)
    return ""


def launch(kernel: Any, grid: int, args: Sequence[Tensor], constants: Mapping[str, Any], device: torch.device) -> None:
    """Run `grid` programs."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(grid,)](*args, **{"num_warps": WARPS, **constants}, enable_fp_fusion=False)


def build(kernel: Any, args: Sequence[torch.dtype], constants: Mapping[str, Any], device: torch.device) -> None:
    """Compile a kernel for arguments of these types; an interpreter needs none of it."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel.warmup(*args, grid=(1,), **{"num_warps": WARPS, **constants}, enable_fp_fusion=False)


def upload(values: "np.ndarray[Any, Any]", device: torch.device, into: Tensor | None = None) -> Tensor:
    """Numbers on a device: a copy that the host does not wait for.

    Pinned memory comes from torch's own cache, which gives it out again only when the copy is done.
    """
    if capturing():
        raise cannot("tables of such a step are not there yet; take one with the same gradients before the capture")
    host = torch.from_numpy(values)
    if device.type == "cuda":
        host = host.pin_memory()
    if into is None:
        return host.to(device, non_blocking=True)
    return into.copy_(host, non_blocking=True)


class Staged:
    """A vector on a device, of numbers of 8 bytes, to which the host writes where they have changed.

    A graph copies them anew each time it runs: from memory that was set aside, and is not written again.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.empty(size, dtype=dtype, device=device)
        self._aside = torch.empty(size, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
        self._written: np.ndarray[Any, Any] | None = None

    def write(self, values: "np.ndarray[Any, Any]") -> Tensor:
        """Write all of them."""
        if self._written is None or not np.array_equal(values, self._written):
            if capturing():
                self._aside.numpy()[:] = values
                self.tensor.copy_(self._aside, non_blocking=True)
            else:
                upload(values.copy(), self.tensor.device, self.tensor)
            self._written = values
        return self.tensor
