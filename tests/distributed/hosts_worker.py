"""One of two gloo processes: Accelerate, the Trainer and DDP against one process; what is refused.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m distributed.hosts_worker OUTPUT.json

What is found is judged by test_hosts.py.
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, DistributedType, PartialState
from first_contact.fsdp_worker import difference, full, set_gradients, shard, state_difference, train
from first_contact.tiny import STEPS, batches, gpt2, loss_of, nanogpt
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import sharpwise
from distributed.serving import Case, serve
from sharpwise.integrations.hf import set_optimizer

LR = 1e-3
OFFLOADED = ("adamw", "adam-mini", "adapm", "muon")
DATA = [{"input_ids": row, "labels": row} for tokens in batches() for row in tokens]


def accelerators_of_cpus() -> None:
    """Let Accelerate shard on CPUs: it turns FSDP on for some kinds of processes only, whatever the plugin says.

    `AcceleratorState` asks `distributed_type in [MULTI_GPU, ..., MULTI_XPU, ...]`, and CPUs are `MULTI_CPU`. That
    answer is all that is changed; devices stay CPUs, the backend gloo, and everything behind it runs as it is.
    """
    original = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = init


def fsdp2(**options: Any) -> accelerate.Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = accelerate.utils.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        **options,
    )
    return accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)


def prepared_by_accelerate(name: str, start: str, **options: Any) -> dict[str, Any]:
    """`prepare(model, optimizer)` exchanges the parameters; then a loop, and `save_state` and `load_state` in it."""
    accelerator = fsdp2(**options)
    plain, alone = gpt2(), gpt2()
    settings = {"lr": LR, "block_lr": "blockwise", "max_grad_norm": 1.0}
    inner = sharpwise.create_optimizer(plain, name, **settings)
    if start == "allocated":
        inner.init_state()
    model, optimizer = accelerator.prepare(plain, inner)
    reference = sharpwise.create_optimizer(alone, name, **settings)
    losses = []
    for number, tokens in enumerate(batches()):
        loss = loss_of(model, tokens.chunk(2)[dist.get_rank()])
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        expected = loss_of(alone, tokens)
        expected.backward()
        reference.step()
        reference.zero_grad()
        losses.append((accelerator.reduce(loss.detach(), "mean").item(), expected.item()))
        if number == 9:
            saved_and_spoilt_and_loaded(accelerator, model, inner)
    return {
        "losses": max(abs(a - b) for a, b in losses),
        "fell": losses[0][0] - losses[-1][0],
        "parameters": difference(model, alone),
        "sharded": all(isinstance(p, DTensor) for group in inner.param_groups for p in group["params"]),
        "state": set(inner.state) == set(model.parameters()),
        "steps": sorted({float(own["step"]) for own in inner.state.values()}),
    }


def saved_and_spoilt_and_loaded(accelerator: accelerate.Accelerator, model: nn.Module, inner: Any) -> None:
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    accelerator.save_state(folder[0])
    train(model, inner, range(2))
    inner.zero_grad()
    inner.param_groups[0]["lr"] = 1.0
    accelerator.load_state(folder[0])
    assert inner.param_groups[0]["lr"] == LR


def trainer(folder: str, model: nn.Module, size: int, **arguments: Any) -> transformers.Trainer:
    """20 steps of batches of `size` sequences per process, the loss of each of them logged."""
    args = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=size,
        learning_rate=LR,
        weight_decay=0.1,
        warmup_steps=3,
        logging_steps=1,
        save_steps=10,
        seed=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    made = transformers.Trainer(model=model, args=args, train_dataset=DATA)
    set_optimizer(made, "adam-mini", block_lr="blockwise")  # at two groups: biases and norms do not decay
    return made


def losses_of(run: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trained_by_the_trainer() -> dict[str, Any]:
    """The Trainer under FSDP2, and the same resumed from its checkpoint in the middle."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    sharding = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}}
    whole = trainer(folder[0], gpt2(), 2, **sharding)
    whole.train()
    resumed = trainer(folder[0], gpt2(), 2, **sharding)
    resumed.train(resume_from_checkpoint=str(Path(folder[0]) / "checkpoint-10"))
    sharded = all(isinstance(p, DTensor) for group in whole.optimizer.param_groups for p in group["params"])
    weights = {name: full(p).tolist() for name, p in whole.model.named_parameters()}
    return {
        "losses": losses_of(whole),
        "resumed": difference(resumed.model, whole.model),
        "sharded": sharded,
        "weights": weights,
    }


