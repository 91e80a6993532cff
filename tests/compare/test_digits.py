"""The small Vision Transformer of `recipes/sgd_sai`: its block map, the loss that training sees, and that it learns."""

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharpwise.blocks import BlockMap
from sharpwise.compare.recipes import recipes_folder
from sharpwise.train.data import open_tokens
from sharpwise.train.models import load_model
from sharpwise.train.run import run
from sharpwise.train.steps import token_loss

NAME = "recipes.sgd_sai.vit"
SMALL = {"width": 32, "layers": 1, "heads": 2}
LEARNING = {"adamw": 1e-2, "sgd-sai": 3e-2}


@pytest.fixture(scope="module")
def recipe() -> Any:
    """The module, as a run finds it: from the folder that it is started in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(recipes_folder().parent)
        with pytest.raises(ValueError, match="the function raised FileNotFoundError"):
            load_model(f"{NAME}:vit", settings={"vocab_size": 10, "folder": "nowhere"})
        yield sys.modules[NAME]


@pytest.fixture(scope="module")
def folder(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten blurred pictures, each many times with other noise."""
    made, chance = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    classes = np.arange(400) % 10
    images = chance.uniform(0, 16, (10, 8, 8))[classes] + chance.normal(0, 2, (400, 8, 8))
    recipe.prepare(made, images.clip(0, 16), classes, held_out=100)
    return made


def test_images_for_validation_are_not_trained_on(folder: Path) -> None:
    data = open_tokens(folder)
    train, validation = (np.concatenate(part.shards).reshape(-1, 2) for part in (data.train, data.validation))
    assert (len(train), len(validation)) == (300, 100)
    numbers, classes = np.concatenate([train, validation]).T
    assert sorted(numbers) == list(range(400))
    assert (numbers % 10 == classes).all()


def test_every_parameter_has_a_role(recipe: Any, folder: Path) -> None:
    model = recipe.vit(400, **SMALL, folder=str(folder))
    blocks = BlockMap.of(model)
    counted = Counter(str(segment.role) for segment in blocks.segments)
    matrices = dict.fromkeys(("q", "k", "v", "o", "up", "down"), 2)  # a weight and a bias
    assert counted == {"patch_emb": 2, "pos_emb": 2, **matrices, "norm": 4 + 2, "head": 2}
    assert {segment.heads for segment in blocks.segments if segment.role in ("q", "k")} == {2}


@torch.no_grad()
def test_the_loss_is_that_of_the_class(recipe: Any, folder: Path) -> None:
    model = recipe.vit(400, **SMALL, folder=str(folder)).eval()
    numbers, classes = torch.tensor([[3], [7], [399]]), torch.tensor([[3], [7], [9]])
    logits = model(numbers)
    assert logits.shape == (3, 1, 400)
    images = torch.from_numpy(np.load(folder / recipe.IMAGES))[numbers.flatten()]
    assert images.shape == (3, 1, 8, 8) and -1 <= images.min() < images.max() <= 1
    expected = torch.nn.functional.cross_entropy(model.vit(images).logits, classes.flatten())
    torch.testing.assert_close(token_loss(logits, numbers, classes), expected, rtol=0, atol=0)
    assert 0.9 * math.log(10) < float(expected) < 1.1 * math.log(10)


@pytest.mark.parametrize("name", list(LEARNING))
def test_it_learns(name: str, recipe: Any, folder: Path, tmp_path: Path) -> None:
    outcome = run(
        {
            "model": {"name": f"{NAME}:vit", "settings": {**SMALL, "folder": str(folder)}},
            "data": {"path": str(folder)},
            "batch": {"sequences": 32},
            "optimizer": {"name": name, "lr": LEARNING[name]},
            "schedule": {"steps": 80},
            "compute": {"device": "cpu", "threads": 1, "precision": "fp32"},
            "validation": {"sequences": 100, "every": 0},
            "log": {"tensorboard": False, "diagnostics": 40},
        },
        tmp_path / "run",
    )
    assert outcome.validation_loss is not None and outcome.validation_loss < 1.0


def test_the_digits_of_scikit_learn_are_as_expected(recipe: Any, tmp_path: Path) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    recipe.prepare(tmp_path, digits.images, digits.target)
    data = open_tokens(tmp_path)
    assert (data.vocabulary, data.context) == (1797, 1)
    assert data.about["documents"] == 1797 and data.about["validation_documents"] == recipe.HELD_OUT
