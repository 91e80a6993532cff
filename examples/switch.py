"""Switch an AdamW run in the middle: to 8-bit state, which loads as it is, or to Adam-mini, whose blocks take a mean.

    python examples/switch.py

Half of the steps with torch's AdamW, the other half with each of three: AdamW again, AdamW8bit, AdamMini. Prints the
loss at the end and the bytes of state.
"""

import copy

import torch
import transformers
from torch import Tensor, nn

import sharpwise

STEPS, VOCABULARY, CONTEXT = 40, 32, 32


def batches(seed: int) -> list[Tensor]:
    """Tokens that count up by a step of their own: easy to learn, and not by heart."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(VOCABULARY, (STEPS, 16, 1), generator=generator)
    strides = torch.randint(1, 5, (STEPS, 16, 1), generator=generator)
    return list((starts + strides * torch.arange(CONTEXT)) % VOCABULARY)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> float:
    for tokens in data:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def block_means(v: Tensor, optimizer: sharpwise.BlockOptimizer, name: str) -> Tensor:
    """Adam-mini's second moment of a parameter from AdamW's: of each of its blocks the mean."""
    means = []
    for segment in optimizer.blocks[name]:
        _, cut = optimizer.rule.assign(segment)
        if cut == "element":
            return v
        rows = segment.row_sums(v)[0, segment.row_index()].float()  # one copy: experts that are stacked have more
        sums = torch.zeros(segment.blocks(cut)).index_add(0, segment.block_of_row(cut), rows)
        means.append(sums * segment.blocks(cut) / segment.numel)
    return torch.cat(means)


def to_adam_mini(model: nn.Module, old: torch.optim.Optimizer, **options: float) -> sharpwise.AdamMini:
    """Adam-mini that goes on where an AdamW of the same model stands."""
    new = sharpwise.AdamMini(model, **options)
    new.init_state()
    for name, p in model.named_parameters():
        for key in ("step", "exp_avg"):
            new.state[p][key].copy_(old.state[p][key])
        new.state[p]["exp_avg_sq"].copy_(block_means(old.state[p]["exp_avg_sq"], new, name))
    return new


def main() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=VOCABULARY, n_positions=CONTEXT)
    config.bos_token_id = config.eos_token_id = 0
    model = transformers.GPT2LMHeadModel(config)
    first = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
    print(f"torch AdamW, {STEPS} steps: loss {train(model, first, batches(1)):.3f}")

    for name in ("AdamW", "AdamW8bit", "AdamMini"):
        branch = copy.deepcopy(model)
        old = torch.optim.AdamW(branch.named_parameters(), lr=3e-3)
        old.load_state_dict(first.state_dict())
        if name == "AdamMini":
            optimizer: torch.optim.Optimizer = to_adam_mini(branch, old, lr=3e-3)
        else:
            optimizer = getattr(sharpwise, name)(branch, lr=3e-3)
            optimizer.load_state_dict(old.state_dict())
        loss = train(branch, optimizer, batches(2))
        print(f"then {name}: loss {loss:.3f}, {optimizer.state_bytes() / 2**10:.0f} KiB of state")


if __name__ == "__main__":
    main()
