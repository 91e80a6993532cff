"""From what a training script has (a model, names, groups) to named parameter groups and a block map."""

import logging
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharpwise.block_lr import BlockLR
from sharpwise.blocks import BlockMap, Role, Segment, canonical_name
from sharpwise.blocks.map import Blocks, blocks_for, map_for_elements
from sharpwise.blocks.names import canonical_path, collapse
from sharpwise.blocks.roles import meant
from sharpwise.blocks.unclear import A_MAP, BLOCKS, Unclear, example_of
from sharpwise.engine.live_model import model_behind
from sharpwise.hints import IN_A_TRAINER, kind_of
from sharpwise.rules import Rule
from sharpwise.shards import is_dtensor

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]

KEEP_SHAPES = (
    "Blocks (rows, heads) cannot be found in flattened or partitioned parameters. Shard with FSDP2, which leaves every "
    "parameter its shape: torch.distributed.fsdp.fully_shard(model), or version 2 of FSDP in Accelerate and Trainer. "
    "FSDP1 and DeepSpeed ZeRO-1, 2 and 3 are not supported"
)

IDLE = (
    "%s: none of its parameters has a gradient, so that this step changes nothing; call backward() before, and build "
    "the optimizer of the very model that is trained, not of a copy"
)
RESIZED = (
    "Resize the model (resize_token_embeddings, pruning) before the optimizer is built, or after that build another one"
)


def bind(
    first: Any, model: nn.Module | None, blocks: Blocks, who: str, roles: bool = True
) -> tuple[Groups, BlockMap, nn.Module | None]:
    """Groups whose `params` are (name, tensor) pairs, the block map of the whole model, and the model if there is one.

    Raises:
        TypeError: for tensors without a model, or something that holds no parameters.
        ValueError: for a parameter given twice, one that does not belong to the model, or a flattened one.
        RuntimeError: for DTensors without a process group.
    """
    if not isinstance(model, nn.Module | None):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {kind_of(model)}")
    if isinstance(first, nn.Module):
        if model is not None and model is not first:
            raise TypeError(f"{who}: a model was given twice; pass it first, or as model=, not both")
        model, first = first, [(n, p) for n, p in first.named_parameters() if p.requires_grad]
        if not first:
            all_of_them = len(names_of(model))
            if not all_of_them:
                raise ValueError(f"{who}: the model {type(model).__name__} has no parameters")
            raise ValueError(
                f"{who}: the model has no trainable parameters, requires_grad is False for all "
                f"{all_of_them}; call requires_grad_(True) on what is to be trained, or to unfreeze it later "
                f"give all of them: {who}(model.parameters(), model=model)"
            )
    model = model_behind(first) if model is None else model
    groups = _groups(first, who)
    names = names_of(model)
    for group in groups:
        group["params"] = [_named(item, names, model, who) for item in group["params"]]
    named = [pair for group in groups for pair in group["params"]]
    check_unique(named, who)
    check_tensors(named, who)
    return groups, _block_map(named, model, blocks, who, roles), model


def replicas_of(model: nn.Module | None, given: Any, who: str) -> Any:
    """The processes that hold the same plain parameters: the group given, or that of a DistributedDataParallel model.

    Raises:
        TypeError: for anything but a process group.
    """
    distributed = sys.modules.get("torch.distributed")
    if given is not None and not isinstance(given, getattr(distributed, "ProcessGroup", ())):
        raise TypeError(
            f"{who}: process_group must be a torch.distributed.ProcessGroup, such as dist.group.WORLD, or None, got "
            f"{kind_of(given)}"
        )
    inner: Any = getattr(model, "_orig_mod", model)  # of torch.compile
    # What DDP is told to ignore differs from process to process, as experts do.
    same = isinstance(inner, DistributedDataParallel) and not inner.parameters_to_ignore
    group: Any = inner.process_group if given is None and same else given
    return group if group is not None and group.size() > 1 else None


def names_of(model: nn.Module | None) -> dict[int, str]:
    """Names by identity of the tensors that the model holds now."""
    return {} if model is None else {id(p): canonical_name(n) for n, p in model.named_parameters()}


