"""The configuration of a run: one TOML file, `a.b=c` on top of it, checked as a whole before anything starts.

A field that is None is worked out when the run is built (`sharpwise.train.build`) and written down with the others:
the `config.toml` of a run holds every value that it used.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sharpwise.block_lr.spelling import make_block_lr
from sharpwise.groups import check_settings
from sharpwise.hints import nearest


def _with_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Args:
        name: a preset, a folder or `.json` file with a Hugging Face config, or `module:function`.
        init_from: a folder with weights (or a run) to start from, "" for random weights; its config is the model's.
        settings: fields of the Hugging Face config to override, or arguments of the function.
        attention: "eager" or "sdpa"; None takes what is quicker (written out on CPU, where the backward pass of the
            fused kernel is slow, fused elsewhere).
        compile: `torch.compile` the model.
        activation_checkpointing: recompute activations in the backward pass, for memory.
    """

    name: str = "gpt2-0.4m"
    init_from: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    compile: bool = False
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on.

    Args:
        path: a folder that `sharpwise prepare` or `sharpwise.train.data.write_examples` wrote.
        context: tokens that the model sees at once; None takes what the model allows, at most 1024, and of examples
            their length less 1.
        sha256: of the prepared data, filled in; a run does not go on with other data.
    """

    path: str = "data/stdlib"
    context: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class BatchConfig:
    """How many windows of `data.context` tokens.

    Args:
        sequences: per optimizer step.
        micro: per forward and backward pass of a process, a divisor of `sequences`; None takes all at once. It does
            not change which windows a step sees.
    """

    sequences: int = 16
    micro: int | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer; further keys of the table are arguments of its constructor, such as `betas` or `storage`.

    Args:
        name: one of `sharpwise.list_optimizers()`; where it is read from, also with a block_lr: "adamw+blockwise". Or
            `module:class`, an optimizer of another library (`sharpwise.train.foreign`).
        lr: peak of the schedule; None takes the constructor's default. A class of another library needs one.
        block_lr: a spelling as `sharpwise.make_block_lr` reads it, or a table with `name` and its arguments, "" for
            none.
        max_grad_norm: clip the global norm to this; 0 does not clip.
        on_nonfinite: a loss or gradient that is not finite: "raise" ends the run at that step, before any weight
            changes; "skip" leaves the step out and goes on.
        settings_of: settings that some parameters have instead, as `sharpwise.param_groups` takes them: a table by
            block type, role, glob on names or "bias", such as `Emb = {weight_decay = 0.0}`.
        options: the further keys.
    """

    name: str = "adamw"
    lr: float | None = None
    block_lr: str | dict[str, Any] = ""
    max_grad_norm: float = 1.0
    on_nonfinite: Literal["raise", "skip"] = "raise"
    settings_of: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as a constructor takes them."""
        return _with_tuples(self.options)

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """What `sharpwise.param_groups` makes groups of, {} for none."""
        return {key: _with_tuples(settings) for key, settings in self.settings_of.items()}

    def check_groups(self, allowed: Collection[str]) -> None:
        """Raise ValueError for a setting of some parameters that the groups of the optimizer do not have."""
        for key, settings in self.settings_of.items():
            for name in settings:
                if name not in allowed:
                    raise ValueError(
                        f"optimizer.settings_of: {key!r} has {name!r}{nearest(name, allowed)}; the groups of "
                        f"{self.name} may differ in {', '.join(allowed)}"
                    )


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and the learning rate on the way (`sharpwise.train.schedule`).

    Args:
        kind: "cosine", "linear", "wsd" (constant, then linear) or "constant".
        steps: optimizer steps; None takes what fits into `tokens`, and 1000 where that is not given either.
        tokens: budget of the run.
        warmup: steps of linear warm-up, or below 1 a fraction of all steps.
        floor: what is left of the peak at the end, a fraction.
        decay: of "wsd": steps, or below 1 the fraction of all steps, in which it falls.
    """

    kind: str = "cosine"
    steps: int | None = None
    tokens: int | None = None
    warmup: float = 0.1
    floor: float = 0.1
    decay: float = 0.2


@dataclass(frozen=True)
class ComputeConfig:
    """On what, and how exactly.

    Args:
        device: "cpu", "cuda", "cuda:1"; None takes a GPU if there is one. Of several processes each takes the GPU of
            its rank on its machine.
        precision: "fp32", "bf16-autocast" (weights and state stay fp32) or "bf16" (weights too); None takes
            bf16-autocast where the device multiplies bf16 natively.
        threads: of torch on CPU, per process; None takes what torch chose. Results depend on it in the last bits.
        deterministic: ask CUDA for repeatable kernels; without effect on CPU, whose kernels are.
    """

    device: str | None = None
    precision: str | None = None
    threads: int | None = None
    deterministic: bool = True


@dataclass(frozen=True)
class MeshConfig:
    """How several processes, started by torchrun, share the work; what a step computes stays the same.

    The processes that `fsdp` and `tp` leave over hold replicas, each with its share of the batch.

    Args:
        fsdp: processes over which FSDP2 cuts parameters, gradients and optimizer state; 1 cuts nothing, 0 takes all
            that are left.
        tp: processes over which tensor parallelism cuts the matrices of a layer, for models that have a plan for it.
    """

    fsdp: int = 1
    tp: int = 1


@dataclass(frozen=True)
class ValidationConfig:
    """The validation loss, always on the same windows.

    Args:
        every: steps from one to the next; the last step has one too. None takes a twentieth of the run, 0 none at all
            but at the end.
        sequences: windows, evenly spaced over the validation tokens.
    """

    every: int | None = None
    sequences: int = 128


