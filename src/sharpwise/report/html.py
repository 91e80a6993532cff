"""The frame of a page: one HTML file with everything in it, readable without a network."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from sharpwise.report.plot import Figure
from sharpwise.report.svg import draw

PAGE_NAME = "index.html"


def document(title: str, body: str) -> str:
    """The whole page as HTML, with style and script inside; `body` is what `main` holds."""
    style, script = (files("sharpwise.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n"
        f"<script>\n{script}</script>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def card(
    title: str, hint: str, content: str, *, wide: bool = False, folded: bool = False, caution: bool = False
) -> str:
    """A titled box of the grid; `content` is HTML, a click away where it is `folded`; `caution` sets it off."""
    hint = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    inner = f"<h2>{escape(title)}</h2>\n{hint}\n{content}"
    if folded:
        inner = f"<details><summary>{escape(title)}</summary>\n{hint}\n{content}\n</details>"
    return f'<section class="card{" wide" * wide}{" caution" * caution}">\n{inner}\n</section>'


def breakable(name: str) -> str:
    """A name of an arm as HTML, which may break after its signs."""
    return escape(re.sub(r"(?<=[+(_/,.-])", "\0", name)).replace("\0", "<wbr>")


def bullets(items: Sequence[str]) -> str:
    """Sentences as a list."""
    return f'<ul class="plain">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def command(text: str) -> str:
    """A command line to copy."""
    words = " ".join(f"<span>{escape(word)}</span>" for word in text.split(" "))
    return f'<pre class="command"><code>{words}</code></pre>'


def notes(items: Sequence[str]) -> str:
    """What a reader has to know before believing any of it."""
    return f'<ul class="notes">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def chart(figure: Figure, name: str, label: str) -> str:
    """A figure as HTML; `label` says what it shows to those who do not see it."""
    return f'<div id="chart-{name}" role="img" aria-label="{escape(label)}">{draw(figure)}</div>'


def table(head: str, lines: Iterable[str], label: str) -> str:
    """A table of HTML cells and rows."""
    # Focusable, so that a keyboard can scroll it where it is wider than the screen.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def facts(items: Iterable[tuple[str, str]], code: Iterable[str] = ()) -> str:
    """Names and values; those of `code` are set as code."""
    names = set(code)
    text = "".join(
        f"<dt>{escape(key)}</dt><dd>{f'<code>{escape(value)}</code>' if key in names else escape(value)}</dd>"
        for key, value in items
    )
    return f"<dl>{text}</dl>"
