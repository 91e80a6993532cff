"""Arms that are classes of other libraries, `module:class`."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from compare.test_results import fill, result_of
from compare.test_runner import losses, study
from sharpwise.compare.runner import run_study
from sharpwise.compare.stored import open_study
from sharpwise.compare.study import make_study
from sharpwise.optim import parse_arm

OWN = """
import torch

class Own(torch.optim.SGD):
    def __init__(self, params, lr, size=1.0):
        super().__init__(params, lr * size, momentum=0.9)
"""
ARMS: dict[str, Any] = {
    "torch.optim:RAdam": {"settings": {"optimizer.weight_decay": 0.1}, "search": {"optimizer.betas": [[0.8, 0.9]]}},
    "adamw": {},
    "mine": {"name": "own_arms:Own", "settings": {"optimizer.size": 2.0}, "lrs": [0.03, 0.1, 0.3]},
    "as radam": {"name": "own_arms:Own", "setting_of": "adamw"},
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_arms.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_study_of_them_runs_in_one_process_and_in_two(data: Path, own: Path) -> None:
    given = study(data, arms={name: ARMS[name] for name in ("torch.optim:RAdam", "mine")}, horizons=[])
    state = run_study(open_study(given, own / "study"), own / "study", jobs=2)
    result = result_of(state.study, own / "study")
    arms = result["arms"]
    # The version of a library is noted where it has a part; that it is not elsewhere is no difference.
    assert {"own_arms", "torch"} <= set(result["environment"])
    assert not any("made alike" in note for note in result["caveats"])
    assert [arm["name"] for arm in arms] == ["torch.optim:RAdam", "mine"]
    for arm in arms:
        assert all(run["final_loss"] is not None for run in arm["final"])
        assert arm["mean_multiplier"] == 1.0
    parameters = state.budget.parameters
    assert [arm["state_bytes"] for arm in arms] == [8 * parameters + 4 * 20, 4 * parameters]
    before = losses(own / "study")
    with pytest.raises(ValueError, match=r"a class for its optimizer: .*import torch\.optim .* and import own_arms"):
        open_study(None, own / "study")
    shutil.rmtree(own / "study" / "runs")
    (own / "study" / "study.db").unlink()
    run_study(open_study(None, own / "study", trust_code=True), own / "study")
    assert losses(own / "study") == before


def test_what_the_page_says_of_them(data: Path, own: Path) -> None:
    folder = own / "study"
    result = result_of(fill(study(data, arms=ARMS), folder), folder)
    said = {arm["name"]: arm["definition"] for arm in result["arms"]}
    assert said["torch.optim:RAdam"] == "The baseline: torch.optim:RAdam, of another library; weight decay 0.1."
    assert said["mine"] == "own_arms:Own, of another library; size 2."
    codes = {arm["name"]: arm["code"] for arm in result["arms"]}
    assert codes["mine"].startswith("own_arms.Own(model.parameters(), lr=0.0")
    assert "size=2.0" in codes["mine"] and "gradients clipped to 1" in codes["mine"]
    assert codes["as radam"].startswith("own_arms.Own(model.parameters(), lr=0.00")
    assert "sharpwise compare --trust-code" in result["next"]["command"]


def test_what_is_refused(data: Path, own: Path) -> None:
    for name, table, message in (
        ("own_arms:Own", {"settings": {"optimizer.sise": 1.0}}, r"optimizer\.sise: .* \(did you mean 'size'"),
        ("own_arms:One", {}, "arm 'own_arms:One' cannot be built: own_arms:One: module 'own_arms' has no 'One'"),
        ("no_such_arms:Own", {}, "no module 'no_such_arms' here or among the installed ones; install the package"),
        ("own_arms:OWN", {}, "module 'own_arms' has no 'OWN'"),
        ("own_arms:Own", {"setting_of": "adamw"}, "arm 'own_arms:Own' cannot be built: optimizer.weight_decay: own_"),
    ):
        decay = {"search": {"optimizer.weight_decay": [0.3]}}
        given = study(data, arms={"adamw": decay, name: table}, tokens=1600)
        with pytest.raises(ValueError, match=message):
            run_study(open_study(given, own / "study"), own / "study")
        assert not (own / "study").exists()
    for name, message in (
        ("own_arms:Own+blockwise", "expected module:class, .*; a block_lr is for the optimizers of sharpwise"),
        ("own_arms:", "got 'own_arms:', expected module:class"),
    ):
        with pytest.raises(ValueError, match=message):
            make_study(study(data, arms=["adamw", name]))
    with pytest.raises(ValueError, match="no optimizer is called 'own_arms:Own'"):
        parse_arm("own_arms:Own")  # which is of sharpwise's own
