"""axolotl 0.19: its plugin interface, and what its trainers do with what the plugin sets."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from first_contact.tiny import gpt2

import sharpwise
from sharpwise.integrations.hf import Factory

pytest.importorskip("axolotl.integrations.base")
from axolotl.integrations.base import BasePlugin, PluginManager, load_plugin

PLUGIN = "sharpwise.integrations.axolotl.SharpwisePlugin"


def trainer(**changes: Any) -> Any:
    args = transformers.TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", **changes)
    return transformers.Trainer(model=gpt2(), args=args)


def test_the_plugin_sets_what_the_trainer_builds() -> None:
    plugin = load_plugin(PLUGIN)
    assert isinstance(plugin, BasePlugin)
    made = trainer(learning_rate=3e-3, weight_decay=0.2, adam_beta2=0.9)
    plugin.post_trainer_create(SimpleNamespace(sharpwise={"name": "adam-mini", "block_lr": "blockwise"}), made)
    kind, options = made.optimizer_cls_and_kwargs
    options = copy.copy(options)
    optimizer = kind()(made.model, made.args, **options)  # axolotl puts the arguments behind the model
    assert isinstance(optimizer, sharpwise.AdamMini)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-3, 0.2, (0.9, 0.9))
    assert group["block_lr"] == "blockwise"


def test_arguments_behind_the_model_are_used() -> None:
    made = trainer(learning_rate=3e-3)
    assert Factory()(made.model, made.args, name="adamw").param_groups[0]["lr"] == 3e-3


def test_the_key_of_the_file_is_known() -> None:
    """axolotl merges the keys of all plugins into what it validates a file by."""
    import importlib

    manager = PluginManager()
    manager.plugins.clear()
    manager.register(PLUGIN)
    (path,) = manager.get_input_args()
    module, _, name = path.rpartition(".")
    read = getattr(importlib.import_module(module), name)(sharpwise={"name": "muon", "lr": 1e-3})
    assert read.sharpwise == {"name": "muon", "lr": 1e-3}
    manager.plugins.clear()


def test_a_file_without_an_optimizer_is_told_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"needs an optimizer.*\nsharpwise:\n  name: adam-mini"):
        load_plugin(PLUGIN).post_trainer_create(SimpleNamespace(sharpwise=None), trainer())


def test_its_trainers_call_a_factory_with_the_arguments() -> None:
    mixin = pytest.importorskip("axolotl.core.trainers.mixins.optimizer").OptimizerMixin

    class Trainer(mixin, transformers.Trainer):
        pass

    own = {"loraplus_lr_ratio": None, "embedding_lr_scale": None, "embedding_lr": None, "lr_groups": None}
    made = trainer(learning_rate=3e-3)
    made.__class__ = Trainer
    for key, value in own.items():
        setattr(made.args, key, value)
    load_plugin(PLUGIN).post_trainer_create(SimpleNamespace(sharpwise={"name": "adam-mini"}), made)
    assert isinstance(made.create_optimizer(), sharpwise.AdamMini)
    assert made.optimizer.param_groups[0]["lr"] == 3e-3
