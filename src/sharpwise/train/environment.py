"""Where a run takes place: versions, machine, memory."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sharpwise.train.code import names_class
from sharpwise.train.config import Config

PACKAGES = ("numpy", "transformers", "tokenizers")


def environment(config: Config) -> dict[str, Any]:
    """Versions, commit, processor and threads of this process, as plain values."""
    device = config.compute.device or "cpu"
    library = config.optimizer.name.partition(":")[0].partition(".")[0] if names_class(config.optimizer.name) else ""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sharpwise": version("sharpwise"),
        "commit": commit(),
        "torch": version("torch"),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        **({library: version(library)} if library else {}),
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


def commit() -> str | None:
    """The commit of sharpwise's sources, with `-dirty` where files differ from it; None outside a clone of its own."""
    here = Path(__file__).parent
    try:
        # Installed packages may lie within somebody else's repository, which does not know their files.
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        return _git(here, "describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_multiplies_bf16() -> bool | None:
    """Whether the CPU has products in bf16, None where torch cannot tell; without them oneDNN emulates them."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return None
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def slow_bf16(precision: str | None, device: str | None) -> str:
    """The line to say before a training whose products in bf16 this CPU emulates; "" where nothing is known to be slow.

    Args:
        precision: of the configuration, None where it is left to the machine.
        device: where it trains, None where that is left to the machine.
    """
    on_cpu = not torch.cuda.is_available() if device is None else device.startswith("cpu")
    x86 = platform.machine().lower() in ("x86_64", "amd64")  # of others nobody measured it
    if precision not in ("bf16", "bf16-autocast") or not on_cpu or not x86 or cpu_multiplies_bf16() is not False:
        return ""
    return (
        f"Slow: compute.precision is {precision}, and this CPU has no bf16 instructions (avx512_bf16, amx_bf16): its "
        "products take about 50 times as long as in fp32. To avoid that: --set compute.precision=fp32"
    )


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
