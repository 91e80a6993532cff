"""Cases in a process of a group, and what they found. One start serves many cases: it costs more than any of them."""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Case = Callable[[], dict[str, Any]]
Found = dict[str, dict[str, Any]]


def serve(cases: Mapping[str, Case], output: str) -> None:
    """Run all cases, and write what rank 0 found. A case must fail on all ranks alike."""
    warnings.simplefilter("ignore")  # gloo's and FSDP's, about a machine without GPUs
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: Found = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except Exception:  # the other cases are to be judged all the same
            found[name] = {"error": traceback.format_exc()}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()
    # Threads of gloo may outlive the group, and then abort a process that ends as usual, now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def of(found: Found, case: str) -> dict[str, Any]:
    """What one case found; fails with its traceback where it failed."""
    result = found[case]
    assert "error" not in result, result["error"]
    return result
