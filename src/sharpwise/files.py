"""Files that are either as they were or as they should be, whenever the process or the machine stops."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside, flush it to the disk and put it in place; nobody ever sees a part of it."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its place at the end of the block, or leaves no trace if that raises."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            yield file
            sync(file)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync(file: IO[bytes]) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Make a folder with `fill` aside and put it in place of `folder`, whole or not at all.

    Raises:
        Whatever `fill` raises; then `folder` is as it was.
    """
    aside = folder.with_name(f".writing-{folder.name}")
    old = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        fill(aside)
        for path in (path for path in aside.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                sync(file)
        sync_folder(aside)
        if folder.exists():
            os.replace(folder, old)
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder: it is gone at once, even if the process stops in between and its parts stay."""
    old = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def rename_folder(folder: Path, name: str) -> None:
    """Give a folder another name; one that has it already is removed."""
    new = folder.with_name(name)
    shutil.rmtree(new, ignore_errors=True)
    os.replace(folder, new)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was stopped while it wrote into `folder` left behind."""
    for pattern in (".writing-*", ".removed-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def held(path: Path, taken: str) -> Iterator[None]:
    """Hold a file that one process at a time may hold; the system lets go of it when the process ends, however it does.

    Raises:
        ValueError: another process holds it, with `taken` as the message.
    """
    with path.open("a") as file:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(taken) from None
        yield
