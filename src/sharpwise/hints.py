"""What somebody may have meant."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint for the message about a name that is not known, empty where nothing is near.

    >>> nearest("adamv", ["lion", "adamw"])
    " (did you mean 'adamw'?)"
    """
    found = difflib.get_close_matches(word, sorted(known), n=1, cutoff=cutoff)
    return f" (did you mean {found[0]!r}?)" if found else ""
