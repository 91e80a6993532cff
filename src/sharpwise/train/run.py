"""A run from its configuration to its end: begin or go on, write down every step, save, stop well."""

import errno
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from sharpwise.files import write_whole
from sharpwise.model_facts import count_parameters
from sharpwise.probes.callbacks import Probes
from sharpwise.train.build import Built, build
from sharpwise.train.checkpoint import Checkpoint, Checkpoints, OtherVersion
from sharpwise.train.code import confirm_code
from sharpwise.train.config import Config
from sharpwise.train.config_file import Given, differences, flat, make_config, taking_over
from sharpwise.train.diagnostics import explained
from sharpwise.train.environment import environment, peak_memory
from sharpwise.train.final import save_final
from sharpwise.train.folder import Bystander, RunFolder, changed_lines, read_starts
from sharpwise.train.launch import joined
from sharpwise.train.optimizer import as_code
from sharpwise.train.steps import Step, step_starts, train_steps
from sharpwise.train.tracking import Tracker, make_trackers, points
from sharpwise.train.world import World, is_everywhere, is_marked, mark

logger = logging.getLogger("sharpwise.train")

_LOSS = (float, type(None))
_NOTES = {
    "validation_loss": _LOSS, "last_validation_loss": _LOSS, "best_loss": _LOSS, "metrics_bytes": (int,),
    "timing_bytes": (int,), "probes": (dict,),
}  # fmt: skip
"""What a run notes in its checkpoints."""

_OUT_OF_MEMORY = (
    "{} has not enough memory for windows of this size, {} at a time. In another folder: a smaller batch.micro, "
    "model.activation_checkpointing = true, or a shorter data.context"
)


class Diverged(FloatingPointError):
    """The loss or a gradient was not finite; the weights are as they were before that step."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `run` ended. `validation_loss` is the last one that was measured, nats per token."""

    folder: Path
    state: Literal["finished", "interrupted"]
    step: int
    steps: int
    validation_loss: float | None
    message: str


@dataclass(frozen=True)
class Start:
    """What a run says before its first step: where it begins, and the facts that `facts.json` holds."""

    folder: Path
    config: Config
    step: int
    facts: Mapping[str, Any]


