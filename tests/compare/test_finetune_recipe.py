"""`recipes/finetune`: two studies of 49 runs, and the function that puts an adapter on the base."""

import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sharpwise
from sharpwise.compare.recipes import find_recipe, recipes_folder
from sharpwise.compare.study import make_study
from sharpwise.train.models import load_model

pytest.importorskip("peft")


@pytest.fixture
def function() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(recipes_folder().parent)
        yield importlib.import_module("recipes.finetune.lora")


def test_the_two_studies_are_of_49_runs_at_most() -> None:
    tables = [tomllib.loads(find_recipe(f"finetune/{name}").read_text("utf-8")) for name in ("full", "lora")]
    arms = [[arm.name for arm in make_study(table).arms] for table in tables]
    assert arms == [["adamw", "adam-mini", "adapm", "muon-8bit"], ["adamw", "sgd-sai", "adam-mini"]]
    assert sum(len(table["arms"]) * (table["most"] + table["seeds"]) for table in tables) == 49
    assert {table["tokens"] for table in tables} == {307_200}


def test_the_adapted_base_has_its_weights_and_trains_the_adapter_by_role(tmp_path: Path, function: ModuleType) -> None:
    base = load_model("gpt2-tiny")
    base.save_pretrained(tmp_path)
    model = function.adapted(str(tmp_path), rank=4, vocab_size=256, attn_implementation="eager")
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(model(tokens).logits, base(tokens).logits)  # an adapter begins at zero
    optimizer = sharpwise.AdamMini(model, lr=1e-3)
    assert {str(s.role) for s in optimizer.blocks.segments} == {"q", "k", "v", "o", "up", "down"}
    assert all(".lora_" in s.name for s in optimizer.blocks.segments)


def test_data_of_another_tokenizer_are_refused(tmp_path: Path, function: ModuleType) -> None:
    load_model("gpt2-tiny").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"knows 256 tokens, the data have 1024: prepare them with --tokenizer"):
        function.adapted(str(tmp_path), vocab_size=1024)
