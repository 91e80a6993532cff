"""From a configuration to what it names: data, model, optimizer and the plan of the run; and the rest of its values."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpwise.block_lr import make_block_lr
from sharpwise.blocks import BlockMap
from sharpwise.blocks.unclear import without_options
from sharpwise.engine import BlockOptimizer
from sharpwise.hints import nearest
from sharpwise.model_facts import enable_activation_checkpointing, logits_of, max_context, vocabulary_of
from sharpwise.train.code import names_class
from sharpwise.train.config import Config, steps_of
from sharpwise.train.config_file import as_flat
from sharpwise.train.data import Prepared, open_tokens, same_tokens
from sharpwise.train.data.manifest import MANIFEST
from sharpwise.train.environment import cpu_multiplies_bf16
from sharpwise.train.foreign import Foreign
from sharpwise.train.launch import Launch
from sharpwise.train.models import load_model, load_pretrained, tokenizer_of, usable_settings
from sharpwise.train.optimizer import build_optimizer
from sharpwise.train.schedule import Schedule
from sharpwise.train.steps import Plan, step_starts
from sharpwise.train.tracking import check_trackers, has_tensorboard
from sharpwise.train.world import ALONE, World

LONGEST = 1024  # tokens of context, where nobody says
EAGER_UP_TO = 1024  # tokens of context: where written-out attention is quicker than torch's fused one on a CPU
STEPS = 1000
_OWN = ("compute.threads", "log.tensorboard")  # which may differ from machine to machine


@dataclass(frozen=True)
class Built:
    """A run that is ready to start. `config` has a value for everything."""

    config: Config
    data: Prepared
    model: nn.Module
    optimizer: BlockOptimizer | Foreign
    plan: Plan
    forward: Callable[[Tensor], Any]


def build(config: Config, world: World = ALONE) -> Built:
    """Everything that a configuration names, the model with weights drawn from its seed.

    Sets torch's number of threads and, on CUDA, its choice of kernels. Several processes build the same model, each for
    itself, before its parameters are cut.

    Raises:
        ValueError: data, model and settings that do not fit each other.
        ImportError: something that is asked for is not installed.
    """
    config, data, model, plan = world.together(lambda: _build_here(config, world))
    blocks = None
    if world.size > 1:
        world.check_same("configuration", {k: v for k, v in as_flat(config).items() if k not in _OWN})
        world.check_same("model", _fingerprint(model))
        with without_options(config.model.init_from or config.model.name):
            blocks = BlockMap.of(model)  # of whole parameters
        world.distribute(model, plan.device)
    try:
        batches = probe_batches(config, data, plan)
        with without_options(config.model.init_from or config.model.name):
            optimizer = build_optimizer(config.optimizer, model, blocks, plan.schedule.total, batches)
    except TypeError as error:  # from its constructor, for values of another kind
        raise ValueError(f"the optimizer cannot be built: {error}") from error
    forward = torch.compile(model) if config.model.compile else model
    return Built(config, data, model, optimizer, plan, forward)


def _build_here(config: Config, world: World) -> tuple[Config, Prepared, nn.Module, Plan]:
    """The model on its device, or where it is still to be cut, on the CPU."""
    if world.size > 1 and names_class(config.optimizer.name):
        raise ValueError(
            f"optimizer.name: {config.optimizer.name} is of another library, and trains in one process here, not "
            f"{world.size}; take one of sharpwise's"
        )
    world.arrange(config.mesh, config.batch.sequences)
    data = _open(config.data.path)
    config = _on_this_machine(config, data, world)
    check_trackers(config)
    _set_up_torch(config)
    model = _build_model(config, data)
    config = _with_sizes(config, model, data)
    plan = _make_plan(config, world)
    if config.model.activation_checkpointing:
        enable_activation_checkpointing(model)
    place = plan.device if world.size == 1 else torch.device("cpu")
    model = _moved(model, place, bf16=config.compute.precision == "bf16")
    if vocabulary_of(model) is None:
        _try_out(model, config, plan, data, place)
    return config, data, model, plan


# --- what was left open ----------------------------------------------------------------------------------------------


def _on_this_machine(config: Config, data: Prepared, world: World) -> Config:
    compute, model = config.compute, config.model
    device = compute.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if world.size > 1 and device.startswith("cuda"):
        device = "cuda"  # and its number is that of the process
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"compute.device: got {device!r}, expected cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind not in ("cpu", "cuda") or (kind == "cuda" and (_device_of(device, world).index or 0) >= count):
        wanted = str(_device_of(device, world))
        raise ValueError(f"compute.device: {wanted!r} is not there; this machine has {_devices()}")
    native = torch.cuda.is_bf16_supported() if kind == "cuda" else cpu_multiplies_bf16()
    if config.data.sha256 not in (None, data.sha256):
        raise ValueError(
            f"the tokens in {data.folder} are not those that the run began with (data.sha256); prepare them as they "
            "were, or begin another run"
        )
    return replace(
        config,
        data=replace(config.data, sha256=data.sha256),
        model=replace(model, attention=model.attention or _attention(config, kind)),
        compute=replace(
            compute,
            device=device,
            precision=compute.precision or ("bf16-autocast" if native else "fp32"),
            threads=compute.threads or torch.get_num_threads(),
        ),
        log=replace(
            config.log,
            tensorboard=has_tensorboard() if config.log.tensorboard is None else config.log.tensorboard,
        ),
    )


def _device_of(text: str, world: World) -> torch.device:
    """Of several processes on one machine, each has its own GPU."""
    device = torch.device(text)
    if world.size > 1 and device.type == "cuda":
        return torch.device("cuda", Launch.of_environment().local_rank)
    return device


def _devices() -> str:
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return ", ".join(["cpu", *(f"cuda:{i}" for i in gpus)]) if gpus else "cpu only"


def _attention(config: Config, kind: str) -> str:
    # On a CPU the backward pass of the fused attention takes three times as long as the products themselves.
    return "eager" if kind == "cpu" and (config.data.context or 0) <= EAGER_UP_TO else "sdpa"


def _with_sizes(config: Config, model: nn.Module, data: Prepared) -> Config:
    """Context, steps and cadences, once the model is known."""
    most = max_context(model)
    context = config.data.context or data.context or min(most or LONGEST, LONGEST)
    if data.context not in (None, context):
        raise ValueError(
            f"data.context={context}, and {data.folder} holds examples that need {data.context}; leave it out"
        )
    if most is not None and context > most:
        raise ValueError(
            f"data.context={context} is longer than the model's {most} positions; take at most {most}, or another "
            "model (model.settings.context makes this one longer)"
        )
    for part, tokens in (("training", data.train), ("validation", data.validation)):
        if len(tokens) < context + 1:
            raise ValueError(
                f"the {part} part of {data.folder} has {len(tokens):,} tokens, and a context of {context} needs "
                f"{context + 1:,}; prepare more text, or a larger share for validation"
            )
    batch, schedule = config.batch, config.schedule
    per_step = batch.sequences * context
    fits = STEPS if schedule.tokens is None else schedule.tokens // per_step
    steps = fits if schedule.steps is None else schedule.steps
    if schedule.tokens is not None and steps != fits:
        raise ValueError(
            f"the budget is given twice and differs: schedule.steps={steps}, and schedule.tokens={schedule.tokens} "
            f"are {fits} steps of {per_step} tokens; give one of them"
        )
    if steps < 1:
        raise ValueError(f"schedule.tokens={schedule.tokens} is less than one step of {per_step} tokens")
    return replace(
        config,
        data=replace(config.data, context=context),
        batch=replace(batch, micro=batch.micro or batch.sequences),
        schedule=replace(schedule, steps=steps),
        validation=replace(config.validation, every=validation_every(config.validation.every, steps)),
        log=replace(config.log, diagnostics=_part(config.log.diagnostics, steps, 50)),
        checkpoint=replace(config.checkpoint, every=_part(config.checkpoint.every, steps, 10)),
    )


def validation_every(given: int | None, steps: int) -> int:
    """Steps from one validation to the next in a run of so many: as given, or else a twentieth of them."""
    return _part(given, steps, 20)


def _part(given: int | None, steps: int, parts: int) -> int:
    return max(1, math.ceil(steps / parts)) if given is None else given


def _make_plan(config: Config, world: World) -> Plan:
    schedule, batch = config.schedule, config.batch
    assert schedule.steps and batch.micro and config.data.context and config.optimizer.lr is not None
    assert config.validation.every is not None and config.log.diagnostics is not None and config.compute.device
    kind: Any = schedule.kind
    warmup = steps_of(schedule.warmup, schedule.steps)
    decay = steps_of(schedule.decay, schedule.steps) if kind == "wsd" else 0
    return Plan(
        schedule=Schedule(kind, schedule.steps, warmup, schedule.floor, decay),
        peak=config.optimizer.lr,
        sequences=batch.sequences,
        micro=batch.micro,
        context=config.data.context,
        seed=config.seed,
        device=_device_of(config.compute.device, world),
        autocast=config.compute.precision == "bf16-autocast",
        validation_every=config.validation.every,
        validation_sequences=config.validation.sequences,
        diagnostics_every=config.log.diagnostics,
        world=world,
    )


# --- parts -----------------------------------------------------------------------------------------------------------


def _set_up_torch(config: Config) -> None:
    assert config.compute.threads and config.compute.device
    torch.set_num_threads(config.compute.threads)
    if config.compute.deterministic and config.compute.device.startswith("cuda"):
        import os

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _open(path: str) -> Prepared:
    try:
        return open_tokens(path)
    except ValueError as error:
        folder = Path(path)
        places = {folder.parent, folder.parent / "data"}
        there = [str(found.parent) for place in places for found in place.glob(f"*/{MANIFEST}")]
        near = "" if folder.exists() else nearest(path, there) or nearest(str(folder.parent / "data" / folder), there)
        raise ValueError(f"{error}{near}") from error


def _build_model(config: Config, data: Prepared) -> nn.Module:
    """The model on the CPU, so that its weights do not depend on the device."""
    own = config.model
    settings: dict[str, Any] = {"vocab_size": data.vocabulary, "attn_implementation": own.attention}
    torch.manual_seed(config.seed)
    if own.init_from:
        model = load_pretrained(own.init_from, settings={"attn_implementation": own.attention, **own.settings})
        tokenizer = tokenizer_of(own.init_from)
        if tokenizer is not None and not same_tokens(tokenizer, data.tokenizer()):
            raise ValueError(
                f"the tokenizer in {own.init_from} is not that of the tokens in {data.folder}; prepare the text with "
                f"--tokenizer {own.init_from}"
            )
    else:
        model = load_model(own.name, settings={**usable_settings(own.name, settings), **own.settings})
    size = vocabulary_of(model)
    if size is not None and size < data.vocabulary:
        raise ValueError(
            f"the model has a vocabulary of {size:,}, and the tokens in {data.folder} have one of {data.vocabulary:,}: "
            "leave out model.settings.vocab_size, or prepare the text with the model's tokenizer"
        )
    if hasattr(getattr(model, "config", None), "use_cache"):
        model.config.use_cache = False  # type: ignore[union-attr]  # of keys and values: for generating only
    return model


def _moved(model: nn.Module, device: torch.device, *, bf16: bool) -> nn.Module:
    if not bf16:
        return model.to(device)
    # The rotations of Hugging Face models stay exact, as `from_pretrained` has them: in bf16 far positions are wrong.
    exact = dict(model.named_buffers()) if vocabulary_of(model) is not None else {}
    kept = {name: buffer.clone() for name, buffer in exact.items() if buffer.is_floating_point()}
    model = model.to(device, torch.bfloat16)
    for name, buffer in kept.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer.to(device))
    return model


def _fingerprint(model: nn.Module) -> dict[str, str]:
    """Of every tensor its kind, and a sum of its bytes, which is the same on all machines."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: f"{tuple(tensor.shape)} {tensor.dtype} {int(tensor.view(words[tensor.element_size()]).sum())}"
        for name, tensor in model.state_dict().items()
    }


