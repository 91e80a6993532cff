"""A small table: rows one can iterate over, that print themselves aligned."""

from collections.abc import Iterator, Sequence
from typing import Any


class Table(Sequence[dict[str, Any]]):
    """Rows of named values. Iterate for dicts, `str()` for aligned text, numbers to the right.

    `shown`, where given, is the shorter table that is printed in its place.

    >>> print(Table(("name", "elements", "lr"), [("wte", 38597376, 0.1), ("ln_f", 768, None)]))
    name    elements   lr
    wte   38,597,376  0.1
    ln_f         768    -
    """

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], shown: "Table | None" = None) -> None:
        self.columns = tuple(columns)
        self._rows = [tuple(row) for row in rows]
        self.shown: Table = self if shown is None else shown

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Table(self.columns, self._rows[index])
        return dict(zip(self.columns, self._rows[index], strict=True))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (dict(zip(self.columns, row, strict=True)) for row in self._rows)

    def __str__(self) -> str:
        if self.shown is not self:
            return str(self.shown)
        cells = [self.columns, *(tuple(_text(value) for value in row) for row in self._rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        columns = [[row[i] for row in self._rows] for i in range(len(widths))]
        aligned = [str.rjust if values and all(map(_is_number, values)) else str.ljust for values in columns]
        lines = ([put(c, w) for put, c, w in zip(aligned, row, widths, strict=True)] for row in cells)
        return "\n".join("  ".join(line).rstrip() for line in lines)

    __repr__ = __str__


def _is_number(value: Any) -> bool:
    """Of a column that is one of numbers; nothing is none of them, and does not say otherwise."""
    return value is None or value == "" or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
