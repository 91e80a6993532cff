"""timm 1.0: `create_optimizer_v2` as its scripts call it, with our names."""

from typing import Any

import pytest
import torch

import sharpwise

timm = pytest.importorskip("timm")
timms = pytest.importorskip("timm.optim").create_optimizer_v2
scheduler = pytest.importorskip("timm.scheduler")
create_optimizer_v2 = pytest.importorskip("sharpwise.integrations.timm").create_optimizer_v2


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(in_chans=1, **sizes)


def loss_of(model: Any) -> torch.Tensor:
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.cross_entropy(model(images), torch.arange(6) % 5)


CASES: list[dict[str, Any]] = [
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "filter_bias_and_bn": False},
    {"weight_decay": 0.0},
    {"weight_decay": 0.1, "layer_decay": 0.7},
    {"param_group_fn": lambda model: [{"params": list(model.parameters()), "weight_decay": 0.2}]},
]


@pytest.mark.parametrize("case", CASES, ids=["plain", "all decay", "none decays", "layer decay", "own groups"])
def test_groups_are_those_of_timm(case: dict[str, Any]) -> None:
    """And so are the steps: AdamW in timm's groups, under a schedule that applies its layer decay."""
    ours, theirs = vit(), vit()
    optimizers = (
        create_optimizer_v2(ours, "adamw", lr=1e-2, compile=False, **case),
        timms(theirs, "adamw", lr=1e-2, foreach=False, **case),
    )
    assert isinstance(optimizers[0], sharpwise.AdamW)
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        schedule = scheduler.CosineLRScheduler(optimizer, t_initial=10)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            schedule.step(step + 1)
    assert [g["weight_decay"] for g in optimizers[0].param_groups] == [
        g["weight_decay"] for g in optimizers[1].param_groups
    ]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", sharpwise.list_optimizers())
def test_every_name_of_ours_trains_a_vit(name: str) -> None:
    model = vit()
    optimizer = create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.1)
    before = loss_of(model)
    before.backward()
    optimizer.step()
    assert loss_of(model) < before


def test_names_of_timm_are_timms() -> None:
    assert type(create_optimizer_v2(vit(), "lamb", lr=1e-3)).__module__.startswith("timm.")


def test_parameters_alone_are_refused() -> None:
    with pytest.raises(TypeError, match=r"'adam-mini' needs the model.*got list"):
        create_optimizer_v2(list(vit().parameters()), "adam-mini", lr=1e-3)
