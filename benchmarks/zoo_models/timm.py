"""timm's models by its own classes, two blocks a stage and narrow."""

from collections.abc import Callable
from typing import Any

import timm.models as zoo
import torch
from torch import nn


def _image(kind: Callable[..., nn.Module], size: int = 32, **arguments: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        return kind(num_classes=10, **arguments), torch.randn(2, 3, size, size)

    return build


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "timm/vit": _image(zoo.VisionTransformer, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4),
    "timm/swin": _image(
        zoo.SwinTransformer, img_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4
    ),
}
