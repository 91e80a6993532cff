"""Documents: pieces of text that are never divided between training and validation, and streams of them."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

END_OF_TEXT = "<|endoftext|>"
"""Separates documents: a line of a text file, and a token."""
LONGEST = 32 * 2**20  # characters; a text file without marks is cut into documents of this length
_MARK = re.compile(rf"\n{re.escape(END_OF_TEXT)}(?=\n)")


@dataclass(frozen=True)
class Document:
    """A piece of text that is never divided between training and validation.

    Args:
        name: where it is from.
        text: the piece.
        whole: False for a part of a text longer than `LONGEST`; such a part may be divided.
    """

    name: str
    text: str
    whole: bool = True

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the name and the text."""
        return hashlib.sha256(f"{self.name}\n{self.text}".encode()).digest()

    @cached_property
    def bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())


def encodable(text: str) -> str:
    """`text` with each lone surrogate, which JSON can hold and UTF-8 cannot, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def split_at_marks(blocks: Iterable[str], name: str, *, longest: int = LONGEST) -> Iterator[Document]:
    """Documents of a text that comes in blocks; lines that hold only `<|endoftext|>` separate them.

    Args:
        blocks: of any lengths.
        name: of the text; where it has several documents, `#0`, `#1`, ... is appended.
        longest: characters after which a document is cut at the end of a line.

    >>> [d.text for d in split_at_marks(["one\\ntwo\\n<|endoftext|>\\n", "three <|endoftext|>\\n"], "a.txt")]
    ['one\\ntwo', 'three <|endoftext|>']
    """
    first: Document | None = None  # held back until it is known whether there are others
    count = 0
    for text, whole in _pieces(blocks, longest):
        if not text.strip():
            continue
        document = Document(f"{name}#{count}", text, whole)
        count += 1
        if count == 1:
            first = document
            continue
        if first:
            yield first
            first = None
        yield document
    if first:
        yield Document(name, first.text, first.whole)


def _pieces(blocks: Iterable[str], longest: int) -> Iterator[tuple[str, bool]]:
    """Texts between marks, without newlines at their ends, and whether each is whole."""
    rest, whole = "\n", True  # `rest` begins with the newline before its first line
    for block in chain(blocks, ["\n"]):
        seen = max(0, len(rest) - len(END_OF_TEXT) - 1)  # a mark that reaches into the block begins here or later
        rest += block
        begin = 0
        for mark in _MARK.finditer(rest, seen):
            yield rest[begin : mark.start()].strip("\n"), whole
            begin, whole = mark.end(), True
        rest = rest[begin:]
        while len(rest) > longest:
            at = rest.rfind("\n", 1, longest)
            at = at if at > 0 else longest
            yield rest[:at].strip("\n"), False
            rest, whole = rest[at:], False
    yield rest.strip("\n"), whole


def limited(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """The first `max_bytes` of text (UTF-8); the last document ends with the last line that fits, and what lies beyond
    is not read. None takes everything."""
    left = max_bytes
    for document in documents:
        if left is None or document.bytes <= left:
            yield document
            if left is not None:
                left -= document.bytes
                if left <= 0:
                    return
            continue
        raw = document.text.encode()[:left]
        raw = raw[: raw.rfind(b"\n") + 1] or raw
        text = raw.decode("utf-8", "ignore").strip("\n")  # "ignore": a character that the limit cuts
        if text.strip():
            yield Document(document.name, text, document.whole)
        return
