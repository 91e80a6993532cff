"""Vision models through the generic block map: a ViT of Hugging Face, whose roles are known, and a small ResNet."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import sharpwise
from sharpwise.memory import plan


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.stages = nn.ModuleList(Residual(width) for _ in range(2))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def vit() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=32, image_size=8, patch_size=4, num_channels=1, num_labels=10
    )
    return transformers.ViTForImageClassification(config)


MODELS = {"vit": vit, "resnet": ResNet}
CASES = [
    ("vit", "adamw", {}),
    ("vit", "adam-mini", {}),
    ("vit", "adasgd", {}),
    *(("vit", "blockwise-adam", {"cut": cut}) for cut in ("row", "head", "tensor", "layer", "role")),
    ("resnet", "adamw", {}),
    ("resnet", "adam-mini", {"cut": "tensor"}),
    ("resnet", "adasgd", {}),
    ("resnet", "blockwise-adam", {"cut": "row"}),
    ("resnet", "blockwise-adam", {"cut": "tensor"}),
]


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def loss_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 1, 8, 8, generator=generator)
    found = model(images)
    return nn.functional.cross_entropy(getattr(found, "logits", found), torch.arange(6))


@pytest.mark.parametrize(("name", "optimizer", "options"), CASES, ids=str)
def test_it_steps(name: str, optimizer: str, options: dict[str, Any]) -> None:
    """Every parameter moves, the compiled step as the reference, and the loss of one batch falls."""
    models = [built(name) for _ in range(2)]
    before = copy.deepcopy(models[0])
    losses = []
    for model, compiled in zip(models, (None, False), strict=True):
        own = sharpwise.create_optimizer(model, optimizer, lr=3e-3, compile=compiled, **options)
        for _ in range(5):
            own.zero_grad()
            loss = loss_of(model)
            loss.backward()
            losses.append(loss.item())
            own.step()
    assert loss_of(models[0]) < losses[0]
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-4)
    for (path, p), start in zip(models[0].named_parameters(), before.parameters(), strict=True):
        assert p.grad is None or not p.grad.any() or not torch.equal(p, start), path


def test_blocks_of_a_convolution() -> None:
    """A row is an output channel, with all that feeds it."""
    model = built("resnet")
    optimizer = sharpwise.BlockwiseAdam(model, cut="row")
    loss_of(model).backward()
    optimizer.step()
    weight = model.get_parameter("stages.1.conv2.weight")
    assert weight.grad is not None
    want = 1e-3 * weight.grad.double().square().mean((1, 2, 3))
    assert torch.allclose(optimizer.state[weight]["exp_avg_sq"].double(), want, rtol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "cut"), [("adam-mini", None), ("blockwise-adam", "layer"), ("blockwise-adam", "role")]
)
def test_what_needs_roles_says_so(optimizer: str, cut: str | None) -> None:
    options = {"cut": cut} if cut else {}
    with pytest.raises(ValueError, match=r"distinguishes roles.*cut='"):
        sharpwise.create_optimizer(built("resnet"), optimizer, **options)


def test_their_memory_is_planned() -> None:
    for name in MODELS:
        model = built(name)
        found = {own.name: own for own in plan(model).combinations}
        for optimizer in ("adamw", "blockwise-adam"):
            assert found[optimizer].state == sharpwise.create_optimizer(model, optimizer, compile=False).state_bytes()
