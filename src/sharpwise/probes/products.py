"""Products of the Hessian and the Gauss-Newton matrix with vectors, over any set of blocks of a model.

    L(p) = 1/N sum over tokens of -log softmax(z_t)_{y_t}         z = f(p), the logits
    H v  = d/dp <dL/dp, v>                                        two backward passes, the second through the first
    G v  = J^T A J v,   J = dz/dp,   A_t = (diag(p_t) - p_t p_t^T) / N
    J v  = d/dw <J^T w, v>                                        a backward pass that is differentiated once more

| symbol | meaning |
|---|---|
| N | tokens of all batches that have a target |
| p_t | softmax of the logits at token t |
| A | Hessian of the loss with respect to the logits |

G is the Fisher matrix F of `sharpwise.probes.fisher`, and H without the curvature of the network itself. The loss is
never computed: its gradient with respect to the logits, (p_t - onehot) / N, is a short expression that is
differentiated as it stands, with less memory than the double backward of a cross-entropy takes.

References: Pearlmutter, Fast exact multiplication by the Hessian, 1994; Schraudolph, Fast curvature matrix-vector
products, 2002; the double backward for J v after J. Townsend's note of 2017.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sharpwise.blocks import BlockMap, Segment
from sharpwise.blocks.map import Blocks
from sharpwise.probes.batches import IGNORED, Batch, check_micro
from sharpwise.probes.gather import Selection
from sharpwise.probes.parts import choose
from sharpwise.probes.subject import Subject, Tied

Kind = Literal["hessian", "gauss-newton"]
_WHO = "Curvature"


class Operator:
    """A symmetric matrix that is known by its products with vectors. Subclass it for a matrix of your own.

    Attributes:
        selection: the segments that its rows belong to.
        cost: of the latest product, in gradients over all the batches.
        products: made so far; `gradients` is what they cost.
        warnings: what a measurement has to say about it.
    """

    selection: Selection
    cost: float = 3.0
    what: str = "hessian"

    def __init__(self, selection: Selection, dtype: torch.dtype, device: torch.device) -> None:
        self.selection, self.dtype, self.device = selection, dtype, device
        self.products, self.gradients = 0, 0.0
        self.warnings: list[str] = []

    @property
    def dim(self) -> int:
        """Rows, and columns."""
        return self.selection.dim

    def matvec(self, v: Any) -> Any:
        """The product with a vector [dim], or with a dict of tensors by segment, as `selection.split` makes it.

        Raises:
            ValueError: for a vector of another length, or one that is not finite.
            FloatingPointError: for a product that is not finite.
        """
        if isinstance(v, Mapping):
            return self.selection.split(self.matvec(self.selection.join(v)))
        if tuple(v.shape) != (self.dim,):
            raise ValueError(f"{_WHO}.matvec: got a tensor of shape {list(v.shape)}, expected [{self.dim}]")
        v = v.to(self.device, self.dtype)
        result = self.multiply(v)
        self.products += 1
        self.gradients += self.cost
        if not bool(result.isfinite().all()):
            if not bool(v.isfinite().all()):
                raise ValueError(f"{_WHO}.matvec: the vector is not finite")
            raise FloatingPointError(f"{_WHO}: a product with the {self.what} is not finite; are weights and loss?")
        return result

    __matmul__ = matvec

    def multiply(self, v: Tensor) -> Tensor:
        """The product itself, [dim] -> [dim]."""
        raise NotImplementedError

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Where several products follow each other: meanwhile a matrix may keep what they have in common."""
        yield

    def settings(self) -> dict[str, Any]:
        """What it is of, for the settings of a measurement."""
        return {"matrix": self.what, "dim": self.dim, "dtype": str(self.dtype).removeprefix("torch.")}


