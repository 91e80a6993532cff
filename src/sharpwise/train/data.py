"""Text to tokens, and tokens to batches: read documents, split them, train a byte-level BPE, sample windows."""

import hashlib
import lzma
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".md", ".py", ".rst", ".text", ".txt", ".xz")
MAX_BYTES = 32 * 2**20  # more text than a demo can read in its time
# Of the standard library: what is not its own, tests, and generated tables, which are neither prose nor code.
SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests")
)

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class Document:
    """A piece of text that is never divided between training and validation."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Tokens of the training and the validation part, each a one-dimensional uint16 array, and where they came from.

    `about` holds plain values: source, documents, bytes, sha256 of the text, vocabulary, tokens, bytes per token.
    """

    train: Tokens
    validation: Tokens
    vocabulary: int
    about: dict[str, object]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_documents(source: Path | None = None, *, max_bytes: int = MAX_BYTES) -> list[Document]:
    """The documents of `source`, in a fixed order, at most about `max_bytes` of text.

    Args:
        source: None for the source text of the running Python's standard library; or a text file, an `.xz` of a text
            file, or a folder with such files (suffixes `SUFFIXES`, hidden ones and folders left out). Inside a file,
            lines that hold only `<|endoftext|>` separate documents.
        max_bytes: what lies beyond is not read.

    Raises:
        ValueError: the path is missing, holds no text, or is not UTF-8 text.
    """
    if source is None:
        return _standard_library()
    if not source.exists():
        raise ValueError(f"no such file or folder: {source}; give a text file, an .xz of one, or a folder of them")
    if not source.is_dir():
        documents = _read_file(source, source.name, max_bytes)
    else:
        documents, left = [], max_bytes
        for path in _text_files(source):
            documents += _read_file(path, path.relative_to(source).as_posix(), left)
            left = max_bytes - sum(len(document.text) for document in documents)
            if left <= 0:
                break
    if not any(document.text.strip() for document in documents):
        what = f"has no file with text that ends in {', '.join(SUFFIXES)}" if source.is_dir() else "is empty"
        raise ValueError(f"{source} {what}; give a text file, an .xz of one, or a folder of them")
    return documents


def _standard_library() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):  # a file in an old encoding, or a broken link: not worth a failure
                continue
            if text.strip():
                documents.append(Document(relative.as_posix(), text))
    if not documents:
        raise ValueError(f"this Python has no source text of its standard library in {root}; name a text with --data")
    return documents


def _text_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path


def _read_file(path: Path, name: str, max_bytes: int) -> list[Document]:
    try:
        with lzma.open(path) if path.suffix.lower() == ".xz" else path.open("rb") as file:
            raw = file.read(max_bytes)
            cut = bool(file.read(1))
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is not a whole .xz file ({error}); pack it again, or give the text itself") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    if (zero := raw.find(b"\0")) >= 0:
        raise ValueError(f"{path} is not text: it has a zero byte at offset {zero}; give UTF-8 text")
    if cut:  # not inside a character: end with the last whole line
        raw = raw[: raw.rfind(b"\n") + 1] or raw
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start}; convert it to UTF-8"
        ) from error
    return _split_at_marks(text.replace("\r\n", "\n"), name)


def _split_at_marks(text: str, name: str) -> list[Document]:
    pieces = [piece.strip("\n") for piece in f"\n{text}\n".split(f"\n{END_OF_TEXT}\n")]
    pieces = [piece for piece in pieces if piece.strip()]
    return [Document(name if len(pieces) == 1 else f"{name}#{i}", piece) for i, piece in enumerate(pieces)]


# --- splitting -------------------------------------------------------------------------------------------------------


