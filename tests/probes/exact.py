"""A two-layer GPT with tied weights and a fused QKV, small enough for its Hessian and Fisher matrix as they are."""

from functools import cached_property, lru_cache, partial

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from sharpwise.blocks import BlockMap, Segment
from sharpwise.probes import Operator
from sharpwise.probes.gather import Selection

VOCAB, CONTEXT = 7, 5


def gpt2(attention: str = "sdpa", **changes) -> transformers.GPT2LMHeadModel:
    """364 float64 parameters, far from their usual start so that nothing in the curvature is small; dropout is on."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 4, "n_inner": 6, "vocab_size": VOCAB, "n_positions": CONTEXT}
    config = transformers.GPT2Config(
        **(sizes | changes), bos_token_id=0, eos_token_id=0, attn_implementation=attention, embd_pdrop=0.5
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(sequences: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (sequences, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))


def flat_logits(model, inputs: Tensor, flat: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] as a function of all parameters in one vector."""
    named = dict(model.named_parameters())
    parts = flat.split([p.numel() for p in named.values()])
    whole = {n: part.view(p.shape) for (n, p), part in zip(named.items(), parts, strict=True)}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return functional_call(model, whole, (inputs,), {"use_cache": False}).logits.flatten(0, 1)


def flat_parameters(model) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def label_gradients(model, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of -log p_t(y), [tokens, vocabulary, d], and p_t(y) / N: F is the weighted sum of their squares."""
    flat, logits = flat_parameters(model), partial(flat_logits, model, inputs)
    gradients = torch.autograd.functional.jacobian(lambda flat: -logits(flat).log_softmax(-1), flat)
    p = logits(flat).softmax(-1)
    return gradients, p.detach() / len(p)


class Exact:
    """The matrices of the mean loss over `batch`, rows in the order of `selection`, which has all segments."""

    def __init__(self) -> None:
        self.model, self.batch = gpt2().eval(), tokens()
        self.blocks = BlockMap.of(self.model)
        named = dict(self.model.named_parameters())
        self.selection = Selection(self.blocks.segments, list(named))
        numbers = torch.arange(self.selection.dim).split([p.numel() for p in named.values()])
        whole = {n: own.view(p.shape) for (n, p), own in zip(named.items(), numbers, strict=True)}
        self._order = self.selection.gather(whole)

    @cached_property
    def hessian(self) -> Tensor:
        # Row by row: `torch.func.hessian` of torch 2.13 is wrong, and not even symmetric, for the gain of a layer norm.
        inputs, targets = self.batch[:, :-1], self.batch[:, 1:].flatten()
        found = torch.autograd.functional.hessian(
            lambda flat: F.cross_entropy(flat_logits(self.model, inputs, flat), targets), flat_parameters(self.model)
        )
        return found[self._order][:, self._order]

    @cached_property
    def fisher(self) -> Tensor:
        """1/N sum_t sum_y p_t(y) g_t(y) g_t(y)^T, label by label."""
        gradients, weights = label_gradients(self.model, self.batch[:, :-1])
        return torch.einsum("ty,tyi,tyj->ij", weights, gradients, gradients)[self._order][:, self._order]

    def rows(self, *types: str) -> list[int]:
        """Of the elements of some roles or block types."""
        ends = np.cumsum([0, *self.selection.sizes])
        parts = zip(self.selection.segments, ends, ends[1:], strict=False)
        return [i for s, a, b in parts if s.role in types or s.block_type in types for i in range(a, b)]


@lru_cache
def exact() -> Exact:
    return Exact()


class Dense(Operator):
    """A matrix that is there."""

    def __init__(self, matrix: Tensor, selection: Selection | None = None) -> None:
        selection = selection or Selection([Segment("w", (len(matrix),))], ["w"])
        super().__init__(selection, matrix.dtype, matrix.device)
        self.matrix = matrix

    def multiply(self, v: Tensor) -> Tensor:
        return self.matrix @ v


def cover(found, truth: float) -> bool:
    """Whether an estimate has the true value within its error."""
    return abs(found.value - truth) <= found.error
