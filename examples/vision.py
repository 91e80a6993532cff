"""A ViT and a ResNet on scikit-learn's digits, each with the optimizer that suits it.

    python examples/vision.py [--epochs 6]

A ViT has queries, keys and heads: Adam-mini cuts by them, layer decay follows its layers. A ResNet has neither: its
blocks are tensors. Prints the accuracy on held-out digits, and the state of each optimizer against AdamW's.
"""

import argparse

import torch
import torch.nn.functional as F
import transformers
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sharpwise


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
        self.stages = nn.Sequential(*(Residual(width) for _ in range(2)))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8,
            patch_size=4, num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.vit = transformers.ViTForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x).logits


def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> float:
    """Accuracy on the last fifth of the digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = len(labels) * 4 // 5
    seen, unseen = order[:cut], order[cut:]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=epochs * (cut // 64), cycle_momentum=False
    )
    for _ in range(epochs):
        for rows in seen[torch.randperm(cut)][: cut // 64 * 64].split(64):
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return (model(images[unseen]).argmax(1) == labels[unseen]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    vit, resnet = ViT(), ResNet()
    optimizers = {
        "ViT, Adam-mini, layer decay": (vit, sharpwise.AdamMini(vit, lr=3e-3, block_lr="layer_decay(rate=0.8)")),
        "ResNet, Adam-mini by tensor": (resnet, sharpwise.AdamMini(resnet, lr=3e-3, cut="tensor")),
    }
    for name, (model, optimizer) in optimizers.items():
        accuracy = train(model, optimizer, epochs)
        share = optimizer.state_bytes() / sharpwise.AdamW(model).state_bytes()
        print(f"{name}: accuracy {accuracy:.3f}, {share:.0%} of AdamW's state")


if __name__ == "__main__":
    main()