class Branches(nn.Module):
    """One branch per kind of batch, so that the other gets no gradient; and one that none ever reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.first, self.second, self.never = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return (self.first, self.second)[which](self.inner(x).tanh()).square().mean()


def ddp(name: str) -> dict[str, Any]:
    models = Branches(), Branches()
    wrapped = DistributedDataParallel(models[0], find_unused_parameters=True)
    blocks = dict.fromkeys(("*",), "up")
    settings = {"lr": LR, "weight_decay": 0.1, "blocks": blocks, "block_lr": "blockwise", "max_grad_norm": 0.1}
    optimizers = [sharpwise.create_optimizer(m, name, compile=False, **settings) for m in (wrapped, models[1])]
    generator = torch.Generator().manual_seed(5)
    worst = 0.0
    for step in range(STEPS):
        x = torch.randn(8, 6, generator=generator)
        loss = wrapped(x.chunk(2)[dist.get_rank()], step % 3 % 2)
        loss.backward()
        expected = models[1](x, step % 3 % 2)
        expected.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        worst = max(worst, abs(mean.item() / 2 - expected.item()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    steps = {n: float(optimizers[0].state[p]["step"]) for n, p in models[0].named_parameters()}
    return {"losses": worst, "parameters": difference(*models), "steps": steps}


def muon_of_replicas() -> dict[str, Any]:
    """What processes share, and what each of them has for itself; errors against one that works alone."""

    def apart(wrap: Callable[[nn.Module], nn.Module], own: float = 0.0, **options: Any) -> dict[str, Any]:
        name = "transformer.h.0.mlp.c_fc.weight"
        placed, alone = nanogpt(), nanogpt()
        common = {"lr": LR, "normalize_rows": True, "compile": False}
        for model in (placed, alone):
            with torch.no_grad():
                model.get_parameter(name).add_(own)
        optimizers = [sharpwise.Muon(wrap(placed), **common, **options), sharpwise.Muon(alone, **common)]
        for step in range(3):
            for model, optimizer in zip((placed, alone), optimizers, strict=True):
                set_gradients(model, step)
                if own:
                    model.get_parameter(name).grad.add_(own)
                optimizer.step()
        shared, all_of_them = (sum(m.worked for m in o._backends.matrices.values()) for o in optimizers)
        error = torch.tensor(difference(placed, alone))
        dist.all_reduce(error, dist.ReduceOp.MAX)
        here = torch.cat([full(p).detach().view(-1) for p in placed.parameters()])
        there = here.clone()
        dist.broadcast(there, 0)
        same = torch.tensor(float(torch.equal(here, there)))
        dist.all_reduce(same, dist.ReduceOp.MIN)
        return {"error": float(error), "shared": shared / all_of_them, "same": bool(same)}

    def experts(model: nn.Module) -> nn.Module:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["transformer.h.0.mlp.c_fc.weight"])
        return DistributedDataParallel(model)

    def one_each(model: nn.Module) -> nn.Module:
        return shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "data"))["data"])

    return {
        "ddp": apart(DistributedDataParallel),
        "compiled": apart(lambda model: torch.compile(DistributedDataParallel(model))),
        "parameters": apart(lambda model: DistributedDataParallel(model).module, process_group=dist.group.WORLD),
        "bf16": apart(DistributedDataParallel, bf16_exchange=True),
        "one shard each": apart(one_each, process_group=dist.group.WORLD),
        "experts": apart(experts, own=1.0 + dist.get_rank()),
    }


def offloaded(name: str) -> dict[str, Any]:
    """FSDP2 with and without `CPUOffloadPolicy`, a norm over all gradients."""
    optimizers, models = [], []
    for policy in (OffloadPolicy(), CPUOffloadPolicy(pin_memory=False)):
        model = shard(gpt2(), offload_policy=policy)
        optimizer = sharpwise.create_optimizer(model, name, lr=LR, max_grad_norm=1.0)
        for tokens in batches()[:5]:
            loss = loss_of(model, tokens.chunk(2)[dist.get_rank()])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
        optimizers.append(optimizer)
    return {
        "parameters": difference(*models),
        "state": state_difference(optimizers[1], optimizers[0], (models[1], models[0])),
        "places": sorted({str(v.device) for own in optimizers[1].state.values() for v in own.values()}),
    }


def no_backend() -> str:
    """What NCCL does with parameters on CPUs, by a group of gloo that serves GPUs alone."""
    mesh = DeviceMesh.from_group(dist.new_group(backend="cuda:gloo"), "cpu")
    model = nn.Linear(2, 4, bias=False)
    model.weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)], src_data_rank=None))
    return complaint(step_of(model, sharpwise.AdamW(model, lr=LR)))


def complaint(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def step_of(model: nn.Module, optimizer: Any) -> Callable[[], Any]:
    def call() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    return call


def fsdp1(original: bool, name: str) -> dict[str, Any]:
    """FullyShardedDataParallel before the optimizer is built, and behind its back."""
    model = FullyShardedDataParallel(gpt2(), use_orig_params=original, device_id=torch.device("cpu"))
    inside = list(model.module.named_parameters())
    map_of_before = sharpwise.BlockMap.of(gpt2())
    later = gpt2()
    optimizer = sharpwise.create_optimizer(later, name, lr=LR)
    optimizer.init_state()
    wrapped = FullyShardedDataParallel(later, use_orig_params=original, device_id=torch.device("cpu"))
    exchanged = sharpwise.create_optimizer(gpt2(), name, lr=LR)
    exchanged.param_groups[0]["params"] = list(wrapped.parameters())
    return {
        "model": complaint(lambda: sharpwise.create_optimizer(model, name, lr=LR)),
        "inner model": complaint(lambda: sharpwise.create_optimizer(model.module, name, lr=LR)),
        "pairs": complaint(lambda: sharpwise.create_optimizer(inside, name, lr=LR)),
        "groups": complaint(lambda: sharpwise.create_optimizer([{"params": inside}], name, lr=LR, model=model)),
        "block map": complaint(lambda: sharpwise.create_optimizer(inside, name, lr=LR, blocks=map_of_before)),
        "wrapped later": complaint(step_of(wrapped, optimizer)),
        "exchanged": complaint(step_of(wrapped, exchanged)),
    }


def ranks_that_differ() -> dict[str, Any]:
    """A model, an option, a setting or an order of groups that is not the same on both ranks."""
    odd = dist.get_rank() == 1

    def stepped(model: nn.Module, make: Any = sharpwise.AdamW, **options: Any) -> str:
        sharded = shard(model)
        optimizer = make(sharded, **{"lr": LR, **options})
        set_gradients(sharded, 0)
        return complaint(optimizer.step)

    blocks = {"transformer.wpe.weight": "other"} if odd else None
    return {
        "same": stepped(nanogpt()),
        "shape": stepped(gpt2(vocab_size=66 if odd else 65)),
        "rule": complaint_of_rule(odd),
        "block_lr": stepped(nanogpt(), block_lr="blockwise" if odd else None),
        "lr": stepped(nanogpt(), lr=torch.tensor(LR * (2 if odd else 1))),
        "betas": stepped(nanogpt(), betas=(0.9, 0.95 if odd else 0.99)),
        "roles": stepped(nanogpt(), block_lr=sharpwise.BlockwiseLR(other=1.0), blocks=blocks),
        "rows": stepped(nanogpt(), sharpwise.Muon, normalize_rows=odd),
        "compile": stepped(nanogpt(), compile=False if odd else None),
    }


def complaint_of_rule(odd: bool) -> str:
    model = shard(nanogpt())
    optimizer = (sharpwise.Lion if odd else sharpwise.AdamW)(model, lr=LR)
    before = copy.deepcopy(model.state_dict())
    set_gradients(model, 0)
    said = complaint(optimizer.step)
    assert all(torch.equal(full(a), full(b)) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    return said


def one_rank_asks() -> dict[str, Any]:
    """Tables and sizes are made without the other ranks, so that rank 0 may print them alone."""
    model = shard(gpt2())
    optimizer = sharpwise.AdamMini(model, lr=LR, block_lr="blockwise")
    rows = 0
    if dist.get_rank() == 0:
        rows = len(str(optimizer.explain()).splitlines()) + len(str(optimizer.lr_multipliers()).splitlines())
        optimizer.init_state()
        optimizer.state_bytes()
        optimizer.state_dict()
    train(model, optimizer, range(1))
    return {"rows": rows, "steps": sorted({float(own["step"]) for own in optimizer.state.values()})}


def left_behind() -> dict[str, Any]:
    """`fully_shard` after the optimizer was built, which nobody told it."""
    found = {}
    for when in ("before", "after"):
        model = nanogpt()
        optimizer = sharpwise.AdamMini(model, lr=LR)
        if when == "after":
            train(model, optimizer, range(1))
            optimizer.zero_grad()
        fully_shard(model)
        set_gradients(model, 0)
        found[f"sharded {when} the first step"] = complaint(optimizer.step)
    return found


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {
        "trainer": trained_by_the_trainer,
        "accelerate, adamw": lambda: prepared_by_accelerate("adamw", "fresh", state_dict_type="SHARDED_STATE_DICT"),
        "accelerate, adam-mini": lambda: prepared_by_accelerate(
            "adam-mini", "allocated", cpu_ram_efficient_loading=True, state_dict_type="FULL_STATE_DICT"
        ),
        "ddp, adamw": lambda: ddp("adamw"),
        "ddp, adam-mini": lambda: ddp("adam-mini"),
        "muon": muon_of_replicas,
        **{f"offload, {name}": lambda name=name: offloaded(name) for name in OFFLOADED},
        "no backend": no_backend,
        "ranks that differ": ranks_that_differ,
        "one rank asks": one_rank_asks,
        "left behind": left_behind,
    }
    for original in (False, True):
        for name in ("adamw", "adam-mini"):
            key = f"fsdp1, {name}, use_orig_params={original}"
            found[key] = lambda original=original, name=name: fsdp1(original, name)
    return found


if __name__ == "__main__":
    accelerators_of_cpus()
    serve(cases(), sys.argv[1])
