"""What the build of the documentation refuses: `make docs` fails where a page, an example or a link breaks."""

import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BREAKS = {  # page: (what is there, what is put in its place, what the build says)
    "start.md": (
        "lr=6e-4, weight_decay=0.1)",
        "lr=-1.0, weight_decay=0.1)",
        r"start.md:\d+: WARNING: the example fails",
    ),
    "choose.md": ("\n7.2\n", "\n7.3\n", r"choose.md:\d+: WARNING: the example fails"),
    "design.md": (
        "(concepts/engine.md)",
        "(concepts/engin.md)",
        "cross-reference target not found: 'concepts/engin.md'",
    ),
    "guides/switching.md": ("#checkpoints", "#checkpoint", "checkpoint"),
    "concepts/block_lr.md": (
        "`sharpwise.probes.calibrate",
        "`sharpwise.probes.calibrated",
        "no sharpwise.probes.calibrated",
    ),
    "reference/probes.md": (
        ".. public:: sharpwise.probes\n",
        ".. public:: sharpwise.memory\n",
        "sharpwise.probes.rrc is public",
    ),
    "reference/configuration.md": (
        ".. configuration:: mesh",
        ".. configuration:: log",
        "the configuration keys of mesh",
    ),
    "reference/commands.md": (".. command:: runs", ".. command:: page", "the command sharpwise runs"),
    "results/index.md": ("recipes/llr/result.json", "recipes/muon/result.json", "recipes/llr/result.json is committed"),
}


@pytest.fixture
def extension(monkeypatch):
    """Imports a module of docs/_extensions, where Sphinx is installed."""
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    yield import_module
    for name in ("commands", "configuration", "docstrings", "examples", "paper", "public"):
        sys.modules.pop(name, None)


def test_an_option_that_a_docstring_lacks_is_found(extension):
    def told(a, b=1, *, c=2, d=3):
        """Short.

        Args:
            a: one.
            b, c: two. d: three.
        """

    def untold(a, b=1, *, c=2):
        """Short: c is not here.

        Args:
            a, b: one, of `c`: no.
        """

    public = extension("public")
    assert (public.untold(told), public.untold(untold)) == ([], ["c"])


def test_docstrings_are_plain_text_but_for_names_and_code(extension):
    lines = ["a * b, |u|, the `x_*` of x_", "Example::", "", "    _target_: a * b", "", "end_ of it", ">>> print(*a)"]
    expected = [r"a \* b, \|u\|, the `x_*` of x\_", *lines[1:5], r"end\_ of it", lines[6]]
    assert [*extension("public").escaped(lines)] == expected


def test_a_public_name_without_a_page_is_found(extension):
    public = extension("public")
    modules = [import_module(name) for name in public.public_modules()]
    every = {public.key(module, name) for module in modules for name in public.exported(module)}
    assert not [*public.undocumented(every)]
    assert "sharpwise.AdaPM" in [*public.undocumented(every - {public.key(modules[0], "AdaPM")})]


def test_examples_that_fail_or_print_something_else_are_found(extension, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- example: two = 2 -->\n```python\nthree = two + 1\n```\n\n```pycon\n>>> three\n3\n```\n"
        "<!-- not run: it would fail -->\n```python\nfour\n```\n"
        "```pycon\n>>> three\n4\n```\n\n```python\n\nfive\n```\n"
        "<!-- not run: nor does it compile -->\n```python\nsix seven\n```\n"
    )
    examples = extension("examples")
    monkeypatch.setattr(examples, "names", dict)  # no model: these need none
    found = examples.failures(page)
    assert [line for line, _ in found] == [15, 20, 25]
    for (_, message), expected in zip(
        found, ("Expected:\n    4\nGot:\n    3", "'five' is not", "invalid syntax"), strict=True
    ):
        assert expected in message


def test_the_head_of_a_module_is_markdown_whose_tables_hold(extension, monkeypatch, tmp_path):
    (tmp_path / "good_head.py").write_text('"""One.\n\n| a | b |\n|---|---|\n| c | d |\n\nDeparts: here.\n"""\n')
    (tmp_path / "bad_head.py").write_text('"""One.\n\n| a | b |\n|---|---|\n| c | |u|^2 |\n"""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    paper = extension("paper")
    assert paper.markdown("good_head")[-1] == "**Departs:** here."
    with pytest.raises(ValueError, match=r"bad_head: a row of a table"):
        paper.markdown("bad_head")


def test_every_key_and_option_says_something(extension):
    keys = [key for table in extension("configuration").tables().values() for key in table]
    assert len(keys) > 50 and all(key.text for key in keys)
    options = [one for command in extension("commands").commands().values() for one in command.params]
    assert len(options) > 50 and all(one.help for one in options)


@pytest.mark.slow
def test_a_build_fails_where_a_page_breaks(extension, tmp_path):
    for part in ("docs", "recipes", "benchmarks", "CONTRIBUTING.md"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    for page, (old, new, _) in BREAKS.items():
        text = (tmp_path / "docs" / page).read_text()
        assert old in text, page
        (tmp_path / "docs" / page).write_text(text.replace(old, new, 1))
    command = [sys.executable, "-m", "sphinx", "-EWnq", "--keep-going", tmp_path / "docs", tmp_path / "out"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert built.returncode == 1
    for page, (_, _, said) in BREAKS.items():
        assert re.search(said, built.stderr), (page, built.stderr)
