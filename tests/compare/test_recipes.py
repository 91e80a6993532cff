"""Recipes are found by the names of their folders, and of their files where a folder has several studies."""

import pytest

from sharpwise.compare.recipes import find_recipe, list_recipes, recipes_folder


def test_a_folder_with_several_studies_lists_each() -> None:
    names = list_recipes()
    assert {"blockwise_lr", "sgd_sai/gpt", "sgd_sai/gpu", "sgd_sai/vit"} <= set(names)
    assert names == sorted(names)
    assert not any(name.startswith("sharpness_disparity") for name in names)  # runs, which compare nothing
    for name in names:
        assert find_recipe(name).parent.parent == recipes_folder()


def test_the_folder_alone_does_not_say_which() -> None:
    with pytest.raises(ValueError, match=r"no recipe is called 'sgd_sai'.* there are adam_mini, .*sgd_sai/vit"):
        find_recipe("sgd_sai")
