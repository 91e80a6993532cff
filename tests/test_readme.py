"""The README's Python runs, top to bottom, as one script."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_every_python_snippet_of_the_readme_runs() -> None:
    snippets = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(snippets) >= 5
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), names)  # our own file
