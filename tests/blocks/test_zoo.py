"""Maps of tiny models against what the sources of these models say, by the code of `benchmarks/zoo.py`.

Here are the models of packages that the tests have anyway, twenty of them quick; `benchmarks/zoo.py` has the others.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sharpwise.blocks import BlockMap, Segment

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    import zoo
    import zoo_truth
for own in ("environment", "zoo", "zoo_truth"):
    sys.modules.pop(own, None)

# Models warn as they are imported and built.
pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = {
    name: file for name, file in zoo.names().items() if name.startswith(("hand-written/", "torch/", "transformers/"))
}


def models_named(names):
    """By package: names after the slash, with blanks between them."""
    return frozenset(f"{package}/{name}" for package, listed in names.items() for name in listed.split())


QUICK = models_named(
    {
        "hand-written": """
            codes detection einsum interleaved mix-mlp modulated no-key-bias perceiver reduced relative speech stacked
        """,
        "transformers": "bart bert deberta_v2 detr segformer swinv2 t5 vit",
    }
)
KNOWN = models_named({})
"""Models of which a role is wrong, or that cannot be mapped. Who mends one takes it out."""
PARTLY = models_named(
    {
        "hand-written": """
            codes continuous einsum experts linear mix-mlp modulation-table relative
        """,
        "torch": """
            transformer
        """,
        "transformers": """
            aimv2 albert altclip autoformer bit blip_2 bridgetower chameleon chinese_clip clip clipseg
            conditional_detr convbert convnextv2 d_fine dab_detr deberta deberta_v2 decision_transformer
            deformable_detr deformable_detr_two_stage depth_anything detr detr_segmentation dinov2 dinov2_swiglu
            dinov2_with_registers dinov3_vit dpt electra encodec fastspeech2_conformer flava fnet funnel gemma3
            git glpn granite_speech grounding_dino groupvit hiera idefics idefics2 informer kosmos2 layoutlm
            layoutlmv3 levit lilt llava longt5 luke lw_detr lxmert markuplm mask2former maskformer
            minimax mllama mobilebert mra nllb_moe nystromformer oneformer owlvit paligemma parakeet
            patchtsmixer patchtst perceiver perceiver_image pop2piano prophetnet pvt_v2 pvt_v2_linear qwen3_next
            reformer rembert roformer rt_detr rt_detr_v2 rwkv sam seamless_m4t segformer seggpt sew_d siglip
            siglip2_classifier speecht5 speecht5_speech swiftformer swin2sr swinv2 table_transformer tapas
            time_series_transformer timesfm udop vit_mae vitdet vjepa2 wav2vec2_bert wav2vec2_conformer wavlm
            x_clip xlnet yolos zamba2
        """,
    }
)
"""Models some of whose parameters are `other` and should not be. All that are in neither set are complete."""


def marks(name):
    slow = [] if name in QUICK else [pytest.mark.slow]
    return slow + ([pytest.mark.xfail(reason="a role is wrong")] if name in KNOWN else [])


@pytest.fixture
def path(monkeypatch):
    """Models are imported when they are built."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for module in [module for module in sys.modules if module.partition(".")[0] in ("zoo_models", "zoo_transformers")]:
        del sys.modules[module]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in MODELS])
def test_maps(name, path):
    row = zoo.walk(name, MODELS[name])
    expected = "partly" if name in PARTLY else "complete"
    assert row["status"] == expected, row.get("message") or {key: row[key] for key in ("wrong", "other")}


def test_the_models_that_are_listed_are_there():
    packages = {name.partition("/")[0] for name in MODELS}
    assert {name for name in QUICK | KNOWN | PARTLY if name.partition("/")[0] in packages} <= set(MODELS)
    assert not KNOWN & PARTLY


def test_every_truth_can_be_read():
    assert all(zoo_truth.rules_of(file, name) for name, file in zoo.names().items())


def test_every_model_has_a_truth(path):
    assert zoo.without_truth(set(MODELS.values())) == []


