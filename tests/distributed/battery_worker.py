"""One of several gloo processes: each case sharded against one process, on recorded gradients. Rank 0 writes what it
found, test_battery.py judges it.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m distributed.battery_worker CASES.json OUTPUT.json
"""

import json
import os
import sys
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import sharpwise
from sharpwise.blocks import BlockMap, Segment
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.options import Options
from sharpwise.rules import AdamMini, AdamW, Lion, Muon
from sharpwise.shards import Shard
from sharpwise.testing import EXAMPLES

from .cases import Case
from .controls import BOUNDS
from .placements import EVERYWHERE, MODELS, ODD, gradient_as, held, part_of, worst
from .rules import RULES

STEPS = 8
LOOKED_AT, BAD = 5, 6
"""The steps whose collectives are counted: the latter if there is a guard; an element of one process is not finite
then."""


def optimizer_of(model: nn.Module, case: Case, blocks: BlockMap | None, shared: bool) -> BlockOptimizer:
    """shared: whether replicas share the work on whole matrices."""
    guard: dict[str, Any] = {"max_grad_norm": 1.0, "on_nonfinite": "skip"} if case.guard else {}
    eager = {"compile": False} if case.path == "eager" else {}
    storage, _, more = case.storage.partition(", ")
    if case.rule in RULES or more in BOUNDS:
        rule = (
            RULES.get(case.rule)
            or {"adamw": AdamW(), "adam-mini": AdamMini(), "lion": Lion(), "muon": Muon()}[case.rule]
        )
        options = Options(control=BOUNDS.get(more), **guard, **eager)
        return BlockOptimizer(model, rule, lr=1e-2, weight_decay=0.1, options=options, blocks=blocks)
    block_lr = EXAMPLES.get(case.block_lr, case.block_lr or None)
    if case.rule == "muon":
        guard |= {"normalize_rows": case.guard, "per_head": more == "heads"}
        guard |= {"process_group": dist.group.WORLD if shared else None}
    if case.rule == "adapm":  # the rank of tiny models
        guard |= {"rank": 2, "second_moment": "block" if more == "block" else "element"}
    return sharpwise.create_optimizer(
        model, case.rule, lr=1e-2, weight_decay=0.1, block_lr=block_lr, storage=storage,
        stochastic_rounding=more == "stochastic", cautious_decay=more == "cautious", blocks=blocks, **guard, **eager,
    )  # fmt: skip


