"""One of several processes that torchrun starts: does the runs that are listed in a folder, and notes how they ended.

    torchrun --nproc-per-node N worker.py FOLDER

One process group serves all runs, because starting processes costs more than most of them.
"""

import errno
import json
import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from sharpwise.train import final, sharded
from sharpwise.train.run import run
from train.distributed.rig import LENGTH, rank

final.LENGTH = LENGTH


def do(folder: Path, own: dict[str, Any]) -> dict[str, Any]:
    given = own["given"] | (own.get("rank1", {}) if rank() == 1 else {})
    os.environ["TROUBLE"] = own.get("trouble", "")
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return steps == own.get("stop") and rank() == dist.get_world_size() - 1  # one says so, all end

    try:
        outcome = run(given, folder / own.get("folder", own["name"]), should_stop=stop)
        return {"state": outcome.state, "step": outcome.step, "loss": outcome.validation_loss}
    except Exception as error:
        return {"error": str(error), "kind": type(error).__name__}


def spoil(how: str) -> None:
    """Make rank 1 fail while it writes its third part of a checkpoint, from here on."""
    if rank() != 1:
        return
    count = 0
    before = FileSystemWriter.write_data if how == "full" else sharded._hashed

    def instead(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return before(*arguments)

    if how == "full":
        FileSystemWriter.write_data = instead  # type: ignore[method-assign]
    else:
        sharded._hashed = instead  # type: ignore[assignment]


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")  # gloo's and FSDP's, about a machine without GPUs
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    said = {}
    for own in json.loads((folder / "jobs.json").read_text()):
        if "spoil" in own:
            spoil(own["spoil"])
        said[own["name"]] = do(folder, own)
    (folder / f"said-{rank()}-of-{dist.get_world_size()}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
