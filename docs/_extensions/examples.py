"""Runs the Python of the pages: what fails, or prints something else than the page says, ends the build.

The blocks of a page marked `python` run one after the other in one namespace; `pycon` blocks are doctests. They find
`torch`, `transformers`, `sharpwise`, and `model`, a small GPT-2. What a reader is not to see stands before a block in a
comment, `<!-- example: code -->`; a block behind `<!-- not run: reason -->` is compiled and not run, nor is one behind
`<!-- needs: package -->` where that is not installed.
"""

import contextlib
import doctest
import importlib.util
import io
import logging as standard
import re
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
FENCE = re.compile(
    r"^<!-- (?P<what>example|not run|needs):(?P<text>.*?)-->\n"
    r"|^(?P<ticks>```+)(?P<language>python|pycon)\n(?P<code>.*?)^(?P=ticks)$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    code: str
    line: int
    language: str
    runs: bool


def blocks(text: str) -> Iterator[Block]:
    """The Python of a page, in order."""
    runs = True
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["what"] == "example":
            yield Block(match["text"].strip(), line, "python", True)
        elif match["what"]:
            runs = match["what"] == "needs" and importlib.util.find_spec(match["text"].strip()) is not None
        else:
            yield Block(match["code"], line + 1, match["language"], runs)
            runs = True


def names() -> dict[str, Any]:
    """What every page finds."""
    import torch
    import transformers

    import sharpwise

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 512, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    return {"torch": torch, "transformers": transformers, "sharpwise": sharpwise, "model": model}


def failures(path: Path) -> list[tuple[int, str]]:
    """Line and message of what is wrong on a page."""
    found = [*blocks(path.read_text(encoding="utf-8"))]
    if not found:
        return []
    wrong, space = [], names()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in found:
            if message := failure(block, space, path):
                wrong.append((block.line, message))
    return wrong


def failure(block: Block, space: dict[str, Any], path: Path) -> str:
    """What is wrong with one, "" for nothing."""
    said = io.StringIO()
    if block.language == "pycon":
        test = doctest.DocTestParser().get_doctest(block.code, space, path.name, str(path), block.line - 1)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        doctest.DocTestRunner(optionflags=flags).run(test, out=said.write, clear_globs=False)
        space |= test.globs
        return said.getvalue()
    try:
        code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
        if block.runs:
            with contextlib.redirect_stdout(said):
                exec(code, space)
    except Exception:
        return traceback.format_exc(limit=-2)
    return ""


def check(app: Sphinx, env: Any) -> None:
    for name in sorted(env.found_docs):
        path = Path(env.doc2path(name))
        logging_of_others(False)
        wrong = failures(path)
        logging_of_others(True)
        for line, message in wrong:
            logger.warning("the example fails:\n%s", message, location=(name, line))


def logging_of_others(on: bool) -> None:
    """What examples log is no warning of the build."""
    standard.disable(standard.NOTSET if on else standard.CRITICAL)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("env-check-consistency", check)
    return {"version": "1", "parallel_read_safe": True}
