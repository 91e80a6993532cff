"""Pretrain a small GPT by characters, in the loop that nanoGPT made known; only the line with the optimizer is new.

    python examples/pretrain_nanogpt.py [--optimizer adam-mini] [--steps 300]

The text is the source of Python's own argparse. Prints the validation loss on the way, and what the state weighs.
"""

import argparse
import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpwise

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="adam-mini", help="one of sharpwise.list_optimizers()")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    given = parser.parse_args()

    torch.manual_seed(0)
    text = inspect.getsource(argparse)
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(letter) for letter in text])
    train, held_out = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(len(letters)).to(device)
    optimizer = sharpwise.create_optimizer(model, given.optimizer, lr=given.lr, weight_decay=0.1)

    def batch(data: Tensor, size: int = 16) -> Tensor:
        starts = torch.randint(len(data) - CONTEXT, (size,))
        return torch.stack([data[i : i + CONTEXT + 1] for i in starts]).to(device)

    def loss_of(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def rate(step: int, warmup: int = 20) -> float:
        if step < warmup:
            return given.lr * (step + 1) / warmup
        return given.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, given.steps - warmup))))

    for step in range(given.steps + 1):
        if step % 100 == 0 or step == given.steps:
            with torch.no_grad():
                print(f"step {step}: validation loss {loss_of(batch(held_out, 64)).item():.3f}")
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for _ in range(2):  # two micro-batches
            (loss_of(batch(train)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{given.optimizer}: {optimizer.state_bytes() / 2**20:.2f} MiB of state")


if __name__ == "__main__":
    main()
