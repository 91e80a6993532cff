"""torchtitan: the component that a config's `optimizer` builds (torchtitan 0.3.0, `components/optimizer`).

    config.optimizer = sharpwise_optimizer("adam-mini", lr=8e-4)

torchtitan makes one optimizer per kind and model part, of groups with names, and saves it by these names. A part is
sharded by then and its attention runs on a mesh alone, so that no dataflow can be seen: `roles_of` reads the types of
torchtitan's modules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.models.common.attention import BaseQKVLinear, FusedQKVLinear
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import GroupedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.nn_modules import RMSNorm

from sharpwise.blocks.names import IN_LAYER, canonical_name
from sharpwise.engine import BlockOptimizer
from sharpwise.optim import create_optimizer, list_optimizers

__all__ = ["SharpwiseOptimizers", "roles_of", "sharpwise_optimizer"]

_Fields = dict[str, Any]


def sharpwise_optimizer(name: str = "adam-mini", *, lr: float = 8e-4, **options: Any) -> "SharpwiseOptimizers.Config":
    """A config with one group, of all parameters.

    For more groups, write `SharpwiseOptimizers.Config(param_groups=[...])`: `optimizer_name` is one of
    `sharpwise.list_optimizers()` or of torchtitan's; `optimizer_kwargs` are numbers of the group, such as `lr` and
    `weight_decay`; options of the whole optimizer, such as `block_lr`, stand in `optimizer_factory_kwargs_by_name`.

    Args:
        name, options: as `sharpwise.create_optimizer` takes them. lr: the peak, which torchtitan's schedule scales.
    """
    group = ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs={"lr": lr})
    return SharpwiseOptimizers.Config(param_groups=[group], optimizer_factory_kwargs_by_name={name: options})


class SharpwiseOptimizers(OptimizersContainer):
    """torchtitan's container, which also knows the names of `sharpwise.list_optimizers()`."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan's; `implementation` is for torch's own optimizers."""

    def _resolve_optimizer_factory(self, name: str) -> Callable[..., Any]:
        if name in list_optimizers():
            return lambda groups, **options: self._build(groups, name, options)
        return OptimizersContainer._resolve_optimizer_factory(name)

    def _build(self, groups: list[dict[str, Any]], name: str, options: dict[str, Any]) -> BlockOptimizer:
        for group in groups:
            group.pop("fused", None)  # these two say how torch's optimizers step
            group.pop("foreach", None)
        held = {id(p) for group in groups for p in group["params"]}
        part = next(part for part in self.model_parts if any(id(p) in held for p in part.parameters()))
        given = options.pop("blocks", None) or {}
        blocks = {**roles_of(part), **given} if isinstance(given, dict) else given
        return create_optimizer(groups, name, model=part, blocks=blocks or None, **options)


def roles_of(part: nn.Module) -> dict[str, list[_Fields]]:
    """What the parameters of a model of torchtitan are, by the types of the modules that hold them.

    Known are `Decoder` (llama3, qwen3, and what else is made of it), its attention by heads with q, k, v fused or not,
    feed-forward networks, experts and norms; latent attention (deepseek_v3) and other modules are left out.

    Args:
        part: the model, or a stage of its pipeline, sharded or not.

    Returns:
        By canonical name of the parameter its segments, as `blocks=` takes them.
    """
    found: dict[int, list[_Fields]] = {}

    def say(place: Any, *segments: _Fields) -> None:
        tensors = place.parameters() if isinstance(place, nn.Module) else [] if place is None else [place]
        for tensor in tensors:
            found.setdefault(id(tensor), list(segments))  # of a tied head, the embedding counts

    for module in part.modules():
        if isinstance(module, Decoder):
            say(module.tok_embeddings, {"role": "tok_emb"})
            say(module.lm_head, {"role": "head"})
        elif isinstance(getattr(module, "qkv_linear", None), BaseQKVLinear):
            _attention(module, say)
        elif isinstance(module, FeedForward):
            for held, role in ((module.w1, "gate"), (module.w3, "up"), (module.w2, "down")):
                say(held, {"role": role})
            say(getattr(module, "gate", None), {"role": "router"})
        elif isinstance(module, GroupedExperts) and hasattr(module, "w1_EFD"):  # those of gpt_oss hold others
            for held, role in ((module.w1_EFD, "gate"), (module.w3_EFD, "up"), (module.w2_EDF, "down")):
                say(held, {"role": role, "dim": 1, "stacked": True})
        elif isinstance(module, TokenChoiceTopKRouter):
            say(module.gate, {"role": "router"})
        elif isinstance(module, RMSNorm):
            say(module, {"role": "norm"})
    named = {canonical_name(name): found[id(p)] for name, p in part.named_parameters() if id(p) in found}
    return {name: [fields | _layer(name) for fields in segments] for name, segments in named.items()}


def _attention(module: Any, say: Callable[..., None]) -> None:
    qkv, n, kv = module.qkv_linear, module.n_heads, module.n_kv_heads
    if isinstance(qkv, FusedQKVLinear):  # for each key head in turn its queries, itself, and its values
        size, rows, start = qkv.head_dim, [], 0
        for role, heads in (("q", n // kv), ("k", 1), ("v", 1)):
            length = heads * size
            rows.append({"role": role, "start": start, "length": length, "count": kv, "heads": heads * kv})
            start += length
        say(qkv.wqkv, *({**row, "stride": start} for row in rows))
    else:
        for held, role, heads in ((qkv.wq, "q", n), (qkv.wk, "k", kv), (qkv.wv, "v", kv)):
            say(held, {"role": role, "heads": heads})
    say(module.wo, {"role": "o"})
    for norm in ("q_norm", "k_norm"):
        say(getattr(module, norm, None), {"role": "qk_norm"})


def _layer(name: str) -> _Fields:
    inside = IN_LAYER.fullmatch(name)
    return {"layer": int(inside["number"])} if inside else {}
