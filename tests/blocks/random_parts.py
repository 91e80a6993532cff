"""Parts of hand-made models that know what their parameters are: projections in many spellings, norms, experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace as Choices

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Row = tuple[str, int | None]
"""The role of an output row, and the number of the attention head that it belongs to."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "squared relu": lambda x: F.relu(x) ** 2,
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.045 * x**3))),
}


@dataclass
class Truth:
    """What a parameter is: role and head of each output row along `dim`. Not `exact`: no Segment can say its heads."""

    rows: Sequence[Row]
    dim: int = 0
    stacked: bool = False
    bias: bool = False
    layer: int | None = None
    exact: bool = True


class Part(nn.Module):
    """A module that says what its parameters are, by local name."""

    def __init__(self) -> None:
        super().__init__()
        self.truth: dict[str, Truth] = {}

    def make(self, name: str, shape: Sequence[int], truth: Truth | str) -> None:
        """Make a parameter; of a role alone all rows are."""
        self.register_parameter(name, nn.Parameter(0.2 * torch.randn(*shape)))
        self.truth[name] = Truth([(truth, None)] * shape[0]) if isinstance(truth, str) else truth


class Projection(Part):
    """x [..., size] -> [..., one number per row], as `form` spells it."""

    FORMS = ("nn.Linear", "F.linear", "F.linear, then bias", "x @ W.T", "x @ W", "addmm", "einsum")

    def __init__(self, form: str, size: int, rows: Sequence[Row], bias: bool = False) -> None:
        super().__init__()
        self.form = form
        if form == "nn.Linear":
            self.linear = nn.Linear(size, len(rows), bias)
            self.truth["linear.weight"] = Truth(rows)
            self.truth["linear.bias"] = Truth(rows, bias=True)
            return
        last = form in ("x @ W", "addmm")  # the output dimension is the last
        self.make("weight", (size, len(rows)) if last else (len(rows), size), Truth(rows, dim=int(last)))
        if bias or form == "addmm":
            self.make("bias", (len(rows),), Truth(rows, bias=True))
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        match self.form:
            case "nn.Linear":
                return self.linear(x)
            case "F.linear":
                return F.linear(x, self.weight, self.bias)
            case "addmm":
                return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
            case "F.linear, then bias":
                out = F.linear(x, self.weight)
            case "x @ W.T":
                out = x @ self.weight.T
            case "x @ W":
                out = x @ self.weight
            case "einsum":
                out = torch.einsum("...i,oi->...o", x, self.weight)
        return out if self.bias is None else out + self.bias


class ByHead(Part):
    """x [..., size] -> [..., heads, head size] by a weight of three dimensions, heads before or after the inputs."""

    def __init__(self, heads_first: bool, size: int, role: str, heads: int, head_size: int, bias: bool) -> None:
        super().__init__()
        self.equation = "...i,hio->...ho" if heads_first else "...i,iho->...ho"
        shape = (heads, size, head_size) if heads_first else (size, heads, head_size)
        one, whole = [(role, 0)] * head_size, [(role, h) for h in range(heads)]
        if heads == 1:
            self.make("weight", shape, Truth(one, dim=2))
        elif heads_first:  # each head is a copy of its own
            self.make("weight", shape, Truth(one, dim=2, stacked=True))
        else:
            self.make("weight", shape, Truth(whole, dim=1))
        if bias:
            self.make("bias", (heads, head_size), Truth(whole, bias=True))
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.einsum(self.equation, x, self.weight)
        return out if self.bias is None else out + self.bias


