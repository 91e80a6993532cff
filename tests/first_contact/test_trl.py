"""TRL: SFT, Reward, DPO and GRPO, with LoRA where the trainer makes the adapter; tiny random models."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sharpwise
from sharpwise.integrations.hf import Factory, set_optimizer

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

WORDS = ["<pad>", "<eos>", "<unk>", "one", "two", "three", "and", "is", "more"]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def llama(head: type = transformers.LlamaForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return head(
        transformers.LlamaConfig(
            **sizes, vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
            bos_token_id=None, **changes,
        )
    )  # fmt: skip


def rows(**columns: str) -> Any:
    return datasets.Dataset.from_list([columns] * 8)


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.3,
        "adam_beta2": 0.9,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "gradient_checkpointing": None,  # its former name, which TRL 1.16 sets, and transformers warns of
        "activation_checkpointing": False,
    }


def lora(task: str = "CAUSAL_LM") -> Any:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], task_type=task)


def sft(folder: Path, model: Any, **more: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**settings(folder), max_length=16)
    data = rows(text="one and two is three")
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


def reward(folder: Path, model: Any, **more: Any) -> Any:
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(**settings(folder), max_length=16)
    data = rows(chosen="one and two is three", rejected="one and two is two")
    return RewardTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


def dpo(folder: Path, model: Any, **more: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**settings(folder), max_length=16)
    data = rows(prompt="one and two is", chosen=" three", rejected=" two")
    return DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


def grpo(folder: Path, model: Any, **more: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    def threes(completions: list[str], **_: Any) -> list[float]:
        return [float(text.count("three")) + 0.1 * len(text) for text in completions]

    args = GRPOConfig(**settings(folder), num_generations=2, max_completion_length=4)
    data = rows(prompt="one and two is")
    return GRPOTrainer(
        model=model, reward_funcs=threes, args=args, train_dataset=data, processing_class=tokenizer(), **more
    )


TRAINERS = {"sft": sft, "reward": reward, "dpo": dpo, "grpo": grpo}


def model_for(kind: str) -> Any:
    return llama(transformers.LlamaForSequenceClassification, num_labels=1) if kind == "reward" else llama()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_set_optimizer_serves_every_trainer(tmp_path: Path, kind: str) -> None:
    """With an adapter that the trainer makes: it is trained, at the numbers of the arguments, and the rest is not."""
    model = model_for(kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = TRAINERS[kind](tmp_path, model, peft_config=lora("SEQ_CLS" if kind == "reward" else "CAUSAL_LM"))
    set_optimizer(made, "adam-mini")
    made.train()
    own = made.optimizer.optimizer
    assert isinstance(own, sharpwise.AdamMini)
    assert {(g["initial_lr"], g["betas"], g["weight_decay"]) for g in own.param_groups} <= {
        (1e-2, (0.9, 0.9), 0.3),
        (1e-2, (0.9, 0.9), 0.0),
    }
    held = {name for g in own.param_groups for name in g["param_names"]}
    assert held == {n for n, p in made.model.named_parameters() if p.requires_grad}
    after = dict(made.model.named_parameters())
    assert any(".lora_A." in name for name in held)
    assert all(p.any() for name, p in after.items() if ".lora_B." in name)  # they begin at zero
    for name, p in before.items():
        now = [q for n, q in after.items() if n.replace(".base_layer", "").endswith(f"model.{name}")]
        assert all(torch.equal(p, q) for q in now)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_the_argument_serves_those_that_have_it(tmp_path: Path, kind: str) -> None:
    made = TRAINERS[kind](tmp_path, model_for(kind), optimizer_cls_and_kwargs=(Factory, {"name": "muon", "lr": 1e-3}))
    made.train()
    assert isinstance(made.optimizer.optimizer, sharpwise.Muon)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_an_optimizer_of_the_model_passed_in_trains_it(tmp_path: Path, kind: str) -> None:
    model = model_for(kind)
    before = [p.detach().clone() for p in model.parameters()]
    more = {"ref_model": llama()} if kind == "dpo" else {}  # else TRL loads it from the hub
    made = TRAINERS[kind](tmp_path, model, optimizers=(sharpwise.AdaPM(model, lr=1e-2), None), **more)
    made.train()
    moved = [not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)]
    assert sum(moved) >= len(moved) - 1  # the bias of nothing that a reward sees may rest


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_an_optimizer_built_before_the_adapter_says_so(tmp_path: Path, kind: str) -> None:
    model = model_for(kind)
    optimizer = sharpwise.AdamMini(model, lr=1e-2)
    config = lora("SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
    made = TRAINERS[kind](tmp_path, model, peft_config=config, optimizers=(optimizer, None))
    with pytest.raises(RuntimeError, match=r"an adapter was added after.*set_optimizer"):
        made.train()


@pytest.mark.slow
def test_nothing_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sharpwise"):
        made = sft(tmp_path, llama())
        set_optimizer(made, "adam-mini+blockwise")
        made.train()
    assert not [record for record in caplog.records if record.name.startswith("sharpwise")]
