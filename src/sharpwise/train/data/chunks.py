"""Documents in chunks: what is split, encoded and written together, and recognized again after a stop."""

import hashlib
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sharpwise.train.data.documents import Document
from sharpwise.train.data.files import Meter

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """Documents in order.

    `part` is the split that they come from; `last` whether it ends here; `consumed` the position in the source files.
    """

    part: str
    documents: list[Document]
    last: bool
    consumed: int
    sha256: str

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of text."""
        return sum(document.bytes for document in self.documents)


def chunked(documents: Iterable[Document], part: str, size: int, meter: Meter) -> Iterator[Chunk]:
    """Chunks of at least `size` bytes of text, the last one excepted; a chunk ends with a whole document."""
    waiting: list[Document] = []
    held, consumed = 0, 0
    for document in documents:
        if held >= size:
            yield _chunk(part, waiting, False, consumed)
            waiting, held = [], 0
        waiting.append(document)
        held += document.bytes
        consumed = meter.consumed
    if waiting:
        yield _chunk(part, waiting, True, meter.consumed)


def _chunk(part: str, documents: list[Document], last: bool, consumed: int) -> Chunk:
    digest = hashlib.sha256(part.encode())
    for document in documents:
        digest.update(document.digest)
    return Chunk(part, documents, last, consumed, digest.hexdigest())


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items; the next one is made in another thread while the present one is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def pieces(documents: list[Document], size: int) -> Iterator[list[Document]]:
    """Runs of documents of about `size` bytes of text each."""
    run: list[Document] = []
    held = 0
    for document in documents:
        run.append(document)
        held += document.bytes
        if held >= size:
            yield run
            run, held = [], 0
    if run:
        yield run
