"""A figure as plain values: its curves, bars, notes and axes. `svg` draws it.

Names and meanings are Plotly's, of whose figures this is the small part that the pages draw: who knows one knows the
other. On a logarithmic axis ranges and places of notes are powers of ten, data and lines are values.
"""

from collections.abc import Iterable, Mapping
from typing import Any


class Node:
    """Named values, each also an attribute; what was not set is None. Mappings become nodes, sequences tuples.

    >>> node = Node(line={"width": 2}, x=[1, 2])
    >>> node.line.width, node.x, node.name
    (2, (1, 2), None)
    """

    def __init__(self, **values: Any) -> None:
        self.update(**values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = _plain(value)

    def update(self, **values: Any) -> None:
        """Set values; those of a mapping that is there already one by one."""
        for name, value in values.items():
            if isinstance(value, Mapping) and isinstance(old := getattr(self, name), Node):
                old.update(**value)
            else:
                setattr(self, name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Node(**value)
    if isinstance(value, Iterable) and not isinstance(value, (str, Node)):
        return tuple(map(_plain, value))
    return value


class Figure:
    """Traces in the order in which they are drawn, and a layout: axes, margins in pixels, notes, straight lines."""

    def __init__(self, layout: Mapping[str, Any]) -> None:
        self.data: list[Node] = []
        self.layout = Node(**{"xaxis": {}, "yaxis": {}, "margin": {}, "annotations": (), "shapes": (), **layout})

    def add_scatter(self, **values: Any) -> None:
        """A curve, points, or both: `mode`."""
        self.data.append(Node(type="scatter", **values))

    def add_bar(self, **values: Any) -> None:
        """Bars, upright or lying (`orientation="h"`, where they are stacked)."""
        self.data.append(Node(type="bar", **values))

    def add_heatmap(self, **values: Any) -> None:
        """A table `z` of numbers as colours."""
        self.data.append(Node(type="heatmap", **values))

    def add_annotation(self, **values: Any) -> None:
        """A note: escaped text with <br>, <b> and <span style="color:#...">."""
        self.layout.annotations += (Node(**values),)

    def add_hline(self, y: float, **values: Any) -> None:
        """A line across the figure."""
        self.layout.shapes += (Node(type="line", y0=y, y1=y, **values),)

    def add_vline(self, x: float, **values: Any) -> None:
        """A line from the bottom to the top."""
        self.layout.shapes += (Node(type="line", x0=x, x1=x, **values),)

    def add_vrect(self, x0: float, x1: float, **values: Any) -> None:
        """A band from the bottom to the top."""
        self.layout.shapes += (Node(type="rect", x0=x0, x1=x1, **values),)

    def update_xaxes(self, **values: Any) -> None:
        """Change the x axis."""
        self.layout.xaxis.update(**values)

    def update_yaxes(self, **values: Any) -> None:
        """Change the y axis."""
        self.layout.yaxis.update(**values)

    def update_layout(self, **values: Any) -> None:
        """Change the layout."""
        self.layout.update(**values)