class LowRank(Part):
    """A projection in two factors; the first has the role of what it makes, the first of q, k and v."""

    def __init__(self, form: str, norm: str | None, size: int, rank: int, rows: Sequence[Row], bias: bool) -> None:
        super().__init__()
        first = min((role for role, _ in rows), key=["q", "k", "v"].index)
        self.a = Projection(form, size, [(first, None)] * rank)
        self.norm = Norm(norm, rank) if norm else nn.Identity()
        self.b = Projection(form, rank, rows, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


class Norm(Part):
    """Normalizes the last axis of a tensor."""

    KINDS = (
        "nn.LayerNorm",
        "nn.LayerNorm, no bias",
        "nn.RMSNorm",
        "F.layer_norm",
        "written LayerNorm",
        "written RMSNorm",
        "written RMSNorm, 1 + weight",
        "written RMSNorm in float32",
        "F.normalize",
    )

    def __init__(self, kind: str, size: int, role: str = "norm") -> None:
        super().__init__()
        self.kind = kind
        rows = [(role, None)] * size
        if kind.startswith("nn."):
            self.norm = nn.RMSNorm(size) if kind == "nn.RMSNorm" else nn.LayerNorm(size, bias="no" not in kind)
            self.truth |= {"norm.weight": Truth(rows), "norm.bias": Truth(rows, bias=True)}
            return
        self.make("weight", (size,), Truth(rows))
        if kind in ("F.layer_norm", "written LayerNorm"):
            self.make("bias", (size,), Truth(rows, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "F.layer_norm":
                return F.layer_norm(x, self.weight.shape, self.weight, self.bias)
            case "written LayerNorm":
                centred = x - x.mean(-1, keepdim=True)
                return centred / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * self.weight + self.bias
            case "written RMSNorm":
                return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight
            case "written RMSNorm, 1 + weight":
                return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * (1 + self.weight)
            case "written RMSNorm in float32":
                wide = x.float()
                return self.weight * (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-5)).type_as(x)
            case "F.normalize":
                return F.normalize(x, dim=-1) * self.weight * x.shape[-1] ** 0.5
        return self.norm(x)


class MLP(Part):
    """Up, activation, down; gated unless `layout` is "plain"."""

    LAYOUTS = ("plain", "separate", "gate, up", "up, gate", "interleaved")

    def __init__(self, c: Choices, size: int, hidden: int) -> None:
        super().__init__()
        self.act, self.layout = ACTIVATIONS[c.activation], c.mlp
        ups = {
            "plain": [["up"] * hidden],
            "separate": [["gate"] * hidden, ["up"] * hidden],
            "gate, up": [["gate"] * hidden + ["up"] * hidden],
            "up, gate": [["up"] * hidden + ["gate"] * hidden],
            "interleaved": [["gate", "up"] * hidden],
        }[c.mlp]
        self.ups = nn.ModuleList(Projection(c.form, size, [(r, None) for r in roles], c.bias) for roles in ups)
        self.dropout = nn.Dropout(0.5)
        self.down = Projection(c.form, hidden, [("down", None)] * size, c.bias)

    def forward(self, x: Tensor) -> Tensor:
        first, *second = (up(x) for up in self.ups)
        return self.dropout(self.down(gated(self.act, self.layout, first, *second)))


def gated(act: Callable[[Tensor], Tensor], layout: str, x: Tensor, other: Tensor | None = None) -> Tensor:
    """The hidden units of an MLP, from what one matrix or two matrices made."""
    match layout:
        case "plain":
            return act(x)
        case "separate":
            gate, up = x, other
        case "gate, up":
            gate, up = x.chunk(2, -1)
        case "up, gate":
            up, gate = x.chunk(2, -1)
        case "interleaved":
            gate, up = x[..., ::2], x[..., 1::2]
    return act(gate) * up


class Experts(Part):
    """A mixture: the `TOP` best experts of each token, weighed. Plain experts, or gated by fused matrices."""

    KINDS = ("list", "einsum", "bmm", "indexed")
    COUNT, TOP = 4, 2

    def __init__(self, c: Choices, size: int, hidden: int) -> None:
        super().__init__()
        self.kind, self.routing, self.act = c.experts, c.routing, ACTIVATIONS[c.activation]
        self.layout = c.mlp if c.experts == "list" or c.mlp != "separate" else "gate, up"
        self.router = Projection(c.form, size, [("router", None)] * self.COUNT, c.bias)
        if self.kind == "list":
            self.members = nn.ModuleList(MLP(c, size, hidden) for _ in range(self.COUNT))
            return
        roles = {"gate, up": ["gate"] * hidden + ["up"] * hidden, "up, gate": ["up"] * hidden + ["gate"] * hidden}
        roles |= {"plain": ["up"] * hidden, "interleaved": ["gate", "up"] * hidden}
        up, down = [(role, None) for role in roles[self.layout]], [("down", None)] * size
        if self.kind == "indexed":  # rows first, as F.linear takes them
            self.make("up", (self.COUNT, len(up), size), Truth(up, dim=1, stacked=True))
            self.make("down", (self.COUNT, size, hidden), Truth(down, dim=1, stacked=True))
        else:
            self.make("up", (self.COUNT, size, len(up)), Truth(up, dim=2, stacked=True))
            self.make("down", (self.COUNT, hidden, size), Truth(down, dim=2, stacked=True))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scores = self.router(tokens)
        if self.routing == "softmax, top-k":
            weights, chosen = scores.softmax(-1).topk(self.TOP)
        elif self.routing == "top-k, softmax":
            weights, chosen = scores.topk(self.TOP)
            weights = weights.softmax(-1)
        else:
            weights, chosen = scores.sigmoid().topk(self.TOP)
            weights = weights / weights.sum(-1, keepdim=True)
        if self.kind in ("einsum", "bmm"):
            share = torch.zeros_like(scores).scatter(-1, chosen, weights)
            return torch.einsum("end,ne->nd", self.all_experts(tokens), share).view_as(x)
        out = torch.zeros_like(tokens)
        for e in range(self.COUNT):
            token, place = torch.where(chosen == e)
            out.index_add_(0, token, self.expert(e, tokens[token]) * weights[token, place, None])
        return out.view_as(x)

    def all_experts(self, tokens: Tensor) -> Tensor:
        """[experts, tokens, size], every expert on every token."""
        if self.kind == "einsum":
            hidden = gated(self.act, self.layout, torch.einsum("nd,edh->enh", tokens, self.up))
            return torch.einsum("enh,ehd->end", hidden, self.down)
        hidden = gated(self.act, self.layout, torch.bmm(tokens.expand(self.COUNT, -1, -1), self.up))
        return torch.bmm(hidden, self.down)

    def expert(self, e: int, tokens: Tensor) -> Tensor:
        if self.kind == "list":
            return self.members[e](tokens)
        return F.linear(gated(self.act, self.layout, F.linear(tokens, self.up[e])), self.down[e])
