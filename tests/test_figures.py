"""Figures of README and docs are those of the committed files, and one that is changed on either side is noticed."""

import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import figures

    yield figures
    for name in ("figures", "figures_docs", "figures_results"):
        sys.modules.pop(name)


@pytest.fixture
def copied(figures, tmp_path):
    """The documents and their files, to be changed; and which files they read."""
    read = []

    def load(path):
        read.append(path)
        return figures.loader(ROOT)(path)

    for document, sentences in figures.DOCUMENTS.items():
        list(sentences(load))
        (tmp_path / document).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / document, tmp_path / document)
    for path in set(read):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path, sorted(set(read))


def test_documents_say_what_the_files_say(figures):
    assert figures.problems() == []


@pytest.mark.parametrize(
    ("document", "old", "new"),
    [
        ("README.md", "0.077 nats below", "0.078 nats below"),
        ("docs/results/speed.md", "| 475.5 |", "| 475.6 |"),
        ("docs/results/speed.md", "moves 20 bytes", "moves 21 bytes"),
        ("docs/choose.md", "was 0.0018 without", "was 0.0019 without"),
        ("docs/guides/measure.md", "qk=4.5", "qk=4.6"),
        ("docs/concepts/block_lr.md", "(p 0.056)", "(p 0.055)"),
    ],
)
def test_a_figure_that_is_changed_in_a_document_is_noticed(figures, copied, document, old, new):
    root, _ = copied
    text = (root / document).read_text()
    assert old in text
    (root / document).write_text(text.replace(old, new))
    (found, *_) = figures.problems(root)
    assert found.startswith(f"{document}: the files say") and old in found and new in found


def test_a_figure_stands_in_one_place(figures):
    """So that a second one cannot go stale behind the first."""
    for document, sentences in figures.DOCUMENTS.items():
        text = figures.plain((ROOT / document).read_text())
        for sentence in map(figures.plain, sentences(figures.loader(ROOT))):
            assert text.count(sentence) == 1 and re.search(r"\d", sentence), sentence


def test_a_figure_that_is_changed_in_a_file_is_noticed(figures, copied):
    root, files = copied
    assert len(files) >= 12
    for name in files:
        path, text = root / name, (root / name).read_text()
        path.write_text(json.dumps(_changed(json.loads(text), random.Random(0))))
        try:
            found = figures.problems(root)
        # What a sentence takes for granted, such as which arm is better, or that there is a certain step.
        except (AssertionError, KeyError, ValueError, RuntimeError):
            found = ["not what a sentence takes for granted"]
        assert found, f"{name} may be changed without a word"
        path.write_text(text)


def _changed(value, rng):
    """Every number up to a fifth larger or smaller, but for small whole ones, which are names as often as figures."""
    if isinstance(value, dict):
        return {key: _changed(own, rng) for key, own in value.items()}
    if isinstance(value, list):
        return [_changed(own, rng) for own in value]
    if isinstance(value, float):
        return value * rng.uniform(0.8, 1.2)
    return int(value * rng.uniform(1.01, 1.2)) if type(value) is int and value > 100 else value


def test_numbers_without_a_source_are_listed(figures):
    listed = dict(figures.unchecked("docs/choose.md"))
    assert "0.001 nats below" in listed["0.001"]
    assert "0.0018" not in listed and "7.2" not in listed  # checked, and part of a block of code
