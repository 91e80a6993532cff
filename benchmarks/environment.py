"""Where a result was measured: without it a figure cannot be checked."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from sharpwise.train.environment import commit

PEERS = ("numpy", "torch", "transformers", "adam-mini", "pytorch_optimizer", "bitsandbytes", "torchao", "sharpwise")


def environment() -> dict[str, Any]:
    """Python, torch and peers, processor, threads, allocator settings, commit and time, as plain values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "load_average_before": os.getloadavg()[0],
        "versions": {name: version(name) for name in PEERS},
    }


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(name: str) -> str | None:
    """Installed version of a package, None where it is not installed."""
    if name == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