def name_of(tensor: Any, names: Mapping[int, str], who: str) -> str:
    """The name of a tensor that is added later."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{who}: expected tensors or (name, tensor) pairs, got {kind_of(tensor)}")
    name = names.get(id(tensor))
    if name is None:
        raise ValueError(
            f"{who}: a tensor of shape {tuple(tensor.shape)} is unknown to the model this optimizer was built with; "
            f"pass (name, tensor) pairs"
        )
    return name


def _groups(first: Any, who: str) -> Groups:
    if isinstance(first, (Tensor, str, Mapping)) or not isinstance(first, Iterable):
        alone = isinstance(first, Mapping) and "params" in first
        got = "one group outside a list: give [group]" if alone else kind_of(first)
        raise TypeError(f"{who}: expected a model, (name, tensor) pairs or parameter groups, got {got}")
    check_ordered(first, who)
    items = list(first)
    if not items:
        raise ValueError(f"{who}: got no parameters; a generator, such as model.parameters(), can be read once only")
    if all(isinstance(item, Mapping) for item in items):
        groups = [dict(item) for item in items]
        for group in groups:
            check_is_group(group, who)
            own = group["params"]
            check_ordered(own, who)
            group["params"] = [own] if isinstance(own, Tensor) or is_pair(own) else list(own)
            given = group.pop("param_names", None)
            if given is not None and not any(is_pair(item) for item in group["params"]):
                if len(given) != len(group["params"]):
                    raise ValueError(
                        f"{who}: a group has {len(group['params'])} params and {len(given)} param_names; give one per "
                        f"tensor, or none"
                    )
                group["params"] = list(zip(given, group["params"], strict=True))
        return groups
    return [{"params": items}]


def check_is_group(group: Any, who: str) -> None:
    """Raise unless this is a parameter group, with tensors or (name, tensor) pairs."""
    if not isinstance(group, Mapping) or "params" not in group:
        got = f"a mapping of {sorted(map(str, group))[:5]}" if isinstance(group, Mapping) else kind_of(group)
        raise TypeError(f"{who}: a parameter group is a dict with 'params', such as {{'params': [...]}}, got {got}")
    own = group["params"]
    if isinstance(own, nn.Module) or not isinstance(own, Iterable):
        raise TypeError(f"{who}: the params of a group are tensors or (name, tensor) pairs, got {kind_of(own)}")


def check_ordered(parameters: Any, who: str) -> None:
    """Raise TypeError for a set, as torch does."""
    if isinstance(parameters, (set, frozenset)):
        raise TypeError(
            f"{who}: parameters must come in an order, got a {type(parameters).__name__}, whose order changes from run "
            f"to run; pass a list"
        )


def is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str)


def _named(item: Any, names: Mapping[int, str], model: nn.Module | None, who: str) -> tuple[str, Tensor]:
    name, tensor = item if is_pair(item) else (None, item)
    if not isinstance(tensor, Tensor):
        several = "; several models go together as torch.nn.ModuleList([...])" if isinstance(tensor, nn.Module) else ""
        raise TypeError(f"{who}: expected tensors or (name, tensor) pairs, got {kind_of(tensor)}{several}")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{who}: parameters must be real floating point, got {tensor.dtype} for {name or 'a tensor'}; leave it out"
        )
    if model is None:
        if name is None:
            trainer = f". In a Trainer: {IN_A_TRAINER}" if "transformers.trainer" in sys.modules else ""
            raise TypeError(
                f"{who}: tensors have no names, and the blocks of a model are found by name. "
                f"Say which model they belong to: {who}(groups, model=model, lr=...){trainer}"
            )
        return canonical_name(name), tensor
    known = names.get(id(tensor))
    if known is None:
        check_tensors([(name or "a tensor", tensor)], who)
        shape = f"{name or 'a tensor'} of shape {tuple(tensor.shape)}"
        hint = f". If it is a flattened copy of parameters: {KEEP_SHAPES}" if tensor.ndim == 1 else ""
        raise ValueError(f"{who}: {shape} does not belong to the model {type(model).__name__}{hint}")
    if name is not None and canonical_name(name) != known:
        raise ValueError(
            f"{who}: the tensor called {name!r} is {known!r} in the model {type(model).__name__}; give "
            f"it by that name, or by none"
        )
    return known, tensor


def check_unique(named: Sequence[tuple[str, Tensor]], who: str) -> None:
    """Raise ValueError for a tensor or a name that is given twice."""
    seen_names: set[str] = set()
    seen_tensors: dict[int, str] = {}
    for name, tensor in named:
        if id(tensor) in seen_tensors:
            raise ValueError(
                f"{who}: parameter {name!r} is given twice (also as {seen_tensors[id(tensor)]!r}); each belongs to one "
                f"group"
            )
        if name in seen_names:
            raise ValueError(f"{who}: two parameters are called {name!r}")
        seen_names.add(name)
        seen_tensors[id(tensor)] = name


def _block_map(
    named: Sequence[tuple[str, Tensor]], model: nn.Module | None, blocks: Blocks, who: str, roles: bool
) -> BlockMap:
    if isinstance(blocks, BlockMap):
        missing = [name for name, _ in named if name not in blocks]
        if missing:
            left_out = any(not tensor.requires_grad for name, tensor in named if name in missing)
            of = "BlockMap.of(model, include_frozen=True)" if left_out else "BlockMap.of(model)"
            raise ValueError(f"{who}: the block map given lacks {_few(missing)}; make it of this model, with {of}")
        for name, tensor in named:
            if tuple(blocks[name][0].shape) != tuple(tensor.shape):
                raise ValueError(
                    f"{who}: {name} has shape {tuple(tensor.shape)}, the block map says {blocks[name][0].shape}: "
                    f"it is of another model, or of this one before it was resized; make it anew: BlockMap.of(model)"
                )
        return blocks
    if model is None:
        if blocks:
            raise TypeError(f"{who}: roles given as blocks= need the model too; pass it first, or as model=model")
        return BlockMap.unknown(named)
    return blocks_for(model, blocks, who, include_frozen=True) if roles or blocks else map_for_elements(model, who)


def check_tensors(named: Iterable[tuple[str, Tensor]], who: str) -> None:
    """Raise ValueError for a flattened tensor, RuntimeError for a DTensor without a process group."""
    for name, tensor in named:
        by = _flattened_by(tensor)
        if by:
            raise ValueError(f"{who}: {name}, now of shape {tuple(tensor.shape)}, was flattened by {by}. {KEEP_SHAPES}")
        if is_dtensor(tensor) and not torch.distributed.is_initialized():
            raise RuntimeError(
                f"{who}: {name} is a DTensor, and there is no process group to reach its other parts: call "
                f"torch.distributed.init_process_group() before the model is sharded, and keep it while training"
            )


def _flattened_by(tensor: Tensor) -> str | None:
    # FSDP1 marks its flat parameter, and with use_orig_params=True the originals, whose data become views of it. ZeRO-3
    # leaves parameters of no elements, and keeps what they were under names that begin with ds_.
    if getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_fsdp_flattened", False):
        return "FSDP1 (FullyShardedDataParallel)"
    return "DeepSpeed ZeRO-3" if hasattr(tensor, "ds_id") else None


def check_group(names: Sequence[str], tensors: Sequence[Tensor], who: str) -> None:
    """Raise ValueError unless a group holds a tensor per name: ZeRO puts its flat partition in their place."""
    if len(names) != len(tensors):
        first = f", the first of shape {tuple(tensors[0].shape)}" if tensors else ""
        raise ValueError(
            f"{who}: the group of {len(names)} parameters that begins with {names[0] if names else 'nothing'} now "
            f"holds {len(tensors)} tensors{first}. {KEEP_SHAPES}; to leave out a parameter, freeze it"
        )


def check_shapes(named: Sequence[tuple[str, Tensor]], blocks: BlockMap, who: str) -> None:
    """Raise ValueError for a tensor that no longer has the shape that its blocks were found in."""
    check_tensors(named, who)
    for name, tensor in named:
        now, before = tuple(tensor.shape), tuple(blocks[name][0].shape)
        if now != before:
            # A vector where a matrix was, or one without elements: what FSDP1 and ZeRO leave where no mark tells it.
            flattened = len(now) == 1 and (len(before) != 1 or now == (0,))
            raise ValueError(
                f"{who}: {name} now has shape {now}, it had {before} when the optimizer was built. "
                + (KEEP_SHAPES if flattened else RESIZED)
            )


def check_followed(named: Sequence[tuple[str, Tensor]], model: nn.Module | None, who: str) -> None:
    """Raise if the model was sharded or moved after the optimizer was built, and that was left with the old tensors.

    Only that is looked for: between forward and backward FSDP2 shows plain tensors where the optimizer holds DTensors.
    """
    live = {} if model is None else {canonical_name(n): p for n, p in model.named_parameters()}
    check_tensors(live.items(), who)
    for name, tensor in named:
        if name in live and is_dtensor(live[name]) and not is_dtensor(tensor):
            raise RuntimeError(
                f"{who}: the model was sharded after this optimizer was built: {name} is a DTensor there and a plain "
                f"tensor here, which will never get a gradient. Build the optimizer after fully_shard(model), or give "
                f"both to Accelerator.prepare(model, optimizer)"
            )
        if name in live and not is_dtensor(tensor) and live[name].device != tensor.device:
            raise RuntimeError(
                f"{who}: the model was moved after this optimizer was built: {name} is on {live[name].device} there, "
                f"and another tensor, on {tensor.device}, here, which will never get a gradient. Build the optimizer "
                f"after the model is moved; to go on with state, take optimizer.state_dict() before that, and load it"
            )


def warn_if_frozen(groups: Groups, who: str) -> bool:
    """Whether no parameter of these groups requires a gradient, which goes to the log."""
    frozen = [not tensor.requires_grad for group in groups for tensor in group["params"]]
    if not frozen or not all(frozen):
        return False
    logger.warning(
        "%s: none of its %d parameters requires a gradient, so that steps change nothing; call requires_grad_(True) on "
        "what is to be trained",
        who,
        len(frozen),
    )
    return True


def check_roles_named(names: Collection[str], who: str, option: str, more: tuple[str, ...] = ()) -> frozenset[str]:
    """Raise TypeError or ValueError for anything but roles, and what is allowed more."""
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{who}: {option} takes names, such as {('norm', *more)!r}, got {names!r}")
    allowed = sorted({*(str(role) for role in Role), *more})
    wrong = sorted(set(names) - set(allowed))
    if wrong:
        got = ", ".join(f"{name!r}{meant(name, allowed)}" for name in wrong)
        what = " and ".join(["roles", *map(repr, more)])
        raise ValueError(f"{who}: {option} takes {what}, got {got}; allowed: {', '.join(allowed)}")
    return frozenset(str(n) for n in names)


def check_roles(
    blocks: BlockMap,
    known: BlockMap,
    rule: Rule,
    block_lr: BlockLR | None,
    strict: bool,
    model: nn.Module | None,
    unknown: Callable[..., Exception],
    who: str,
) -> None:
    """Raise where the roles of parameters have to be known, and are not.

    Args:
        blocks: of the parameters; known: of the whole model.
        unknown: (what needs the roles, what else can be done) -> the error.
    """
    if strict and blocks.unexplained:
        raise unknown("strict=True asks for")
    if block_lr is not None and block_lr.by_role and blocks.unexplained:
        raise unknown(f"block_lr {block_lr.name!r} distinguishes")
    if block_lr is not None:
        try:
            block_lr.check(known.segments)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from None
    for segment in blocks.segments:
        own, cut = rule.assign(segment)
        by_role = cut in ("role", "layer") or (own, cut) != rule.assign(replace(segment, role=Role.Q))
        if not segment.source and by_role:
            raise unknown(f"rule {rule.name!r} distinguishes", rule.hint)
        if cut == "layer" and all(s.layer is None for s in known.segments):
            raise ValueError(f"{who}: cut='layer': no layers were found in the model; take {rule.hint}")
        if cut == "head" and segment.heads is None:
            raise no_heads(who, segment, model)


def unexplained(
    who: str, what: str, blocks: BlockMap, known: BlockMap, model: nn.Module | None, mapped: bool, more: str = ""
) -> TypeError | ValueError:
    """The error about parameters whose roles nothing explains.

    Args:
        what: needs the roles.
        blocks: of the parameters that it needs them of; `known`: of the whole model.
        mapped: whether the user gave a map.
        more: what else can be done.
    """
    reason = f" ({known.problem})" if known.problem else ""
    problem = f"{who}: {what} roles, and nothing explains {_few(collapse(blocks.unexplained))}{reason}"
    if model is None and not mapped:
        other = f"; or {more}" if more else ""
        return TypeError(f"{problem}. Names alone carry none: pass the model, {who}(model, ...) or model=model{other}")
    modules = {} if model is None else {canonical_path(path): module for path, module in model.named_modules()}
    words = A_MAP if mapped or model is None else BLOCKS
    if model is not None and any(map(is_dtensor, model.parameters())):
        words = replace(words, batch=f"{words.batch}, made before the model is sharded")
    return Unclear(problem, *example_of(blocks.segments, modules), more=more, words=words)


def unexplained_later(who: str, what: str, blocks: BlockMap) -> ValueError:
    """The error about the same in a group that is added to an optimizer: of what was not there, nothing is known."""
    return ValueError(
        f"{who}: {what} roles, and of {_few(blocks.names())}, which the optimizer was built without, none is known; "
        f"build it anew with the model that has them"
    )


def no_heads(who: str, segment: Segment, model: nn.Module | None) -> TypeError:
    """The error about queries or keys that are to be cut by head, where nobody knows how many heads they hold."""
    say = f"{{{segment.name!r}: {{'role': '{segment.role}', 'heads': N}}}}"
    return TypeError(
        f"{who}: {segment.name} is to be cut by head, and how many heads its {segment.role} rows hold is not known; "
        + (f"pass the model too, and say it: blocks={say}" if model is None else f"say it: blocks={say}")
    )


def _few(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
