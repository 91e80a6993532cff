"""How a model lies on a mesh of processes: tensor parallelism in a layer, FSDP2 around it, replicas of the whole."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from sharpwise.blocks import BlockMap
from sharpwise.blocks.names import canonical_name
from sharpwise.model_facts import head_counts, logits_of
from sharpwise.train.config import MeshConfig

STYLES: dict[str, ParallelStyle] = {
    "colwise": ColwiseParallel(),
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel(),
    "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
}
"""Those of Hugging Face's styles that are known here: of a matrix the output features are cut, or the input features,
of an embedding the tokens; what goes in or comes out is cut in the same way or whole."""


def mesh_sizes(own: MeshConfig, processes: int) -> dict[str, int]:
    """Processes along each dimension, the outermost first; their product is `processes`.

    Raises:
        ValueError: it cannot be.
    """
    fsdp = own.fsdp or max(1, processes // own.tp)
    if processes % (fsdp * own.tp):
        raise ValueError(
            f"mesh.fsdp={own.fsdp} and mesh.tp={own.tp} take a multiple of {fsdp * own.tp} processes, and there are "
            f"{processes}: start so many, or set them so that their product divides {processes} (mesh.fsdp=0 takes "
            "all processes that are left)"
        )
    return {"replicate": processes // (fsdp * own.tp), "shard": fsdp, "tp": own.tp}


def shard_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the parameters of a model, in place.

    Args:
        model: on the CPU, with the same weights on all processes.
        mesh: its dimensions are some of replicate, shard, tp.

    Raises:
        ValueError: a model without a plan for tensor parallelism, or whose heads or features so many processes do not
            divide.
    """
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        size = mesh["tp"].size()
        # Every process has the weights: nothing is sent.
        parallelize_module(model, mesh["tp"], dict(_tensor_plan(model, size)), src_data_rank=None)
    if "shard" in names:
        data = mesh["replicate", "shard"] if "replicate" in names else mesh["shard"]
        for layer in layers_of(model):
            fully_shard(layer, mesh=data)
        fully_shard(model, mesh=data)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # losses are weighted by share: their gradients are summed
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def sample_logits(model: nn.Module, device: torch.device) -> Tensor:
    """What a model says to a few tokens, on the CPU: before and after it is cut that has to be the same."""
    tokens = torch.arange(8, device=device)[None]
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            return logits_of(model(tokens), tokens).float().cpu()
    finally:
        model.train(was)