class Curvature(Operator):
    """The Hessian or the Gauss-Newton matrix of the mean loss per token over some batches, restricted to some blocks.

    A restriction is a principal submatrix: rows and columns of the selected elements. The weights are read at every
    product; dropout is off meanwhile, and the model and its gradients stay as they were.

    Where all the batches are one pass, `kept()` keeps the graph of the gradient between products, so that a further
    product costs 2.1 gradients in place of 3.4 (`benchmarks/probes.py`). All probes of a `Curvature` do so.

    Args:
        model: causal language model. Compiled parts run uncompiled, attention in torch's "math" kernel, since neither
            can be differentiated twice otherwise; attention in a package of its own cannot be helped.
        batches: as `sharpness` takes them; kept. The matrix is that of exactly these tokens, each weighing the same.
        kind: "hessian", which has negative eigenvalues, or "gauss-newton", which has none.
        blocks: the model's map, or overrides for it.
        select: block types (`"VO"`), roles (`"q"`), globs on parameter names, several of them in a list; or segments.
            None: every trainable element.
        dtype: torch.float32 or torch.float64, that of the products. None: the parameters', float32 if that is less.
        micro: sequences per pass, None for all of a batch. Memory is about three times that of a gradient.
        tied: of a tied embedding, rows and columns are those of "both" uses together, of the "lookup" or of the "head".

    Raises:
        TypeError, ValueError: for bad arguments, a batch that does not fit the model, or no target that counts.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> h = Curvature(model, torch.tensor([[0, 1, 2, 3, 4]]), select="1.*")
        >>> h.dim, h.matvec(torch.ones(25)).abs().max() < 1e-6  # the same added to all logits changes nothing
        (25, tensor(True))
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        kind: Kind = "hessian",
        *,
        blocks: Blocks = None,
        select: str | Sequence[str] | Sequence[Segment] | None = None,
        dtype: torch.dtype | None = None,
        micro: int | None = None,
        tied: Tied = "both",
    ) -> None:
        if kind not in ("hessian", "gauss-newton"):
            raise ValueError(f"{_WHO}: kind must be 'hessian' or 'gauss-newton', got {kind!r}")
        check_micro(micro, _WHO)
        self.subject = Subject(model, blocks, _WHO, tied)
        chosen = _chosen(self.subject.segments, select)
        selection = Selection(chosen, list(self.subject.trained))
        self.names = list(dict.fromkeys(selection.names))
        dtype = _dtype_for([self.subject.trained[name] for name in self.names], dtype)
        super().__init__(selection, dtype, self.subject.device)
        self.kind, self.what, self.micro = kind, kind, micro
        self.batches = list(self.subject.batches(batches))
        self.tokens = sum(batch.tokens for batch in self.batches)
        self.passes = sum(1 for batch in self.batches for _ in batch.split(micro))
        self._graph: _Graph | None = None
        self._keepers = 0
        self._note_conversion()

    def settings(self) -> dict[str, Any]:
        """What it is of, for the settings of a measurement."""
        about = {"segments": len(self.selection.segments), "batches": len(self.batches), "tokens": self.tokens}
        return super().settings() | about

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Meanwhile the graph of the gradient stays in memory, about three times that of a gradient.

        Weights that change meanwhile are noticed, and the graph is made anew; but not what is done to
        `parameter.data` in place, which torch does not count.
        """
        self._keepers += 1
        try:
            yield
        finally:
            self._keepers -= 1
            if not self._keepers:
                self._graph = None

    def multiply(self, v: Tensor) -> Tensor:
        keep = self._keepers > 0 and self.passes == 1
        state = self._state()
        graph = self._graph if self._graph is not None and self._graph.state == state else None
        # Forward is a third of a gradient, backward two thirds, and each is differentiated at twice its own cost.
        self.cost = (3.0 if self.kind == "hessian" else 7 / 3) - (graph is not None)
        if graph is None:
            self._graph = None  # before another takes memory
            graph = _Graph(state, *self._tensors())
        along = self.selection.scatter(v)
        vectors = [along[name] for name in self.names]
        sums = [torch.zeros_like(leaf) for leaf in graph.leaves]

        def work(inside: nn.Module) -> None:
            for batch in self.batches:
                for part in batch.split(self.micro):
                    _accumulate(sums, self._once(graph, inside, part, vectors, keep))

        with torch.autocast(self.device.type, enabled=False):
            self.subject.run(work, graph.tensors)
        self._graph = graph if keep else None
        return self.selection.gather(dict(zip(self.names, sums, strict=True)))

    def _once(
        self, graph: "_Graph", inside: nn.Module, part: Batch, vectors: list[Tensor], keep: bool
    ) -> Sequence[Tensor | None]:
        try:
            product = graph.product or self._product(inside, part, graph.leaves)
            found = product(vectors, keep)
        except RuntimeError as error:
            if "not implemented" in str(error) or "double backward" in str(error) or "once_diff" in str(error):
                raise ValueError(
                    f"{_WHO}: a part of the model cannot be differentiated twice ({str(error).splitlines()[0]}); build "
                    "it with plain torch operations, as attn_implementation='sdpa' or 'eager' of Hugging Face models"
                ) from error
            raise
        graph.product = product if keep else None
        return found

    def _product(self, inside: nn.Module, part: Batch, leaves: list[Tensor]) -> "_Product":
        """Forward and backward pass over a part of a batch, and how a product follows from their graph."""
        logits, targets = self.subject.logits(inside, part, twice=True).to(self.dtype), part.targets.flatten()
        counts = targets != IGNORED
        if not bool(counts.all()):
            logits, targets = logits[counts], targets[counts]
        if not logits.requires_grad:
            return lambda vectors, keep: [None] * len(leaves)
        make = _hessian_product if self.kind == "hessian" else _gauss_newton_product
        # Walking through the graph takes a while in a small model, and it is the same at every product.
        return make(logits, targets, self.tokens, leaves, check=not self.products)

    def _state(self) -> list[tuple[int, int, int]]:
        """Another one as soon as weights have changed."""
        model = self.subject.model
        tensors = (*model.parameters(), *model.buffers())
        return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    def _tensors(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What stands in for parameters and buffers, by name: leaves for those selected, the others constant."""
        model = self.subject.model
        tensors = {name: p.detach().to(self._wide(p)) for name, p in model.named_parameters()}
        if self._converts:
            tensors |= {name: b.to(self._wide(b)) for name, b in model.named_buffers()}
        for name in self.names:
            tensors[name].requires_grad_()
        return tensors, [tensors[name] for name in self.names]

    def _wide(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    def _note_conversion(self) -> None:
        floating = [p.dtype for p in self.subject.model.parameters() if p.is_floating_point()]
        self._converts = any(dtype != self.dtype for dtype in floating)
        low = sorted({str(d).removeprefix("torch.") for d in floating if torch.finfo(d).bits < 32})
        if low:
            own = str(self.dtype).removeprefix("torch.")
            self.warnings.append(
                f"{_WHO}: weights in {', '.join(low)} were taken to {own}, as second derivatives need; the curvature "
                f"is that of the {own} model at these weights"
            )


_Product = Callable[[list[Tensor], bool], Sequence[Tensor | None]]
"""From a vector by leaf, and whether another product will follow: the product by leaf, None where it has no part."""


@dataclass
class _Graph:
    """What products with the same weights have in common: `leaves` are those of the `tensors` that are selected."""

    state: list[tuple[int, int, int]]
    tensors: dict[str, Tensor]
    leaves: list[Tensor]
    product: _Product | None = None


def _hessian_product(logits: Tensor, targets: Tensor, tokens: int, leaves: list[Tensor], *, check: bool) -> _Product:
    """From logits [targets, vocabulary]; `tokens` is N. `check` that the backward pass can be differentiated."""
    ones = logits.new_ones(len(targets), 1)
    direction = logits.softmax(-1).scatter_add(1, targets[:, None], -ones) / tokens
    gradients = torch.autograd.grad(logits, leaves, direction, create_graph=True, allow_unused=True)
    if check:
        _check_differentiable(gradients)

    def product(vectors: list[Tensor], keep: bool) -> Sequence[Tensor | None]:
        some, along = _where_used(gradients, vectors)
        if not some:
            return [None] * len(leaves)
        return torch.autograd.grad(some, leaves, along, retain_graph=keep, allow_unused=True)

    return product


def _gauss_newton_product(
    logits: Tensor, targets: Tensor, tokens: int, leaves: list[Tensor], *, check: bool
) -> _Product:
    w = torch.zeros_like(logits, requires_grad=True)
    gradients = torch.autograd.grad(logits, leaves, w, create_graph=True, allow_unused=True)
    if check:
        _check_differentiable(gradients)
    p = logits.detach().softmax(-1)

    def product(vectors: list[Tensor], keep: bool) -> Sequence[Tensor | None]:
        some, along = _where_used(gradients, vectors)
        if not some:
            return [None] * len(leaves)
        (jv,) = torch.autograd.grad(some, w, along, retain_graph=True)
        ajv = p * (jv - (p * jv).sum(-1, keepdim=True)) / tokens
        return torch.autograd.grad(logits, leaves, ajv, retain_graph=keep, allow_unused=True)

    return product


def _where_used(gradients: Sequence[Tensor | None], vectors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    used = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g is not None and g.requires_grad]
    return [g for g, _ in used], [v for _, v in used]


def _check_differentiable(gradients: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError where a backward pass has a part that would be left out of the second one without a word."""
    seen: set[Any] = set()
    ahead = [g.grad_fn for g in gradients if g is not None]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("autograd::Error"):  # left by `once_differentiable`: no way leads on to the weights
            raise RuntimeError("a backward pass is marked once_differentiable")
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]


