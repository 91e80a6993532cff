"""Packed files: what is inside comes in pieces of the size that is asked for, however much there is of it."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from sharpwise.installing import needs

PACKED = (".bz2", ".gz", ".xz", ".zst")


def kind_of(path: Path) -> tuple[str, str]:
    """The suffix of what is inside, and that of the packing ("" for none).

    >>> kind_of(Path("a.jsonl.GZ")), kind_of(Path("a.txt"))
    (('.jsonl', '.gz'), ('.txt', ''))
    """
    suffix = path.suffix.lower()
    if suffix in PACKED:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


@contextmanager
def unpacked(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The bytes inside the file, and the file itself, whose position tells how far the reading is.

    Raises:
        ValueError: the file cannot be read, is cut, or is not packed as its suffix says.
    """
    _, packing = kind_of(path)
    try:
        with ExitStack() as opened:
            raw = opened.enter_context(path.open("rb"))
            yield opened.enter_context(_inside(raw, packing)), raw
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        if packing and not getattr(error, "errno", None):  # the libraries' own errors have no number
            raise ValueError(
                f"{path} is not a whole {packing} file ({error}); pack it again, or give the text itself"
            ) from error
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _inside(raw: IO[bytes], packing: str) -> Any:
    match packing:
        case ".bz2":
            return bz2.open(raw)
        case ".gz":
            return gzip.open(raw)
        case ".xz":
            return lzma.open(raw)
        case ".zst":
            with needs("reading .zst", "train"):
                import pyarrow as pa
            return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    return raw
