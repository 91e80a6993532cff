"""Recipes are found by the names of their folders, and of their files where a folder has several studies."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from report.parse import parse

from sharpwise.block_lr import make_block_lr
from sharpwise.compare.recipes import find_recipe, list_recipes, recipes_folder
from sharpwise.compare.report.text import headline
from sharpwise.compare.study import make_study
from sharpwise.train.models import load_model
from sharpwise.train.optimizer import build_optimizer


def test_a_folder_with_several_studies_lists_each() -> None:
    names = list_recipes()
    assert {"blockwise_lr", "sgd_sai/gpt", "sgd_sai/gpu", "sgd_sai/vit"} <= set(names)
    assert names == sorted(names)
    assert not any(name.startswith("sharpness_disparity") for name in names)  # runs, which compare nothing
    for name in names:
        assert find_recipe(name).parent.parent == recipes_folder()


@pytest.mark.parametrize(("name", "model"), [("dynamic", "gpt2-tiny"), ("dynamic-llama", "llama-tiny")])
def test_every_arm_of_the_dynamic_ratios_can_be_built(name: str, model: str) -> None:
    """On a smaller model of the family; their kinds are those that the study is about."""
    study = make_study(tomllib.loads(find_recipe(f"sharpness_lr/{name}").read_text("utf-8")))
    arms = {"adamw", "adamw+blockwise", "searched", "centred", "norm_11", "early", "calibrated", "reversed"}
    assert {arm.name for arm in study.arms} - {"of_gpt2"} == arms
    assert study.run["model"]["name"].partition("-")[0] == model.partition("-")[0]
    for config in study.configs:
        built = load_model(model)
        batches = [torch.zeros(2, 9, dtype=torch.int64)]
        optimizer = build_optimizer(config.optimizer, built, steps=220, batches=batches)
        assert str(make_block_lr(config.optimizer.block_lr or None) or "") == str(optimizer.options.block_lr or "")


@pytest.mark.parametrize(
    "page", sorted(recipes_folder().glob("*/*.html")), ids=lambda page: f"{page.parent.name}/{page.stem}"
)
def test_committed_pages_say_what_their_results_do_and_are_small(page: Path) -> None:
    """They are written by benchmarks/pages.py."""
    numbers = page.with_name("result.json") if page.stem == "page" else page.with_suffix(".json")
    result, found = json.loads(numbers.read_text("utf-8")), parse(page.read_text("utf-8"))
    assert headline(result) in found.text and page.stat().st_size < 1_000_000
    links = [value for _, name, value in found.attributes if name == "href"]
    assert {numbers.name, numbers.with_suffix(".csv").name} <= set(links)
    assert all((page.parent / str(link)).exists() for link in links if not str(link).startswith(("#", "./runs/")))


def test_the_folder_alone_does_not_say_which() -> None:
    with pytest.raises(ValueError, match=r"no recipe is called 'sgd_sai'.* there are adam_mini, .*sgd_sai/vit"):
        find_recipe("sgd_sai")
