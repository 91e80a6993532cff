"""The Args of a docstring, as a table: what `configuration` prints, and looks for."""

import inspect
import re
from typing import Any


def arguments(thing: Any) -> dict[str, str]:
    """By name, what the section Args of a docstring says; `a, b: text` says it of both."""
    section = re.search(r"^Args:\n((?:    .*(?:\n|$)|\n)*)", inspect.getdoc(thing) or "", re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", section[1].rstrip()) if section else []:
        names, _, text = entry.strip().partition(":")
        for name in names.split(","):
            found[name.strip()] = " ".join(text.split())
    return found
