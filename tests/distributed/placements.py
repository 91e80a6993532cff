"""Tiny models, and every way to lay one out over processes: what the battery multiplies.

Sizes divide by nothing: heads straddle shards, some processes hold a row more than others, some none.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers
from blocks.models import llama_config, neox_config
from first_contact.tiny import gpt2, nanogpt
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def _hf(config: Any) -> nn.Module:
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config)


def _mixtral() -> nn.Module:
    """Three experts, so that the router has fewer rows than there may be processes."""
    sizes = {"hidden_size": 8, "intermediate_size": 10, "num_attention_heads": 4, "num_key_value_heads": 2}
    return _hf(transformers.MixtralConfig(**sizes, num_local_experts=3, num_hidden_layers=1, vocab_size=11))


def _frozen(model: nn.Module, name: str) -> nn.Module:
    model.get_parameter(name).requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2 (Conv1D, fused, tied)": gpt2,
    "nanogpt (fused)": lambda: _frozen(nanogpt(), "transformer.wpe.weight"),
    "gpt_neox (interleaved)": lambda: _hf(neox_config(vocab_size=13)),
    "llama (grouped)": lambda: _frozen(_hf(llama_config(vocab_size=13)), "model.norm.weight"),
    "mixtral (experts)": _mixtral,
}


def _odd_heads() -> nn.Module:
    """Three query heads of four rows and one of keys and values: processes have a head and a half, or half a head."""
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 12, "head_dim": 4}
    return _hf(llama_config(vocab_size=13, **sizes))


ODD: dict[str, Callable[[], nn.Module]] = {"llama (3 heads, 1 of keys)": _odd_heads}
"""Whose heads divide by nothing."""


@functools.cache
def _mesh(*sizes: int, names: tuple[str, ...]) -> DeviceMesh:
    """One for all cases: each has process groups with threads of their own, which stay."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def _fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for layer in layers:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Matrices and the biases of every other one cut along one dimension after the other; the rest stays whole."""
    done: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) not in done:
                turn = len(done)
                cut = p.ndim > 1 or (name == "bias" and turn % 4 == 1)
                # What is not cut stays plain, as torch leaves it, or is replicated, as under sequence parallelism.
                placement = Shard(turn % p.ndim) if cut else Replicate()
                placed = distribute_tensor(p.detach(), mesh, [placement])
                plain = not cut and turn % 3 == 0
                done[id(p)] = p if plain else nn.Parameter(placed, requires_grad=p.requires_grad)
            module.register_parameter(name, done[id(p)])
    return model


def _by_plan(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """As Megatron and torch's own tensor parallelism do: q, k and v by rows, o by columns, whatever the heads."""
    cut = {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    cut |= {f"model.layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    cut |= dict.fromkeys(("model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj"), RowwiseParallel())
    return parallelize_module(model, mesh or _mesh(2, names=("tensor",)), cut)


def _both_by_plan(model: nn.Module) -> nn.Module:
    mesh = _mesh(2, 2, names=("data", "tensor"))
    return _fsdp(_by_plan(model, mesh["tensor"]), mesh["data"])


def _both(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    mesh = mesh or _mesh(2, 2, names=("data", "tensor"))
    return _fsdp(_tensor_parallel(model, mesh["tensor"]), mesh["data"])


def _stage(model: nn.Module) -> nn.Module:
    """One of two pipeline stages, here of the same model: less than the world, so that it needs a group of its own."""
    return _both(model, _mesh(2, 2, 2, names=("stage", "data", "tensor")))


PLACEMENTS: dict[str, tuple[int, Callable[[nn.Module], nn.Module]]] = {
    "replicated 2": (2, lambda model: model),
    "fsdp 2": (2, lambda model: _fsdp(model, _mesh(2, names=("data",)))),
    "tp 2": (2, lambda model: _tensor_parallel(model, _mesh(2, names=("tensor",)))),
    "fsdp 3": (3, lambda model: _fsdp(model, _mesh(3, names=("data",)))),
    "fsdp 4": (4, lambda model: _fsdp(model, _mesh(4, names=("data",)))),
    "hsdp 2x2": (4, lambda model: _fsdp(model, _mesh(2, 2, names=("replicas", "data")))),
    "fsdp 2 x tp 2": (4, _both),
}
"""Name -> number of processes, and how a model is laid out over them."""
WIDE: dict[str, tuple[int, Callable[[nn.Module], nn.Module]]] = {"stages 2 x fsdp 2 x tp 2": (8, _stage)}
"""Of more processes than a quick test can start."""
PLANNED: dict[str, tuple[int, Callable[[nn.Module], nn.Module]]] = {
    "tp 2 by plan": (2, _by_plan),
    "tp 3 by plan": (3, lambda model: _by_plan(model, _mesh(3, names=("tensor",)))),
    "fsdp 2 x tp 2 by plan": (4, _both_by_plan),
}
"""For models with LLaMA's names."""


def _experts(model: nn.Module) -> nn.Module:
    """Stacks of experts cut between them, as expert parallelism does; the rest stays plain."""
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if p.ndim == 3:
                placed = distribute_tensor(p.detach(), _mesh(2, names=("experts",)), [Shard(0)])
                module.register_parameter(name, nn.Parameter(placed))
    return model


EXPERTS: dict[str, tuple[int, Callable[[nn.Module], nn.Module]]] = {"replicated but for experts 2": (2, _experts)}
EVERYWHERE = PLACEMENTS | WIDE | PLANNED | EXPERTS


def part_of(whole: Tensor, placed: Tensor) -> Tensor:
    """What this process holds of `whole`, laid out as `placed` is; chunks of chunks, as FSDP cuts what TP has cut."""
    if not isinstance(placed, DTensor):
        return whole
    mesh, here = placed.device_mesh, placed.device_mesh.get_coordinate()
    cuts = [(d, p) for d, p in enumerate(placed.placements) if not p.is_replicate()]
    for d, placement in sorted(cuts, key=lambda cut: type(cut[1]).__name__ == "_StridedShard"):
        chunks = whole.chunk(mesh.size(d), placement.dim)
        empty = whole.narrow(placement.dim, 0, 0)
        whole = chunks[here[d]] if here[d] < len(chunks) else empty
    return whole


def gradient_as(whole: Tensor, placed: Tensor) -> Tensor:
    """`whole` laid out as a backward pass does for `placed`: of what tensor parallelism replicates each has a share."""
    if not isinstance(placed, DTensor):
        return whole
    mesh, part = placed.device_mesh, part_of(whole, placed).contiguous()
    placements = list(placed.placements)
    if "tensor" in mesh.mesh_dim_names and placements[-1].is_replicate():
        placements[-1], part = Partial(), part / mesh.size(-1)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def held(tensor: Tensor) -> Tensor:
    """The plain tensor that this process holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def worst(value: float) -> float:
    """The largest over all processes."""
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)
