"""A small table: rows one can iterate over, that print themselves aligned."""

from collections.abc import Iterator, Sequence
from typing import Any


class Table(Sequence[dict[str, Any]]):
    """Rows of named values. Iterate for dicts, `str()` for aligned text.

    `shown`, where given, is the shorter table that is printed in its place.

    >>> print(Table(("name", "lr"), [("wte", 0.1), ("ln_f", None)]))
    name  lr
    wte   0.1
    ln_f  -
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
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)

    __repr__ = __str__


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