def test_a_model_without_a_truth_shows(path, monkeypatch):
    monkeypatch.setattr(zoo, "models_of", lambda file: ("hand-written/encoder",))
    assert "hand-written/codes" in zoo.without_truth({"hand_written"})


# -- the judge ---------------------------------------------------------------------------------------------------------


def parts(*roles, shape=(12, 4), dim=0):
    """The segments of one parameter, its output rows in equal parts."""
    length = shape[dim] // len(roles)
    return [
        Segment("w", shape, role=role, dim=dim, start=i * length, length=length, source="trace")
        for i, role in enumerate(roles)
    ]


@pytest.mark.parametrize(
    ("truth", "segments", "verdict"),
    [
        ("q", parts("q"), "complete"),
        ("q", parts("k"), "wrong"),
        ("q", parts("other"), "partly"),
        ("other", parts("other"), "complete"),
        ("other", parts("q"), "wrong"),
        ("q k v", parts("q", "k", "v"), "complete"),
        ("q k v", parts("q", "v", "k"), "wrong"),
        ("q k v", parts("q", "k", "other"), "partly"),
        ("q k v", parts("other"), "partly"),
        ("q k v", parts("q", "other", "k"), "wrong"),
        ("2:q 1:k", parts("q", "q", "k"), "complete"),
        ("2:q 1:k", parts("q", "k", "k"), "wrong"),
        ("2*(q k v)", parts("q", "k", "v", "q", "k", "v"), "complete"),
        ("2*(q k v)", parts("q", "k", "v"), "wrong"),
        ("2*(2:q 1:k)", parts("q", "q", "k", "q", "q", "k"), "complete"),
        ("norm,other", parts("other"), "complete"),
        ("norm,qk_norm", parts("other"), "partly"),
        ("q,v k", parts("v", "k"), "complete"),
        ("q,v k", parts("k", "k"), "wrong"),
        ("q k v", parts("q", "k", "v", shape=(4, 12), dim=1), "complete"),
        ("q k v", parts("q", shape=(4, 12)), "wrong"),
        ("q k v", parts("other", shape=(4, 12)), "partly"),
    ],
)
def test_verdicts(truth, segments, verdict):
    found = zoo_truth.compare("w", segments, truth)
    assert verdict == ("complete" if found is None else "wrong" if found.wrong else "partly")


def test_roles_of_rows_in_order():
    assert zoo_truth.compare("w", parts("q", "q", "k"), "v").got == "q k"


