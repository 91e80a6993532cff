"""Checkpoints: written aside, flushed, put in place by one rename; read back only if every byte is as it was written.

A checkpoint is a folder `step-00000100` with `state.pt` (tensors and plain values, for `torch.load(weights_only=True)`)
and `about.json`, which holds the hash of the former and its own. A folder of that name is whole: what was being written
when the process was killed has another name, and is removed at the next start.

Several processes write a part each (`sharpwise.train.sharded`) in place of `state.pt`; the rest is the same, and rank 0
does it when all have written. Either kind is read by any number of processes.
"""

import hashlib
import json
import logging
import math
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sharpwise.files import remove_folder, remove_leftovers, rename_folder, replace_folder, sync
from sharpwise.shards import local
from sharpwise.train.environment import version
from sharpwise.train.world import ALONE, World

if TYPE_CHECKING:
    from sharpwise.train.distributed import Several

logger = logging.getLogger("sharpwise.train")

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_STATE = "state.pt"


class OtherVersion(ValueError):
    """A checkpoint that is as it was written, but not as this version writes them."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after step `step`: `state` as given to `save`, `about` its plain notes.

    `state` is None where it was written in parts, and on all processes but the one that found it: see `state_like`.
    """

    step: int
    state: dict[str, Any] | None
    about: dict[str, Any]
    path: Path

    def state_like(self, into: Mapping[str, Any], world: World = ALONE) -> dict[str, Any]:
        """The state, cut as `into`, a state of the same model whose tensors may be overwritten.

        Raises:
            OtherVersion: it lacks a part of the state.
            ValueError, KeyError: it is that of another model.
        """
        whole = self.state
        if _STATE in self.about["files"]:
            whole = _load(self.path / _STATE, mmap=True) if whole is None else whole
            for key in into:
                if not isinstance(whole, Mapping) or not isinstance(whole.get(key), Mapping):
                    raise OtherVersion(_lacks(self.path, self.about, f"the state of the {key}"))
        if whole is not None and world.size == 1:
            return whole
        from sharpwise.train import sharded

        if whole is not None:
            return sharded.placed(whole, into)
        return sharded.read_parts(self.path, into, alone=world.size == 1)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: made when the first is written.
        keep: how many of the latest stay.
        milestones: steps of which they stay too.
        best: keep the one with the lowest `about["validation_loss"]` as well.
        asynchronous: write in the background, from a copy of the tensors on the CPU.
        check: says what is wrong with a checkpoint by its notes, "" if nothing is; such a one is passed over.
        notes: what the notes of a checkpoint hold, with the kinds of value; one without is of another version.
        world: the processes that write together; each must call the same methods in the same order.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        milestones: Collection[int] = (),
        best: bool = False,
        asynchronous: bool = False,
        check: Callable[[Mapping[str, Any]], str] = lambda about: "",
        notes: Mapping[str, tuple[type, ...]] = MappingProxyType({}),
        world: World = ALONE,
    ) -> None:
        self.folder, self.keep, self.best, self.check = folder, keep, best, check
        self.milestones, self.notes = frozenset(milestones), notes
        self.world = world.for_writer()
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None
        if world.is_main and folder.exists():
            remove_leftovers(folder)

    def save(self, step: int, state: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Save the state after step `step`; in the background if asynchronous, after what is still being written.

        Raises:
            OSError: this one, or the one before it, could not be written; those already there are as they were.
        """
        self.wait()
        copy = _copied(state, {})
        notes = {**about, "step": step, "format": FORMAT, "sharpwise": version("sharpwise")}
        write = self._write if self.world.size == 1 else self._write_together
        if self._writer is None:
            write(step, copy, notes)
        else:
            self._pending = self._writer.submit(write, step, copy, notes)

    def wait(self) -> None:
        """Wait for what is being written. Raises OSError if it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the background thread."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()

    def _write(self, step: int, state: Any, about: dict[str, Any]) -> None:
        def fill(folder: Path) -> None:
            with (folder / _STATE).open("wb") as raw:
                file = _Hashing(raw)
                try:
                    torch.save(state, cast(IO[bytes], file))
                except RuntimeError:
                    if file.error is not None:  # torch reports a full disk as a file position that it did not expect
                        raise file.error from None
                    raise
                sync(raw)
            about["files"] = {_STATE: {"bytes": file.size, "sha256": file.hash.hexdigest()}}
            _write_about(folder, about)

        self.folder.mkdir(parents=True, exist_ok=True)
        replace_folder(self._path(step), fill)
        self._remove_old()

    def _write_together(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Every process writes its part aside; when all have, rank 0 puts them in place."""
        from sharpwise.train.sharded import write_parts

        parts = self.folder / f".writing-parts-{step:08d}"

        def begin() -> None:
            remove_leftovers(self.folder)
            parts.mkdir(parents=True)

        def fill(folder: Path) -> None:
            for name in about["files"]:
                (parts / name).rename(folder / name)
            _write_about(folder, about)

        def end() -> None:
            replace_folder(self._path(step), fill)
            parts.rmdir()
            self._remove_old()

        self.world.on_main(begin)
        about["files"] = write_parts(cast("Several", self.world), parts, state)
        self.world.on_main(end)

    def _remove_old(self) -> None:
        steps = self.steps()
        kept = set(steps[-self.keep :]) | self.milestones
        if self.best and (losses := {s: loss for s in steps if (loss := self._loss(s)) is not None}):
            kept.add(min(losses, key=losses.__getitem__))
        for step in steps:
            if step not in kept:
                remove_folder(self._path(step))

    def _loss(self, step: int) -> float | None:
        try:
            loss = json.loads((self._path(step) / "about.json").read_text(encoding="utf-8")).get("validation_loss")
        except (OSError, ValueError, AttributeError, RecursionError):
            return None
        return loss if isinstance(loss, float) and math.isfinite(loss) else None

    def _path(self, step: int) -> Path:
        return path_of(self.folder, step)

    def steps(self) -> list[int]:
        """Steps after which there is a checkpoint, in order."""
        return saved_steps(self.folder)

    def latest(self) -> Checkpoint | None:
        """The latest one that is as it was written, None if none was ever written. Rank 0 decides for all.

        Damaged ones after it are named in a warning and set aside: they must not count among those that are kept.

        Raises:
            OtherVersion: another version has written it; nothing is set aside.
            ValueError: there are some, and all are damaged.
        """
        found = self.world.on_main(self._latest)
        sent = self.world.from_main(lambda: found and replace(found, state=None))
        return found or sent

    def _latest(self) -> Checkpoint | None:
        damaged: list[Path] = []
        for path, loaded in self._read_backwards():
            if isinstance(loaded, Checkpoint):
                for other in damaged:
                    rename_folder(other, f"damaged-{other.name}")
                self._remove_old()  # a kill may have come before that
                return loaded
            logger.warning("the checkpoint %s is passed over: %s", path, loaded)
            damaged.append(path)
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.folder} can be read; bring one back from a copy, or remove that folder to let "
                "the run begin again"
            )
        return None

    def _read_backwards(self) -> Iterator[tuple[Path, Checkpoint | str]]:
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                yield path, _read(step, path, self.check, self.notes)
            except (OtherVersion, MemoryError):
                raise
            except Exception as error:  # whatever a damaged file may lead to
                yield path, f"{type(error).__name__}: {error}"


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, in the folder of the checkpoints."""
    return folder / f"step-{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """Steps after which there is a checkpoint in the folder of the checkpoints, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name)))


