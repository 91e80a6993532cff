"""Files that are either as they were or as they should be, whenever the process or the machine stops; their names."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # no such locks on Windows, where an open file can be neither removed nor moved
    fcntl = None  # type: ignore[assignment]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside, flush it to the disk and put it in place; nobody ever sees a part of it."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its place at the end of the block, or leaves no trace if that raises."""
    aside = path.with_name(f".writing-{path.name}.{secrets.token_hex(6)}")  # which nobody can foresee
    try:
        with _open_held(aside) as file:
            yield file
            sync(file)
            if fcntl:  # while it is held
                os.replace(aside, path)
        if not fcntl:
            os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _open_held(path: Path) -> IO[bytes]:
    """Open a new file to write, which `remove_leftovers` leaves alone as long as it is open."""
    while True:
        file = open(path, "xb", opener=no_link)  # noqa: SIM115 - the caller closes it
        if fcntl:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # it was removed before it was held


def no_link(path: str, flags: int) -> int:
    """An `opener` for `open` that follows no link which somebody has put in the file's place: an OSError instead."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def checked_name(name: object, what: str) -> str:
    """A name that a file or folder may have on any system, below the one that it is meant for.

    Raises:
        ValueError: it is none; `what` it is the name of begins the message.
    """
    if (
        not isinstance(name, str)
        or not 0 < len(name.encode(errors="replace")) <= 100
        or not name.isprintable()
        or set(name) & set('/\\:*?"<>|')
        or name[0] in ".- "
        or name[-1] in ". "
        or _RESERVED.fullmatch(name)
    ):
        raise ValueError(
            f"{what}: got {name!r}, which can be no folder's name here; take one of at most 100 letters, without "
            """/ \\ : * ? " < > |, that does not begin with a dot or a dash and is no device (such as nul); """
            "or name the folder with --out"
        )
    return name


def parse_json(text: str | bytes) -> Any:
    """What JSON says; whole numbers beyond 64 bits as floats, so that nobody stumbles over them.

    Raises:
        ValueError: it is none, however deep it is nested.
    """
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits)


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
    """Remove what processes that were stopped while they wrote into `folder` left behind.

    To be called by the one process that may make folders there. Files may be written by others too, such as pages by
    whoever looks on: those that somebody is writing stay.
    """
    for pattern in (".writing-*", ".removed-*"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                _remove_unless_held(path)


def _remove_unless_held(path: Path) -> None:
    with suppress(OSError):  # it is held, or gone
        if fcntl is None or path.is_symlink():
            path.unlink()
            return
        with open(path, "rb+", opener=no_link) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextmanager
def held(path: Path, taken: str) -> Iterator[IO[bytes]]:
    """Hold a file that one process at a time may hold; the system lets go of it when the process ends, however it does.

    It is made where it is missing, and open to read and to append to.

    Raises:
        ValueError: another process holds it, with `taken` as the message.
    """
    with open(path, "ab+", opener=no_link) as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(taken) from None
        yield file


def printable(name: str | Path) -> str:
    r"""A name, or a text with names in it, with what is not UTF-8 (which Python keeps as lone surrogates) as `\xff`.

    >>> print(printable(os.fsdecode(b"caf\xe9.txt")))
    caf\xe9.txt
    """
    return re.sub("[\ud800-\udfff]", lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", str(name))


def check_name(folder: Path) -> None:
    """Find out before the work, rather than after it, that a folder cannot be used by its name.

    Raises:
        ValueError: the name is not UTF-8; the libraries that write models and tokenizers take no other.
    """
    if printable(folder) != str(folder):
        raise ValueError(
            f"{printable(folder)}: the name is not UTF-8, and models and tokenizers cannot be kept there; name "
            "another folder with --out, or rename it"
        )
