"""torchtitan's own `Trainer` with our component, its debug model at two layers, sharded by FSDP2, on CPUs.

torchrun --nproc-per-node 2 tests/first_contact/torchtitan_worker.py FOLDER

Three things are stood in for, as torchtitan runs on GPUs alone: what it asks of a device (its name, its memory), the
kernel of its attention, of which torch has no backward on CPUs, and the scaled sum of gradients, which gloo has not.
torchtitan 0.3.0 also calls `torch.distributed.set_timeout`, which torch 2.13 does not have.
What comes out is in FOLDER: `run.json`, `weights.pt`.
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

STEPS, SAVED = 6, 3


def device_of_cpus() -> None:
    """What `torch.cuda` has and `torch.cpu` has not, before torchtitan looks."""
    device = ModuleType("device")
    device.__dict__.update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})
    device.__dict__.update(
        device_count=lambda: 1,
        set_device=lambda index: None,
        current_device=lambda: 0,
        get_device_name=lambda index: "cpu",
        get_device_properties=lambda index: SimpleNamespace(total_memory=2**34),
        memory_stats=lambda index: {},
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
    )
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda kind: device


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block_mask: Any, enable_gqa: bool, **_: Any) -> Any:
    """Flex attention by its mask, as a dense one."""
    i, j = (torch.arange(n).view(shape) for n, shape in ((q.shape[2], (1, -1, 1)), (k.shape[2], (1, 1, -1))))
    mask = block_mask.mask_mod(torch.arange(q.shape[0]).view(-1, 1, 1), torch.tensor(0), i, j)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=enable_gqa)
    return out, SimpleNamespace(lse=None)


def sums_of_gloo() -> None:
    """FSDP2 scales and sums in two steps where it is told to."""
    from torch.distributed.fsdp import FSDPModule

    original = FSDPModule.set_gradient_divide_factor

    def set_factor(module: FSDPModule, factor: float) -> None:
        original(module, factor)
        module.set_force_sum_reduction_for_comms(True)

    if not hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout = lambda timeout, group: None
    FSDPModule.set_gradient_divide_factor = set_factor


def prepare(folder: Path) -> None:
    """A tokenizer of ten words, and a text of them where torchtitan looks for its test data."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("#@abcdefghij")}, unk_token="#"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "#", "bos_token": "@"}))
    data = folder / "tests" / "assets" / "c4_test"
    data.mkdir(parents=True, exist_ok=True)
    texts = (" ".join("abcdefghij"[(i + 3 * j) % 10] for j in range(60)) for i in range(50))
    (data / "data.json").write_text("\n".join(json.dumps({"text": text}) for text in texts))


def config() -> Any:
    from torchtitan.models.llama3 import model_registry
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    from sharpwise.integrations.torchtitan import sharpwise_optimizer

    given = llama3_debugmodel()
    given.model_spec = model_registry("debugmodel", attn_backend="flex")
    del given.model_spec.model.layers[2:]
    given.optimizer = sharpwise_optimizer("adam-mini", lr=8e-4, weight_decay=0.1, block_lr="blockwise")
    given.hf_assets_path, given.dump_folder = ".", "run"
    given.training.local_batch_size, given.training.seq_len, given.training.steps = 2, 64, STEPS
    given.training.disable_cuda_graphs, given.validator.enable = True, False
    given.checkpoint.enable, given.checkpoint.interval = True, SAVED
    given.parallelism.spmd_backend, given.debug.seed = "partial_dtensor", 1
    return given


def main() -> None:
    os.chdir(sys.argv[1])
    device_of_cpus()
    sums_of_gloo()
    from torchtitan.models.common import attention

    attention.FlexAttention._compiled_flex_attn = staticmethod(attend)
    attention._compiled_create_block_mask = attention.create_block_mask
    trainer = config().build()
    losses: list[float] = []
    forward_backward_step = trainer.forward_backward_step

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = forward_backward_step(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    trainer.forward_backward_step = counted
    trainer.train()
    (optimizer,) = trainer.optimizers
    weights = {name: p.full_tensor() for name, p in trainer.model_parts[0].named_parameters()}
    blocks = [[s.name, s.role, s.heads, s.source] for s in optimizer.blocks.segments]
    found = {
        "losses": losses,
        "optimizer": type(optimizer).__name__,
        "blocks": blocks,
        "sharded": all(p.device_mesh.size() == 2 for p in trainer.model_parts[0].parameters()),
        "steps": sorted({float(own["step"]) for own in optimizer.state.values()}),
        "state": optimizer.state_bytes(),
    }
    trainer.close()
    if torch.distributed.get_rank() == 0:
        Path("run.json").write_text(json.dumps(found))
        torch.save(weights, "weights.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
