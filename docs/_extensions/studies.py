"""Results of studies, read from the committed JSON: `.. study:: recipes/muon/result.json`.

Nothing of them is typed. A study that is committed and has no place on a page is a warning, and warnings end the build.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from committed import HEAD, ROOT, committed, load, losses, rows, setting
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)
Rows = Sequence[Sequence[str]]


class Study(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = self.arguments[0]
        if path not in committed():
            raise self.error(f"{path} is no committed study: there are {', '.join(committed())}")
        self.env.note_dependency(str(ROOT / path))
        said(self.env).add(path)
        study = load(path)
        drawn = losses(study)
        return [
            nodes.paragraph("", setting(study)),
            table(HEAD, rows(study)),
            *([nodes.raw("", f'<div class="picture">{drawn}</div>', format="html")] if drawn else []),
            *listed("What to know before believing it:", study["caveats"]),
            *listed("Not tested:", study["not_tested"]),
        ]


def listed(head: str, items: Sequence[str]) -> list[nodes.Node]:
    """A list under a line, nothing where it is empty."""
    found = nodes.bullet_list("", *(nodes.list_item("", nodes.paragraph("", one)) for one in items))
    return [nodes.paragraph("", head), found] if items else []


def table(head: Sequence[str], body: Iterator[list[str]] | Rows) -> nodes.table:
    """Cells of text; one in backticks is code."""

    def row(cells: Sequence[str]) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *cell_of(cell))) for cell in cells))

    def cell_of(cell: str) -> list[nodes.Node]:
        return [nodes.literal("", cell[1:-1])] if cell.startswith("`") else [nodes.Text(cell)]

    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    group += nodes.thead("", row(head))
    group += nodes.tbody("", *map(row, body))
    return nodes.table("", group)


def said(env: Any) -> set[str]:
    if not hasattr(env, "sharpwise_studies"):
        env.sharpwise_studies = set()
    return env.sharpwise_studies  # type: ignore[no-any-return]


def check(app: Sphinx, env: Any) -> None:
    for path in sorted({*committed()} - said(env)):
        logger.warning("%s is committed, and no page shows it: results/index.md needs `study` of it", path)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("study", Study)
    app.connect("env-check-consistency", check)
    return {"version": "1", "parallel_read_safe": False}
