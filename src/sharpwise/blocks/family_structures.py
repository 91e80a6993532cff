"""What a module is made of, seen through the wrappers of torch.compile, checkpointing, FSDP and PEFT.

For backbones without a Hugging Face config, which are recognized by their whole structure.
"""

from collections.abc import Mapping

from torch import nn

from sharpwise.blocks.names import canonical_path


def structure(module: nn.Module) -> str | None:
    """Which backbone has this structure: nanogpt, timm, transformer_encoder, or None."""
    parts = children(module)
    if isinstance(module, nn.TransformerEncoder):
        return "transformer_encoder" if _is_transformer_encoder(parts) else None
    if _is_nanogpt(parts):
        return "nanogpt"
    return "timm" if _is_timm(parts) else None


def children(module: nn.Module | None) -> dict[str, nn.Module]:
    """Children by name, looking through wrappers."""
    return {canonical_path(name): child for name, child in _unwrapped(module).items()}


def inherits(thing: object, name: str, package: str = "") -> bool:
    """Whether a class of this name is among the bases: FSDP2 and parametrizations put a new class in front."""
    return any(c.__name__ == name and c.__module__.startswith(package) for c in type(thing).__mro__)


def is_output(parent: nn.Module, embedding: nn.Module) -> bool:
    """Whether nanoGPT's `lm_head` beside the backbone maps the width back to the vocabulary."""
    head, wte = _base_layer(children(parent).get("lm_head")), _base_layer(embedding)
    return (
        isinstance(head, nn.Linear)
        and isinstance(wte, nn.Embedding)
        and (head.out_features, head.in_features) == (wte.num_embeddings, wte.embedding_dim)
    )


def whole_number(value: object) -> int | None:
    """The value if it is a positive int."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _is_nanogpt(parts: Mapping[str, nn.Module]) -> bool:
    """{wte, h}, blocks of {attn: {c_attn, c_proj}, mlp: {c_fc, c_proj}}, c_attn 3 x width."""
    if not isinstance(_base_layer(parts.get("wte")), nn.Embedding):
        return False
    blocks = [children(block) for block in children(parts.get("h")).values()]
    return bool(blocks) and all(
        children(block.get("mlp")).keys() >= {"c_fc", "c_proj"} and _is_fused(block.get("attn"), "c_attn", "c_proj")
        for block in blocks
    )


def _is_timm(parts: Mapping[str, nn.Module]) -> bool:
    """{patch_embed: {proj}, blocks}, blocks of {norm1, attn: {qkv, proj}, norm2, mlp: {fc1, fc2}}, nothing gated."""
    if not isinstance(_base_layer(children(parts.get("patch_embed")).get("proj")), nn.Conv2d):
        return False
    blocks = [children(block) for block in children(parts.get("blocks")).values()]
    return bool(blocks) and all(
        block.keys() >= {"norm1", "norm2"} and _is_fused(block.get("attn"), "qkv", "proj") and _is_mlp(block.get("mlp"))
        for block in blocks
    )


def _is_transformer_encoder(parts: Mapping[str, nn.Module]) -> bool:
    """Layers may be of any type: those that torch's own names describe."""
    layers = [children(layer) for layer in children(parts.get("layers")).values()]
    return bool(layers) and all(
        layer.keys() >= {"linear1", "linear2", "norm1", "norm2"}
        and isinstance(_base_layer(layer.get("self_attn")), nn.MultiheadAttention)
        for layer in layers
    )


def _is_fused(attention: nn.Module | None, qkv: str, out: str) -> bool:
    """Whether the fused matrix gives q, k and v of one size, that of what goes into the output projection."""
    fused, o = (_base_layer(children(attention).get(name)) for name in (qkv, out))
    return isinstance(fused, nn.Linear) and isinstance(o, nn.Linear) and fused.out_features == 3 * o.in_features


def _is_mlp(mlp: nn.Module | None) -> bool:
    up, down = (_base_layer(children(mlp).get(name)) for name in ("fc1", "fc2"))
    return isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and up.out_features == down.in_features


def _unwrapped(module: nn.Module | None) -> dict[str, nn.Module]:
    inner = {} if module is None else {name: m for name, m in module._modules.items() if m is not None}
    if len(inner) == 1:
        ((name, child),) = inner.items()
        if name in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"):
            return _unwrapped(child)
    return inner


def _base_layer(module: nn.Module | None) -> nn.Module | None:
    """The module below PEFT's and torch.compile's wrappers."""
    for name in ("_orig_mod", "base_layer", "original_module"):
        inner = None if module is None else module._modules.get(name)
        if inner is not None:
            return _base_layer(inner)
    return module
