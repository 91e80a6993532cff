"""`sharpwise measure` on a run and on a saved model: what it writes, prints and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from train.run_rig import prepare
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention
from typer.testing import CliRunner, Result

from sharpwise.cli.main import create_app
from sharpwise.measure.results import read
from sharpwise.probes import Density, Estimate, Measurement
from sharpwise.probes.order import as_block_lr, relations, suggested_ratios
from sharpwise.train.run import run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 8 steps with checkpoints of steps 2, 4 and 8, and its tokens."""
    folder = tmp_path_factory.mktemp("place")
    given = {
        "model": {"name": "gpt2-tiny", "settings": {"n_embd": 32, "n_head": 2, "n_layer": 2}},
        "data": {"path": str(prepare(folder)), "context": 16},
        "batch": {"sequences": 4},
        "schedule": {"steps": 8},
        "compute": {"threads": 1, "precision": "fp32"},
        "validation": {"sequences": 4},
        "checkpoint": {"every": 0, "keep": 1, "milestones": [2, 0.5]},
        "log": {"tensorboard": False},
    }
    assert run(given, folder / "run").state == "finished"
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(create_app(), ["measure", *map(str, arguments)])


def test_a_trajectory_is_written_added_to_and_shown(place: Path, tmp_path: Path) -> None:
    small = ("--batches", 3, "--sequences", 2, "--out", tmp_path)
    first = call("sharpness", place / "run", "--at", "0,4", *small)
    assert first.exit_code == 0, first.output
    second = call("sharpness", place / "run", "--at", "last", "--ratios", *small)
    assert second.exit_code == 0, second.output
    assert "BlockwiseLR(" in second.output and "Emb < QK" in second.output
    found = read(tmp_path / "sharpness.json")
    assert [one.step for one in found] == [0, 4, 8]
    assert all(e.samples == 3 and e.error is not None for one in found for e in one.select(quantity="sharpness"))
    assert len({one.value(quantity="sharpness", by="type", of="FFN") for one in found}) == 3
    for one in found:
        assert {"date", "commit", "torch", "threads", "data"} <= one.environment.keys()
        assert {"source", "sha256", "bytes"} <= one.environment["data"].keys()
        assert one.at(7).environment == one.environment
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "over training" in page and "http-equiv" not in page
    again = call("sharpness", place / "run", "--at", "all", *small)
    assert again.exit_code == 0, again.output
    assert [one.step for one in read(tmp_path / "sharpness.json")] == [0, 2, 4, 8]
    assert read(tmp_path / "sharpness.json")[0].to_json() != ""


def test_step_0_is_the_initialization_and_the_last_is_what_was_saved(place: Path, tmp_path: Path) -> None:
    for at, where in (("8", place / "run"), ("last", place / "run" / "final")):
        done = call("spectrum", where, "--at", at, "--out", tmp_path / at)
        assert done.exit_code == 0, done.output
    by_run, by_model = (read(tmp_path / at / "spectrum.json")[0] for at in ("8", "last"))
    assert [(e.of, e.quantity, e.value) for e in by_run] == [(e.of, e.quantity, e.value) for e in by_model]


def test_every_probe_on_a_run(place: Path, tmp_path: Path) -> None:
    small = ("--sequences", 4, "--out", tmp_path)
    assert call("updates", place / "run", "--batches", 2, *small).exit_code == 0
    some = call("hessian", place / "run", "--select", "VO", "--what", "trace", "--rtol", 0.5, *small)
    assert some.exit_code == 0, some.output
    assert {path.stem for path in tmp_path.glob("*.json")} == {"update-size", "RRC", "noise-scale", "trace-VO"}
    sizes = read(tmp_path / "update-size.json")
    assert [one.step for one in sizes] == [0, 2, 4]  # no step follows the last, 8
    assert all(one.value(quantity="relative update", by="type", of="FFN") > 0 for one in sizes)


def test_densities_are_written_and_drawn(place: Path, tmp_path: Path) -> None:
    few = ("--what", "density", "--select", "Norm", "--samples", 3, "--sequences", 2, "--out", tmp_path)
    assert call("hessian", place / "run", "--at", "0,8", *few).exit_code == 0
    done = call("hessian", place / "run", "--kind", "gauss-newton", *few)
    assert done.exit_code == 0, done.output
    hessian, newton = (read(tmp_path / f"density-{name}.json") for name in ("Norm", "gauss-newton-Norm"))
    assert [one.step for one in hessian] == [0, 8] and [one.step for one in newton] == [8]
    nodes = Density.of(newton[0]).nodes
    assert nodes.shape == (3, 50) and nodes.min() > -1e-3 * nodes.max()  # it has no negative eigenvalues
    assert Density.of(hessian[1]).curve()[1].max() > 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count('id="chart-0-density"') == page.count('id="chart-1-density"') == 1
    assert "Density of eigenvalues (Norm) over training" in page
    assert "Density of eigenvalues (gauss-newton, Norm)" in page


