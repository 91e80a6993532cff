"""GRPO with TRL: Adam-mini and AdaPM, which hold half and less than half of AdamW's state, on a tiny random Llama.

    python examples/grpo.py [--steps 6]

The reward is the share of the word "three" in what the model writes. Prints it for each optimizer, first and last.
"""

import argparse
import tempfile

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig, GRPOTrainer

import sharpwise
from sharpwise.integrations.hf import set_optimizer

WORDS = ["<pad>", "<eos>", "<unk>", "one", "two", "three", "and"]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(WORDS),
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def threes(completions: list[str], **_: object) -> list[float]:
    """The share of "three" among the words of each completion."""
    return [text.split().count("three") / max(1, len(text.split())) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_args().steps
    data = Dataset.from_dict({"prompt": ["one and", "two and", "one two", "and one"] * 8})
    for name, options in {"adam-mini": {}, "adapm": {"second_moment": "block"}}.items():
        with tempfile.TemporaryDirectory() as folder:
            args = GRPOConfig(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=16, num_generations=8,
                learning_rate=1e-2, max_completion_length=8, logging_steps=1, report_to="none",
                save_strategy="no", bf16=False,
            )  # fmt: skip
            trainer = GRPOTrainer(llama(), threes, args, train_dataset=data, processing_class=tokenizer())
            set_optimizer(trainer, name, **options)
            trainer.train()
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        share = trainer.optimizer.optimizer.state_bytes() / sharpwise.AdamW(trainer.model).state_bytes()
        print(f"{name}: reward {rewards[0]:.2f}, then {rewards[-1]:.2f}; {share:.0%} of AdamW's state")


if __name__ == "__main__":
    main()
