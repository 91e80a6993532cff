"""A small Vision Transformer and scikit-learn's digits (1797 images of 8 x 8, 17 grey levels), for `sharpwise compare`.

    pip install scikit-learn
    python recipes/sgd_sai/vit.py        # writes data/digits
    sharpwise compare --recipe sgd_sai/vit --trust-code

An example is the number of an image and its class. The images themselves are in the model, as a table that is not
trained: so the loss that the harness takes, that of the next token, is that of the class alone.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FOLDER = Path("data/digits")
IMAGES = "images.npy"
CLASSES = 10
HELD_OUT = 360
NEVER = -1e4  # the logit of what is no class; finite, so that curvature can be measured


class DigitsViT(nn.Module):
    """A ViT of Hugging Face that is asked for images by number.

    Args:
        images: float32 [images, 1, 8, 8].
        vocab_size: width of the logits; those from `CLASSES` on are `NEVER`.
        width, layers, heads: of the transformer.
        attn_implementation: "eager" or "sdpa".
    """

    def __init__(
        self, images: Tensor, vocab_size: int, width: int, layers: int, heads: int, attn_implementation: str | None
    ) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        self.vit = ViTForImageClassification(
            ViTConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                image_size=images.shape[-1],
                patch_size=2,
                num_channels=1,
                num_labels=CLASSES,
                attn_implementation=attn_implementation,
            )
        )
        self.register_buffer("images", images, persistent=False)
        self.images: Tensor
        self.missing = vocab_size - CLASSES

    def forward(self, input_ids: Tensor) -> Tensor:
        """Numbers of images, int64 [n, m], to logits [n, m, vocab_size]."""
        logits = self.vit(self.images[input_ids.flatten()]).logits
        return F.pad(logits, (0, self.missing), value=NEVER).unflatten(0, input_ids.shape)


def vit(
    vocab_size: int,
    width: int = 64,
    layers: int = 4,
    heads: int = 4,
    attn_implementation: str | None = None,
    folder: str = str(FOLDER),
) -> DigitsViT:
    """What `model.name = "recipes.sgd_sai.vit:vit"` builds; its arguments are `model.settings`."""
    images = torch.from_numpy(np.load(Path(folder) / IMAGES))
    return DigitsViT(images, vocab_size, width, layers, heads, attn_implementation)


def prepare(folder: Path, images: np.ndarray, classes: np.ndarray, held_out: int = HELD_OUT) -> None:
    """Write the images as the model takes them, and the examples (number of an image, class) as the harness does.

    Args:
        folder: made if need be.
        images: [images, 8, 8], 0 to 16.
        classes: int [images].
        held_out: so many images are for validation, chosen by chance, the same every time.
    """
    from sharpwise.train.data import write_examples

    examples = np.stack([np.arange(len(images)), classes], axis=1)
    np.random.default_rng(0).shuffle(examples)
    description = f"images of 8 x 8 and their class, {len(images) - held_out} to train on, {held_out} held out"
    write_examples(folder, examples[:-held_out], examples[-held_out:], description)
    np.save(folder / IMAGES, (images[:, None] / 8 - 1).astype(np.float32))


if __name__ == "__main__":
    from sklearn.datasets import load_digits

    digits = load_digits()
    prepare(FOLDER, digits.images, digits.target)
    print(f"{len(digits.images)} images in {FOLDER}, {HELD_OUT} of them for validation")
