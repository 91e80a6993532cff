"""How to install what is missing: the command depends on where sharpwise was installed from."""

import importlib.metadata
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

EXTRAS = frozenset(
    (
        "accelerate",
        "datasets",
        "optuna",
        "pyarrow",
        "rich",
        "safetensors",
        "scipy",
        "tensorboard",
        "tokenizers",
    )
) | {"tomli_w", "transformers", "typer"}
"""Modules that the extras bring."""


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Around imports: raises ImportError that says what `what` lacks, and the command that installs the `extra`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if _package(error) not in EXTRAS:
            raise  # what lacks something is installed
        raise ImportError(lacks(what, error, extra), name=error.name) from error


def lacks(what: str, error: ModuleNotFoundError, extra: str = "train") -> str:
    """The message about a module that was not found; the extra `train` has all that the command line may need."""
    package = _package(error)
    if package not in EXTRAS:
        return str(error)
    return f"{what} needs {package}, which is not installed: {install_line(extra)}"


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]


def install_line(extra: str) -> str:
    """The command that adds the packages of an extra to this Python, for the shell."""
    return pip_install(_requirement(extra))


def pip_install(what: str) -> str:
    """The command that installs something into this Python, for the shell."""
    python = shlex.quote(sys.executable or "python")
    try:
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:  # what uv sets up has none of its own
        return f"uv pip install --python {python} {what}"
    return f"{python} -m pip install {what}"


def _requirement(extra: str) -> str:
    try:
        origin = importlib.metadata.distribution("sharpwise").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:  # found by its path, not installed
        return _of_folder(Path(__file__).parents[2], extra, editable=True)
    if origin is None:
        return shlex.quote(f"sharpwise[{extra}]")  # from an index, which knows it then
    origin = json.loads(origin)
    url = urlsplit(origin["url"])
    if "dir_info" in origin:
        editable = origin["dir_info"].get("editable", False)
        return _of_folder(Path(url2pathname(unquote(url.path))), extra, editable=editable)
    vcs = origin.get("vcs_info")
    place = f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}" if vcs else origin["url"]
    return shlex.quote(f"sharpwise[{extra}] @ {place}")


def _of_folder(folder: Path, extra: str, *, editable: bool) -> str:
    """Of a clone, which may be gone by now."""
    place = shlex.quote(f"{folder}[{extra}]") if (folder / "pyproject.toml").exists() else f"'PATH_OF_A_CLONE[{extra}]'"
    return f"-e {place}" if editable else place