@dataclass(frozen=True)
class LogConfig:
    """What is written down; losses, learning rate and gradient norm are at every step, whatever is said here.

    Args:
        diagnostics: steps between measurements of update sizes and multipliers per role; None takes a fiftieth of the
            run, 0 none.
        tensorboard: write event files too; None does where tensorboard is installed.
        wandb: project of Weights & Biases to report to, "" for none.
    """

    diagnostics: int | None = None
    tensorboard: bool | None = None
    wandb: str = ""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run that was stopped goes on from.

    Args:
        every: steps between checkpoints; None takes a tenth of the run, at least one step; 0 writes none but the last.
        keep: how many of the latest stay.
        milestones: steps, or below 1 fractions of the run, after which there is one that stays whatever comes later.
        best: also keep the one with the lowest validation loss, and write one whenever it falls.
        asynchronous: write while training goes on, from a copy.
    """

    every: int | None = None
    keep: int = 2
    milestones: list[Any] = field(default_factory=list)
    best: bool = False
    asynchronous: bool = True

    def steps_of_milestones(self, total: int) -> frozenset[int]:
        """The milestones of a run of `total` steps, as steps."""
        return frozenset(max(1, round(at * total)) if at < 1 else round(at) for at in self.milestones)


@dataclass(frozen=True)
class Config:
    """A whole run; see the tables. `seed` is that of the weights, of the order of the data and of dropout."""

    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    validation: ValidationConfig = ValidationConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


# --- checking --------------------------------------------------------------------------------------------------------

ATTENTIONS = ("eager", "sdpa")
PRECISIONS = ("fp32", "bf16-autocast", "bf16")


def check(config: Config) -> None:
    """Raise ValueError for a value out of its range, as far as that shows without the model and the data."""
    batch, schedule = config.batch, config.schedule
    _at_least(1, "batch.sequences", batch.sequences)
    _at_least(1, "batch.micro", batch.micro)
    if batch.micro is not None and batch.sequences % batch.micro:
        raise ValueError(
            f"batch.micro={batch.micro} does not divide batch.sequences={batch.sequences}; "
            f"divisors are {', '.join(str(n) for n in range(1, batch.sequences + 1) if batch.sequences % n == 0)}"
        )
    _at_least(1, "data.context", config.data.context)
    _at_least(0, "seed", config.seed)
    _at_least(1, "schedule.steps", schedule.steps)
    _at_least(1, "schedule.tokens", schedule.tokens)
    for key in ("warmup", "decay"):
        if not 0 <= getattr(schedule, key) < math.inf:
            raise ValueError(f"schedule.{key}: steps, or a fraction below 1, got {getattr(schedule, key)}")
    for where, value, allowed in (
        ("model.attention", config.model.attention, ATTENTIONS),
        ("compute.precision", config.compute.precision, PRECISIONS),
    ):
        if value is not None and value not in allowed:
            raise ValueError(f"{where}: got {value!r}{nearest(value, allowed)}, allowed: {', '.join(allowed)}")
    _at_least(1, "compute.threads", config.compute.threads)
    _at_least(0, "mesh.fsdp", config.mesh.fsdp)
    _at_least(1, "mesh.tp", config.mesh.tp)
    _at_least(0, "validation.every", config.validation.every)
    _at_least(1, "validation.sequences", config.validation.sequences)
    _at_least(0, "log.diagnostics", config.log.diagnostics)
    _at_least(0, "checkpoint.every", config.checkpoint.every)
    _at_least(1, "checkpoint.keep", config.checkpoint.keep)
    for at in config.checkpoint.milestones:
        if isinstance(at, bool) or not isinstance(at, (int, float)) or not 0 < at < math.inf or (at > 1 and at % 1):
            raise ValueError(f"checkpoint.milestones: steps, or fractions below 1, got {at!r}")
    optimizer = config.optimizer
    _at_least(0.0, "optimizer.max_grad_norm", optimizer.max_grad_norm)
    _at_least(0.0, "optimizer.lr", optimizer.lr)
    spelled_block_lr(optimizer.block_lr)
    _check_settings_of(optimizer.settings_of)


def _check_settings_of(given: Mapping[str, Any]) -> None:
    if not given:
        return
    try:
        check_settings(given, "optimizer.settings_of")
    except TypeError as error:
        raise ValueError(str(error)) from None
    if rated := [key for key, own in given.items() if "lr" in own]:
        raise ValueError(
            f"optimizer.settings_of: {rated[0]!r} has an lr, and the schedule sets that of all parameters; take "
            f"optimizer.block_lr, such as 'per_role(ratios={{{rated[0]}: 2}})'"
        )


def spelled_block_lr(given: str | Mapping[str, Any]) -> str:
    """The canonical spelling of a block_lr, "" for none. Raises ValueError for what is none."""
    if given == "":
        return ""
    try:
        return str(make_block_lr(given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.block_lr: {error}") from None


def _at_least(least: float, where: str, value: float | None) -> None:
    if value is not None and not (least <= value < math.inf):
        raise ValueError(f"{where} must be at least {least}, got {value}")
    if value is not None and value >= 2**63:
        raise ValueError(f"{where} must be below 2^63, got {value!s:.40}")


def steps_of(value: float, total: int) -> int:
    """Steps that are given as such, or below 1 as a fraction of `total`."""
    return round(value * total) if value < 1 else int(value)
