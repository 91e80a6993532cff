"""Text to token ids. For byte-level BPE with GPT-2's pattern, each distinct word goes to the tokenizer once.

`tokenizers` spends most of its time on finding words and their offsets. Where the words are those of GPT-2's pattern
(its own vocabulary, and the BPE trained here), they are found with `regex` and looked up in a table of the ids that
the tokenizer itself gave to them: about three times as fast, and the same ids. The same because the pattern knows
nothing of a character but whether it is a letter, a number, a space or else, and every character is tried in both
before a word that contains it enters the table (their Unicode versions differ). Any other tokenizer takes the documents
as they are.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# GPT-2's pattern with its alternatives in the order of how often they are met (no two of those that changed places can
# match at the same place), and the same for ASCII alone, which the standard library finds three times as fast.
PATTERN = r" ?\p{L}+|'(?:s|t|re|ve|m|ll|d)| ?[^\s\p{L}\p{N}]+| ?\p{N}+|\s+(?!\S)|\s+"
ASCII = re.compile(r" ?[A-Za-z]+|'(?:s|t|re|ve|m|ll|d)| ?[^\sA-Za-z0-9]+| ?[0-9]+|\s+(?!\S)|\s+", re.ASCII)
MOST_WORDS = 400_000  # in the table, about 60 MB; then it starts anew
MOST_CHARACTERS = 2**25  # in all words of the table


class Encoder:
    """Encodes texts, each followed by the end-of-text token.

    Args:
        tokenizer: its special tokens are not looked for in the text, and it adds none.
        end: id of the end-of-text token.
        dtype: of the ids.

    Raises:
        ValueError: when called, where the tokenizer meets what it does not know and has no token for that.
    """

    def __init__(self, tokenizer: "Tokenizer", end: int, dtype: Any) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype)
        self._end = np.array([end], dtype=self._dtype)
        self._words: _Words | None = None
        if _splits_like_gpt2(tokenizer):
            try:
                import regex  # type: ignore[import-untyped]
            except ImportError:  # comes with transformers; without it everything is slower and the same
                return
            every = regex.compile(PATTERN)

            def find(text: str) -> list[str]:
                # Without `concurrent=False` the interpreter lock is given up and taken back at every word.
                words: list[str] = ASCII.findall(text) if text.isascii() else every.findall(text, concurrent=False)
                return words

            self._words = _Words(self._plain, find, tokenizer, self._end)

    def __call__(self, texts: Sequence[str]) -> NDArray[Any]:
        """The ids of all texts, one-dimensional."""
        if self._words is not None and (ids := self._words.encode(texts)) is not None:
            return ids
        if not texts:
            return self._end[:0]
        return np.concatenate([part for ids in self._plain(texts) for part in (ids, self._end)])

    def _plain(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(
                f"the tokenizer cannot encode the text ({error}); give one that has a token for what it does not know, "
                "or falls back on bytes"
            ) from error
        return [np.array(encoding.ids, dtype=self._dtype) for encoding in encoded]


class _Words:
    """A table from words to their ids: `numbers` gives each word a number, `ids`, `starts` and `lengths` its ids."""

    def __init__(
        self,
        encode: Callable[[Sequence[str]], list[NDArray[Any]]],
        find: Callable[[str], list[str]],
        tokenizer: "Tokenizer",
        end: NDArray[Any],
    ) -> None:
        self._encode, self._find, self._end = encode, find, end
        self._split = tokenizer.pre_tokenizer.pre_tokenize_str
        self._good: set[str] = set()
        self._bad: set[str] = set()
        self._clear()

    def _clear(self) -> None:
        self.numbers = _Numbers()
        assert self.numbers[None] == 0  # stands for the end of a text
        self.numbers.new.clear()
        self.ids = self._end
        self.starts = np.zeros(1, dtype=np.int64)
        self.lengths = np.ones(1, dtype=np.int64)
        self.characters = 0

    def encode(self, texts: Sequence[str]) -> NDArray[Any] | None:
        """The ids of all texts; None if a character is not what the tokenizer takes it for."""
        if len(self.numbers) > MOST_WORDS or self.characters > MOST_CHARACTERS:
            self._clear()
        words: list[str | None] = []
        for text in texts:
            words += self._find(text)
            words.append(None)
        found = np.fromiter(map(self.numbers.__getitem__, words), dtype=np.int64, count=len(words))
        if not self._learn():
            return None
        # The ids of word after word: place k of the result is k - (first place of its word) in that word.
        lengths = self.lengths[found]
        ends = np.cumsum(lengths)
        shift = np.repeat(self.starts[found] - ends + lengths, lengths)
        ids: NDArray[Any] = self.ids[shift + np.arange(len(shift))]
        return ids

    def _learn(self) -> bool:
        """Put the new words into the table; False, and none of them, if one has a character that we must not split."""
        new = [word for word in self.numbers.new if word is not None]
        if not new:
            return True
        characters = set().union(*new) - self._good
        self._bad |= {c for c in characters - self._bad if not self._agree(c)}
        self._good |= characters - self._bad
        if not self._bad.isdisjoint(characters):
            for word in new:
                del self.numbers[word]
            self.numbers.new.clear()
            return False
        ids = self._encode(new)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        self.starts = np.concatenate([self.starts, len(self.ids) + np.cumsum(lengths) - lengths])
        self.lengths = np.concatenate([self.lengths, lengths])
        self.ids = np.concatenate([self.ids, *ids])
        self.characters += sum(map(len, new))
        self.numbers.new.clear()
        return True

    def _agree(self, character: str) -> bool:
        """Whether both take the character for the same: among a letter, a number and another it shows what it is."""
        text = f"a{character}a1{character}1!{character}! {character}"
        ours = np.cumsum([len(word) for word in self._find(text)]).tolist()
        return ours == [end for _, (_, end) in self._split(text)]


class _Numbers(dict[str | None, int]):
    """Numbers words in the order in which they are first asked for; `new` holds those since it was last cleared."""

    def __init__(self) -> None:
        self.new: list[str | None] = []

    def __missing__(self, word: str | None) -> int:
        number = self[word] = len(self)
        self.new.append(word)
        return number


def _splits_like_gpt2(tokenizer: "Tokenizer") -> bool:
    """Whether the ids of a text are those of its words by GPT-2's pattern."""
    described = json.loads(tokenizer.to_str())
    before, model = described["pre_tokenizer"] or {}, described["model"]
    return (
        described["normalizer"] is None
        and before.get("type") == "ByteLevel"
        and not before.get("add_prefix_space", True)
        and before.get("use_regex", True)
        and model["type"] == "BPE"
        and not model.get("dropout")
        # others are looked for in the text before it is split into words
        and all(token["special"] for token in described["added_tokens"])
    )
