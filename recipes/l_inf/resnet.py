"""A small ResNet for scikit-learn's digits, which `recipes/sgd_sai/vit.py` prepares: a model that is no transformer.

An example is the number of an image and its class, as there: the loss that the harness takes is that of the class.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.sgd_sai.vit import CLASSES, FOLDER, IMAGES, NEVER


class Residual(nn.Module):
    """Two convolutions beside the identity, or beside one of 1 x 1 where width or resolution change.

    Groups are normalized, not batches: the loss of an image is then its own, and has a Hessian.
    """

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(4, outside)
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inside, height, width] to [n, outside, height / stride, width / stride]."""
        y = self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x)))))
        return F.silu(self.shortcut(x) + y)


class DigitsResNet(nn.Module):
    """A ResNet that is asked for images by number.

    Args:
        images: float32 [images, 1, 8, 8].
        vocab_size: width of the logits; those from `CLASSES` on are `NEVER`.
        width: channels at 8 x 8; twice as many at 4 x 4.
    """

    def __init__(self, images: Tensor, vocab_size: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(
            Residual(width, width), Residual(width, 2 * width, 2), Residual(2 * width, 2 * width)
        )
        self.classes = nn.Linear(2 * width, CLASSES)
        self.register_buffer("images", images, persistent=False)
        self.images: Tensor
        self.missing = vocab_size - CLASSES

    def forward(self, input_ids: Tensor) -> Tensor:
        """Numbers of images, int64 [n, m], to logits [n, m, vocab_size]."""
        x = self.blocks(self.stem(self.images[input_ids.flatten()])).mean((2, 3))
        return F.pad(self.classes(x), (0, self.missing), value=NEVER).unflatten(0, input_ids.shape)


def resnet(vocab_size: int, width: int = 20, folder: str = str(FOLDER)) -> DigitsResNet:
    """What `model.name = "recipes.l_inf.resnet:resnet"` builds; its arguments are `model.settings`."""
    images = torch.from_numpy(np.load(Path(folder) / IMAGES))
    return DigitsResNet(images, vocab_size, width)
