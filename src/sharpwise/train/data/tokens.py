"""Prepared tokens: memory-mapped shards that read as one long array."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sharpwise.files import check_name
from sharpwise.train.data.manifest import FORMAT, JOURNAL, MANIFEST, TOKENIZER, TYPES, again

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Tokens:
    """Shards as one long array.

    Args:
        shards: one-dimensional arrays of one type, in order; memory-mapped ones stay on the disk.
        names: of the shards, for `where`.
    """

    def __init__(self, shards: Sequence[NDArray[Any]], names: Sequence[str] = ()) -> None:
        self._shards = list(shards)
        self._names = list(names) or [f"shard {i}" for i in range(len(shards))]
        self._bounds = np.cumsum([0, *map(len, shards)], dtype=np.int64)
        self._total = int(self._bounds[-1])

    def __len__(self) -> int:
        return self._total

    @property
    def shards(self) -> list[NDArray[Any]]:
        """The arrays themselves."""
        return self._shards

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Copies of `length` tokens from each start, int64 [len(starts), length]; a window may cross shards.

        Raises:
            IndexError: a window that does not lie within the tokens.
        """
        starts = np.asarray(starts, dtype=np.int64)
        if len(starts) and (starts.min() < 0 or starts.max() + length > self._total):
            raise IndexError(
                f"windows of {length} tokens from {starts.min()} to {starts.max()} do not lie within {self._total} "
                "tokens"
            )
        result = np.empty((len(starts), length), dtype=np.int64)
        shard_of = np.searchsorted(self._bounds, starts, side="right") - 1
        crossing = starts + length > self._bounds[shard_of + 1]
        for i in np.unique(shard_of[~crossing]):
            rows = np.flatnonzero((shard_of == i) & ~crossing)
            result[rows] = sliding_window_view(self._shards[i], length)[starts[rows] - self._bounds[i]]
        for row in np.flatnonzero(crossing):
            filled, i, at = 0, int(shard_of[row]), int(starts[row] - self._bounds[shard_of[row]])
            while filled < length:
                piece = self._shards[i][at : at + length - filled]
                result[row, filled : filled + len(piece)] = piece
                filled, i, at = filled + len(piece), i + 1, 0
        return result

    def where(self, start: int) -> tuple[str, int]:
        """The shard's name that holds token `start`, and the place in it.

        >>> Tokens([np.arange(5), np.arange(7)], ["a.bin", "b.bin"]).where(6)
        ('b.bin', 1)
        """
        if not 0 <= start < self._total:
            raise IndexError(f"there are {self._total} tokens, got {start}")
        i = int(np.searchsorted(self._bounds, start, side="right")) - 1
        return self._names[i], int(start - self._bounds[i])


