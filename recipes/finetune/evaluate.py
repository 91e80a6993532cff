"""What `sharpwise compare` does not say of these runs: next-token accuracy, and the loss on the text of the base.

    python -m recipes.finetune.evaluate runs/finetune-base runs/full/runs/*/final-* > recipes/finetune/full-texts.json
    python -m recipes.finetune.evaluate runs/finetune-base runs/lora/runs/*/final-* > recipes/finetune/lora-texts.json

An object for each run that has ended: loss and accuracy on the new text, then on the old one, over 256 windows each.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.finetune.lora import adapted
from sharpwise.train.data import even_starts, open_tokens
from sharpwise.train.models import load_pretrained

TEXTS = ("data/code", "data/mix")
WINDOWS, CONTEXT = 256, 128


def trained(run: Path) -> nn.Module:
    """The model of a run, its adapter merged into the base where it has one."""
    final = run / "final"
    if not (final / "adapter_config.json").exists():
        return load_pretrained(final)
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    model = adapted()
    set_peft_model_state_dict(model, load_file(final / "adapter_model.safetensors"))
    return model


@torch.no_grad()
def judged(model: nn.Module, windows: Tensor) -> tuple[float, float]:
    """Loss and accuracy of the next token, over int64 [n, context + 1]."""
    logits = torch.cat([model(part[:, :-1]).logits for part in windows.split(16)])
    targets = windows[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    return loss, (logits.argmax(-1) == targets).float().mean().item()


def main(runs: list[str]) -> None:
    windows = []
    for folder in TEXTS:
        text = open_tokens(folder).validation
        starts = even_starts(len(text), WINDOWS, CONTEXT)
        windows.append(torch.from_numpy(text.windows(starts, CONTEXT + 1)))
    found = []
    for run in map(Path, runs):
        if (run / "final").is_dir():
            model = trained(run).eval()
            numbers = [round(number, 4) for text in windows for number in judged(model, text)]
            arm = run.parent.name if run.name.startswith("final-") else "base"
            named = dict(zip(("loss", "accuracy", "old_loss", "old_accuracy"), numbers, strict=True))
            found.append({"arm": arm, "run": run.name, **named})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
