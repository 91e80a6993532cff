"""Where a run takes place: versions, machine, memory."""

import datetime
import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from sharpwise.train.config import Config

PACKAGES = ("numpy", "transformers", "tokenizers")


def environment(config: Config) -> dict[str, Any]:
    """Versions, processor and threads of this process, as plain values."""
    device = config.compute.device or "cpu"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **{name: version(name) for name in ("sharpwise", "torch")},
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": available_cpus(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "matrix_products": config.compute.precision,
    }


def version(name: str) -> str | None:
    """Installed version of a package, None where it is not installed."""
    if name == "torch":
        return str(torch.__version__)
    if name == "sharpwise":
        from sharpwise._version import __version__

        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held so far: on the device, or resident in memory for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
