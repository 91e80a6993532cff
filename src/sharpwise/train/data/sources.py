"""Where text comes from: local files, the standard library, data sets of the hub."""

import hashlib
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from sharpwise.files import printable
from sharpwise.train.data.documents import Document
from sharpwise.train.data.files import Meter, read_file
from sharpwise.train.data.hub import HubData, find_data, hub_documents, suggestion
from sharpwise.train.data.listing import FORMATS, LeftOut, grouped, list_folder, told

STDLIB = "stdlib"
KINDS = "text, JSON or parquet, a packed one, or a folder of them"
# Of the standard library: what is not its own, tests, and generated tables, which are neither prose nor code.
SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests")
)


class Source(Protocol):
    """Something with documents in a fixed order."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def own_validation(self) -> bool:
        """Whether it has a validation split of its own."""
        ...

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """What a user may think it has and it has not."""
        ...

    def documents(self, meter: Meter) -> Iterator[Document]:
        """What there is to train on; all there is, where there is no validation split."""
        ...

    def validation(self) -> Iterator[Document]:
        """The validation split."""
        ...

    def size(self) -> int | None:
        """Bytes that `meter` counts when all is read, None if that is not known."""
        ...

    def state(self) -> str:
        """Tells whether the source has changed, without reading it."""
        ...


def find_source(spec: str | Path, field: str = "text") -> Source:
    """What a name means: `stdlib`, a data set of `hub.NAMES`, `hub:owner/name[:config]`, or else a path.

    Args:
        spec: such a name, or a path.
        field: of a JSON object or parquet row that holds the text.

    Raises:
        ValueError: there is no such name and no such path.
    """
    name = str(spec)
    if name == STDLIB:
        return StandardLibrary()
    if not isinstance(spec, Path) and (data := find_data(name, field)):
        return HubSource(name, data)
    path = Path(spec)
    if not path.exists():
        if not isinstance(spec, Path) and path.name == name:
            raise ValueError(f"no such file, folder or data set: {name}; {suggestion(name)}")
        raise ValueError(f"no such file or folder: {path}; give {KINDS}")
    return LocalFiles(path, field)


@dataclass(frozen=True)
class LocalFiles:
    """A file, or the files of a folder that `list_folder` takes. Names are printable ones, whatever bytes they are."""

    path: Path
    field: str = "text"
    own_validation = False

    @property
    def name(self) -> str:
        return printable(self.path.name or self.path)

    @property
    def left_out(self) -> Sequence[LeftOut]:
        return self._listed[1]

    def documents(self, meter: Meter) -> Iterator[Document]:
        """Raises ValueError for what cannot be read, and where there is no text at all."""
        some = False
        for path, name in self._files():
            for document in read_file(path, name, field=self.field, meter=meter):
                some = True
                yield document
        if not some:
            what = f"has no file with text that ends in {FORMATS}" if self.path.is_dir() else "is empty"
            left_out = told(grouped(self.left_out))
            raise ValueError(f"{self.path} {what}; " + (left_out or f"give {KINDS}"))

    def validation(self) -> Iterator[Document]:
        raise AssertionError("files have no validation split")

    def size(self) -> int | None:
        return sum(path.stat().st_size for path, _ in self._files())

    def state(self) -> str:
        return _state(self.name, self._files())

    def _files(self) -> list[tuple[Path, str]]:
        if not self.path.is_dir():
            return [(self.path, printable(self.path.name))]
        return [(path, printable(path.relative_to(self.path).as_posix())) for path in self._listed[0]]

    @cached_property
    def _listed(self) -> tuple[list[Path], list[LeftOut]]:
        return list_folder(self.path, self.field) if self.path.is_dir() else ([], [])


@dataclass(frozen=True)
class StandardLibrary:
    """The source text of the running Python's standard library."""

    own_validation = False
    left_out = ()

    @property
    def name(self) -> str:
        return f"standard library of Python {platform.python_version()}"

    def documents(self, meter: Meter) -> Iterator[Document]:
        """Raises ValueError where this Python came without it."""
        some = False
        for path, name in self._files():
            try:
                text = path.read_text(encoding="utf-8")
                meter.consumed += path.stat().st_size
            except (UnicodeDecodeError, OSError):  # a file in an old encoding, or a broken link: not worth a failure
                continue
            if text.strip():
                some = True
                yield Document(name, text)
        if not some:
            raise ValueError(
                f"this Python has no source text of its standard library in {sysconfig.get_path('stdlib')}; name a text"
            )

    def validation(self) -> Iterator[Document]:
        raise AssertionError("the standard library has no validation split")

    def size(self) -> int | None:
        return sum(path.stat().st_size for path, _ in self._files())

    def state(self) -> str:
        return _state(self.name, self._files())

    def _files(self) -> list[tuple[Path, str]]:
        root = Path(sysconfig.get_path("stdlib"))
        paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
        return [
            (path, path.relative_to(root).as_posix())
            for path in paths
            if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts) and path.is_file()
        ]


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub."""

    spec: str
    data: HubData
    streaming: bool | None = None
    left_out = ()

    @property
    def name(self) -> str:
        return self.spec

    @property
    def own_validation(self) -> bool:
        return self.data.validation

    def documents(self, meter: Meter) -> Iterator[Document]:
        return hub_documents(self.data, "train", streaming=self.streaming)

    def validation(self) -> Iterator[Document]:
        return hub_documents(self.data, "validation", streaming=self.streaming)

    def size(self) -> int | None:
        return None

    def state(self) -> str:
        return f"{self.data.path} ({self.data.config or 'its only configuration'}, field {self.data.field})"


def _state(name: str, files: Sequence[tuple[Path, str]]) -> str:
    digest, total = hashlib.sha256(), 0
    for path, relative in files:
        found = path.stat()
        total += found.st_size
        digest.update(f"{relative}\n{found.st_size}\n{found.st_mtime_ns}\n".encode())
    return f"{name} ({len(files)} files, {total:,} bytes; names, sizes and times {digest.hexdigest()[:16]})"
