"""Tiny random models by package, one file each: `MODELS`, by name a function that builds (model, example)."""

from torch.library import define

try:
    import torchvision  # noqa: F401 - timm and transformers import it where it is there
except ModuleNotFoundError:
    pass
except RuntimeError:  # a build for CUDA beside torch for CPU lacks its operators, which no model here calls
    for operator in ("nms", "qnms"):
        define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
