"""Studies that come with sharpwise: a folder below `recipes/` each, with the study file and its committed results."""

from pathlib import Path

from sharpwise.hints import nearest

FILE = "study.toml"


def recipes_folder() -> Path:
    """Where the recipes are: beside the sources of a clone."""
    return Path(__file__).parents[3] / "recipes"


def list_recipes() -> list[str]:
    """Their names."""
    folder = recipes_folder()
    return sorted(path.parent.name for path in folder.glob(f"*/{FILE}")) if folder.is_dir() else []


def find_recipe(name: str) -> Path:
    """The study file of a recipe, as `blockwise_lr`, or another one in its folder, as `blockwise_lr/gpu`.

    Raises:
        ValueError: there is none of that name.
    """
    base, _, variant = name.partition("/")
    path = recipes_folder() / base / (f"{variant}.toml" if variant else FILE)
    if path.is_file():
        return path
    known = list_recipes()
    if not known:
        raise ValueError("recipes come with a clone of the repository, and there are none here; give a study file")
    raise ValueError(f"no recipe is called {name!r}{nearest(base, known)}; there are {', '.join(known)}")