@torch.no_grad()
def _try_out(model: nn.Module, config: Config, plan: Plan, data: Prepared, place: torch.device) -> None:
    """Show one window to a model without a config to ask. Raises ValueError for one that fails on it."""
    name, highest = config.model.name, data.vocabulary - 1
    # On a GPU a token that is too high would end the process: there the width of the logits has to do.
    tokens = torch.full((1, plan.context), highest if place.type == "cpu" else 0, device=place)
    was = model.training
    model.eval()
    try:
        with torch.autocast(place.type, torch.bfloat16, enabled=plan.autocast):
            found = logits_of(model(tokens), tokens).shape[-1]
    except Exception as error:
        raise ValueError(
            f"{name}: the model fails on a window of {plan.context} tokens, the highest of which is {highest}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(was)
    if found < data.vocabulary:
        raise ValueError(
            f"{name}: the model gives logits for {found:,} tokens, and the tokens in {data.folder} have a vocabulary "
            f"of {data.vocabulary:,}; give the function a parameter vocab_size, or set it"
        )


def probe_batches(config: Config, data: Prepared, plan: Plan) -> list[Tensor] | None:
    """What a block_lr that probes the model does so on: as many training windows as a step has, always the same."""
    block_lr = make_block_lr(config.optimizer.block_lr or None)
    if block_lr is None or not any(source.probed for source in block_lr.sources):
        return None
    starts = step_starts(data.train, plan, 0)  # the steps of a run are counted from 1
    return list(torch.from_numpy(data.train.windows(starts, plan.context + 1)).split(plan.micro))
