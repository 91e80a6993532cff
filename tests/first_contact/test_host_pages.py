"""The scripts of `docs/hosts/` run as they stand, where the host is installed."""

import importlib
import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "hosts"
NEEDS = {
    "axolotl": ("axolotl.integrations.base",),
    "diffusers": ("diffusers", "peft"),
    "litgpt": ("litgpt.utils",),
    "nemo_automodel": ("nemo_automodel.components.optim.optimizer",),
    "olmo_core": ("olmo_core.optim",),
    "timm": ("timm", "timm.optim"),
    "torchtitan": ("torchtitan.components.optimizer",),
    "trl": ("trl", "peft"),
}
QUICK = {"deepspeed", "verl"}


def page(name: str) -> object:
    return pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)


@pytest.mark.filterwarnings("default::FutureWarning", "default::UserWarning", "default::DeprecationWarning")
@pytest.mark.parametrize("name", [page(path.stem) for path in sorted(PAGES.glob("*.md"))])
def test_the_script_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module, exc_type=ImportError)
    scripts = re.findall(r"^```python\n(.*?)^```$", (PAGES / f"{name}.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert scripts
    monkeypatch.chdir(tmp_path)
    for script in scripts:
        exec(compile(script, f"docs/hosts/{name}.md", "exec"), {"__name__": name})


def test_a_page_for_every_file_that_adapts_a_host() -> None:
    adapters = Path(importlib.import_module("sharpwise.integrations").__path__[0]).glob("[a-z]*.py")
    wanted = {"transformers" if path.stem == "hf" else path.stem for path in adapters}
    assert wanted <= {path.stem for path in PAGES.glob("*.md")}
