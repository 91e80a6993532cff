"""TensorBoard and Weights & Biases, for those who look at runs there. What counts is in `metrics.jsonl`."""

import importlib.util
from pathlib import Path
from typing import Any, Protocol

from sharpwise.installing import install_line, pip_install
from sharpwise.train.config import Config
from sharpwise.train.config_file import as_given
from sharpwise.train.steps import Step

EVERY = 10  # steps between points: a point costs more than a line of text


class Tracker(Protocol):
    """Where numbers of a run go besides its own files."""

    def add(self, values: dict[str, float], step: int) -> None:
        """Numbers by name, after a step."""

    def close(self) -> None:
        """Write what is left."""


def has_tensorboard() -> bool:
    """Whether event files can be written."""
    return importlib.util.find_spec("tensorboard") is not None


def check_trackers(config: Config) -> None:
    """Raise ImportError where the configuration asks for something that is not installed."""
    if config.log.tensorboard and not has_tensorboard():
        raise ImportError(f"log.tensorboard = true, and tensorboard is not installed: {install_line('train')}")
    if config.log.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ImportError(
                f"log.wandb = {config.log.wandb!r}, and wandb is not installed: {pip_install('wandb')}"
            ) from None


def make_trackers(config: Config, folder: Path, start: int) -> list[Tracker]:
    """Those that the configuration asks for, after `check_trackers`.

    Args:
        config: resolved.
        folder: of the run.
        start: steps that were taken already; later points of an earlier start no longer count.

    Raises:
        ValueError: Weights & Biases refuses, for instance without a login.
    """
    trackers: list[Tracker] = []
    if config.log.tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard", start))
    if config.log.wandb:
        trackers.append(WandB(config, folder))
    return trackers


class TensorBoard:
    """Event files. After a resume, points beyond its first step are purged by TensorBoard."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def add(self, values: dict[str, float], step: int) -> None:
        """Numbers by name, after a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases with the name of the folder; a resumed run goes on under the same id."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        name = folder.resolve().name
        try:
            self._run: Any = wandb.init(
                project=config.log.wandb, name=name, id=name, resume="allow", dir=str(folder), config=as_given(config)
            )
        except Exception as error:  # it has several kinds, for a missing login, a bad name, no network
            raise ValueError(f"log.wandb = {config.log.wandb!r}: {type(error).__name__}: {error}") from error

    def add(self, values: dict[str, float], step: int) -> None:
        """Numbers by name, after a step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


def points(step: Step, last: int) -> dict[str, float]:
    """What a step has to show, empty for most."""
    shown = step.step % EVERY == 0 or step.step in (1, last)
    if not shown and step.validation_loss is None and not step.notes:
        return {}
    values = {"loss/train": step.loss, "lr": step.lr, "tokens_per_second": step.tokens / step.step / step.seconds}
    if step.grad_norm is not None:
        values["grad_norm"] = step.grad_norm
    if step.validation_loss is not None:
        values["loss/validation"] = step.validation_loss
    for name, found in step.notes.items():
        values |= {f"{name}/{of}": value for of, value in found.items()}
    for role, multiplier in step.multipliers.items():
        layers = multiplier if isinstance(multiplier, list) else [multiplier]
        for i, value in enumerate(layers):
            values[f"multiplier/{role}" + (f"/{i}" if len(layers) > 1 else "")] = value
    return values
