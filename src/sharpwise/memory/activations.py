"""What a backward pass keeps, and what a pass sends: estimates, from the shapes of the matrices of a transformer.

    kept per token of a layer, in the type of the arithmetic:
      what goes into every matrix (once where q, k, v or gate, up share it); what comes out of all but o and down, of
      gate twice, before and after its activation; what goes into every norm, twice where it has no bias (transformers
      writes RMSNorm out); with written-out attention one number per head and position of the context
    once:    what goes into the last norm and the head; the logits, with 12 bytes more for each (fp32: the logits, their
             log-probabilities, a gradient)
    casts:   under autocast a copy in bf16 of every matrix

For GPT-2 that is 16 widths per token and layer: 34 bytes in 16 bits in Korthikanti et al. (arXiv 2205.05198, section
4.1), less the masks of dropout, which pretraining does without. Not in it: what a framework and its kernels need
besides, fragmentation, and what an activation function keeps that is written out (`gelu_new` of transformers: nearly
as much as all else).
Stacked experts are counted for as many as a token goes to.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from sharpwise.blocks import Segment
from sharpwise.memory.pieces import How, Piece

PRECISIONS: dict[str, tuple[str | None, int]] = {
    "fp32": ("float32", 4),
    "bf16-autocast": ("float32", 2),
    "bf16": ("bfloat16", 2),
}
"""By the words of `sharpwise train`: the type of the parameters, and bytes of a number of the arithmetic."""
_SHARED = {"q": "qkv", "k": "qkv", "v": "qkv", "kv_latent": "qkv", "o_gate": "qkv", "gate": "up", "router": "up"}
"""Roles of matrices that read the same vectors."""
_TO_RESIDUAL = {"o", "down"}
"""What comes out of these is added, and not kept."""


class Activations(NamedTuple):
    """Bytes, an estimate.

    Attributes:
        sequence: kept for the backward pass, per sequence; casts: copies of the matrices, whatever the batch.
        sent: by tensor parallelism, per sequence.
    """

    sequence: int
    casts: int
    sent: int = 0


def activations_of(
    model: nn.Module,
    segments: Sequence[Segment],
    context: int,
    size: int,
    *,
    autocast: bool,
    eager: bool,
    cut: Mapping[str, int],
    processes: int,
) -> Activations | None:
    """What is kept per sequence of so many tokens; None of what is no transformer as far as the map knows.

    Args:
        size: bytes of a number.
        cut: matrices that are cut by tensor parallelism, and along which dimension.
    """
    if not any(str(s.role) == "q" and s.layer is not None for s in segments):
        return None
    experts = _experts_per_token(model)
    per_token, sent, vocabulary, width, elements = 0.0, 0.0, 0, 0, 0
    inputs: dict[tuple[object, str, int], float] = {}
    biased = {s.name.rpartition(".")[0] for s in segments if s.bias}
    for s in segments:
        role, own = str(s.role), cut.get(s.name)
        if role == "norm" and not s.bias:
            per_token += s.numel * (1 if s.layer is None or s.name.rpartition(".")[0] in biased else 2)
            continue
        if not s.is_matrix or role in ("pos_emb", "rel_pos", "modulation") or (role == "tok_emb" and not s.tied):
            continue
        times = min(experts, s.copies) if s.stacked else 1
        out = s.rows * times / (processes if own == s.dim else 1)
        into = s.numel / s.copies / max(1, s.rows) * times / (1 if own in (None, s.dim) else processes)
        elements += s.numel // (processes if own is not None else 1)
        if role in ("tok_emb", "head"):
            vocabulary, width = s.rows, int(into)
            continue
        if s.layer is None:
            per_token += out + into
            continue
        inputs[s.layer, _SHARED.get(role, role), int(into)] = into
        per_token += 0 if role in _TO_RESIDUAL else 2 * out if role == "gate" else out
        if role in _TO_RESIDUAL and own is not None:
            sent += 4 * s.rows * (processes - 1) / processes  # summed up forward, and its input's gradient backward
        if eager and role == "q" and s.heads:
            per_token += s.heads * context / (processes if own == s.dim else 1)
    per_token += sum(inputs.values()) + width
    kept = context * (per_token * size + vocabulary * (size + 12))
    return Activations(round(kept), 2 * elements if autocast else 0, round(context * sent * size))


def _experts_per_token(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    found = getattr(config, "num_experts_per_tok", None)
    return found if isinstance(found, int) and found > 0 else 1


class Passes(NamedTuple):
    """Bytes that a process holds and sends for the passes of one micro-batch, besides activations.

    Attributes:
        gathered: parameters and gradients that FSDP2 holds whole for a while: what lies outside of the layers from the
            forward to the backward pass, two layers (one in use, one on its way), and the gradient of the largest.
        sent: parameters gathered forward and, of layers, backward; gradients reduced.
    """

    gathered: int
    sent: int


def passes_of(pieces: Sequence[Piece], processes: int, how: How) -> Passes:
    """What a data parallel training holds and sends; of tensor parallelism see `Activations`."""
    if processes == 1 or how == "tp":
        return Passes(0, 0)
    whole: dict[int | None, int] = {}
    gradients = 0
    for piece in pieces:
        size = piece.held.element_size() * sum(s.numel for s in piece.segments)
        layer = piece.segments[0].layer
        whole[layer] = whole.get(layer, 0) + size
        gradients += size if piece.held.requires_grad else 0
    ring = (processes - 1) / processes
    if how == "replicate":
        return Passes(0, round(2 * ring * gradients))
    outside = whole.pop(None, 0)
    layers, largest = sum(whole.values()), max(whole.values(), default=0)
    gathered = outside + 2 * largest + max(outside, largest)
    return Passes(gathered, round(ring * (2 * layers + outside + gradients)))
