"""Bytes of optimizer state, by model and optimizer: exact, as the code that allocates state runs on the meta device.

    python benchmarks/state_bytes.py    writes benchmarks/results/state_bytes.json

The pictures of the README and the table of "How to choose" are drawn from that file.
"""

import json
from pathlib import Path
from typing import Any

import torch
from environment import environment

import sharpwise
from sharpwise.train.models import load_model

RESULT = Path(__file__).parent / "results" / "state_bytes.json"
MODELS = {"GPT-2 124M": "gpt2", "GPT-2 1.5B": "gpt2-xl", "Llama-2-7B": "llama-2-7b"}
ARMS: dict[str, dict[str, Any]] = {
    "AdamW": {"name": "adamw"},
    "AdamW8bit": {"name": "adamw-8bit"},
    "AdamW8bit(keep_fp32=())": {"name": "adamw-8bit", "keep_fp32": ()},
    "BlockwiseAdam(cut='layer')": {"name": "blockwise-adam", "cut": "layer"},
    "AdamMini": {"name": "adam-mini"},
    "AdamMini(storage='int8-linear')": {"name": "adam-mini", "storage": "int8-linear"},
    "Muon": {"name": "muon"},
    "Muon8bit": {"name": "muon-8bit"},
    "Muon8bit(aux_storage='int8-dynamic')": {"name": "muon-8bit", "aux_storage": "int8-dynamic"},
    "Lion": {"name": "lion"},
    "LionAR": {"name": "lionar"},
    "SGDSaI": {"name": "sgd-sai"},
    "AdaPM": {"name": "adapm"},
    "AdaPM(second_moment='block')": {"name": "adapm", "second_moment": "block"},
}
"""As they are written in Python, and as `create_optimizer` takes them."""


def state_bytes(preset: str, arm: dict[str, Any]) -> int:
    """Of all state but the step counters."""
    optimizer = sharpwise.create_optimizer(load_model(preset, device="meta"), **arm)
    optimizer.init_state()
    kept = ((key, value) for own in optimizer.state.values() for key, value in own.items())
    return sum(value.numel() * value.element_size() for key, value in kept if torch.is_tensor(value) and key != "step")


def main() -> None:
    found = {name: {arm: state_bytes(preset, own) for arm, own in ARMS.items()} for name, preset in MODELS.items()}
    RESULT.write_text(json.dumps({"environment": environment(), "bytes": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
