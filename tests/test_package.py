"""What is published says the same everywhere: versions, Python, extras, and a release that only a tag starts."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml

from sharpwise import __version__
from sharpwise.installing import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def brought_by(extra: str) -> set[str]:
    """The modules of an extra, and of those that it takes in."""
    found = set()
    for line in PROJECT["optional-dependencies"][extra]:
        if inner := re.fullmatch(r"sharpwise\[(.*)\]", line):
            found |= {name for part in inner.group(1).split(",") for name in brought_by(part)}
        else:
            found.add(re.split(r"[><=;\[ ]", line)[0].replace("-", "_"))
    return found


def named(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The extras that calls in a source name, and where: `needs(what, extra)`, `lacks(..., extra)`, `install_line`."""
    place = {"needs": 1, "lacks": 2, "install_line": 0}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in place:
            given = node.args[place[node.func.id] :]
            if given and isinstance(given[0], ast.Constant):
                yield given[0].value, node


def test_errors_name_extras_that_there_are() -> None:
    found = {extra: path for path in SOURCES for extra, _ in named(ast.parse(path.read_text()))}
    assert {"cli", "compare", "hf", "measure", "train"} == found.keys()
    assert found.keys() <= PROJECT["optional-dependencies"].keys()


def test_lines_to_install_name_extras_that_there_are() -> None:
    seen = set()
    for path in (*SOURCES, *DOCUMENTS):
        text = path.read_text(encoding="utf-8")
        for extras in re.findall(r"(?:sharpwise|PATH_OF_\w+|\.)\[([a-z,]+)\]['\"`]", text):
            assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys(), f"{path}: {extras}"
            seen.add(extras)
    assert {"dev", "train"} <= seen


def test_an_error_names_an_extra_that_brings_what_is_missing() -> None:
    """Of every `with needs(what, extra)` the imports below it; of all extras, what `installing` knows."""
    seen = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.With):
                continue
            extras = [extra for item in node.items for extra, _ in named(item.context_expr)]
            imports = [inner for inner in ast.walk(node) if isinstance(inner, (ast.Import, ast.ImportFrom))]
            names = {inner.module if isinstance(inner, ast.ImportFrom) else inner.names[0].name for inner in imports}
            for extra in extras:
                modules = {str(name).partition(".")[0] for name in names} & EXTRAS
                assert modules <= brought_by(extra), f"{path}:{node.lineno}"
                seen += len(modules)
    assert seen >= 5
    assert brought_by("train") == EXTRAS == {name for extra in ("hf", "compare", "train") for name in brought_by(extra)}


def test_the_version_is_said_once_and_cited() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__
    assert cited["license"] == PROJECT["license"]
    assert cited["abstract"].rstrip(".") == PROJECT["description"]
    assert cited["authors"] == PROJECT["authors"]
    assert {"cff-version", "message", "title"} <= cited.keys()


def test_classifiers_and_the_oldest_python_agree() -> None:
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert f">={min(versions, key=lambda v: int(v[2:]))}" == PROJECT["requires-python"]
    assert not any(line.startswith("License ::") for line in PROJECT["classifiers"])  # PEP 639
    assert (ROOT / "src" / "sharpwise" / "py.typed").exists() and "Typing :: Typed" in PROJECT["classifiers"]


def test_only_a_tag_publishes_and_only_what_ci_has_passed() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert flow[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    build, publish = flow["jobs"]["build"], flow["jobs"]["publish"]
    runs = " ".join(step.get("run", "") for step in build["steps"])
    assert ".ci/run" in runs and "-m build" in runs and "_version.py" in runs
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    assert "id-token" not in str(flow["permissions"]) + str(build.get("permissions", ""))
    targets = re.findall(r"^make ([^.\n].*)$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert {"lint", "types", "package", "docs"} <= {word for line in targets for word in line.split()}
