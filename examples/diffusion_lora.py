"""LoRA on a diffusion U-Net of diffusers, trained to denoise scikit-learn's digits.

    python examples/diffusion_lora.py [--steps 30]

The U-Net is tiny and random; put `UNet2DConditionModel.from_pretrained(...)` in its place. The adapter sits on the
projections of attention, each of which gets the learning rate of its role. Prints the loss, first and last.
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from sklearn.datasets import load_digits

import sharpwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--optimizer", default="adamw+blockwise", help="an optimizer, or one + a block_lr")
    given = parser.parse_args()

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 32),
        norm_num_groups=8, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian"))
    # Built after the adapter is there: it holds what trains. Names of diffusers are not among those known: say them.
    blocks = {"*.to_q.*": "q", "*.to_k.*": "k", "*.to_v.*": "v", "*.to_out.*": "o"}
    optimizer = sharpwise.create_optimizer(unet, given.optimizer, lr=1e-2, weight_decay=0.01, blocks=blocks)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    classes = F.one_hot(torch.tensor(digits.target), 32).float()[:, None]  # what a text encoder would say
    schedule = DDPMScheduler(num_train_timesteps=100)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(given.steps):
        rows = torch.randint(len(images), (16,), generator=generator)
        noise = torch.randn(images[rows].shape, generator=generator)
        times = torch.randint(100, (16,), generator=generator)
        noisy = schedule.add_noise(images[rows], noise, times)
        loss = F.mse_loss(unet(noisy, times, encoder_hidden_states=classes[rows]).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    roles = sorted({str(segment.role) for segment in optimizer.blocks.segments})
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"{given.optimizer}: loss {first:.3f}, then {last:.3f}; roles {', '.join(roles)}")


if __name__ == "__main__":
    main()
