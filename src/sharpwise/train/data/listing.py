"""What of a folder is read, what is left out, and why."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharpwise.files import printable
from sharpwise.train.data.files import LINES, TEXT, Meter, read_file
from sharpwise.train.data.packing import PACKED, kind_of

NAMED = 5  # files that are named of those left out for one reason
FORMATS = f"{', '.join(sorted((*TEXT, *LINES, '.json')))}, plain or packed ({', '.join(PACKED)}), or .parquet"


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not read, and why."""

    path: Path
    why: str


def list_folder(folder: Path, field: str) -> tuple[list[Path], list[LeftOut]]:
    """The files of a folder and the folders in it that can be read, in a fixed order, and what is left out.

    Left out are hidden files and folders, links to folders, and files of other formats. What `.json` is depends on what
    is in it: files with objects that have a text in `field` are read, others are settings, tokenizers and the like.
    """
    taken: list[Path] = []
    left_out: list[LeftOut] = []

    def failed(error: OSError) -> None:
        left_out.append(LeftOut(Path(error.filename), error.strerror or str(error)))

    for root, folders, names in os.walk(folder, onerror=failed):
        reasons = {name: _why_not_folder(Path(root, name)) for name in folders}
        folders[:] = [name for name in folders if not reasons[name]]
        reasons |= {name: _why_not_file(Path(root, name), field) for name in names}
        taken += [Path(root, name) for name in names if not reasons[name]]
        left_out += [LeftOut(Path(root, name), why) for name, why in reasons.items() if why]
    taken.sort(key=lambda path: path.relative_to(folder).as_posix())
    return taken, left_out


def _why_not_folder(path: Path) -> str:
    if path.name.startswith("."):
        return "hidden"
    return "a link to a folder" if path.is_symlink() else ""


def _why_not_file(path: Path, field: str) -> str:
    if path.name.startswith("."):
        return "hidden"
    kind, packing = kind_of(path)
    if not (kind in (*TEXT, *LINES, ".json") or (kind, packing) == (".parquet", "") or (packing and not kind)):
        return f"{kind}{packing} is not read" if kind else "no suffix"
    if not path.is_file():
        return "a link to nothing" if path.is_symlink() else "not a regular file"
    if kind == ".json":
        try:
            next(read_file(path, path.name, field=field, meter=Meter()))
        except (ValueError, StopIteration):
            return f"no objects with a text in {field!r}"
    return ""


def grouped(left_out: Iterable[LeftOut]) -> list[dict[str, Any]]:
    """What is left out as plain values, by reasons: why, how many files and folders, the names of the first of them."""
    paths: dict[str, list[str]] = {}
    for one in left_out:
        paths.setdefault(one.why, []).append(printable(one.path))
    return [{"why": why, "files": len(names), "names": sorted(names)[:NAMED]} for why, names in sorted(paths.items())]


def told(groups: Iterable[dict[str, Any]]) -> str:
    """What is left out, in a line; "" for nothing.

    >>> told([{"why": ".png is not read", "files": 7, "names": ["a.png", "b.png"]}])
    'left out: a.png, b.png and 5 more (.png is not read)'
    """
    parts = []
    for group in groups:
        more = group["files"] - len(group["names"])
        parts.append(", ".join(group["names"]) + (f" and {more} more" if more else "") + f" ({group['why']})")
    return f"left out: {'; '.join(parts)}" if parts else ""
