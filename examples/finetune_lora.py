"""Fine-tune with TRL: SFT, then DPO, each with an adapter that the trainer makes, LoRA or QLoRA.

    python examples/finetune_lora.py [--qlora] [--optimizer adam-mini]

The model is a tiny Llama with random weights, saved and loaded here; put your own in place of `folder`. In 4 bits the
base needs bitsandbytes. `set_optimizer` takes learning rate and decay from the arguments of the trainer.
"""

import argparse
import tempfile

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sharpwise.integrations.hf import set_optimizer

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ["<pad>", "<eos>", "<unk>", *DIGITS, "plus", "is"]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def save_model(folder: str) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(WORDS),
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def load_model(folder: str, qlora: bool) -> transformers.PreTrainedModel:
    if not qlora:
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qlora", action="store_true")
    parser.add_argument("--optimizer", default="adam-mini", help="one of sharpwise.list_optimizers()")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()

    sums = [(a, b, a + b) for a in range(10) for b in range(10 - a)]
    texts = [f"{DIGITS[a]} plus {DIGITS[b]} is {DIGITS[c]}" for a, b, c in sums]
    pairs = [(f"{DIGITS[a]} plus {DIGITS[b]} is", f" {DIGITS[c]}", f" {DIGITS[(c + 1) % 10]}") for a, b, c in sums]
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        common = {
            "output_dir": folder, "max_steps": given.steps, "per_device_train_batch_size": 8, "learning_rate": 5e-3,
            "weight_decay": 0.01, "logging_steps": given.steps, "report_to": "none", "save_strategy": "no",
            "bf16": False,
        }  # fmt: skip
        words = tokenizer()

        model = load_model(folder, given.qlora)
        data = Dataset.from_dict({"text": texts})
        sft = SFTTrainer(model, SFTConfig(**common), train_dataset=data, processing_class=words, peft_config=lora)
        set_optimizer(sft, given.optimizer)
        print(f"SFT: loss {sft.train().training_loss:.3f}, {sft.optimizer.optimizer.state_bytes()} bytes of state")

        # TRL's DPO takes the adapter of a PeftModel as the one to train, and the model without it as the reference.
        merged = load_model(folder, given.qlora)
        columns = zip(*pairs, strict=True)
        data = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), columns, strict=True)))
        dpo = DPOTrainer(merged, args=DPOConfig(**common), train_dataset=data, processing_class=words, peft_config=lora)
        set_optimizer(dpo, given.optimizer)
        print(f"DPO: loss {dpo.train().training_loss:.3f}, {dpo.optimizer.optimizer.state_bytes()} bytes of state")


if __name__ == "__main__":
    main()
