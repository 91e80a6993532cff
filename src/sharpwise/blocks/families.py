"""Families: architectures whose parameters are known by name.

A family is recognized by exact knowledge, never by a substring: by the `model_type` of a Hugging Face config together
with the children of the module that has it, or, where there is no such config (nanoGPT and its descendants, timm's
vision transformers, torch's own encoder), by the whole structure of modules or their type. What is recognized is the
*backbone*, the module that holds the embedding and the layers. It may lie anywhere: alone, below a head, in a
LightningModule, under torch.compile, DDP or PEFT. Names are matched relative to it; what they mean,
`family_tables` says.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sharpwise.blocks.family_structures import children, inherits, is_output, structure, whole_number
from sharpwise.blocks.family_tables import HF, HF_BESIDE, STRUCTURES, Family, Heads, Sites, even_heads
from sharpwise.blocks.names import canonical_path
from sharpwise.blocks.roles import Role
from sharpwise.blocks.segment import Segment

_FFN = frozenset({Role.GATE, Role.UP, Role.DOWN})

# Parts that PEFT puts into the path of the module it wraps.
_PEFT_PARTS = frozenset({"base_layer", "token_adapter", "original_module"})
_LORA = re.compile(
    r"(?P<site>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"\.[^.]+(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<site>.+)\.trainable_tokens_delta\.[^.]+")


@dataclass(frozen=True, slots=True)
class _Backbone:
    source: str
    prefix: str  # path of the backbone, without PEFT's parts
    family: Family
    beside: Sites  # of what holds the backbone: the output projections
    heads: Heads


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
        site = name.rpartition(".")[0] if leaf in ("weight", "bias") else name
        if found := _LORA.fullmatch(name):
            site, part, leaf = self._adapted(found["site"]), found["part"], found["leaf"] or "weight"
        elif found := _TOKENS.fullmatch(name):
            site, leaf = found["site"], "weight"  # rows of the embedding, trained alone
        site = _without_peft(site)
        for backbone in self._backbones:
            if known := self._roles(backbone, site):
                roles, layer = known
                heads = self._heads(backbone, site)
                source = backbone.source + ("+lora" if part else "")
                base = {"name": name, "shape": shape, "layer": layer, "bias": leaf.endswith("bias"), "source": source}
                dim = self.output_dim(name, shape)
                return _adapter(part, roles, base) or _cut(roles, heads, backbone.family.per_head, dim, base)
        return None

    def _adapted(self, path: str) -> str:
        """The site that the adapter at this path adapts: the module's, or of one parameter that is not its weight."""
        parameter = getattr(self.modules.get(path), "parameter_name", "weight")
        return path if parameter == "weight" else f"{path}.{parameter}"

    def _roles(self, backbone: _Backbone, site: str) -> tuple[tuple[Role, ...], int | None] | None:
        places = [(backbone.family.sites, backbone.prefix)]
        if backbone.prefix:
            places.append((backbone.beside, backbone.prefix.rpartition(".")[0]))
        for sites, prefix in places:
            if (inner := _below(site, prefix)) is None:
                continue
            for pattern, roles in sites.items():
                if found := re.fullmatch(pattern, inner):
                    layer = int(found[1]) if found.re.groups else None
                    return roles if isinstance(roles, tuple) else (roles,), layer
        return None

    def _heads(self, backbone: _Backbone, site: str) -> Heads:
        parent, _, last = site.rpartition(".")
        if last in backbone.family.latent:
            return {}
        if backbone.source not in STRUCTURES:
            return backbone.heads
        # Without such a config the attention itself knows its number, which is what runs; nanoGPT's config is second.
        owners = [self.modules.get(path) for path in (site, parent)]
        counts = [whole_number(getattr(m, attr, None)) for m in owners for attr in ("n_head", "num_heads")]
        return next((even_heads(count) for count in counts if count), backbone.heads)

    def _backbone(self, path: str, module: nn.Module) -> _Backbone | None:
        parts = children(module)
        parent = self.modules.get(path.rpartition(".")[0]) if path else None
        prefix = _without_peft(path)
        config: Any = getattr(module, "config", None)
        if _is_hf(config):
            source = config.model_type
            family = HF.get(source)
            if family is None or not family.children <= parts.keys():
                return None
            return _Backbone(source, prefix, family, _beside(parent), family.heads(config))
        found = structure(module)
        # A type is proof, likeness in a model that says it is something else is not.
        if found is None or (
            found != "transformer_encoder" and any(_is_hf(getattr(m, "config", None)) for m in self._ancestors(path))
        ):
            return None
        beside: Sites = {}
        if found == "nanogpt" and parent is not None and is_output(parent, parts["wte"]):
            beside = {"lm_head": Role.HEAD}
        counts = (whole_number(getattr(getattr(m, "config", None), "n_head", None)) for m in (module, parent))
        heads = next((even_heads(count) for count in counts if count), {})
        return _Backbone(found, prefix, STRUCTURES[found], beside, heads)

    def _ancestors(self, path: str) -> Iterable[nn.Module]:
        while path:
            path = path.rpartition(".")[0]
            if path in self.modules:
                yield self.modules[path]


def _cut(
    roles: tuple[Role, ...], heads: Heads, per_head: bool, dim: int, base: Mapping[str, Any]
) -> list[Segment] | None:
    """The output rows of a matrix, its bias or its lora_B: one segment per role, None if the shape does not fit."""
    shape = base["shape"]
    stacked = len(shape) == 3 and _FFN.issuperset(roles)  # experts: [experts, out, in]
    if stacked:
        dim = 1
    if dim >= len(shape):
        return None
    known = [heads.get(role, (None, None)) for role in roles]
    rows = [count * size for count, size in known if count is not None and size is not None]
    if len(roles) == 1 or len(rows) < len(roles):
        rows = [shape[dim] // len(roles)] * len(roles)  # sizes are not known, or do not matter: equal parts
    turns = (known[-1][0] or 1) if per_head and len(roles) > 1 else 1  # as many as key heads
    if sum(rows) != shape[dim] or any(n % turns for n in rows):
        return None
    segments, start = [], 0
    for role, n, (count, size) in zip(roles, rows, known, strict=True):
        fits = count is not None and (n % count == 0 if size is None else n == count * size)
        segments.append(
            Segment(
                role=role,
                dim=dim,
                start=start,
                length=n // turns,
                stride=shape[dim] // turns if turns > 1 else 0,
                count=turns,
                heads=count if fits else None,
                stacked=stacked,
                **base,
            )
        )
        start += n // turns
    return segments


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


def _is_conv1d(module: nn.Module | None) -> bool:
    return inherits(module, "Conv1D") and hasattr(module, "nf")


def _is_hf(config: object) -> bool:
    return inherits(config, "PreTrainedConfig", "transformers.") or inherits(
        config, "PretrainedConfig", "transformers."
    )


def _beside(parent: nn.Module | None) -> Sites:
    names = [c.__name__ for c in type(parent).__mro__ if c.__module__.startswith("transformers.")]
    tables = [sites for end, sites in HF_BESIDE.items() if any(name.endswith(end) for name in names)]
    return {pattern: roles for sites in tables for pattern, roles in sites.items()}
