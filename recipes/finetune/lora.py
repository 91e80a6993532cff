"""The base model of this recipe under a LoRA adapter, for `sharpwise compare`: the base is frozen, the adapter trains.

pip install peft
sharpwise compare --recipe finetune/lora --trust-code
"""

from typing import Any

from torch import nn

from sharpwise.train.models import load_pretrained


def adapted(
    folder: str = "runs/finetune-base",
    rank: int = 8,
    vocab_size: int | None = None,
    attn_implementation: str | None = None,
) -> nn.Module:
    """The causal model of a run with an adapter on every matrix of attention and MLP.

    Args:
        folder: of the run that trained the base, or of its `final`.
        rank: of the adapters; their scale is 2 * rank, as is usual.
        vocab_size: of the data, which has to be the base's.
        attn_implementation: "eager" or "sdpa".

    Raises:
        ValueError: for data of another tokenizer than the base's.
    """
    from peft import LoraConfig, get_peft_model

    settings = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model: Any = load_pretrained(folder, settings=settings)
    if vocab_size is not None and vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{folder} knows {model.config.vocab_size} tokens, the data have {vocab_size}: prepare them with "
            f"--tokenizer {folder}/final"
        )
    matrices = ["c_attn", "c_proj", "c_fc"]
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=matrices, fan_in_fan_out=True, lora_dropout=0.0)
    )