def run(
    given: Given | None,
    folder: Path,
    *,
    trust_code: bool = False,
    on_start: Callable[[Start], object] = lambda start: None,
    on_step: Callable[[Step], object] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train in `folder`: begin, or go on with what is there. What comes out is the same, however often it was stopped.

    Where several processes were launched, as by torchrun, each calls this with the same arguments, and they train
    together: every one takes its share of each batch, rank 0 reads and writes the folder.

    Args:
        given: the configuration as TOML gives it; None goes on with the stored one.
        folder: of the run, made if need be.
        trust_code: the stored configuration may name code to import, `module:function` for the model, `module:class`
            for the optimizer; one in `given` may in any case.
        on_start: called once on rank 0, before the first step.
        on_step: called after each, on rank 0.
        should_stop: asked after each step, on every rank; if one of them says so, the run saves and ends, to be gone
            on with.

    Raises:
        ValueError: a configuration that cannot be run, or differs from that of the run in the folder.
        Diverged: under `optimizer.on_nonfinite = "raise"`.
        OSError: the disk is full, or cannot be written; other processes do not answer. The last checkpoint is intact.
    """
    with joined() as world:
        world.check_same("configuration", {"the configuration": "that of the folder"} if given is None else flat(given))
        place = world.on_main(lambda: RunFolder(folder)) or Bystander(folder)
        try:
            config, finished = world.from_main(lambda: _agree(place, given, world, trust_code))
            if finished is not None:
                return finished
            built = build(config, world)
            world.on_main(lambda: _begin(place, built))
            return _Run(place, built).go(on_start, on_step, should_stop)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            full = OSError(
                error.errno,
                f"the disk is full ({folder}); make room and start the run again: it goes on from its last checkpoint",
            )
            raise (mark(full, everywhere=is_everywhere(error)) if is_marked(error) else full) from error
        finally:
            place.close()


def _agree(place: RunFolder, given: Given | None, world: World, trust_code: bool) -> tuple[Config, Outcome | None]:
    """The configuration to run, and how the run has ended if it has."""
    config = _config(place, given)
    starts = read_starts(place.path)
    others = bool(starts) and starts[-1].get("processes", 1) != world.size
    if others and (given is None or "threads" not in given.get("compute", {})):
        # So many threads were for so many processes.
        config = replace(config, compute=replace(config.compute, threads=None))
    finished = _finished(place, config)
    if given is None and finished is None:
        confirm_code([config], place.path / "config.toml", trust_code)
    return config, finished


def _config(place: RunFolder, given: Given | None) -> Config:
    """The stored configuration if there is one, which `given` must not contradict."""
    stored = place.read_config()
    if stored is None:
        if given is None:
            raise ValueError(f"{place.path} holds no run to go on with; say what to train: --model, --data, --set ...")
        return make_config(given)
    if given is None:
        return stored
    wanted = make_config(given)
    if not place.has_begun:  # it failed before its first step, perhaps for want of another setting
        return wanted
    if lines := differences(stored, wanted):
        raise ValueError(
            f"{place.path} holds a run with another configuration:\n  "
            + "\n  ".join(lines)
            + "\nName another folder with --out, or leave out what differs to go on with that run"
        )
    return taking_over(stored, wanted)


def _begin(place: RunFolder, built: Built) -> None:
    place.write_config(built.config)
    write_whole(place.path / "blocks.json", built.optimizer.blocks.to_json())


def _finished(place: RunFolder, config: Config) -> Outcome | None:
    status = place.read_json("status.json")
    if not isinstance(status, dict) or status.get("state") != "finished" or not place.final.exists():
        return None
    steps = config.schedule.steps or 0
    loss = status.get("validation_loss")
    return Outcome(
        place.path, "finished", steps, steps, loss if isinstance(loss, float) else None, "it had finished already"
    )


class _Run:
    """One process at work in a run's folder."""

    def __init__(self, place: RunFolder, built: Built) -> None:
        self.place, self.built, self.config, self.plan = place, built, built.config, built.plan
        self.world = built.plan.world
        own = self.config.checkpoint
        self.checkpoints = Checkpoints(
            place.checkpoints,
            keep=own.keep,
            milestones=own.steps_of_milestones(self.plan.schedule.total),
            best=own.best,
            asynchronous=own.asynchronous,
            check=partial(changed_lines, place.path),
            notes=_NOTES,
            world=self.world,
        )
        every = self.plan.diagnostics_every
        self.probes = Probes(
            built.model, built.optimizer, built.optimizer.blocks, sequences=self.plan.sequences,
            tokens=self.plan.tokens_per_step, updates_every=every, noise_every=every, sharpness_every=every,
            last=self.plan.schedule.total, micro_batches=self.world.size == 1,
        )  # fmt: skip
        self.start = self.at = 0
        self.validation_loss: float | None = None
        self.best_loss: float | None = None
        found = self.checkpoints.latest()
        sizes = (0, 0) if found is None else self._restore(found)
        self.metrics = place.lines("metrics.jsonl", sizes[0])
        try:
            self.timing = place.lines("timing.jsonl", sizes[1])
        except OSError:
            self.metrics.close()
            raise

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _restore(self, found: Checkpoint) -> tuple[int, int]:
        try:
            state = found.state_like(self._state(), self.world)
            self.built.model.load_state_dict(state["model"])
            self.built.optimizer.load_state_dict(state["optimizer"])
            self.probes.load_state_dict(found.about["probes"])
        except OtherVersion:
            raise
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{found.path} does not fit the model as it is now; was the code changed that builds it? {error}"
            ) from error
        self.start = self.at = found.step
        self.validation_loss, self.best_loss = found.about["last_validation_loss"], found.about["best_loss"]
        return found.about["metrics_bytes"], found.about["timing_bytes"]

    def _save(self, step: Step) -> None:
        about = {
            "validation_loss": self.validation_loss if step.validation_loss is not None else None,
            "last_validation_loss": self.validation_loss,
            "best_loss": self.best_loss,
            "metrics_bytes": self.metrics.sync(),
            "timing_bytes": self.timing.sync(),
            "probes": self.probes.state_dict(),
        }
        self.checkpoints.save(step.step, self._state(), about)

    def _state(self) -> dict[str, Any]:
        return {"model": self.built.model.state_dict(), "optimizer": self.built.optimizer.state_dict()}

    # -- training --------------------------------------------------------------------------------------------------

    def go(
        self,
        on_start: Callable[[Start], object],
        on_step: Callable[[Step], object],
        should_stop: Callable[[], bool],
    ) -> Outcome:
        """Train to the end, or until told to stop."""
        try:
            with ExitStack() as opened:
                for part in (self.metrics, self.timing, self.checkpoints):
                    opened.callback(part.close)
                self.place.clear_status()
                self._write_facts()
                self.place.add_start({"step": self.start + 1, **environment(self.config), **self.world.about()})
                trackers = self.world.on_main(lambda: make_trackers(self.config, self.place.path, self.start)) or []
                for tracker in trackers:
                    opened.callback(tracker.close)
                if self.world.is_main:
                    on_start(Start(self.place.path, self.config, self.start, self.facts))
                return self._end(self._train(trackers, on_step, should_stop))
        except OSError as error:
            self._note("failed", str(error))
            raise
        except (RuntimeError, MemoryError) as error:
            explained = self.world.explained(error)
            self._note("failed", f"{type(explained).__name__}: {explained}")
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
                raise ValueError(_OUT_OF_MEMORY.format(self.plan.device, self.plan.micro)) from error
            if explained is error:
                raise
            raise explained from error

    def _train(
        self, trackers: list[Tracker], on_step: Callable[[Step], object], should_stop: Callable[[], bool]
    ) -> bool:
        """Whether it was told to stop."""
        built, plan = self.built, self.plan
        data = built.data
        steps = train_steps(
            built.model,
            built.optimizer,
            data.train,
            data.validation,
            plan,
            start=self.start,
            forward=built.forward,
            probes=self.probes,
        )
        with closing(steps):
            for step in steps:
                if self.config.optimizer.on_nonfinite == "raise":
                    self._check(step)
                self._write(step)
                self.at = step.step
                if self.facts["state_bytes"] is None:  # it is allocated in a step
                    self._write_facts()
                if shown := points(step, plan.schedule.total):
                    for tracker in trackers:
                        tracker.add(shown, step.step)
                if self.world.is_main:
                    on_step(step)
                stopped = step.step < plan.schedule.total and self.world.any(should_stop())
                if stopped or self._is_due(step):
                    self._save(step)
                if stopped:
                    return True
        return False

    def _is_due(self, step: Step) -> bool:
        own = self.config.checkpoint
        assert own.every is not None
        due = self.plan.due(own.every, step.step) or step.step in self.checkpoints.milestones
        return due or (own.best and self._is_best(step))

    def _is_best(self, step: Step) -> bool:
        return step.validation_loss is not None and step.validation_loss == self.best_loss

    def _write(self, step: Step) -> None:
        line: dict[str, Any] = {"step": step.step, "tokens": step.tokens, "loss": step.loss, "lr": step.lr}
        line["grad_norm"] = step.grad_norm
        if not step.finite:
            line["skipped"] = True
        if step.validation_loss is not None:
            line["validation_loss"] = step.validation_loss
            self.validation_loss = step.validation_loss if math.isfinite(step.validation_loss) else None
            if self.validation_loss is None:
                logger.warning("step %d: the validation loss is not finite", step.step)
            elif self.best_loss is None or self.validation_loss < self.best_loss:
                self.best_loss = self.validation_loss
        line |= ({"multipliers": step.multipliers} if step.multipliers else {}) | step.notes
        self.metrics.write(line)
        self.timing.write(
            {
                "step": step.step,
                "seconds": round(step.seconds, 6),
                "optimizer_seconds": step.optimizer_seconds and round(step.optimizer_seconds, 6),
                "memory": peak_memory(self.plan.device),
            }
        )

    def _check(self, step: Step) -> None:
        """Raise Diverged where a loss or the gradient is not finite."""
        if step.finite and (step.validation_loss is None or math.isfinite(step.validation_loss)):
            return
        what = "the validation loss after it" if step.finite else "a gradient"
        if not math.isfinite(step.loss):
            what = "the loss"
        starts = step_starts(self.built.data.train, self.plan, step.step)
        windows = ", ".join("{}:{}".format(*self.built.data.train.where(int(start))) for start in starts[:4])
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        good = f"{self.place.checkpoints / f'step-{steps[-1]:08d}'}" if steps else "none"
        message = (
            f"step {step.step}: {what} is not finite (loss {step.loss}, gradient norm {step.grad_norm}, "
            f"lr {step.lr:g}). Its {len(starts)} windows of {self.plan.context} tokens begin at {windows}"
            f"{', ...' if len(starts) > 4 else ''} (seed {self.plan.seed}). Last good checkpoint: {good}. To leave "
            "such steps out: --set optimizer.on_nonfinite=skip"
        )
        self.place.set_status("diverged", step.step, message)
        raise mark(Diverged(message), everywhere=True)

    def _note(self, state: str, message: str) -> None:
        try:
            self.place.set_status(state, self.at, message)
        except OSError:  # the disk is full
            logger.warning("could not note that the run %s: %s", state, message)

    def _end(self, stopped: bool) -> Outcome:
        """Save what is left to save, and say how it ended."""
        at, total = self.at, self.plan.schedule.total
        self.checkpoints.wait()
        if stopped:
            state: Literal["finished", "interrupted"] = "interrupted"
            message = f"stopped after step {at} of {total}; the same command goes on from there"
        else:
            state, message = "finished", f"{total} steps done"
            save_final(self.place, self.built)
        self.place.write_json(
            "status.json",
            {"state": state, "step": at, "message": message, "validation_loss": self.validation_loss},
        )
        return Outcome(self.place.path, state, at, total, self.validation_loss, message)

    def _write_facts(self) -> None:
        built, plan = self.built, self.plan
        parameters, without_embedding = count_parameters(built.model)
        self.facts = {
            "parameters": parameters,
            "non_embedding_parameters": without_embedding,
            "vocabulary": built.data.vocabulary,
            "context": plan.context,
            "tokens_per_step": plan.tokens_per_step,
            "steps": plan.schedule.total,
            "state_bytes": built.optimizer.state_bytes(),
            "data": built.data.about,
            "optimizer": as_code(self.config.optimizer, self.config.schedule.steps),
            "explained": explained(built.optimizer),
        }
        self.place.write_json("facts.json", self.facts)
