"""The table of words gives the ids that the tokenizer gives."""

import lzma
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from sharpwise.train.data import encode
from sharpwise.train.data.documents import END_OF_TEXT, Document
from sharpwise.train.data.encode import Encoder
from sharpwise.train.data.tokenizer import load_tokenizer, train_bpe

TEXT = (
    "It's we'll 's ''s 'tis can'ts  two   three\n\n four\t\tfive "
    "12a3 ½²x _a__ größe 東京x\u00a0y \u2003z🙂🙂! \r\n x\x1cy"
)
TOKENIZER = train_bpe([Document("a", TEXT * 3)], 400)
SHARED = Path(__file__).parents[4] / "shared" / "data"


def expected(tokenizer: Tokenizer, texts: list[str], end: int = 0) -> list[int]:
    tokenizer.encode_special_tokens = True
    return [i for text in texts for i in (*tokenizer.encode(text, add_special_tokens=False).ids, end)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("aZ's'tre ll\n\t 1½_-!é東🙂\u00a0\u2003\u0085\x1c\x00"), max_size=30), max_size=4)
)
def test_ids_are_those_of_the_tokenizer(texts: list[str]) -> None:
    encoder = Encoder(TOKENIZER, 0, np.uint16)
    assert encoder._words is not None
    assert encoder(texts).tolist() == expected(TOKENIZER, texts)
    assert encoder([*texts, TEXT]).tolist() == expected(TOKENIZER, [*texts, TEXT])  # with words known from before


def test_every_kind_of_character_is_split_alike() -> None:
    """A few characters of every category in every block of 256, next to letters, numbers, spaces and signs."""
    seen: dict[tuple[int, str], int] = {}
    for code in range(sys.maxunicode + 1):
        kind = unicodedata.category(chr(code))
        if kind not in ("Cs", "Co", "Cn"):
            seen.setdefault((code >> 8, kind), code)
    text = "".join(f"a{chr(c)}b 1{chr(c)}2 !{chr(c)} {chr(c)}\n" for c in seen.values())
    encoder = Encoder(TOKENIZER, 0, np.uint16)
    assert encoder([text]).tolist() == expected(TOKENIZER, [text])
    assert encoder._words is not None
    assert not encoder._words._bad


def test_a_character_that_is_split_otherwise_goes_to_the_tokenizer() -> None:
    encoder = Encoder(TOKENIZER, 0, np.uint16)
    words = encoder._words
    assert words is not None
    # as if an older Unicode did not know the letter
    sign = encode.PATTERN.replace(r"\p{L}+", r"(?:(?!é)\p{L})+")
    sign = sign.replace(r"[^\s\p{L}\p{N}]+", r"(?:é|[^\s\p{L}\p{N}])+")
    words._find = regex.compile(sign).findall
    assert words._find("né na") == ["n", "é", " na"]
    for _ in range(2):
        assert encoder(["né na"]).tolist() == expected(TOKENIZER, ["né na"])
        assert encoder(["na no"]).tolist() == expected(TOKENIZER, ["na no"])
    assert words._bad == {"é"}


def test_a_full_table_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MOST_WORDS", 5)
    encoder = Encoder(TOKENIZER, 0, np.uint16)
    for i in range(4):
        texts = [f"{TEXT} {i}", "the same"]
        assert encoder(texts).tolist() == expected(TOKENIZER, texts)
    assert encoder._words is not None
    assert len(encoder._words.numbers) < 60


def test_the_mark_inside_a_text_is_text() -> None:
    ids = Encoder(TOKENIZER, 0, np.uint16)([f"a {END_OF_TEXT} b"])
    assert (ids == 0).sum() == 1
    assert TOKENIZER.decode(ids[:-1].tolist(), skip_special_tokens=False) == f"a {END_OF_TEXT} b"


def test_other_tokenizers_get_the_documents_whole() -> None:
    other = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    lower = Tokenizer.from_str(TOKENIZER.to_str())
    lower.normalizer = normalizers.Lowercase()
    prefix = Tokenizer.from_str(TOKENIZER.to_str())
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    added = Tokenizer.from_str(TOKENIZER.to_str())
    added.add_tokens(["two   three"])
    for tokenizer in (other, lower, prefix, added):
        encoder = Encoder(tokenizer, 3, np.uint32)
        assert encoder._words is None
        assert encoder(["a c", TEXT]).tolist() == expected(tokenizer, ["a c", TEXT], 3)
        assert encoder([]).tolist() == []


def test_padding_truncation_and_a_template_are_left_out() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
    tokenizer.normalizer = normalizers.NFC()
    ids = Encoder(tokenizer, 0, np.uint16)(["one two three"])
    assert (ids == 0).sum() == 1
    assert tokenizer.decode(ids.tolist()) == "one two three"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared corpora are not here")
def test_the_gpt2_tokenizer_on_real_text() -> None:
    tokenizer, _ = load_tokenizer(str(SHARED / "gpt2_tokenizer.json.xz"))
    with lzma.open(SHARED / "val_wiki.txt.xz") as file:
        text = file.read(400_000).decode(errors="ignore")
    encoder = Encoder(tokenizer, 50256, np.uint16)
    assert encoder._words is not None
    assert encoder([text]).tolist() == expected(tokenizer, [text], 50256)