def set_gradients(model: nn.Module, step: int, spoil: bool) -> None:
    """The recorded gradients, of a size that differs from step to step; now and then a parameter has none."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(model.parameters()):
        whole = torch.randn(p.shape, generator=generator) * (0.1 + step % 3)
        if spoil and i == 2:
            whole.view(-1)[-1] = float("inf")
        missing = not p.requires_grad or (step in (2, 3) and i == 4)
        p.grad = None if missing else gradient_as(whole, p)


def differences(placed: nn.Module, alone: nn.Module, states: tuple[Any, Any], blocks: BlockMap) -> dict[str, Any]:
    """max|dp| / max|p| of every parameter, and the same of its state, over all processes."""
    found = {}
    for (name, p), q in zip(placed.named_parameters(), alone.parameters(), strict=True):
        if not p.requires_grad:
            continue
        own, other = (
            states[0][p],
            _in_full(states[1][q], q, blocks[name]) if "exp_avg" in states[0][p] else states[1][q],
        )
        assert own.keys() == other.keys(), (name, own.keys(), other.keys())
        apart = max(_apart(own[key], other[key]) for key in own)
        found[name] = [worst(_apart(p, q)), worst(apart)]
    return found


def _in_full(state: dict[str, Tensor], param: Tensor, segments: tuple[Segment, ...]) -> dict[str, Tensor]:
    """Momentum of a part of a parameter as it is kept where a mesh cuts the rows: with zeros for the others."""
    found = dict(state)
    for segment in segments:
        if (key := f"exp_avg.{segment.role}") in found:
            whole = torch.zeros_like(param, dtype=found[key].dtype)
            found["exp_avg"] = whole.index_copy_(segment.dim, segment.row_index(), found.pop(key))
    return found


def _apart(placed: Tensor, whole: Tensor) -> float:
    whole = whole.detach()
    assert placed.shape == whole.shape, (placed.shape, whole.shape)
    difference = (held(placed).double() - part_of(whole, placed).double()).abs()
    if placed.dtype == torch.uint8:  # codes, of which 255 is next to 0
        difference = torch.minimum(difference, 256 - difference)
    scale = whole.double().abs().max().clamp_min(1e-30) if whole.numel() else 1.0
    return float(difference.max() / scale) if difference.numel() else 0.0


def rows_are_cut(name: str, p: Tensor, blocks: BlockMap) -> bool:
    """Whether an output row lies in more than one process."""
    if not isinstance(p, DTensor):
        return False
    rows = {blocks[name][0].dim} | ({0} if blocks[name][0].stacked else set())
    cut = {q.dim for d, q in enumerate(p.placements) if not q.is_replicate() and p.device_mesh.size(d) > 1}
    return bool(cut - rows)


def head_is_cut(name: str, p: Tensor, blocks: BlockMap) -> bool:
    """Whether a head begins here and ends in another process."""
    heads = blocks[name][0].heads
    return isinstance(p, DTensor) and heads is not None and Shard.of(p).region[0].stop % (len(p) // heads) != 0


def exchanges_of(optimizer: BlockOptimizer) -> int:
    """How many collectives whole matrices take in a step: one there, where parts come together, and one back."""
    backends = optimizer._backends.matrices.values()
    shared = [batch for own in backends for batch in own.planned if batch.group.process_group is not None]
    return sum(1 + batch.cut for batch in shared)


def worked_on(optimizer: BlockOptimizer) -> int:
    """How many whole matrices this process has worked on."""
    return sum(own.worked for own in optimizer._backends.matrices.values())


def in_all(count: int) -> int:
    """The same over all processes."""
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


def run(case: Case) -> dict[str, Any]:
    make = (MODELS | ODD)[case.model]
    alone = make()
    blocks = BlockMap.of(make(), include_frozen=True)
    placed = EVERYWHERE[case.placement][1](make())
    # Names alone serve as well after sharding; every other case is told what was found before.
    shared = case.placement.startswith("replicated")
    optimizers = (
        optimizer_of(placed, case, blocks if case.guard else None, shared),
        optimizer_of(alone, case, None, False),
    )
    calls = []
    for step in range(STEPS):
        for model, optimizer in zip((placed, alone), optimizers, strict=True):
            set_gradients(model, step, case.guard and step == BAD)
            # The debug mode sees hidden collectives too, but takes many times as long as the step.
            with CommDebugMode() if step == LOOKED_AT or (case.guard and step == BAD) else nullcontext() as comm:
                optimizer.step()
            calls.append(comm.get_total_counts() if comm else 0)
    names = [name for name, p in placed.named_parameters() if p.requires_grad]
    parameters = dict(placed.named_parameters())
    return {
        "differences": differences(placed, alone, (optimizers[0].state, optimizers[1].state), blocks),
        "rows cut": [name for name in names if rows_are_cut(name, parameters[name], blocks)],
        "heads cut": [name for name in names if head_is_cut(name, parameters[name], blocks)],
        "cut": any(isinstance(p, DTensor) for p in placed.parameters()),
        # Partial sums are completed first, one by one: that is traffic of gradients.
        "collectives": calls[2 * LOOKED_AT] - _partial_sums(placed),
        "bad step": calls[2 * BAD] - _partial_sums(placed),
        "alone": max(calls[1::2]),
        "lines cut": any(view.cut_blocks for view in optimizers[0]._bind().views),
        "exchanges": exchanges_of(optimizers[0]),
        "worked on": [in_all(worked_on(optimizers[0])), worked_on(optimizers[1])],
        "skipped": [optimizer.skipped_steps for optimizer in optimizers],
        "moved": max(_apart(p, q) for p, q in zip(alone.parameters(), make().parameters(), strict=True)),
        "same map": optimizers[0].blocks == optimizers[1].blocks,
        "empty": worst(float(any(held(p).numel() == 0 for p in placed.parameters()))),
    }


def _partial_sums(model: nn.Module) -> int:
    set_gradients(model, LOOKED_AT, False)
    grads = [p.grad for p in model.parameters() if isinstance(p.grad, DTensor)]
    return sum(any(placement.is_partial() for placement in g.placements) for g in grads)


def main(cases: str, output: str) -> None:
    warnings.simplefilter("ignore")  # gloo's and FSDP's, about a machine without GPUs
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: list[dict[str, Any]] = []
    for case in json.loads(Path(cases).read_text()):
        try:
            found.append(run(Case(*case)))
        except Exception:  # the other cases are to be judged all the same; all ranks fail alike
            found.append({"error": traceback.format_exc()})
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # all is written; threads of many process groups may abort the interpreter while it ends
