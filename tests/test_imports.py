"""Imports point down: by the rungs of the package, and without a circle of files, wherever in a file they stand.

Read from the source, so that what a function imports and what only a type checker imports count like any other.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

RUNGS = (
    ("_version", "files", "hints", "installing", "model_facts", "processes", "table"),
    ("shards",),
    ("blocks",),
    ("rules", "storage", "controls", "block_lr"),
    ("engine",),
    ("probes",),
    ("arms", "blockwise", "combinations", "groups", "named", "optim", "rotated"),
    ("",),  # what `import sharpwise` gives
    ("train",),
    ("compare", "measure", "memory", "report"),
    ("tune",),
    ("integrations", "cli"),
    ("__main__", "testing"),
)
RUNG = {part: number for number, rung in enumerate(RUNGS) for part in rung}

Imports = Mapping[str, Mapping[str, int]]
"""By file the files that it imports, and in which line."""


def imports(source: Path) -> dict[str, dict[str, int]]:
    """Who imports whom below `source`, modules by their full names."""
    files = {_name(path.relative_to(source)): path for path in sorted(source.rglob("*.py"))}
    return {name: dict(_imported(name, path, files)) for name, path in files.items()}


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(name: str, path: Path, files: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{base}.{alias.name}" for alias in node.names]
            found = [module if module in files else base for module in found]
        else:
            continue
        for module in found:
            parts = module.split(".")
            # A package's own file runs before the modules in it, which are all that its members wait for.
            for known in {".".join(parts[:n]) for n in range(1, len(parts) + 1)}:
                inside = known == "sharpwise" or f"{name}.".startswith(f"{known}.")
                if known in files and known != name and (known == module or not inside):
                    yield known, node.lineno


def part(module: str) -> str:
    """What of the package a module belongs to: sharpwise.blocks.trace.rows -> blocks."""
    return module.partition(".")[2].partition(".")[0]


def upward(found: Imports) -> list[str]:
    """Imports that point up."""
    return [
        f"{module}:{line} imports {other}"
        for module, others in found.items()
        for other, line in others.items()
        if RUNG[part(other)] > RUNG[part(module)]
    ]


def sideways(found: Imports) -> list[str]:
    """The parts of one rung that import in a circle, if any do."""
    pairs = {(part(module), part(other)) for module, others in found.items() for other in others}
    beside: dict[str, set[str]] = {name: set() for name in RUNG}
    for a, b in pairs:
        if a != b and RUNG[a] == RUNG[b]:
            beside[a].add(b)
    return circle(beside)


def circle(found: Mapping[str, Iterable[str]]) -> list[str]:
    """One circle of what imports what, if there is any: the first is the last."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def package() -> Imports:
    return imports(SOURCE)


def test_every_part_has_a_rung(package: Imports) -> None:
    assert {part(module) for module in package} <= set(RUNG)


def test_nothing_imports_what_stands_above(package: Imports) -> None:
    assert not upward(package)


def test_parts_of_a_rung_import_in_no_circle(package: Imports) -> None:
    assert not sideways(package)


def test_files_import_in_no_circle(package: Imports) -> None:
    assert not circle(package)


# --- the reading itself ----------------------------------------------------------------------------------------------


def written(folder: Path, **files: str) -> Imports:
    """What is read of files given by their names, `__` for a folder."""
    for name, text in files.items():
        path = folder / "sharpwise" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    return imports(folder)


UP = "from sharpwise.engine.plan import Plan\n"


@pytest.mark.parametrize(
    "text",
    [
        UP,
        "import sharpwise.engine.plan\n",
        "from sharpwise.engine import plan\n",
        "from ..engine.plan import Plan\n",
        "from ..engine import plan\n",
        f"def late():\n    {UP}",
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {UP}",
        f"try:\n    {UP}except ImportError:\n    pass\n",
    ],
)
def test_an_import_is_seen_wherever_and_however_it_is_written(tmp_path: Path, text: str) -> None:
    found = written(tmp_path, engine__plan="", blocks__map=text)
    assert "sharpwise.engine.plan" in found["sharpwise.blocks.map"]
    assert any("imports sharpwise.engine.plan" in said for said in upward(found))


@pytest.mark.parametrize("back", ["report", "measure"])
def test_packages_of_a_rung_in_a_circle_are_seen(tmp_path: Path, back: str) -> None:
    files = {
        "compare__arms": "from sharpwise.report.page import Page",
        "compare__study": "",
        "report__page": "",
        "report__rows": "from sharpwise.measure.order import Order",
        "measure__order": "",
    }
    assert not sideways(written(tmp_path, **files))
    found = written(tmp_path, **files, **{f"{back}__more": "from sharpwise.compare.study import Study"})
    assert {"compare", back} <= set(sideways(found)) <= {"compare", "report", "measure"}
    assert not upward(found) and not circle(found)


@pytest.mark.parametrize(
    "third",
    [
        "from sharpwise.blocks.a import A",
        "def late():\n    from . import a",
        "from sharpwise.blocks import anything",  # by the package's own file
    ],
)
def test_a_circle_of_files_is_seen(tmp_path: Path, third: str) -> None:
    files = {"blocks__a": "from sharpwise.blocks.b import B", "blocks__b": "from .c import C", "blocks__c": third}
    written(tmp_path, **files)
    (tmp_path / "sharpwise" / "blocks" / "__init__.py").write_text("from sharpwise.blocks.a import A")
    assert len(set(circle(imports(tmp_path)))) >= 3
    assert not circle(written(tmp_path, **{**files, "blocks__c": "import sharpwise.blocks.d", "blocks__d": ""}))
