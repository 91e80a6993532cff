"""Holds the figures of README, docs and docstrings against the committed files that they come from, to the digit.

    python benchmarks/figures.py               fails where a document does not say what the files say
    python benchmarks/figures.py --unchecked   also lists the numbers that no sentence below reaches

A document has a function in `figures_results.py` or `figures_docs.py`, which yields its sentences with the figures read
from the files. Each has to be in the document, word for word; where lines break is free. Who adds a figure that a
command has made commits what it made, and yields the sentence that tells it.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from figures_docs import (
    block_lr,
    coverage_of_draws,
    coverage_of_speedup,
    kept_graph,
    measure,
    muon,
    storage,
)
from figures_methods import adapm, blockwise_adam
from figures_rates import rates
from figures_results import blocks, capped, choose, controls, distributed, evidence, fine_tuning, readme, speed, where
from figures_updates import update_size

ROOT = Path(__file__).parents[1]
Load = Callable[[str], Any]
DOCUMENTS: dict[str, Callable[[Load], Iterator[str]]] = {
    "README.md": readme,
    "docs/choose.md": choose,
    "docs/concepts/blocks.md": blocks,
    "docs/concepts/evidence.md": evidence,
    "docs/concepts/block_lr.md": block_lr,
    "docs/concepts/controls.md": controls,
    "docs/concepts/storage.md": storage,
    "docs/guides/distributed.md": distributed,
    "docs/guides/measure.md": measure,
    "docs/guides/memory.md": capped,
    "docs/methods/adapm.md": adapm,
    "docs/methods/blockwise_adam.md": blockwise_adam,
    "docs/methods/muon.md": muon,
    "docs/results/fine_tuning.md": fine_tuning,
    "docs/results/rates.md": rates,
    "docs/results/speed.md": speed,
    "docs/results/update_size.md": update_size,
    "docs/results/where.md": where,
    "src/sharpwise/compare/speedup.py": coverage_of_speedup,
    "src/sharpwise/probes/monte_carlo.py": coverage_of_draws,
    "src/sharpwise/probes/products.py": kept_graph,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--unchecked", action="store_true", help="list numbers that no sentence reaches")
    args = parser.parse_args()
    wrong = problems()
    for problem in wrong:
        print(problem, file=sys.stderr)
    if args.unchecked:
        for document in DOCUMENTS:
            for number, around in unchecked(document):
                print(f"{document}: {number:>10}  {around}")
    if wrong:
        sys.exit(f"{len(wrong)} sentences are not what the files say: correct the document, or what makes the file")


def problems(root: Path = ROOT) -> list[str]:
    """What is wrong, in words: the document, the sentence as the files say it, and what there is in its place."""
    found = []
    load = loader(root)
    for document, sentences in DOCUMENTS.items():
        text = plain((root / document).read_text(encoding="utf-8"))
        for sentence in map(plain, sentences(load)):
            if sentence not in text:
                found.append(f"{document}: the files say\n    {sentence}\n  and it says\n    {nearest(sentence, text)}")
    return found


def loader(root: Path) -> Load:
    """Reads a committed JSON file, once."""

    @cache
    def load(path: str) -> Any:
        return json.loads((root / path).read_text(encoding="utf-8"))

    return load


def plain(text: str) -> str:
    """Without line breaks and indentation."""
    return " ".join(text.split())


def nearest(sentence: str, text: str) -> str:
    """The part of a text that most looks like a sentence."""
    size = len(sentence)
    block = difflib.SequenceMatcher(None, text, sentence, autojunk=False).find_longest_match()
    start = max(block.a - block.b, 0)
    return text[start : start + size]


def unchecked(document: str, root: Path = ROOT) -> list[tuple[str, str]]:
    """Numbers of a document, code and addresses left out, that stand in none of its sentences; and what is around."""
    text = (root / document).read_text(encoding="utf-8")
    text = plain(re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    reached = bytearray(len(text))
    spans = [(m.start(), m.end()) for m in re.finditer(r"`[^`]*`|\(https?:[^)]*\)", text)]
    for sentence in map(plain, DOCUMENTS[document](loader(root))):
        start = text.find(sentence)
        spans += [(start, start + len(sentence))] if start >= 0 else []
    for start, end in spans:
        reached[start:end] = b"\1" * (end - start)
    numbers = re.finditer(r"(?<![\w.-])\d+(?:[,.]\d+)*(?!\w)", text)
    return [(m[0], text[max(m.start() - 40, 0) : m.end() + 30]) for m in numbers if not reached[m.start()]]


if __name__ == "__main__":
    main()
