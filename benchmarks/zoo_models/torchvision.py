"""torchvision's models by its own classes, narrow."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models import (
    convnext,
    densenet,
    efficientnet,
    maxvit,
    mobilenetv2,
    mobilenetv3,
    regnet,
    shufflenetv2,
    squeezenet,
    swin_transformer,
    vision_transformer,
)
from torchvision.models.segmentation import fcn
from torchvision.models.video import mvit
from torchvision.models.video import swin_transformer as video_swin

Built = tuple[nn.Module, Any]


def _image(kind: Callable[..., nn.Module], *shape: int, **arguments: Any) -> Callable[[], Built]:
    """A classifier of ten classes, and two images or videos of that shape (32 x 32)."""

    def build() -> Built:
        return kind(num_classes=10, **arguments), torch.randn(2, 3, *(shape or (32, 32)))

    return build


def _mvit(num_classes: int) -> nn.Module:
    kernel, stride, half = [3, 3, 3], [1, 1, 1], [1, 2, 2]
    settings = [
        mvit.MSBlockConfig(2, 16, 16, kernel, kernel, stride, half),
        mvit.MSBlockConfig(4, 16, 32, kernel, kernel, half, stride),
    ]
    return mvit.MViT((32, 32), 4, settings, True, False, True, True, num_classes=num_classes)


def _mobilenetv3(num_classes: int) -> nn.Module:
    config = partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    settings = [config(8, 3, 16, 16, True, "RE", 2), config(16, 3, 32, 24, False, "HS", 1)]
    return mobilenetv3.MobileNetV3(settings, 64, num_classes=num_classes)


class _Backbone(nn.Sequential):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": super().forward(x)}


def _fcn(num_classes: int) -> nn.Module:
    backbone = _Backbone(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
    return fcn.FCN(backbone, fcn.FCNHead(16, num_classes))


SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}

MODELS: dict[str, Callable[[], Built]] = {
    "torchvision/vit": _image(
        vision_transformer.VisionTransformer,
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
    ),
    "torchvision/swin": _image(swin_transformer.SwinTransformer, patch_size=[4, 4], window_size=[4, 4], **SWIN),
    "torchvision/swin-v2": _image(
        swin_transformer.SwinTransformer,
        patch_size=[4, 4],
        window_size=[4, 4],
        **SWIN,
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    ),
    "torchvision/swin-3d": _image(
        video_swin.SwinTransformer3d, 4, 32, 32, patch_size=[2, 4, 4], window_size=[2, 4, 4], **SWIN
    ),
    "torchvision/mvit": _image(_mvit, 4, 32, 32),
    "torchvision/maxvit": _image(
        maxvit.MaxVit,
        32,
        32,
        input_size=(32, 32),
        stem_channels=8,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
    ),
    "torchvision/convnext": _image(
        convnext.ConvNeXt, block_setting=[convnext.CNBlockConfig(16, 24, 2), convnext.CNBlockConfig(24, None, 2)]
    ),
    "torchvision/densenet": _image(densenet.DenseNet, growth_rate=8, block_config=(2, 2), num_init_features=16),
    "torchvision/mobilenet-v2": _image(
        mobilenetv2.MobileNetV2, inverted_residual_setting=[[1, 8, 1, 1], [4, 16, 2, 2]], width_mult=0.25
    ),
    "torchvision/mobilenet-v3": _image(_mobilenetv3),
    "torchvision/efficientnet": _image(
        efficientnet.EfficientNet,
        inverted_residual_setting=[
            efficientnet.FusedMBConvConfig(2, 3, 2, 8, 16, 1),
            efficientnet.MBConvConfig(4, 3, 2, 16, 24, 2),
        ],
        dropout=0.0,
    ),
    "torchvision/regnet": _image(
        regnet.RegNet,
        block_params=regnet.BlockParams.from_init_params(
            depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25
        ),
        stem_width=8,
    ),
    "torchvision/shufflenet": _image(
        shufflenetv2.ShuffleNetV2, stages_repeats=[2, 2, 2], stages_out_channels=[8, 16, 32, 64, 64]
    ),
    "torchvision/squeezenet": _image(squeezenet.SqueezeNet, version="1_1"),
    "torchvision/fcn": _image(_fcn),
}
