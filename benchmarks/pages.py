"""Pages of the recipes that have results, written from these: python benchmarks/pages.py"""

import json
from collections.abc import Iterator
from pathlib import Path

from sharpwise.compare.report.page import render
from sharpwise.files import write_whole

RECIPES = Path(__file__).parents[1] / "recipes"


def pages() -> Iterator[tuple[Path, Path]]:
    """Each result of a comparison, and its page: page.html of result.json, else of the same name."""
    for numbers in sorted(RECIPES.glob("*/*.json")):
        page = numbers.with_name("page.html") if numbers.name == "result.json" else numbers.with_suffix(".html")
        if page.exists():
            yield numbers, page


if __name__ == "__main__":
    for numbers, page in pages():
        result = json.loads(numbers.read_text(encoding="utf-8"))
        write_whole(page, render(result, numbers.name, numbers.with_suffix(".csv").name))
        print(f"{page.relative_to(RECIPES)}: {page.stat().st_size / 1e6:.2f} MB")
