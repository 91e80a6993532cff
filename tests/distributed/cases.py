"""The combinations that the mesh must not change, from the table of what is supported: they grow with it."""

import itertools
from typing import NamedTuple

from sharpwise.optim import COMBINES

from .placements import EVERYWHERE, EXPERTS, MODELS, ODD, PLACEMENTS, PLANNED, WIDE
from .rules import RULES


class Case(NamedTuple):
    """One run of the battery. `guard`: clipping, and steps with a non-finite gradient left out."""

    rule: str
    block_lr: str
    storage: str
    guard: bool
    path: str
    model: str
    placement: str

    @property
    def world(self) -> int:
        """How many processes it takes."""
        return EVERYWHERE[self.placement][0]


def _supported() -> list[tuple[str, str, str]]:
    found = []
    for rule, (block_lrs, storages) in COMBINES.items():
        for storage in storages:
            roundings = [storage, f"{storage}, stochastic"] if storage == "bf16" else [storage]
            found += [(rule, block_lr, name) for block_lr in ("", *block_lrs) for name in roundings]
    return found


WAYS = tuple(itertools.product((False, True), ("eager", "default")))
ALL = [
    Case(*combination, guard, path, model, placement)
    for combination in _supported()
    for guard, path in WAYS
    for model, placement in itertools.product(MODELS, PLACEMENTS)
]


