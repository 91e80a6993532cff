"""The state of several processes in one checkpoint: written by all, each its part, and read back on any mesh.

The parts are a distributed checkpoint of PyTorch (`torch.distributed.checkpoint`): a file per process with what it
holds, and a list of where everything is. Tensors are found by name, so that other processes, or one alone, find theirs.
"""

import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from sharpwise.engine.recoding import OLD_NAMES, SETTLED
from sharpwise.files import sync
from sharpwise.shards import Shard, is_dtensor, like, local
from sharpwise.train.distributed import Several
from sharpwise.train.world import mark

METADATA = ".metadata"


def write_parts(world: Several, folder: Path, state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write this process's part into a folder that all share, while the others write theirs, and flush it.

    Returns:
        The size and the hash of every file, on all processes.

    Raises:
        OSError: on any of the processes.
    """
    writer = dcp.FileSystemWriter(folder)
    try:
        dcp.save(_named(state), storage_writer=writer, process_group=world.hosts)
    except dcp.api.CheckpointException as error:
        raise mark(_first_of(error), everywhere=True) from error
    mine = [path for path in folder.iterdir() if _is_of(path.name, world.rank)]
    found = world.together(lambda: {path.name: _hashed(path) for path in mine})
    return {name: about for files in world.all(found) for name, about in files.items()}


def _is_of(name: str, rank: int) -> bool:
    return name.startswith(f"__{rank}_") or (rank == 0 and name == METADATA)


def _hashed(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sync(file)
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_parts(folder: Path, into: Mapping[str, Any], *, alone: bool) -> dict[str, Any]:
    """The state in a folder, in the tensors of `into`, which are placed on any mesh, or on none.

    Args:
        folder: what `write_parts` has written.
        into: a state of the same model; its tensors are overwritten.
        alone: read by one process, without a process group.

    Raises:
        ValueError: it is the state of another model.
        OSError: a file cannot be read.
    """
    reader = _Reader(folder)
    target = _named(into)
    there = set(reader.read_metadata().state_dict_metadata)
    target["optimizer"] = _under_names_of(there, target["optimizer"])
    here = set(_keys(target))
    if there != here:
        few = [", ".join(sorted(names)[:3]) or "nothing" for names in (there - here, here - there)]
        raise ValueError(f"it holds {few[0]} that is not in the model, and lacks {few[1]}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
            dcp.load(target, storage_reader=reader, planner=_Planner(), no_dist=alone)
    except dcp.api.CheckpointException as error:
        raise _first_of(error) from error
    return _unnamed(target)


class _Reader(dcp.FileSystemReader):
    """One that takes nothing from the list of what is where but the classes that torch writes there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with (Path(self.path) / METADATA).open("rb") as file:
            try:
                found = _Unpickler(file).load()
            except OSError:
                raise
            except Exception as error:  # whatever a damaged or planted pickle may lead to
                raise ValueError(f"{METADATA} is no list of parts ({type(error).__name__}: {error})") from None
        if not isinstance(found, Metadata):
            raise ValueError(f"{METADATA} is no list of parts, it holds a {type(found).__name__}")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(dcp.DefaultLoadPlanner):
    """One that takes plain values for what is no tensor, where torch's would run what it finds."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        found = torch.load(value, weights_only=True)
        super().load_bytes(read_item, _saved(found))


def _saved(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if (module, name) in _KNOWN or module == "torch" else None
        if found is None or (module == "torch" and not isinstance(found, torch.dtype) and found is not torch.Size):
            raise ValueError(f"it wants to run {module}.{name}, and that was not done")
        return found


_KNOWN = {
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
            *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


def placed(whole: Mapping[str, Any], into: Mapping[str, Any]) -> dict[str, Any]:
    """A state of whole tensors, with those cut that are so in another state of the same model.

    Raises:
        ValueError: a tensor of another shape.
    """
    return _unnamed(_placed(_named(whole), _named(into)))


def _placed(value: Any, like_this: Any) -> Any:
    if isinstance(value, Mapping) and isinstance(like_this, Mapping):
        return {key: _placed(item, like_this.get(key)) for key, item in value.items()}
    if not isinstance(value, Tensor) or not isinstance(like_this, Tensor) or not is_dtensor(like_this):
        return value
    if value.shape != like_this.shape:
        raise ValueError(f"a tensor has shape {tuple(value.shape)}, here it is {tuple(like_this.shape)}")
    part = value[Shard.of(like_this).region].to(local(like_this).device)
    return like(like_this, part.clone(memory_format=torch.contiguous_format))


def _first_of(error: Any) -> Exception:
    """What went wrong on the first rank on which something did, in place of torch's error, which is no Exception."""
    failures = [(rank, failure[0]) for rank, failure in sorted(error.failures.items())]
    rank, found = next(((r, e) for r, e in failures if isinstance(e, OSError)), failures[0])
    if isinstance(found, OSError) and found.errno is not None:
        return OSError(found.errno, f"rank {rank}: {os.strerror(found.errno)}")
    return ValueError(f"rank {rank}: {type(found).__name__}: {found}")


# --- by name ---------------------------------------------------------------------------------------------------------


def _named(state: Mapping[str, Any]) -> dict[str, Any]:
    """Model and optimizer, whose state has the names of parameters for their numbers."""
    names = _names(state["optimizer"])
    return {
        "model": dict(state["model"]),
        "optimizer": {
            "state": {names[i]: dict(own) for i, own in state["optimizer"]["state"].items()},
            "param_groups": [dict(group) for group in state["optimizer"]["param_groups"]],
        },
    }


def _unnamed(state: Mapping[str, Any]) -> dict[str, Any]:
    optimizer = state["optimizer"]
    numbers = {name: i for i, name in _names(optimizer).items()}
    own = {numbers[name]: values for name, values in optimizer["state"].items()}
    return {"model": state["model"], "optimizer": {**optimizer, "state": own}}


def _names(optimizer: Mapping[str, Any]) -> dict[int, str]:
    groups = optimizer["param_groups"]
    return {i: name for group in groups for i, name in zip(group["params"], group["param_names"], strict=True)}


def _under_names_of(there: Collection[str], optimizer: dict[str, Any]) -> dict[str, Any]:
    """State and groups of an optimizer under the names that a folder has for them; loading them knows the old ones."""
    old_names = {new: old for names in OLD_NAMES for old, new in names.items()}

    def under(prefix: str, held: dict[str, Any]) -> dict[str, Any]:
        old = {new: old for new, old in old_names.items() if f"{prefix}.{old}" in there}
        known = {key: v for key, v in held.items() if not key.startswith(SETTLED) or f"{prefix}.{key}" in there}
        return {old.get(key, key): value for key, value in known.items()}

    return {
        "state": {name: under(f"optimizer.state.{name}", own) for name, own in optimizer["state"].items()},
        "param_groups": [
            under(f"optimizer.param_groups.{n}", group) for n, group in enumerate(optimizer["param_groups"])
        ],
    }


def _keys(tree: Mapping[str, Any]) -> Iterator[str]:
    """What torch calls the entries of a state."""
    for kind, own in (("model", {"model": tree["model"]}), ("state", tree["optimizer"]["state"])):
        prefix = "" if kind == "model" else "optimizer.state."
        yield from (f"{prefix}{name}.{key}" for name, values in own.items() for key in values)
    for n, group in enumerate(tree["optimizer"]["param_groups"]):
        yield from (f"optimizer.param_groups.{n}.{key}" for key in group)
