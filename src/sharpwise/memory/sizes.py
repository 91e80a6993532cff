"""Sizes in bytes, read and written as people do."""

import re

_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**i for i, letter in enumerate("KMGT", start=1)},
    **{f"{letter}iB": 1024**i for i, letter in enumerate("KMGT", start=1)},
}


def parse_size(text: str) -> int:
    """Bytes of a size with its unit.

    Raises:
        ValueError: it is none.

    >>> parse_size("80GB"), parse_size("1.5 GiB")
    (80000000000, 1610612736)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    size = float(found[1]) * units.get(found[2].lower(), 0) if found else 0.0
    if not 1 <= size < 2**60:
        raise ValueError(f"got {text!r}, expected a size with its unit, as 80GB (80e9 bytes) or 80GiB (80 * 2**30)")
    return int(size)


def size_text(count: float | None, digits: int = 2) -> str:
    """A number of bytes with its unit, a dash for None.

    Args:
        count: of bytes.
        digits: behind the point.

    >>> size_text(24), size_text(5_803_122_688), size_text(498_606_080, 1), size_text(None)
    ('24 B', '5.40 GiB', '475.5 MiB', '-')
    """
    if count is None:
        return "-"
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= 0.9995 * size:
            return f"{count / size:,.{digits}f} {unit}"
    return f"{count:,.0f} B"