def _accumulate(sums: list[Tensor], more: Sequence[Tensor | None]) -> None:
    for total, one in zip(sums, more, strict=True):
        if one is not None:
            total.detach().add_(one)


def _chosen(segments: tuple[Segment, ...], select: Any) -> tuple[Segment, ...]:
    if isinstance(select, Sequence) and select and all(isinstance(item, Segment) for item in select):
        unknown = [item for item in select if item not in segments]
        if unknown:
            raise ValueError(f"{_WHO}: select has a segment of {unknown[0].name} that is not one of this model")
        return tuple(s for s in segments if s in select)
    try:
        found = choose(BlockMap(segments), select)
    except ValueError as error:
        raise ValueError(f"{_WHO}: {error}") from None
    if not sum(s.numel for s in found):
        raise ValueError(f"{_WHO}: select={select!r} leaves no element; None selects everything")
    return found


def _dtype_for(parameters: list[nn.Parameter], dtype: torch.dtype | None) -> torch.dtype:
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"{_WHO}: dtype must be torch.float32 or torch.float64, got {dtype}: less is noise twice over")
    if dtype is not None:
        return dtype
    return torch.float64 if all(p.dtype == torch.float64 for p in parameters) else torch.float32


__all__ = ["Curvature", "Kind", "Operator"]