@pytest.mark.parametrize("truth", ["query", "", "q:k", "0.5:q", "2*(q k", "q,"])
def test_what_is_no_truth(truth):
    with pytest.raises(ValueError, match="truth"):
        zoo_truth.parse(truth)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a file of truths, and gives the rules of its model."""
    monkeypatch.setattr(zoo_truth, "TRUTHS", tmp_path)

    def rules(*own, **shared):
        tables = {"a/b": own, **{f"${name}": table for name, table in shared.items()}}
        (tmp_path / "a.json").write_text(json.dumps(tables))
        return zoo_truth.rules_of("a", "a/b")

    return rules


def test_the_first_rule_counts(written):
    rules = written(["w", "q"], ["$all"], all=[["*", "k"]])
    assert zoo_truth.rule_for("w", rules).truth == "q"
    assert zoo_truth.rule_for("v", rules).truth == "k"


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (["w", "conv,other"], "need a reason"),
        (["w", "conv", "because"], "need a reason"),
        (["w"], "is no rule"),
        (["$none"], "nothing is called"),
        (["w", "query"], "is no part"),
    ],
)
def test_what_is_no_rule(written, rule, says):
    with pytest.raises(ValueError, match=says):
        written(rule)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([["w", "q"], ["v", "q"]], r"without a truth: \[\]; rules that no parameter takes: \['v'\]"),
        ([["w", "q"], ["*", "q"]], r"without a truth: \[\]; rules that no parameter takes: \['\*'\]"),
        ([["$shared"]], r"without a truth: \['w'\]; rules that no parameter takes: \[\]"),
    ],
)
def test_every_parameter_needs_a_rule_and_every_rule_a_parameter(written, rules, says):
    with pytest.raises(ValueError, match=says):
        zoo_truth.judge(BlockMap(parts("q")), written(*rules, shared=[["v", "v"]]))


def test_shared_rules_may_match_no_parameter(written):
    assert zoo_truth.judge(BlockMap(parts("q")), written(["w", "q"], ["$shared"], shared=[["v", "v"]])) == []


# -- the runner --------------------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """Its map says `norm`, whatever the truth."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.LayerNorm(4), nn.LayerNorm(4)

    def forward(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize(
    ("truth", "status", "ends"), [("norm", "complete", 0), ("head", "wrong", 1), ("norm q", "wrong", 1)]
)
def test_how_it_ends(monkeypatch, capsys, written, truth, status, ends):
    written(["*", truth])
    monkeypatch.setattr(zoo, "names", lambda: {"a/b": "a"})
    monkeypatch.setattr(zoo, "build", lambda name, file: (Wrong(), torch.randn(2, 4)))
    monkeypatch.setattr(zoo, "without_truth", lambda files: [])
    monkeypatch.setattr(zoo, "quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["zoo.py", "--only", "a/"])
    assert zoo.walk("a/b", "a")["status"] == status
    assert zoo.main() == ends
    assert ("a/b: first.weight" in capsys.readouterr().out) == (ends == 1)


@pytest.mark.parametrize(("heads", "listed"), [(None, ["w"]), (3, [])])
def test_queries_without_heads_are_listed(heads, listed):
    assert zoo.headless(BlockMap([Segment("w", (12, 4), role="q", heads=heads, source="trace")])) == listed


@pytest.mark.slow
def test_steps_of_every_optimizer(path):
    row = zoo.walk("hand-written/interleaved", "hand_written", steps=True)
    assert row["failed"] == {}


def test_an_optimizer_that_fails_shows(path, monkeypatch):
    monkeypatch.setattr(zoo.sharpwise, "list_optimizers", lambda: ["none"])
    row = zoo.walk("hand-written/interleaved", "hand_written", steps=True)
    assert row["status"] == "error" and "none" in row["message"]


@pytest.mark.parametrize(
    ("steps", "taken"), [([], []), (["--steps"], ["a", "b", "c"]), (["--steps", "missing"], ["b", "c"])]
)
def test_steps_that_are_not_taken_again_keep_their_record(monkeypatch, tmp_path, steps, taken):
    saved = tmp_path / "zoo.json"
    rows = {"a": {"failed": {}, "stepped": "before"}, "b": {"failed": {"lion": "no"}, "stepped": "before"}, "c": {}}
    saved.write_text(json.dumps({"models": rows}))
    row = {"status": "complete", "wrong": []}
    monkeypatch.setattr(zoo, "RESULT", saved)
    monkeypatch.setattr(zoo, "HERE", tmp_path)
    monkeypatch.setattr(zoo, "names", lambda: dict.fromkeys("abc", "file"))
    monkeypatch.setattr(zoo, "walk", lambda name, file, stepped: row | ({"failed": {}} if stepped else {}))
    monkeypatch.setattr(zoo, "environment", lambda: {"commit": "now"})
    monkeypatch.setattr(zoo, "without_truth", lambda files: [])
    monkeypatch.setattr(zoo, "quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["zoo.py", *steps])
    assert zoo.main() == 0
    found = json.loads(saved.read_text())["models"]
    assert [name for name in found if found[name].get("stepped") == "now"] == taken
    assert (found["a"]["stepped"] == "before") == ("a" not in taken)
    assert ("failed" in found["b"]) == ("b" in taken)


def test_steps_of_a_model_that_goes_backward_in_training_mode_alone(monkeypatch):
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(12, 4))

        def forward(self, x):
            out = x * self.w**2
            if not self.training:
                with torch.no_grad():
                    self.w /= 2  # what autograd has saved is gone
            return out

    monkeypatch.setattr(zoo.sharpwise, "list_optimizers", lambda: ["adamw"])
    assert zoo.step(Scales().eval(), torch.ones(4), BlockMap(parts("other"))) == {}