def check_same_logits(
    model: nn.Module, whole: Tensor, cut: Tensor | Exception | None, size: int, *, exact: bool
) -> None:
    """Refuse a model that tensor parallelism changes.

    Args:
        model: as it is cut.
        whole, cut: `sample_logits` before and after, or how that failed.
        size: of the mesh.
        exact: both in fp32 on a CPU; else rounding may be coarse.

    Raises:
        ValueError: it cannot run, or computes something else.
    """
    assert cut is not None
    who = type(model).__name__.removeprefix("FSDP")
    if isinstance(cut, Exception):
        what = f"{who} cannot run when it is cut by its plan ({type(cut).__name__}: {' '.join(str(cut).split())[:300]})"
    elif whole.shape != cut.shape:
        what = f"{who} gives logits of shape {tuple(cut.shape)} in place of {tuple(whole.shape)} when it is cut"
    else:
        apart = float((whole - cut).abs().max() / whole.abs().max().clamp_min(1e-30))
        if apart <= (1e-4 if exact else 0.03):
            return
        what = f"{who} computes something else when it is cut by its plan: logits differ by {apart:.1g} of the largest"
    raise ValueError(
        f"mesh.tp={size}: {what}. Its attention has to find the number of heads from the width that is left, fused "
        "projections cannot be cut, and 'rowwise' has to follow 'colwise'; mend its tp_plan, or take mesh.fsdp"
    )


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists, which are the layers of a transformer; each once."""
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.ModuleList):
                found.setdefault(id(child), child)
            else:
                visit(child)

    visit(model)
    return [layer for layer in found.values() if any(True for _ in layer.parameters())]


def tensor_parallel_cuts(model: nn.Module, size: int) -> dict[str, int]:
    """Along which dimension tensor parallelism over so many processes cuts parameters, by name; nothing is cut.

    Raises:
        ValueError: as `shard_model`.
    """
    found = {}
    modules = dict(model.named_modules())
    for name, style in _tensor_plan(model, size):
        by_column = isinstance(style, ColwiseParallel)
        looked_up = isinstance(modules[name], nn.Embedding)  # of which rows are inputs
        for own, _ in modules[name].named_parameters(recurse=False):
            if own == "weight" or by_column:
                dim = 0 if own == "bias" else int(by_column == looked_up)
                found[canonical_name(f"{name}.{own}")] = dim
    return found


def _tensor_plan(model: nn.Module, size: int) -> Iterator[tuple[str, ParallelStyle]]:
    """Names of modules, and how each is cut."""
    plan = _plan_of(model)
    if not plan:
        raise ValueError(
            f"mesh.tp={size}: {type(model).__name__} has no plan for tensor parallelism. Take mesh.fsdp instead, a "
            "model that has one (llama, mistral, qwen2, gpt_neox, ...), or give your own an attribute tp_plan, such as "
            "{'layers.*.up_proj': 'colwise', 'layers.*.down_proj': 'rowwise'}"
        )
    for name, heads in head_counts(model).items():
        if heads % size:
            raise ValueError(
                f"mesh.tp={size} does not divide the {heads} of {name}; take a divisor of it, or mesh.fsdp"
            )
    tied = _tied(model)
    heads_of = {s.name: s.heads for s in BlockMap.of(model, include_frozen=True).segments if s.heads}
    matched = False
    for name, module in model.named_modules():
        pattern = next((pattern for pattern in plan if fnmatchcase(name, pattern)), None)
        if pattern is not None and not tied & {id(p) for p in module.parameters()}:
            matched = True
            style, heads = plan[pattern], heads_of.get(canonical_name(f"{name}.weight"), size)
            if style == "colwise" and heads % size:
                raise ValueError(
                    f"mesh.tp={size} does not divide the {heads} heads of {name}; take a divisor of it, mesh.fsdp, or "
                    "in tp_plan 'colwise_gather_output' for q, k and v and 'rowwise_split_input' for o: then the "
                    "matrices are cut, and every process has all heads"
                )
            yield name, _style(name, module, style, size)
    if not matched:
        raise ValueError(f"mesh.tp={size}: the plan of {type(model).__name__} names no module: {', '.join(plan)}")


def _plan_of(model: nn.Module) -> dict[str, str]:
    """Patterns of module names and their styles: an attribute of Hugging Face's models, and of the user's."""
    own = getattr(model, "tp_plan", None)
    return dict(own) if isinstance(own, Mapping) else {}


def _style(name: str, module: nn.Module, style: str, size: int) -> ParallelStyle:
    if style not in STYLES:
        raise ValueError(
            f"mesh.tp={size}: the plan cuts {name} {style!r}, and known are {', '.join(STYLES)}; take mesh.fsdp"
        )
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise ValueError(
            f"mesh.tp={size}: {name} is a {type(module).__name__}, and only nn.Linear and nn.Embedding can be cut; "
            "take mesh.fsdp"
        )
    features = {"colwise": "out_features", "rowwise": "in_features"}.get(style)
    if features is not None and getattr(module, features) % size:
        raise ValueError(
            f"mesh.tp={size} does not divide the {getattr(module, features)} {features} of {name}; take a divisor of it"
        )
    return STYLES[style]


def _tied(model: nn.Module) -> set[int]:
    """Parameters that several modules share: they stay whole."""
    counts: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return {key for key, count in counts.items() if count > 1}