KIN = ("adasgd", "blockwise-adam")
"""Adam-mini's own rule under other cuts: among every combination, not among the few that stand for all."""
EVERY = [
    Case(*combination, *way, model, placement)
    for (combination, placement), (model, way) in zip(
        itertools.product(_supported(), PLACEMENTS), itertools.cycle(itertools.product(MODELS, WAYS)), strict=False
    )
]
"""Every combination on every placement, models and the four ways by turns."""
ROUNDS = [
    Case(rule, "", "fp32", guard, "default", model, placement)
    for rule, (guard, placement) in itertools.product(
        RULES, [(False, "replicated 2"), (True, "fsdp 3"), (False, "tp 2"), (True, "fsdp 2 x tp 2"), (True, "hsdp 2x2")]
    )
    for model in (("llama (grouped)",) if placement != "tp 2" else ("gpt2 (Conv1D, fused, tied)",))
]
PARTED = [
    Case("parted", "", "fp32", *way, model, placement)
    for (model, placement), way in zip(
        itertools.product(
            ("gpt2 (Conv1D, fused, tied)", "nanogpt (fused)", "gpt_neox (interleaved)"),
            ("fsdp 2", "tp 2", "fsdp 3", "hsdp 2x2", "fsdp 2 x tp 2"),
        ),
        itertools.cycle(WAYS),
        strict=False,
    )
]
"""Several views of one parameter, whose rows are cut, or its columns."""
STAGES = [
    Case(rule, "", "fp32", True, "default", "llama (grouped)", placement)
    for rule, placement in itertools.product(["adam-mini", "adapm", *RULES], WIDE)
]
CAUTIOUS = [
    Case("adam-mini", "blockwise", "fp32, cautious", *way, "gpt2 (Conv1D, fused, tied)", placement)
    for way, placement in zip(WAYS, ("fsdp 2", "tp 2", "fsdp 3", "fsdp 2 x tp 2"), strict=True)
]
CONTROLLED = [
    Case(rule, "", f"fp32, {control}", *way, model, placement)
    for (rule, control, model, placement), way in zip(
        [
            ("adam-mini", "turned", "llama (grouped)", "fsdp 2"),
            ("adamw", "turned", "gpt2 (Conv1D, fused, tied)", "fsdp 3"),
            ("adam-mini", "sized", "gpt2 (Conv1D, fused, tied)", "tp 2"),
            ("largest", "sized", "llama (grouped)", "fsdp 3"),
            ("adamw", "sized", "mixtral (experts)", "fsdp 2"),
            ("adamw", "sideways", "llama (grouped)", "fsdp 2 x tp 2"),
            ("adam-mini", "sideways", "gpt_neox (interleaved)", "hsdp 2x2"),
            ("muon", "turned", "llama (grouped)", "fsdp 2"),
            ("muon", "sized", "gpt2 (Conv1D, fused, tied)", "fsdp 2 x tp 2"),
            ("adamw", "angular", "llama (grouped)", "fsdp 2 x tp 2"),
            ("lion", "l2", "gpt2 (Conv1D, fused, tied)", "fsdp 3"),
            ("muon", "hyperball", "nanogpt (fused)", "tp 2"),
            ("lion", "snr", "gpt2 (Conv1D, fused, tied)", "fsdp 2"),
            ("muon", "snr", "llama (grouped)", "fsdp 2 x tp 2"),
        ],
        itertools.cycle(WAYS),
        strict=False,
    )
]
CENTRED = [
    Case(rule, "sharpness(start=1, every=3, source=centred, normalize=geometric, by=module)", "fp32", *way, *where)
    for (rule, *where), way in zip(
        [
            ("adam-mini", "llama (grouped)", "fsdp 2"),
            ("adamw", "gpt2 (Conv1D, fused, tied)", "fsdp 3"),
            ("adam-mini", "gpt2 (Conv1D, fused, tied)", "tp 2"),
            ("adamw", "llama (grouped)", "fsdp 2 x tp 2"),
        ],
        itertools.cycle(WAYS),
        strict=False,
    )
]
"""Both moments are summed up in one collective, of which one is replicated and the other cut."""
ODD_HEADS = [
    Case("adam-mini", "blockwise", "fp32", *way, model, placement)
    for model, (i, placement) in itertools.product(ODD, enumerate(PLANNED))
    for way in (WAYS[i % 2], WAYS[3 - i % 2])
]
"""Tensor parallelism over more processes than divide the heads: a head's sum comes from two or three of them."""
BY_HEAD = [
    Case("muon", "", "fp32, heads", *way, model, placement)
    for (model, placement), way in zip(
        [
            *itertools.product(ODD, PLANNED),
            ("gpt2 (Conv1D, fused, tied)", "fsdp 3"),
            ("gpt_neox (interleaved)", "hsdp 2x2"),
            ("nanogpt (fused)", "fsdp 2"),
        ],
        itertools.cycle(WAYS),
        strict=False,
    )
]
"""Every head is a matrix: some lie in one process, some in two or three."""
BY_EXPERT = [
    Case("muon", "", "fp32", *way, "mixtral (experts)", placement) for placement in EXPERTS for way in WAYS[:3]
]
PARTIAL = [
    Case("adapm", "", storage, *way, model, placement)
    for (model, placement, storage), way in zip(
        [
            ("gpt2 (Conv1D, fused, tied)", "fsdp 2", "fp32, block"),
            ("gpt2 (Conv1D, fused, tied)", "tp 2", "fp32"),
            ("gpt2 (Conv1D, fused, tied)", "fsdp 2 x tp 2", "fp32, block"),
            ("nanogpt (fused)", "fsdp 3", "fp32, block"),
            ("nanogpt (fused)", "tp 2", "fp32"),
            ("gpt_neox (interleaved)", "fsdp 2", "fp32"),
            ("gpt_neox (interleaved)", "hsdp 2x2", "fp32, block"),
            ("llama (grouped)", "tp 2", "bf16"),
            ("llama (grouped)", "fsdp 3", "fp32, block"),
            ("mixtral (experts)", "fsdp 2 x tp 2", "fp32"),
            ("mixtral (experts)", "fsdp 4", "fp32, block"),
            ("mixtral (experts)", "replicated but for experts 2", "fp32"),
        ],
        itertools.cycle(WAYS),
        strict=False,
    )
]
"""AdaPM: factors of matrices that are cut, whole or in parts; momentum of a part of a parameter."""
