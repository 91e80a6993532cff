"""NeMo Automodel 0.7: our config under `_target_`, built by its own entry point."""

import pytest
from first_contact.tiny import gpt2

import sharpwise

optimizers = pytest.importorskip("nemo_automodel.components.optim.optimizer")
TARGET = "sharpwise.integrations.nemo_automodel.SharpwiseConfig"


def test_the_dotted_path_builds_the_optimizer_of_the_model() -> None:
    model = gpt2()
    given = {"name": "adam-mini", "lr": 1e-2, "weight_decay": 0.3, "options": {"block_lr": "blockwise"}}
    (optimizer,) = optimizers.build_optimizer(model, (TARGET, given))
    assert isinstance(optimizer, sharpwise.AdamMini)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["block_lr"]) == (1e-2, 0.3, "blockwise")
    assert optimizer.blocks == sharpwise.AdamMini(model).blocks


def test_overrides_make_groups_with_the_multipliers_of_its_scheduler() -> None:
    given = {"name": "adamw", "param_group_overrides": [{"pattern": "wte|wpe", "lr_mult": 0.5, "wd_mult": 0.0}]}
    (optimizer,) = optimizers.build_optimizer(gpt2(), (TARGET, given))
    rest, embeddings = optimizer.param_groups
    assert (len(rest["params"]), len(embeddings["params"])) == (26, 2)
    assert (embeddings["lr_mult"], embeddings["wd_mult"]) == (0.5, 0.0) and "lr_mult" not in rest


def test_the_class_itself_is_told_what_it_lacks() -> None:
    with pytest.raises(TypeError, match=r"tensors have no names.*model=model"):
        optimizers.build_optimizer(gpt2(), ("sharpwise.AdamMini", {"lr": 1e-3}))
