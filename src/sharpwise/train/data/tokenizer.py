"""Tokenizers: a byte-level BPE trained here, or one that exists."""

import difflib
import hashlib
import json
import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpwise.files import printable
from sharpwise.installing import needs
from sharpwise.train.data.documents import END_OF_TEXT, Document
from sharpwise.train.data.hub import quietly

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BPE = "bpe"
SMALLEST = 257  # all bytes and the end-of-text mark
LARGEST = {"uint16": 2**16, "uint32": 2**32}  # token ids that a type can hold
# UTF-8 bytes that a BPE is trained on. Of 2, 4, 8, 16 and 32 MB of a mixture of encyclopedia, news and books, 8 MB come
# within 1% of 32 in bytes per token, at a vocabulary of 4,096 as at 32,768, in a fourth of the time.
TRAINING_BYTES = 8 * 2**20
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|endofdoc|>", "<|im_end|>", "[EOS]", "[SEP]")
# Bytes of a word, after which it is cut in the text that a BPE is trained on: training takes time like the square of a
# word's length. No word of 8 MB of Python, nor of encyclopedia, news and books, is so long.
LONGEST_WORD = 256


@dataclass(frozen=True)
class Chosen:
    """What `--tokenizer` names: a BPE to train, a file, a folder, or a name on the Hugging Face hub.

    `settings` are plain values that identify it without the network.
    """

    spec: str
    vocabulary: int
    settings: dict[str, Any]

    @property
    def trained(self) -> bool:
        """Whether it is a BPE that is trained on the text."""
        return self.spec == BPE


def choose_tokenizer(spec: str | Path, vocabulary: int, token_type: str = "auto") -> Chosen:
    """Find out what is meant, before any text is read.

    Args:
        spec: "bpe"; a `tokenizer.json` or an `.xz` of one; a folder with a tokenizer; or a name on the hub.
        vocabulary: of a BPE that is trained: from 257 (all bytes and the end-of-text mark); others have their own.
        token_type: "auto", "uint16" or "uint32": what the vocabulary must fit.

    Raises:
        ValueError: the vocabulary is out of range.
    """
    spec = str(spec)
    if spec == BPE:
        check_vocabulary(vocabulary, token_type)
        return Chosen(spec, vocabulary, {"kind": BPE, "vocabulary": vocabulary})
    path = Path(spec)
    if path.is_file():
        return Chosen(spec, 0, {"kind": "file", "sha256": _hash([path])})
    if path.is_dir():
        files = sorted(
            p for p in path.iterdir() if p.is_file() and p.suffix in (".json", ".txt", ".model", ".tiktoken")
        )
        return Chosen(spec, 0, {"kind": "folder", "sha256": _hash(files)})
    return Chosen(spec, 0, {"kind": "hub", "name": spec})


def check_vocabulary(vocabulary: int, token_type: str = "auto", *, trained: bool = True) -> str:
    """The type for ids below `vocabulary`, "uint16" or "uint32". Raises ValueError where it does not fit."""
    if token_type not in ("auto", *LARGEST):
        raise ValueError(f"token type must be one of auto, {', '.join(LARGEST)}, got {token_type!r}")
    largest = LARGEST["uint32" if token_type == "auto" else token_type]
    if trained and vocabulary < SMALLEST:
        raise ValueError(
            f"vocabulary must be from {SMALLEST} (bytes and {END_OF_TEXT}) to {largest} (uint32), got {vocabulary}"
        )
    if vocabulary > largest:
        raise ValueError(
            f"a vocabulary of {vocabulary} is too large for {token_type} tokens, which hold {largest}; take "
            f"--token-type uint32, or a smaller vocabulary"
        )
    return (
        "uint16"
        if token_type == "auto" and vocabulary <= LARGEST["uint16"]
        else "uint32"
        if token_type == "auto"
        else token_type
    )


def train_bpe(documents: Iterable[Document], vocabulary: int, *, max_bytes: int | None = TRAINING_BYTES) -> "Tokenizer":
    """A byte-level BPE of at most `vocabulary` entries, `<|endoftext|>` first, from the first `max_bytes` of text.

    No entry has more than `LONGEST_WORD` bytes, since longer words are cut while it is trained, and then only.
    """
    with needs("preparing tokens", "train"):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts, size = [], 0
    for document in documents:
        texts.append(document.text)
        size += document.bytes
        if max_bytes is not None and size >= max_bytes:
            texts[-1] = texts[-1][: len(texts[-1]) - (size - max_bytes)] or texts[-1]
            break
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.pre_tokenizer = words
    return tokenizer


def load_tokenizer(spec: str) -> tuple["Tokenizer", str | None]:
    """The tokenizer of a file, a folder or a hub name, and the end-of-text token that it declares, if any.

    Raises:
        ValueError: it cannot be read, does not exist, or has no form that `tokenizers` knows.
    """
    with needs("preparing tokens", "train"):
        from tokenizers import Tokenizer
    path = Path(spec)
    if path.is_file():
        return _from_file(path), None
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return _from_file(path / "tokenizer.json"), _declared(path / "tokenizer_config.json")
    import transformers

    with quietly():
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(spec, use_fast=True, trust_remote_code=False)
        except Exception as error:  # the hub, the files and the formats each have their own kinds
            what = (
                "a folder with a tokenizer"
                if path.is_dir()
                else "a file, a folder, or the hub, or the hub is not reached"
            )
            raise ValueError(f"no tokenizer {spec!r}: not {what} ({_first_line(error)})") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(f"tokenizer {spec!r} ({type(loaded).__name__}) has no fast form; give another one")
    return backend, loaded.eos_token


def _from_file(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            return Tokenizer.from_str(file.read().decode())
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"{path} is not a tokenizer.json of `tokenizers`, nor an .xz of one ({_first_line(error)})"
        ) from error


def _declared(path: Path) -> str | None:
    try:
        token = json.loads(path.read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def find_end_of_text(
    tokenizer: "Tokenizer", *, given: str | None = None, declared: str | None = None
) -> tuple[str, int]:
    """The end-of-text token and its id: the one given, the one that the tokenizer declares, or a usual one.

    Raises:
        ValueError: the tokenizer has none of them.
    """
    for token in (given,) if given is not None else (declared, *ENDS):
        if token is not None and (number := tokenizer.token_to_id(token)) is not None:
            return token, number
    special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
    if given is not None:
        near = difflib.get_close_matches(given, [*special, *tokenizer.get_vocab()], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the tokenizer has no token {given!r}{hint}")
    raise ValueError(
        f"the tokenizer has none of the usual end-of-text tokens ({', '.join(ENDS)}); name one of its own with "
        f"--end-of-text (its special ones: {', '.join(special[:20]) or 'none'})"
    )


def vocabulary_of(tokenizer: "Tokenizer") -> int:
    """The number of token ids: the largest one plus 1, gaps counted. Raises ValueError where there are none."""
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise ValueError("the tokenizer has no tokens; give another one")
    return max(ids) + 1


def same_tokens(a: "Tokenizer", b: "Tokenizer") -> bool:
    """Whether two tokenizers give the same ids to the same pieces of text: equal vocabularies and merges.

    Either may be a `tokenizers.Tokenizer` or a fast tokenizer of transformers.
    """
    first, second = (getattr(tokenizer, "backend_tokenizer", tokenizer) for tokenizer in (a, b))
    if first.get_vocab(with_added_tokens=True) != second.get_vocab(with_added_tokens=True):
        return False
    merges = [json.loads(tokenizer.to_str())["model"].get("merges") for tokenizer in (first, second)]
    return bool(merges[0] == merges[1])


def _hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{printable(path.name)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
