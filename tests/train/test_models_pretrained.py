"""Weights that go to a folder and come back, and folders that are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sharpwise.train.models import load_model, load_pretrained, tokenizer_of


def save(model: nn.Module, folder: Path) -> Path:
    """Without `save_pretrained`, which draws a progress bar; the same files."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    tied = model.config.tie_word_embeddings
    weights = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(load_model("gpt2-tiny"), tmp_path / "model")


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
@pytest.mark.parametrize("place", ["model", "run/final"])
def test_weights_come_back(name: str, place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(name)
    save(model, tmp_path / place)
    loaded = load_pretrained(tmp_path / Path(place).parts[0])
    assert type(loaded) is type(model)
    assert loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert len(list(loaded.parameters())) == len(list(model.parameters()))  # tied once again
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert capfd.readouterr() == ("", "")


def test_what_save_pretrained_writes_in_pieces(tmp_path: Path) -> None:
    model = load_model("llama-tiny")
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    loaded = load_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    second = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(ValueError, match=rf"no {second.name} in this folder; expected the weights"):
        load_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json: not an index of weights"):
        load_pretrained(tmp_path / "model")


def test_parameters_are_float32(tmp_path: Path) -> None:
    model = load_model("llama-tiny", settings={"dtype": "bfloat16"})
    loaded = load_pretrained(save(model, tmp_path / "model"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(a, b.float()) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"loaded in float32, not 'bfloat16'; call \.to\(dtype\)"):
        load_pretrained(tmp_path / "model", settings={"dtype": "bfloat16"})


def test_settings_that_fit_the_weights(folder: Path) -> None:
    loaded = load_pretrained(folder, settings={"attn_implementation": "eager", "resid_pdrop": 0.5})
    assert loaded.config._attn_implementation == "eager"
    assert loaded.transformer.h[0].mlp.dropout.p == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"context": 64},
            r"weights of another shape: transformer\.wpe\.weight is \(128, 64\), the config says \(64, 64",
        ),
        ({"n_layer": 3}, r"missing weights: transformer\.h\.2\.\S*, .* and 7 more; config\.json and settings have to"),
        (
            {"n_layer": 1},
            r"weights that the model does not have: transformer\.h\.1\.attn\.c_attn\.(bias|weight), .* more; ",
        ),
        ({"tie_word_embeddings": False}, r"missing weights: lm_head\.weight; "),
        ({"n_layers": 1}, r"no field 'n_layers' \(did you mean 'n_layer'\?\)"),
    ],
)
def test_settings_that_do_not(settings: dict[str, int], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder, settings=settings)


def test_a_head_in_a_file_whose_config_ties_it(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    embedding = weights["transformer.wte.weight"]
    save_file({**weights, "lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    assert load_pretrained(folder).lm_head.weight.equal(embedding)
    save_file({**weights, "lm_head.weight": embedding + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"the config ties the head to the embedding, but the weights have another"):
        load_pretrained(folder)
    loaded = load_pretrained(folder, settings={"tie_word_embeddings": False})
    assert torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight + 1)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def strange(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "strange"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"model: no such folder; give one with config\.json and model\.safetensors, or that of a run"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json in this folder, and no final/"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no model\.safetensors in this folder; expected"),
        (pickled, r"no model\.safetensors in this folder \(pickled weights, pytorch_model\.bin, are not read"),
        (cut, r"model\.safetensors: damaged or cut off \(.*\); copy it again"),
        (strange, r"transformers .* has no model_type 'strange'"),
    ],
)
def test_folders_that_are_refused(damage: Callable[[Path], object], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_the_tokenizer_beside_the_weights(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    final = save(load_model("gpt2-tiny"), tmp_path / "run" / "final")
    assert tokenizer_of(tmp_path / "run") is None
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(final / "tokenizer.json"))
    assert tokenizer_of(tmp_path / "run").get_vocab() == tokenizer_of(final).get_vocab() == {"a": 0, "b": 1}
    (final / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer \("):
        tokenizer_of(final)
