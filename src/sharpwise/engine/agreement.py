"""Whether the processes that share a model agree on what they train: asked once, at the first step.

Ranks with other parameters, blocks or settings would sum what does not belong together, or wait for each other for
ever.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sharpwise.engine.options import Options
from sharpwise.engine.view import ParamView
from sharpwise.rules import Rule
from sharpwise.shards import is_dtensor, local


def check_ranks_agree(views: Sequence[ParamView], options: Options, who: str, replicas: Any = None) -> None:
    """Compare parameters, blocks and settings over the meshes on which the parameters lie: a collective.

    One small all-reduce per dimension of a mesh; only a disagreement costs more.

    Args:
        replicas: a group of processes that share the work of plain parameters.

    Raises:
        ValueError: on every rank, naming what differs first; or that processes cannot talk about tensors that lie where
            these do.
    """
    groups = _groups(views) + ([] if replicas is None else [replicas])
    if not groups:
        return
    lines = _lines(views, options)
    mark = int.from_bytes(hashlib.sha256("\n".join(lines).encode()).digest()[:7], "big")
    extremes = torch.tensor([mark, -mark], dtype=torch.int64, device=local(views[0].param).device)
    for group in groups:
        _check_backend(group, extremes.device.type, who)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group)
    largest, smallest = extremes.tolist()
    if largest != -smallest:
        raise ValueError(f"{who}: {_difference(_lines_by_rank(lines, groups))}")


def _check_backend(group: Any, device: str, who: str) -> None:
    """NCCL alone, as most programs start it, cannot sum what `CPUOffloadPolicy` keeps on CPUs."""
    served = torch.distributed.get_backend_config(group)
    if device not in [pair.split(":")[0] for pair in served.split(",")]:
        backend = "gloo" if device == "cpu" else "nccl"
        raise ValueError(
            f"{who}: parameters lie on {device} (CPUOffloadPolicy?), and the process group that they share serves "
            f"{served}; start with torch.distributed.init_process_group('{device}:{backend},{served}')"
        )


def _groups(views: Sequence[ParamView]) -> list[Any]:
    """Groups of processes over which parameters are cut or repeated, in the order of the parameters."""
    meshes: list[Any] = [e.param.device_mesh for e in views if is_dtensor(e.param)]  # type: ignore[attr-defined]
    found = [mesh.get_group(d) for mesh in dict.fromkeys(meshes) for d in range(mesh.ndim) if mesh.size(d) > 1]
    return list(dict.fromkeys(found))


def _lines(views: Sequence[ParamView], options: Options) -> list[str]:
    """All that has to be the same everywhere, in words. How it is compiled need not be."""
    lines = [repr(replace(options, compile=None))]
    groups = {id(view.group): view.group for view in views}
    for i, group in enumerate(groups.values()):
        plain = {k: _plain(v) for k, v in group.items() if k not in ("params", "param_names")}
        lines.append(f"group {i}: {plain}")
    for e in views:
        parts = ", ".join(f"{s.role} by {c}" for s, c in zip(e.segments, e.cuts, strict=True))
        how = f"{e.rule.name} ({parts}){_fixed(e.rule)}, multipliers {e.multipliers}, decays {e.decays}"
        lines.append(f"{e.full_name} {tuple(e.param.shape)} {e.param.dtype}: {how}")
    return lines


def _fixed(rule: Rule) -> str:
    """Fields of a rule that no group shows."""
    return "".join(f", {f.name}={getattr(rule, f.name)}" for f in fields(rule) if f.name not in rule.hyperparameters)  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.tolist() if value.device.type == "cpu" else "on a device"  # reading it would wait for the device


def _lines_by_rank(lines: list[str], groups: Sequence[Any]) -> dict[int, list[str]]:
    """The lines of every rank that is reached through the groups."""
    everyone = {torch.distributed.get_rank(): lines}
    for group in groups:
        found: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(found, everyone, group=group)
        everyone = {rank: theirs for part in found for rank, theirs in part.items()}
    return everyone


def _difference(everyone: dict[int, list[str]]) -> str:
    first = min(everyone)
    other = min(rank for rank, lines in everyone.items() if lines != everyone[first])
    ours = [line for line in everyone[first] if line not in everyone[other]]
    theirs = [line for line in everyone[other] if line not in everyone[first]]
    said = [f"rank {r} has {lines[0] if lines else 'nothing more'}" for r, lines in ((first, ours), (other, theirs))]
    if not ours and not theirs:
        said = [f"ranks {first} and {other} have the same parameters in different order"]
    return f"ranks differ in model or settings: {'; '.join(said)}. Build model and optimizer alike on all ranks"