def test_measuring_leaves_the_run_as_it_was(place: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()}
    assert call("updates", place / "run", "--at", "4", "--batches", 2, "--out", tmp_path).exit_code == 0
    assert {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sharpness", "run", "--at", "3"), "there are 0, 2, 4, 8"),
        (("sharpness", "run", "--at", "half"), "expected all, last or steps"),
        (("sharpness", "run/final"), "say --data FOLDER"),
        (("sharpness", "run/final", "--at", "2"), "--at is for the folder of a run"),
        (("updates", "run/final"), "measured on the folder of a run"),
        (("updates", "run", "--at", "4,8"), "is the last of the run"),
        (("updates", "run", "--at", "4", "--sequences", "1"), "take 2 windows or more"),
        (("hessian", "run", "--select", "Vo"), "matches nothing"),
        (("hessian", "run", "--what", "eigenvalue"), "is not offered"),
        (("spectrum", "nowhere"), "no such folder"),
        (("spectrum", "tokens"), "config"),
    ],
)
def test_what_cannot_be_measured_is_said(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    done = call(*arguments, "--out", tmp_path / "out")
    assert done.exit_code != 0
    assert said in " ".join(done.output.split()), done.output
    assert not (tmp_path / "out").exists()


# --- what a measurement suggests -------------------------------------------------------------------------------------


def of_types(**values: float) -> Measurement:
    return Measurement("sharpness", [Estimate("sharpness", "type", k, v, 0.1 * v) for k, v in values.items()])


def test_ratios_follow_the_formula() -> None:
    found = of_types(Emb=1e-6, QK=1e-3, FFN=1e-2, VO=0.5, Norm=1.0)
    ratios = suggested_ratios(found)
    assert ratios == {"emb": 10.0, "qk": 10.0, "ffn": 10.0, "vo": float(f"{0.5**-0.6:.2g}")}
    assert suggested_ratios(of_types(FFN=4.0, Norm=1.0)) == {"ffn": 1.0}
    assert as_block_lr(suggested_ratios(found, power=0.0)) == "BlockwiseLR(emb=1, qk=1, ffn=1, vo=1)"
    for bad in (of_types(FFN=1.0), of_types(FFN=0.0, Norm=1.0)):
        with pytest.raises(ValueError, match="sharpness"):
            suggested_ratios(bad)


def test_relations_say_what_the_intervals_allow() -> None:
    found = relations(of_types(Emb=1.0, QK=2.0, FFN=2.1, VO=1.0, Norm=50.0))
    assert [r.holds for r in found] == ["yes", "open", "no", "yes"]
    first = found[0]
    assert (first.ratio, first.low, first.high) == pytest.approx((2.0, 1.8 / 1.1, 2.2 / 0.9))
    single = Measurement("sharpness", [Estimate("sharpness", "type", k, 1.0) for k in ("VO", "Norm")])
    assert [r.holds for r in relations(single)] == ["open"]  # from one sample nothing is known
    assert json.loads(of_types(VO=1.0).to_json())["probe"] == "sharpness"


def test_a_model_that_does_not_do_what_its_names_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command has no option for it, and names none."""

    def swapped(self: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        made = (f(hidden_states).unflatten(-1, (-1, 12)) for f in (self.k_proj, self.q_proj, self.v_proj))
        q, k, v = (x.transpose(1, 2) for x in made)
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None

    sizes = {"hidden_size": 36, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 3}
    LlamaForCausalLM(LlamaConfig(vocab_size=31, num_hidden_layers=1, **sizes)).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(LlamaAttention, "forward", swapped)
    failed = call("spectrum", tmp_path / "model", "--out", tmp_path / "out")
    assert failed.exit_code == 2
    *_, last = failed.stderr.strip().splitlines()
    assert "names and dataflow disagree about 2 parameters" in failed.stderr
    assert last.startswith(
        f"There is no option for it here: `sharpwise blocks {tmp_path / 'model'} --explain model.lay"
    )
    assert "trace=" not in failed.stderr and "overrides=" not in failed.stderr
