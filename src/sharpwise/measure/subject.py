"""What is measured: the checkpoints of a run, one after the other, or a model from a folder; and on which text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpwise.model_facts import max_context, vocabulary_of
from sharpwise.report.measure_text import PLACEHOLDERS, Study
from sharpwise.train.build import Built, build
from sharpwise.train.checkpoint import OtherVersion, read_checkpoint, saved_steps
from sharpwise.train.code import confirm_code
from sharpwise.train.config import Config, MeshConfig
from sharpwise.train.config_file import make_config, read_given
from sharpwise.train.data import Prepared, Tokens, open_tokens, window_starts
from sharpwise.train.environment import environment
from sharpwise.train.models import load_pretrained

LONGEST = 1024  # tokens of context, where nobody says
CONFIG = "config.toml"


@dataclass
class Subject:
    """A model that can be brought to each of the steps that it was saved at.

    Attributes:
        path: where it came from.
        model: as it is now; `at` changes it.
        steps: that it can be brought to, in order: of a run 0 and those of its checkpoints; (None,) for a plain model.
        tokens: the text that it is measured on, by default the validation part of the run's data; None without data.
        context: tokens of a window.
        built: of a run: everything that it was built from.
        text: what the text is: its source, description, size and hash.
    """

    path: Path
    model: nn.Module
    steps: tuple[int | None, ...]
    tokens: Tokens | None
    context: int
    built: Built | None = None
    text: Mapping[str, object] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, Any]:
        """Where, when, with what and on which text it is measured."""
        found = environment(self.built.config if self.built else Config())
        return {**found, "data": dict(self.text)} if self.text else found

    def at(self, step: int | None) -> nn.Module:
        """The model as it was after a step.

        Raises:
            ValueError: there is no readable checkpoint of that step, or it is of another model.
        """
        if step is None:
            return self.model
        assert self.built is not None
        saved = None if step == 0 else read_checkpoint(self.path / "checkpoints", step)
        state = _state(build(self.built.config) if saved is None else self.built)
        try:
            if saved is not None:
                state = saved.state_like(state)  # parts that several processes wrote are put together here
            self.model.load_state_dict(state["model"])
            self.built.optimizer.load_state_dict(state["optimizer"])
        except OtherVersion:
            raise
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"the checkpoint of step {step} is of another model: {error}") from error
        return self.model

    def batches(self, count: int, sequences: int, *, seed: int = 0) -> Iterator[Tensor]:
        """Windows at random places of the text, int64 [sequences, context + 1] each; the same for the same seed.

        Raises:
            ValueError: there is no text.
        """
        if self.tokens is None:
            raise ValueError(
                f"{self.path} is no run, so that it has no text: say --data FOLDER, from `sharpwise prepare`"
            )
        device = next(self.model.parameters()).device
        for step in range(1, count + 1):
            starts = window_starts(len(self.tokens), seed=seed, step=step, sequences=sequences, context=self.context)
            yield torch.from_numpy(self.tokens.windows(starts, self.context + 1)).to(device)


def open_subject(
    path: Path, *, data: Path | None = None, context: int | None = None, trust_code: bool = False
) -> Subject:
    """What there is to measure in a folder: a run, or a model as `save_pretrained` writes it.

    Args:
        path: of the run or model.
        data: text, from `sharpwise prepare`; by default the run's own.
        context: tokens of a window; by default the run's, or what the model takes, at most 1024.
        trust_code: the run may name code to import, `module:function` for its model, `module:class` for its optimizer.

    Raises:
        ValueError: it is neither, or the text does not fit the model.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a run's folder, or a model's with its config.json and weights")
    return _of_run(path, data, context, trust_code) if (path / CONFIG).is_file() else _of_model(path, data, context)


def _state(built: Built) -> dict[str, Any]:
    return {"model": built.model.state_dict(), "optimizer": built.optimizer.state_dict()}


def _of_run(path: Path, data: Path | None, context: int | None, trust_code: bool) -> Subject:
    try:
        config = make_config(read_given(path / CONFIG))
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} cannot be used: {error}") from None
    confirm_code([config], path / CONFIG, trust_code)
    built = build(replace(config, mesh=MeshConfig()))  # several processes may have trained; here is one
    text = built.data if data is None else _open(data, built.model)
    steps = (0, *saved_steps(path / "checkpoints"))
    return Subject(path, built.model, steps, text.validation, context or built.plan.context, built, text.about)


def _of_model(path: Path, data: Path | None, context: int | None) -> Subject:
    model = load_pretrained(path)
    longest = max_context(model)
    if context is not None and longest is not None and context > longest:
        raise ValueError(f"a context of {context} tokens is longer than the {longest} that the model takes")
    text = None if data is None else _open(data, model)
    tokens, about = (None, {}) if text is None else (text.validation, text.about)
    return Subject(path, model, (None,), tokens, context or min(longest or LONGEST, LONGEST), text=about)


def _open(data: Path, model: nn.Module) -> Prepared:
    found = open_tokens(data)
    size = vocabulary_of(model)
    if size is not None and found.vocabulary > size:
        raise ValueError(
            f"{data} has token ids up to {found.vocabulary - 1}, the model knows {size}: prepare the text with the "
            "model's own tokenizer (`sharpwise prepare ... --tokenizer FOLDER`)"
        )
    return found


def study_of(subject: Subject, data: Path | None) -> Study:
    """What a comparison has to be told to try what was measured: the run's model and data, or those that were given."""
    if subject.built is None:
        place = str(subject.path)
        return Study(place, str(data or PLACEHOLDERS.data), init_from=place)
    config = subject.built.config
    return Study(config.model.name, str(data or config.data.path), config.optimizer.name, config.model.init_from or "")


def check_followed(subject: Subject, step: int | None) -> None:
    """Raise ValueError where no training step follows: after a run's last, and of a model without an optimizer."""
    if subject.built is None or step is None:
        raise ValueError(f"{subject.path} is a model without an optimizer; updates are measured on the folder of a run")
    if step >= subject.built.plan.schedule.total:
        raise ValueError(f"step {step} is the last of the run, no update follows; name earlier ones with --at")


def chosen_steps(subject: Subject, wanted: str, *, followed: bool = False) -> Sequence[int | None]:
    """The steps that `--at` names: "all", "last", or numbers with commas.

    Args:
        followed: of those that the run takes another step after.

    Raises:
        ValueError: a step that was not saved, or that no other follows.
    """
    there = subject.steps
    if followed and subject.built is not None:
        there = tuple(s for s in there if s is not None and s < subject.built.plan.schedule.total)
    if subject.steps == (None,):
        if wanted not in ("all", "last"):
            raise ValueError(f"{subject.path} is a model without steps; --at is for the folder of a run")
        return subject.steps
    if wanted in ("all", "last"):
        return there if wanted == "all" else there[-1:]
    try:
        steps = [int(part) for part in wanted.replace(" ", "").split(",")]
    except ValueError:
        raise ValueError(f"--at: expected all, last or steps such as 0,100,200, got {wanted!r}") from None
    missing = [step for step in steps if step not in subject.steps]
    if missing:
        raise ValueError(
            f"{subject.path} has no checkpoint of step {missing[0]}; there are {', '.join(map(str, subject.steps))}. "
            "`--set checkpoint.milestones=[...]` keeps those that you name"
        )
    for step in steps if followed else ():
        check_followed(subject, step)
    return steps
