"""What is asked of a model, wherever it came from: its sizes, its logits, that it recomputes activations."""

from typing import Any

from torch import Tensor, nn


def _config_of(model: nn.Module) -> Any:
    """The Hugging Face config of a model, that of the text where it has several; None for others."""
    config: Any = getattr(model, "config", None)
    known = isinstance(getattr(config, "model_type", None), str) and hasattr(config, "get_text_config")
    return config.get_text_config() if known else None


def vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens a Hugging Face model knows; None where there is no config to ask."""
    found = getattr(_config_of(model), "vocab_size", None)
    return found if isinstance(found, int) else None


def max_context(model: nn.Module) -> int | None:
    """How many positions a Hugging Face model has; None where there is no config to ask, or no bound in it."""
    config = _config_of(model)
    for name in ("max_position_embeddings", "max_seq_len"):  # transformers knows the first by most other names too
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def head_counts(model: nn.Module) -> dict[str, int]:
    """Attention heads, and those of keys and values, by their names in a Hugging Face config; {} where it has none."""
    config = _config_of(model)
    found = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    return {name: count for name, count in found.items() if isinstance(count, int)}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable elements of all parameters, and of those that are not embeddings; tied ones count once.

    Embeddings are the tables of `nn.Embedding` modules, of tokens and of positions. A head of its own is none and
    counts in both numbers; one that is tied to the embedding is that embedding and does not count in the second.
    """
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    sizes = [(p.numel(), id(p) in embeddings) for p in model.parameters() if p.requires_grad]
    return sum(size for size, _ in sizes), sum(size for size, embedding in sizes if not embedding)


def flops_per_token(model: nn.Module, context: int) -> float:
    """Floating point operations of one token in a forward and a backward pass, for the utilization of a machine.

        6 N + 12 L d T

    N: trainable parameters that a token is multiplied with, twice forward and four times backward. That is all but the
    tables that are only looked up: a tied embedding is also the head and counts, positions do not. L: layers, d: heads
    times their width, T: `context`, for the products of queries with keys and of weights with values.

    By convention attention counts as if it were not causal, the recomputation under activation checkpointing does not
    count, and neither do norms, activations and the softmax. Of a mixture of experts all experts count, which is too
    much. What attention does in a model without a Hugging Face config is not known and left out, which is too little.

    References: Chowdhery et al., arXiv 2204.02311, appendix B; Kaplan et al., arXiv 2001.08361, section 2.1.
    """
    multiplied = {
        id(p): p.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
        if p.requires_grad
    }
    config = _config_of(model)
    layers = getattr(config, "num_hidden_layers", None) or 0
    heads, head = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
    width = heads * head if isinstance(heads, int) and isinstance(head, int) else getattr(config, "hidden_size", 0)
    return 6.0 * sum(multiplied.values()) + 12.0 * layers * width * context


def logits_of(output: object, inputs: Tensor) -> Tensor:
    """The logits [batch, tokens, vocabulary] in what a model returned for tokens [batch, tokens].

    Args:
        output: the logits, a tuple or list that begins with them, or an object with `.logits` (Hugging Face).
        inputs: the tokens that the model was given.

    Raises:
        TypeError: nothing of this, or logits that are not floating point.
        ValueError: logits of another shape.
    """
    expected = f"expected logits [{', '.join(map(str, inputs.shape))}, vocabulary]"
    found = getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model returned a {type(output).__name__}, {expected}: as a tensor, as the first of a tuple, "
            "or as the attribute .logits"
        )
    if not found.is_floating_point():
        raise TypeError(f"the model returned {str(found.dtype).removeprefix('torch.')} values, {expected}")
    if found.ndim == 3 and found.shape[:-1] == inputs.shape:
        return found
    hint = ""
    if found.ndim == 2 or (found.ndim == 3 and found.shape[1] == 1):
        hint = "; were they of the last position alone, as nanoGPT's without targets? Return those of every position"
    raise ValueError(f"the model returned a tensor of shape {list(found.shape)}, {expected}{hint}")


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Recompute the activations of every layer in the backward pass instead of keeping them; for Hugging Face models.

    Losses and gradients stay the same. Turns off the cache for generation in the model's config, which the
    recomputation cannot use.

    Raises:
        ValueError: the model cannot do this.
    """
    kind = type(model).__name__
    # The second is what earlier releases of transformers 5 call it.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if not callable(enable):
        raise ValueError(
            f"{kind} has no switch for activation checkpointing, which models of transformers have; "
            "leave it off, or call torch.utils.checkpoint in its forward"
        )
    try:
        enable({"use_reentrant": False})
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{kind} has no activation checkpointing in transformers: {error}; leave it off") from error
    config = _config_of(model)
    if config is not None:
        config.use_cache = False