def read_checkpoint(folder: Path, step: int) -> Checkpoint:
    """One of the checkpoints in a folder, which is left as it is: a run may be writing there.

    Raises:
        OtherVersion: another version has written it.
        ValueError: it is not there, or not as it was written.
    """
    path = path_of(folder, step)
    try:
        found = _read(step, path, lambda about: "", {})
    except (OtherVersion, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file may lead to
        found = f"{type(error).__name__}: {error}"
    if isinstance(found, str):
        raise ValueError(f"the checkpoint {path} cannot be read: {found}")
    return found


def _read(
    step: int, path: Path, check: Callable[[Mapping[str, Any]], str], notes: Mapping[str, tuple[type, ...]]
) -> Checkpoint | str:
    """A checkpoint, or what is wrong with it."""
    about = json.loads((path / "about.json").read_text(encoding="utf-8"))
    if not isinstance(about, dict) or about.get("sha256") != _hash(about):
        return "the content of about.json has changed since it was written"
    _check_version(path, about, notes)
    if about["step"] != step:
        return f"it says that it is of step {about['step']}"
    for name, wanted in about["files"].items():
        file = path / name
        if file.stat().st_size != wanted["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes instead of {wanted['bytes']:,}"
        with file.open("rb") as raw:
            if hashlib.file_digest(raw, "sha256").hexdigest() != wanted["sha256"]:
                return f"the content of {name} has changed since it was written"
    if wrong := check(about):
        return wrong
    state = _load(path / _STATE) if _STATE in about["files"] else None
    return Checkpoint(step, state, about, path)


def _check_version(path: Path, about: Mapping[str, Any], notes: Mapping[str, tuple[type, ...]]) -> None:
    """Raise OtherVersion for notes, unchanged since they were written, that this version does not write."""
    if about.get("format", FORMAT) != FORMAT:
        raise OtherVersion(
            f"the checkpoint {path} has format {about['format']!r}, as {_author(about)} writes it, and sharpwise "
            f"{version('sharpwise')} reads format {FORMAT}; go on with that version, or name another folder"
        )
    for key, kinds in {"format": (int,), "step": (int,), "files": (dict,), **notes}.items():
        value = about.get(key)
        if key not in about or type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
            raise OtherVersion(_lacks(path, about, repr(key)))
    for name, wanted in about["files"].items():
        known = isinstance(wanted, dict) and type(wanted.get("bytes")) is int and type(wanted.get("sha256")) is str
        if not known or Path(name).name != name:
            raise OtherVersion(_lacks(path, about, f"size and hash of the file {name!r}"))
    if not about["files"]:
        raise OtherVersion(_lacks(path, about, "files"))


def _lacks(path: Path, about: Mapping[str, Any], what: str) -> str:
    return (
        f"the checkpoint {path} lacks {what}, or has it in another form: {_author(about)} has written it, and "
        f"sharpwise {version('sharpwise')} cannot go on from it; go on with that version, or name another folder"
    )


def _author(about: Mapping[str, Any]) -> str:
    return f"sharpwise {about['sharpwise']}" if isinstance(about.get("sharpwise"), str) else "an unknown version"


def _load(path: Path, mmap: bool = False) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of forms of a pickle that it does not write
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:  # whose message recommends to run what is in there
        raise ValueError(f"{path.name} holds more than tensors and plain values, and was not loaded") from None


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    about["sha256"] = _hash(about)
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _hash(about: Mapping[str, Any]) -> str:
    """Of the notes, without the hash itself."""
    content = {key: value for key, value in about.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Hashing:
    """A file that remembers the hash and the size of what is written, and why it could not be."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _copied(value: Any, seen: dict[Any, Tensor]) -> Any:
    """A copy on the CPU; tensors that are one and the same stay so."""
    if isinstance(value, Tensor):
        own = local(value)
        if hasattr(own, "__tensor_flatten__"):  # made of others, as quantized state may be: no memory to tell it by
            return own.detach().to("cpu", copy=True)
        key = (own.untyped_storage().data_ptr(), own.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() == 0 or key not in seen:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, Mapping):
        return {key: _copied(item, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, seen) for item in value)
    return value
