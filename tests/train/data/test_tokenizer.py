"""Tokenizers: trained here, from files, folders and the hub; the end-of-text token; which are alike."""

import json
import lzma
import re
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from sharpwise.train.data import Document, prepare_tokens, same_tokens
from sharpwise.train.data.tokenizer import (
    check_vocabulary,
    choose_tokenizer,
    find_end_of_text,
    load_tokenizer,
    train_bpe,
    vocabulary_of,
)

TEXT = "".join(f"line {i} of a text about {i * i} things\n" for i in range(400))
SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([Document("a", TEXT)], 300)


def test_a_trained_one_knows_all_bytes_and_comes_back(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert vocabulary_of(tokenizer) == 300
    every = "größe 東京 🙂\n\t\x00  x"
    assert tokenizer.decode(tokenizer.encode(every).ids) == every
    assert vocabulary_of(train_bpe([Document("a", "")], 5000)) == 257


def test_only_the_first_text_is_used_for_training() -> None:
    first = [Document("a", TEXT)]
    more = [*first, Document("b", "zq" * 10_000)]
    assert same_tokens(train_bpe(first, 300), train_bpe(more, 300, max_bytes=len(TEXT)))
    assert not same_tokens(train_bpe(first, 300), train_bpe(more, 300))


def test_long_words_are_cut_where_a_bpe_is_trained_and_nowhere_else(tmp_path: Path) -> None:
    text = "a" + " " * 20_000 + "b " + "=" * 20_000 + " one two\n" + TEXT
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("held out")
    prepared = prepare_tokens([tmp_path / "a.txt"], tmp_path / "out", validation_data=tmp_path / "b.txt")
    found = prepared.tokenizer()
    assert max(map(len, found.get_vocab())) == 256  # of the doublings of a space
    ids = prepared.train.shards[0][:-1].tolist()
    assert found.decode(ids) == text.strip("\n")
    assert ids == found.encode(text.strip("\n")).ids
    assert json.loads(found.to_str())["pre_tokenizer"]["type"] == "ByteLevel"


def test_without_long_words_nothing_is_cut() -> None:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = TEXT + "=" * 256 + "\n" + "größe" * 30
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    plain.train_from_iterator([text], trainer)
    assert same_tokens(plain, train_bpe([Document("a", text)], 320))


def test_files_and_folders(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    (tmp_path / "packed.json.xz").write_bytes(lzma.compress(path.read_bytes()))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "the"}}')
    for spec, end in ((path, None), (tmp_path / "packed.json.xz", None), (tmp_path, "the")):
        loaded, declared = load_tokenizer(str(spec))
        assert same_tokens(loaded, tokenizer)
        assert declared == end
    kinds = [choose_tokenizer(spec, 0).settings["kind"] for spec in (path, tmp_path, "gpt2")]
    assert kinds == ["file", "folder", "hub"]
    (tmp_path / "config.json").write_text("{}")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    assert same_tokens(fast, tokenizer)


def test_a_folder_without_the_file_goes_through_transformers(tmp_path: Path) -> None:
    words = ["<|endoftext|>", "a", "b", "ab", "Ġ"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    loaded, declared = load_tokenizer(str(tmp_path))
    assert declared == "<|endoftext|>"
    assert loaded.encode("ab", add_special_tokens=False).ids == [3]


def test_a_name_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no tokenizer 'no/such': not a file, a folder, or the hub") as caught:
        load_tokenizer("no/such")
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    for name, raw in (("a.json", b"{}"), ("b.json", b"\xff"), ("c.json.xz", b"no")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=f"{re.escape(name)} is not a tokenizer.json of `tokenizers`"):
            load_tokenizer(str(tmp_path / name))


def test_the_end_of_text_is_found_or_given(tokenizer: Tokenizer) -> None:
    assert find_end_of_text(tokenizer) == ("<|endoftext|>", 0)
    assert find_end_of_text(tokenizer, declared="gone") == ("<|endoftext|>", 0)
    thing = tokenizer.token_to_id("text")
    if thing is not None:
        assert find_end_of_text(tokenizer, given="text", declared="<|endoftext|>") == ("text", thing)
    with pytest.raises(ValueError, match=r"has no token '<\|endoftxt\|>'; did you mean '<\|endoftext\|>'"):
        find_end_of_text(tokenizer, given="<|endoftxt|>")
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = []
    described["model"]["vocab"]["<stop>"] = described["model"]["vocab"].pop("<|endoftext|>")
    other = Tokenizer.from_str(json.dumps(described))
    other.add_special_tokens(["<stop>"])
    with pytest.raises(ValueError, match=r"none of the usual end-of-text tokens .* \(its special ones: <stop>\)"):
        find_end_of_text(other)


def test_types_for_vocabularies() -> None:
    assert check_vocabulary(65_536) == "uint16"
    assert check_vocabulary(65_537) == "uint32"
    assert check_vocabulary(300, "uint32") == "uint32"
    with pytest.raises(
        ValueError, match=r"65537 is too large for uint16 tokens, which hold 65536; take --token-type u"
    ):
        check_vocabulary(65_537, "uint16")


def test_same_tokens_compares_vocabularies_and_merges(tokenizer: Tokenizer) -> None:
    assert same_tokens(tokenizer, Tokenizer.from_str(tokenizer.to_str()))
    assert not same_tokens(tokenizer, train_bpe([Document("a", TEXT)], 299))
    described = json.loads(tokenizer.to_str())
    described["model"]["merges"].reverse()
    assert not same_tokens(tokenizer, Tokenizer.from_str(json.dumps(described)))


def test_a_vocabulary_too_large_for_the_type_is_refused_for_loaded_ones(tokenizer: Tokenizer, tmp_path: Path) -> None:
    described = json.loads(tokenizer.to_str())
    described["added_tokens"][0]["id"] = described["model"]["vocab"]["<|endoftext|>"] = 70_000
    (tmp_path / "large.json").write_text(json.dumps(described))
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="a vocabulary of 70001 is too large for uint16"):
        prepare_tokens([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "large.json", token_type="uint16")
    wide = prepare_tokens([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "large.json")
    assert (wide.vocabulary, wide.end_of_text, wide.train.shards[0].dtype.itemsize) == (70_001, 70_000, 4)
    assert wide.train.shards[0][-1] == 70_000


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared corpora are not here")
def test_gpt2_on_shakespeare(tmp_path: Path) -> None:
    source = SHARED / "tinyshakespeare.txt.xz"
    prepared = prepare_tokens([source], tmp_path / "out", tokenizer=SHARED / "gpt2_tokenizer.json.xz")
    assert (prepared.vocabulary, prepared.end_of_text) == (50257, 50256)
    assert 3.2 < prepared.about["bytes_per_token"] < 3.4
    parts = [prepared.train, prepared.validation]
    texts = [prepared.tokenizer().decode(part.shards[0][:-1].tolist()) for part in parts]
    assert "".join(texts) == lzma.decompress(source.read_bytes()).decode().strip("\n")
