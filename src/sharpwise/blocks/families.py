"""Families: architectures whose parameters are known by name.

A family is recognized by exact knowledge, never by a substring: by the `model_type` of a Hugging Face config together
with the children of the module that has it, or, for nanoGPT and its descendants that carry no such config, by the whole
structure of modules. What is recognized is the *backbone*, the module that holds the embedding and the layers. It may
lie anywhere: alone, below a head, in a LightningModule, under torch.compile, DDP or PEFT. Names are matched relative to
it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sharpwise.blocks.names import canonical_path
from sharpwise.blocks.roles import Role
from sharpwise.blocks.segment import Segment

_Sites = dict[str, tuple[Role, ...]]

# The roles of the output rows of each module, in their order. Group 1 of a pattern is the layer.
_NANOGPT: _Sites = {
    r"wte": (Role.TOK_EMB,),
    r"wpe": (Role.POS_EMB,),
    r"h\.(\d+)\.(?:ln_1|ln_2)": (Role.NORM,),
    r"h\.(\d+)\.attn\.c_attn": (Role.Q, Role.K, Role.V),
    r"h\.(\d+)\.attn\.c_proj": (Role.O,),
    r"h\.(\d+)\.mlp\.c_fc": (Role.UP,),
    r"h\.(\d+)\.mlp\.c_proj": (Role.DOWN,),
    r"ln_f": (Role.NORM,),
}
_GPT2: _Sites = _NANOGPT | {
    r"h\.(\d+)\.ln_cross_attn": (Role.NORM,),
    r"h\.(\d+)\.crossattention\.q_attn": (Role.Q,),
    r"h\.(\d+)\.crossattention\.c_attn": (Role.K, Role.V),
    r"h\.(\d+)\.crossattention\.c_proj": (Role.O,),
}
_LLAMA: _Sites = {
    r"embed_tokens": (Role.TOK_EMB,),
    r"layers\.(\d+)\.(?:input_layernorm|post_attention_layernorm)": (Role.NORM,),
    r"layers\.(\d+)\.self_attn\.q_proj": (Role.Q,),
    r"layers\.(\d+)\.self_attn\.k_proj": (Role.K,),
    r"layers\.(\d+)\.self_attn\.v_proj": (Role.V,),
    r"layers\.(\d+)\.self_attn\.o_proj": (Role.O,),
    r"layers\.(\d+)\.mlp\.gate_proj": (Role.GATE,),
    r"layers\.(\d+)\.mlp\.up_proj": (Role.UP,),
    r"layers\.(\d+)\.mlp\.down_proj": (Role.DOWN,),
    r"norm": (Role.NORM,),
}
_GPT_NEOX: _Sites = {
    r"embed_in": (Role.TOK_EMB,),
    r"layers\.(\d+)\.(?:input_layernorm|post_attention_layernorm)": (Role.NORM,),
    r"layers\.(\d+)\.attention\.query_key_value": (Role.Q, Role.K, Role.V),
    r"layers\.(\d+)\.attention\.dense": (Role.O,),
    r"layers\.(\d+)\.mlp\.dense_h_to_4h": (Role.UP,),
    r"layers\.(\d+)\.mlp\.dense_4h_to_h": (Role.DOWN,),
    r"final_layer_norm": (Role.NORM,),
}


@dataclass(frozen=True, slots=True)
class _Family:
    children: frozenset[str]
    sites: _Sites
    interleaved: bool = False  # a fused matrix holds q, k, v of head 0, then of head 1, ...


# By `config.model_type`, and what the backbone with that config holds.
_HF: dict[str, _Family] = {
    "gpt2": _Family(frozenset({"wte", "wpe", "h", "ln_f"}), _GPT2),
    "llama": _Family(frozenset({"embed_tokens", "layers", "norm"}), _LLAMA),
    "gpt_neox": _Family(frozenset({"embed_in", "layers", "final_layer_norm"}), _GPT_NEOX, interleaved=True),
}
# Output projections beside the backbone, by the end of the name of the transformers class that holds both.
_HF_HEADS: dict[str, str] = {
    "LMHeadModel": r"lm_head",
    "ForCausalLM": r"lm_head|embed_out",
    "DoubleHeadsModel": r"lm_head|multiple_choice_head\.summary",
    "ForSequenceClassification": r"score",
    "ForTokenClassification": r"score|classifier",
    "ForQuestionAnswering": r"qa_outputs",
}

# Parts that PEFT puts into the path of the module it wraps.
_PEFT_PARTS = frozenset({"base_layer", "token_adapter", "original_module"})
_LORA = re.compile(
    r"(?P<site>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"\.[^.]+(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<site>.+)\.trainable_tokens_delta\.[^.]+")


@dataclass(frozen=True, slots=True)
class _Heads:
    """How many heads q and k, v have, and their size. None: not known."""

    q: int | None = None
    kv: int | None = None
    dim: int | None = None

    def of(self, role: Role, rows: int) -> int | None:
        """Heads in `rows` rows of `role`, None where they are not known or do not fit."""
        heads = {Role.Q: self.q, Role.K: self.kv, Role.V: self.kv}.get(role)
        if heads is None or (rows % heads if self.dim is None else rows != heads * self.dim):
            return None
        return heads


@dataclass(frozen=True, slots=True)
class _Backbone:
    source: str
    prefix: str  # path of the backbone, without PEFT's parts
    sites: _Sites
    interleaved: bool
    heads: _Heads
    head_site: str | None  # pattern of the output projections beside the backbone


class Families:
    """What the families know about one model.

    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50257))
    >>> [(s.role.value, s.describe_rows(), s.heads) for s in Families(model).segments("h.0.attn.c_attn.bias", (24,))]
    [('q', '0:8', 2), ('k', '8:16', 2), ('v', '16:24', 2)]
    """

    def __init__(self, model: nn.Module) -> None:
        # Wrapper and wrapped have the same canonical path; the wrapped module comes later and stays.
        self.modules = {canonical_path(path): module for path, module in model.named_modules()}
        found = [self._backbone(path, module) for path, module in self.modules.items()]
        # The innermost first: a model inside a model knows better.
        self._backbones = sorted((b for b in found if b), key=lambda b: len(b.prefix), reverse=True)

    def output_dim(self, name: str, shape: tuple[int, ...]) -> int:
        """The output dimension of a parameter: 1 for the weight of a Conv1D (known by its type), else 0."""
        owner = self.modules.get(name.rpartition(".")[0])
        return 1 if len(shape) == 2 and _is_conv1d(owner) else 0

    def segments(self, name: str, shape: tuple[int, ...]) -> list[Segment] | None:
        """The segments of the parameter with this canonical name, None if no family explains it."""
        part, leaf = "", name.rpartition(".")[2]
        if found := _LORA.fullmatch(name):
            site, part, leaf = found["site"], found["part"], found["leaf"] or "weight"
        elif found := _TOKENS.fullmatch(name):
            site, leaf = found["site"], "weight"  # rows of the embedding, trained alone
        elif leaf in ("weight", "bias"):
            site = name.rpartition(".")[0]
        else:
            return None
        site = _without_peft(site)
        for backbone in self._backbones:
            if known := self._roles(backbone, site):
                roles, layer, heads = known
                source = backbone.source + ("+lora" if part else "")
                base = {"name": name, "shape": shape, "layer": layer, "bias": leaf == "bias", "source": source}
                dim = self.output_dim(name, shape)
                return _adapter(part, roles, base) or _cut(roles, heads, backbone.interleaved, dim, base)
        return None

    def _roles(self, backbone: _Backbone, site: str) -> tuple[tuple[Role, ...], int | None, _Heads] | None:
        inner = _below(site, backbone.prefix)
        if inner is not None:
            for pattern, roles in backbone.sites.items():
                if found := re.fullmatch(pattern, inner):
                    layer = int(found[1]) if found.re.groups else None
                    return roles, layer, self._layer_heads(backbone, site)
        if backbone.head_site is not None and backbone.prefix:
            beside = _below(site, backbone.prefix.rpartition(".")[0])
            if beside is not None and re.fullmatch(backbone.head_site, beside):
                return (Role.HEAD,), None, _Heads()
        return None

    def _layer_heads(self, backbone: _Backbone, site: str) -> _Heads:
        if backbone.source != "nanogpt":
            return backbone.heads
        # nanoGPT's attention knows its own number, which is what runs; the config is second.
        count = _whole_number(getattr(self.modules.get(site.rpartition(".")[0]), "n_head", None))
        return _Heads(count, count) if count is not None else backbone.heads

    def _backbone(self, path: str, module: nn.Module) -> _Backbone | None:
        children = _children(module)
        parent = self.modules.get(path.rpartition(".")[0]) if path else None
        prefix = _without_peft(path)
        config: Any = getattr(module, "config", None)
        if _is_hf(config):
            model_type = config.model_type
            family = _HF.get(model_type)
            if family is None or not family.children <= children.keys():
                return None
            return _Backbone(
                model_type, prefix, family.sites, family.interleaved, _hf_heads(config), _hf_head_site(parent)
            )
        if _is_nanogpt(children) and not any(_is_hf(getattr(m, "config", None)) for m in self._ancestors(path)):
            count = next((n for m in (module, parent) if (n := _config_heads(m)) is not None), None)
            head = "lm_head" if parent is not None and _is_output(parent, children["wte"]) else None
            return _Backbone("nanogpt", prefix, _NANOGPT, False, _Heads(count, count), head)
        return None

    def _ancestors(self, path: str) -> Iterable[nn.Module]:
        while path:
            path = path.rpartition(".")[0]
            if path in self.modules:
                yield self.modules[path]


def _cut(
    roles: tuple[Role, ...], heads: _Heads, interleaved: bool, dim: int, base: Mapping[str, Any]
) -> list[Segment] | None:
    """The output rows of a matrix, its bias or its lora_B: one segment per role, None if the shape does not fit."""
    shape = base["shape"]
    if dim >= len(shape):
        return None
    rows, rest = divmod(shape[dim], len(roles))
    if rest:
        return None
    if len(roles) == 1:
        return [Segment(role=roles[0], dim=dim, heads=heads.of(roles[0], rows), **base)]
    counts = [heads.of(role, rows) for role in roles]
    if not interleaved:
        if heads.dim is not None and None in counts:
            return None  # not the fused matrix that this family has
        return [
            Segment(role=role, dim=dim, start=i * rows, length=rows, heads=count, **base)
            for i, (role, count) in enumerate(zip(roles, counts, strict=True))
        ]
    if heads.dim is None or None in counts:
        return None
    size, stride = heads.dim, heads.dim * len(roles)
    return [
        Segment(role=role, dim=dim, start=i * size, length=size, stride=stride, count=count or 1, heads=count, **base)
        for i, (role, count) in enumerate(zip(roles, counts, strict=True))
    ]


def _adapter(part: str, roles: tuple[Role, ...], base: Mapping[str, Any]) -> list[Segment] | None:
    """The halves of a LoRA whose rows are not the matrix's output rows: one segment, without heads.

    The lora_A of a fused matrix feeds q, k and v at once. It gets the first role, q: together with k that is most of
    what it feeds, and its rows cannot be told apart.
    """
    if part in ("lora_A", "lora_embedding_B"):
        return [Segment(role=roles[0], **base)]
    if part == "lora_embedding_A":
        return [Segment(role=roles[0], dim=1, **base)]  # [rank, tokens]: the columns are the tokens
    if part == "lora_magnitude_vector" and (len(base["shape"]) != 1 or roles[0] in (Role.TOK_EMB, Role.POS_EMB)):
        return [Segment(role=roles[0], **base)]
    return None


def _below(site: str, prefix: str) -> str | None:
    if not prefix:
        return site
    return site[len(prefix) + 1 :] if site.startswith(prefix + ".") else None


def _without_peft(site: str) -> str:
    site = re.sub(r"(^|\.)modules_to_save\.[^.]+(?=\.|$)", r"\1", site)
    return ".".join(part for part in site.split(".") if part and part not in _PEFT_PARTS)


def _inherits(thing: object, name: str, package: str = "") -> bool:
    """Whether a class of this name is among the bases: FSDP2 and parametrizations put a new class in front."""
    return any(c.__name__ == name and c.__module__.startswith(package) for c in type(thing).__mro__)


def _is_conv1d(module: nn.Module | None) -> bool:
    return _inherits(module, "Conv1D") and hasattr(module, "nf")


def _is_hf(config: object) -> bool:
    return _inherits(config, "PreTrainedConfig", "transformers.") or _inherits(
        config, "PretrainedConfig", "transformers."
    )


def _hf_heads(config: Any) -> _Heads:
    q = _whole_number(getattr(config, "num_attention_heads", None))
    kv = _whole_number(getattr(config, "num_key_value_heads", None)) or q
    dim = _whole_number(getattr(config, "head_dim", None))
    if dim is None and q is not None:
        dim = config.hidden_size // q
    return _Heads(q, kv, dim)


def _hf_head_site(parent: nn.Module | None) -> str | None:
    names = [c.__name__ for c in type(parent).__mro__ if c.__module__.startswith("transformers.")]
    sites = [site for end, site in _HF_HEADS.items() if any(name.endswith(end) for name in names)]
    return "|".join(sites) or None


def _children(module: nn.Module | None) -> dict[str, nn.Module]:
    """Children by name, looking through wrappers."""
    return {canonical_path(name): child for name, child in _unwrapped(module).items()}


def _unwrapped(module: nn.Module | None) -> dict[str, nn.Module]:
    children = {} if module is None else {name: m for name, m in module._modules.items() if m is not None}
    if len(children) == 1:
        ((name, child),) = children.items()
        if name in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"):
            return _unwrapped(child)
    return children


def _is_nanogpt(children: Mapping[str, nn.Module]) -> bool:
    """The structure of nanoGPT: {wte, h}, blocks of {attn: {c_attn, c_proj}, mlp: {c_fc, c_proj}}, c_attn 3 x width."""
    if not isinstance(_base_layer(children.get("wte")), nn.Embedding):
        return False
    layers = _children(children.get("h"))
    for block in layers.values():
        parts = _children(block)
        attention, mlp = _children(parts.get("attn")), _children(parts.get("mlp"))
        if not ({"c_attn", "c_proj"} <= attention.keys() and {"c_fc", "c_proj"} <= mlp.keys()):
            return False
        fused = _base_layer(attention["c_attn"])
        if not isinstance(fused, nn.Linear) or fused.out_features != 3 * fused.in_features:
            return False
    return bool(layers)


def _is_output(parent: nn.Module, embedding: nn.Module) -> bool:
    """Whether nanoGPT's `lm_head` beside the backbone maps the width back to the vocabulary."""
    head, wte = _base_layer(_children(parent).get("lm_head")), _base_layer(embedding)
    return (
        isinstance(head, nn.Linear)
        and isinstance(wte, nn.Embedding)
        and (head.out_features, head.in_features) == (wte.num_embeddings, wte.embedding_dim)
    )


def _base_layer(module: nn.Module | None) -> nn.Module | None:
    """The module below PEFT's and torch.compile's wrappers."""
    for name in ("_orig_mod", "base_layer", "original_module"):
        inner = None if module is None else module._modules.get(name)
        if inner is not None:
            return _base_layer(inner)
    return module


def _config_heads(module: nn.Module | None) -> int | None:
    config = getattr(module, "config", None)
    return _whole_number(getattr(config, "n_head", None))


def _whole_number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
