"""What a finished run leaves can be read by others, and by the next run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sharpwise.train.build import build
from sharpwise.train.config_file import make_config
from sharpwise.train.data import even_starts, open_tokens, prepare_tokens, same_tokens
from sharpwise.train.final import generate
from sharpwise.train.run import run
from train.kill_rig import settings


def prepare(folder: Path, text: str, **other: Any) -> Path:
    folder.mkdir(exist_ok=True)
    documents = [text.format(i, i * 7, i * i) * 20 for i in range(40)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    prepare_tokens([folder / "text.txt"], folder / "tokens", vocabulary=300, validation=0.1, **other)
    return folder / "tokens"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"), "The fox {} jumps over {} dogs; who saw it? Fox {}.\n")


def given(data: Path, model: str, **compute: Any) -> dict[str, Any]:
    own = settings(data, {"name": "adamw"}, model={"name": model}, schedule={"steps": 6, "warmup": 1})
    return own | {"compute": {**own["compute"], **compute}}


@pytest.fixture(scope="module", params=[("gpt2-tiny", "fp32"), ("llama-tiny", "fp32"), ("llama-tiny", "bf16")], ids=str)
def finished(request: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, precision = request.param
    folder = tmp_path_factory.mktemp("run") / "run"
    run(given(data, model, precision=precision), folder)
    return folder


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    run(given(data, "gpt2-tiny"), folder)
    return folder


def last_line(folder: Path) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return line


def test_transformers_reads_it_and_gets_the_same_validation_loss(finished, data) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "final", attn_implementation="eager").eval()
    assert model.config.use_cache is True
    tokens = open_tokens(data)
    windows = torch.from_numpy(tokens.validation.windows(even_starts(len(tokens.validation), 4, 16), 17))
    with torch.no_grad():
        losses = []  # by twos, as the run: in bf16 it makes a difference
        for part in windows.split(2):
            logits = model(part[:, :-1]).logits.float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()))
    assert float(sum(losses) / 2) == pytest.approx(last_line(finished)["validation_loss"], rel=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "final")
    text = "The fox 12 jumps over éé dogs"
    assert tokenizer(text)["input_ids"] == tokens.tokenizer().encode(text).ids
    assert tokenizer.eos_token_id == tokens.end_of_text
    assert tokenizer.model_max_length == 16
    assert same_tokens(tokenizer.backend_tokenizer, tokens.tokenizer())
    told = model.generate(
        **tokenizer("The fox", return_tensors="pt"), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert told.shape[1] == len(tokenizer("The fox")["input_ids"]) + 3


@pytest.mark.parametrize("part", ["", "final"])
def test_a_run_begins_with_its_weights(finished, data, tmp_path, part) -> None:
    own = given(data, "ignored") | {"model": {"init_from": str(finished / part)}, "optimizer": {"lr": 0.0}}
    own["compute"] = {**own["compute"], "precision": "fp32"}
    run(own, tmp_path / "run")
    line = last_line(tmp_path / "run")
    assert line["validation_loss"] == pytest.approx(last_line(finished)["validation_loss"], abs=2e-3)
    before, after = ((path / "sample.txt").read_text() for path in (finished, tmp_path / "run"))
    assert before.partition(">>>")[0] == after.partition(">>>")[0]


def test_weights_of_another_tokenizer_are_refused(one, tmp_path) -> None:
    other = prepare(tmp_path / "data", "Quite {} another {} text than the one {} before, with words of its own.\n")
    own = given(other, "ignored") | {"model": {"init_from": str(one)}}
    with pytest.raises(ValueError, match=r"the tokenizer in .* is not that of the tokens in .*; prepare the text with"):
        run(own, tmp_path / "run")
    again = prepare(tmp_path / "again", "Quite {} another {} text than {}.\n", tokenizer=str(one / "final"))
    own = given(again, "ignored") | {"model": {"init_from": str(one)}}
    assert run(own, tmp_path / "run").state == "finished"


def test_weights_and_a_context_or_settings_that_do_not_fit(one, data, tmp_path) -> None:
    own = given(data, "ignored") | {"model": {"init_from": str(one)}}
    with pytest.raises(ValueError, match="context=129 is longer than the model's 128 positions"):
        run(own | {"data": {"path": str(data), "context": 129}}, tmp_path / "run")
    own["model"]["settings"] = {"vocab_size": 299}
    with pytest.raises(ValueError, match="weights of another shape"):
        run(own, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_ones_own_is_saved_too(data, tmp_path) -> None:
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    folder = tmp_path / "run"
    run(given(data, "train.kill_rig:build"), folder)
    built = build(make_config(given(data, "train.kill_rig:build")))
    assert load_file(folder / "final" / "model.safetensors").keys() == built.model.state_dict().keys()
    assert same_tokens(Tokenizer.from_file(str(folder / "final" / "tokenizer.json")), open_tokens(data).tokenizer())
    with pytest.raises(ValueError, match=r"no config\.json"):
        run(given(data, "x") | {"model": {"init_from": str(folder)}}, tmp_path / "other")


def test_a_text_is_drawn_the_same_every_time_and_leaves_the_model_as_it_was(data) -> None:
    built = build(make_config(given(data, "train.kill_rig:build")))
    built.model.train()
    start = torch.zeros(1, 3, dtype=torch.int64)
    drawn = [generate(built.model, start, 30, context=16, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (1, 33)
    assert torch.equal(drawn[0][:, :3], start)
    assert built.model.training


def test_few_validation_tokens_and_a_vocabulary_with_room(data, tmp_path) -> None:
    """A text of fewer tokens than usually begin the sample, and tokens drawn that the tokenizer does not know."""
    source = tmp_path / "text.txt"
    source.write_text("abc def\n" * 400)
    held = tmp_path / "held.txt"
    held.write_text("abc def xyz")
    prepare_tokens([source], tmp_path / "tokens", vocabulary=300, validation_data=held)
    assert len(open_tokens(tmp_path / "tokens").validation) < 16
    own = given(tmp_path / "tokens", "gpt2-tiny")
    own |= {"data": {"path": str(tmp_path / "tokens"), "context": 4}}
    own["model"] = {"name": "gpt2-tiny", "settings": {"vocab_size": 5000}}
    assert run(own, tmp_path / "run").state == "finished"
    assert " >>> " in (tmp_path / "run" / "sample.txt").read_text()