class Examples(Tokens):
    """Shards that hold examples of one length, as `write_examples` has them: a window is one of these.

    The places that windows are drawn from (`window_starts`, `even_starts`) are here `length` - 1 for every example, and
    as many more as let windows begin at the last one: each example is drawn as often as any other.

    >>> pairs = Examples([np.arange(6)], length=2)  # 0 1, 2 3, 4 5
    >>> len(pairs), pairs.windows(np.array([2, 0]), 2).tolist()
    (4, [[4, 5], [0, 1]])
    """

    def __init__(self, shards: Sequence[NDArray[Any]], names: Sequence[str] = (), *, length: int) -> None:
        super().__init__(shards, names)
        self._length = length

    def __len__(self) -> int:
        return (self._total // self._length + 1) * (self._length - 1)

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Copies of `length` tokens from the beginning of the examples at these places."""
        return super().windows(self._begin(np.asarray(starts, dtype=np.int64)), length)

    def where(self, start: int) -> tuple[str, int]:
        """The shard's name that holds the example at this place, and the example's beginning in it."""
        return super().where(int(self._begin(np.asarray(start))))

    def _begin(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        return starts // (self._length - 1) * self._length


@dataclass(frozen=True)
class Prepared:
    """A folder that `prepare_tokens` or `write_examples` finished.

    Attributes:
        folder: where it lies.
        manifest: what `manifest.json` holds.
        train, validation: the tokens of the two parts.
        vocabulary: number of token ids, the largest one plus 1.
        end_of_text: the id that follows every document.
        sha256: of the tokens, their type and the tokenizer; identifies the data wherever it lies.
        context: the only one that fits, of examples (`write_examples`); None for text.
        about: plain values for reports: source, its description where one was given, documents, bytes, sha256,
            vocabulary, tokens, bytes per token.
    """

    folder: Path
    manifest: dict[str, Any]
    train: Tokens
    validation: Tokens
    vocabulary: int
    end_of_text: int
    sha256: str
    about: dict[str, object]
    context: int | None = None

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer that made the tokens (`tokenizers.Tokenizer`)."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / TOKENIZER))


def open_tokens(folder: Path | str) -> Prepared:
    """Open what `prepare_tokens` or `write_examples` wrote; nothing is read but the manifest, the shards are mapped.

    Raises:
        ValueError: not a folder of prepared tokens, not finished, a shard is missing or has another size; the name is
            not UTF-8.
    """
    folder = Path(folder)
    check_name(folder)
    manifest = read_manifest(folder)
    parts, example = {}, manifest.get("example")
    for part in ("train", "validation"):
        files = [file for file in manifest["shards"] if file["part"] == part]
        arrays = [_map(folder / file["file"], file["tokens"], manifest) for file in files]
        names = [file["file"] for file in files]
        parts[part] = Tokens(arrays, names) if example is None else Examples(arrays, names, length=example)
    if not (folder / TOKENIZER).is_file():
        raise ValueError(f"{folder} has lost its {TOKENIZER}; remove the folder, then {again(folder, manifest)}")
    sha256 = identity(manifest)
    counts = manifest["counts"]
    about: dict[str, object] = {
        "source": manifest["source"],
        **{key: manifest[key] for key in ("description",) if key in manifest},
        "documents": counts["documents"],
        "validation_documents": counts["validation_documents"],
        "bytes": counts["bytes"],
        "sha256": sha256,
        "vocabulary": manifest["vocabulary"],
        "train_tokens": counts["train_tokens"],
        "validation_tokens": counts["validation_tokens"],
        "bytes_per_token": counts["bytes"] / (counts["train_tokens"] + counts["validation_tokens"]),
    }
    return Prepared(
        folder=folder,
        manifest=manifest,
        train=parts["train"],
        validation=parts["validation"],
        vocabulary=manifest["vocabulary"],
        end_of_text=manifest["end_of_text"]["id"],
        sha256=sha256,
        about=about,
        context=None if example is None else example - 1,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `manifest.json` of a folder of prepared tokens holds. Raises ValueError where there is none that we know."""
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir():
            raise ValueError(f"no such folder: {folder}; make it with: sharpwise prepare --out {folder}")
        if (folder / JOURNAL).is_file():
            raise ValueError(f"{folder} has no {MANIFEST}: prepare was not finished; {again(folder)}")
        raise ValueError(
            f"{folder} has no {MANIFEST}: it is no folder that sharpwise prepare wrote (data/stdlib by default); one "
            f"with the text in it is prepared with: sharpwise prepare {folder} --out OTHER_FOLDER"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        known = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a manifest of prepared tokens; remove {folder}, then {again(folder)}"
        ) from error
    if known != FORMAT:
        raise ValueError(
            f"{path} has format {known}, and this version reads {FORMAT}; remove {folder}, then {again(folder)}"
        )
    return manifest


def identity(manifest: dict[str, Any]) -> str:
    """SHA-256 over what the tokens are: their hashes, type, end of text and tokenizer; not where they came from."""
    content = {
        "format": manifest["format"],
        "token_type": manifest["token_type"],
        "end_of_text": manifest["end_of_text"],
        "tokenizer": manifest["tokenizer_sha256"],
        "shards": [[file["part"], file["tokens"], file["sha256"]] for file in manifest["shards"]],
    }
    if "example" in manifest:
        content["example"] = manifest["example"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _map(path: Path, tokens: int, manifest: dict[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(TYPES[manifest["token_type"]])
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror or error}; remove {path.parent}, then {again(path.parent, manifest)}"
        ) from error
    if size != tokens * dtype.itemsize:
        raise ValueError(
            f"{path} has {size:,} bytes, and the manifest says {tokens * dtype.itemsize:,}; "
            f"remove {path.parent}, then {again(path.parent, manifest)}"
        )
    # A plain array over the map: indexing numpy's own memmap class costs several times as much.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(tokens,)))