def split_documents(documents: list[Document], share: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, each in an order that depends on their names and texts alone.

    Validation gets whole documents until it has `share` of the characters, and never more than twice that while a
    smaller document is left. A single document is cut at the line nearest to the end of its first `1 - share`.

    >>> train, validation = split_documents([Document(str(i), "text" * 9) for i in range(20)])
    >>> len(train), len(validation)
    (19, 1)
    """
    if len(documents) == 1:
        text = documents[0].text
        at = text.rfind("\n", 0, max(1, int(len(text) * (1 - share)))) + 1
        at = at or int(len(text) * (1 - share))
        return [Document(documents[0].name, text[:at])], [Document(documents[0].name + "#end", text[at:])]
    wanted = share * sum(len(document.text) for document in documents)
    train: list[Document] = []
    validation: list[Document] = []
    taken = 0
    for document in sorted(documents, key=_digest):
        if taken < wanted and taken + len(document.text) <= 2 * wanted:
            validation.append(document)
            taken += len(document.text)
        else:
            train.append(document)
    if not validation:  # few and large documents
        validation.append(min(train, key=lambda document: len(document.text)))
        train.remove(validation[0])
    return train, validation


def _digest(document: Document) -> bytes:
    return hashlib.sha256(f"{document.name}\n{document.text}".encode()).digest()


# --- tokens ----------------------------------------------------------------------------------------------------------


def prepare(documents: list[Document], *, vocabulary: int, context: int, source: str) -> Corpus:
    """Split, train a byte-level BPE of at most `vocabulary` entries on the training part, and encode both parts.

    Args:
        documents: from `read_documents`.
        vocabulary: from 257 (all bytes and the end-of-text mark) to 65536 (tokens are uint16).
        context: tokens that the model sees at once; both parts must hold one window of `context` + 1.
        source: what to call the text in reports.

    Raises:
        ValueError: vocabulary out of range, or a part too short for the context.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if not 257 <= vocabulary <= 65536:
        raise ValueError(f"vocabulary must be from 257 (bytes and {END_OF_TEXT}) to 65536 (uint16), got {vocabulary}")
    train, validation = split_documents(documents)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in train), trainer, length=len(train))

    def encode(part: list[Document]) -> Tokens:
        end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=np.uint16)
        encoded = tokenizer.encode_batch_fast([document.text for document in part])
        return np.concatenate([x for e in encoded for x in (np.array(e.ids, dtype=np.uint16), end)])

    parts = {"training": encode(train), "validation": encode(validation)}
    for name, tokens in parts.items():
        if len(tokens) < context + 1:
            raise ValueError(
                f"the text is too short: its {name} part has {len(tokens)} tokens, and a context of {context} needs "
                f"at least {context + 1}; give more text"
            )
    size = sum(len(document.text.encode()) for document in documents)
    about: dict[str, object] = {
        "source": source,
        "documents": len(documents),
        "validation_documents": len(validation),
        "bytes": size,
        "sha256": hashlib.sha256(b"".join(sorted(map(_digest, documents)))).hexdigest(),
        "vocabulary": tokenizer.get_vocab_size(),
        "train_tokens": len(parts["training"]),
        "validation_tokens": len(parts["validation"]),
        "bytes_per_token": size / sum(map(len, parts.values())),
    }
    return Corpus(parts["training"], parts["validation"], tokenizer.get_vocab_size(), about)


# --- batches ---------------------------------------------------------------------------------------------------------


def sample_batch(
    tokens: Tokens, *, seed: int, step: int, sequences: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one step, int64 tensors [sequences, context]: a pure function of its arguments.

    Windows start at random places, with replacement. The generator is a counter keyed by (seed, step): nothing has
    to be saved to resume, and any step can be drawn without those before it.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(tokens) - context, size=sequences)
    return _windows(tokens, starts, context)


def validation_batch(tokens: Tokens, *, sequences: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 tensors [n, context]: at most `sequences` windows, evenly spaced, not overlapping."""
    room = (len(tokens) - 1) // context
    count = min(sequences, room)
    starts = np.arange(count) * (room // count) * context
    return _windows(tokens, starts, context)


def _windows(tokens: Tokens, starts: NDArray[np.int64], context: int) -> tuple[torch.Tensor, torch.Tensor]:
    windows = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())
