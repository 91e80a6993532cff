"""The text that studies of the tests train on."""

from pathlib import Path

import pytest

from sharpwise.train.data import prepare_tokens

TEXT = "The quick fox jumps over the lazy dog, and {} other foxes watch. Why {}? Nobody knows, not even fox {}.\n"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    documents = [TEXT.format(i, i * 7 % 11, i * i) * 20 for i in range(40)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    prepare_tokens([folder / "text.txt"], folder / "tokens", vocabulary=300, validation=0.1)
    return folder / "tokens"
