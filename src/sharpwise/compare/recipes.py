"""Studies that come with sharpwise: a folder below `recipes/` each, with study files and their committed results."""

import re
import tomllib
from pathlib import Path

from sharpwise.hints import nearest

FILE = "study.toml"


def recipes_folder() -> Path:
    """Where the recipes are: beside the sources of a clone."""
    return Path(__file__).parents[3] / "recipes"


def list_recipes() -> list[str]:
    """Their names: those of the folders with a `study.toml`, and `folder/file` of studies in others."""
    found = []
    for folder in recipes_folder().glob("*/"):
        if (folder / FILE).is_file():
            found.append(folder.name)
        else:  # files without arms are runs
            studies = (path for path in folder.glob("*.toml") if "arms" in tomllib.loads(path.read_text("utf-8")))
            found += [f"{folder.name}/{path.stem}" for path in studies]
    return sorted(found)


def find_recipe(name: str) -> Path:
    """The study file of a recipe, as `blockwise_lr`, or one of several in its folder, as `sgd_sai/vit`.

    Raises:
        ValueError: there is none of that name.
    """
    base, _, variant = name.partition("/")
    path = recipes_folder() / base / (f"{variant}.toml" if variant else FILE)
    if re.fullmatch(r"\w+(/[\w-]+)?", name) and path.is_file():
        return path
    known = list_recipes()
    if not known:
        raise ValueError("recipes come with a clone of the repository, and there are none here; give a study file")
    raise ValueError(f"no recipe is called {name!r}{nearest(name, known)}; there are {', '.join(known)}")
