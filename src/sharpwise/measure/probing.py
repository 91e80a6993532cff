"""The probes, each on a subject at one of its steps."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from sharpwise import probes
from sharpwise.measure.subject import Subject, check_followed
from sharpwise.probes import Measurement
from sharpwise.probes.noise_scale import NoiseScale, gradients_of
from sharpwise.probes.spectrum import spectrum
from sharpwise.probes.update_size import UpdateSize
from sharpwise.train.data import Tokens
from sharpwise.train.steps import token_loss, train_steps

OF_HESSIAN = ("trace", "eigenvalues", "density", "frobenius", "norm_11", "diagonal")


@dataclass(frozen=True)
class Text:
    """How much text: so many batches of so many windows, at most `micro` at a time, drawn by `seed`."""

    batches: int = 8
    sequences: int = 8
    micro: int | None = None
    seed: int = 0

    def of(self, subject: Subject) -> Any:
        """The batches."""
        return subject.batches(self.batches, self.sequences, seed=self.seed)


def sharpness(
    subject: Subject,
    step: int | None,
    text: Text,
    *,
    labels: Literal["sampled", "true"] = "sampled",
    unit: Literal["token", "sequence"] = "token",
    rtol: float | None = None,
) -> list[Measurement]:
    """Fisher sharpness at a step."""
    model = subject.at(step)
    found = probes.sharpness(
        model, text.of(subject), labels=labels, unit=unit, micro=text.micro, rtol=rtol, seed=text.seed
    )
    return [found.at(step)]


def hessian(
    subject: Subject,
    step: int | None,
    text: Text,
    *,
    what: tuple[str, ...] = ("trace", "eigenvalues"),
    kind: Literal["hessian", "gauss-newton"] = "hessian",
    select: tuple[str, ...] = (),
    samples: int | None = None,
    rtol: float | None = None,
) -> list[Measurement]:
    """Of the Hessian or Gauss-Newton matrix of the mean loss over the text at a step: what is asked for.

    `samples` are random vectors, of which eigenvalues need none; None leaves their number to each probe.

    Raises:
        ValueError: for something that is not offered.
    """
    unknown = [name for name in what if name not in OF_HESSIAN]
    if unknown:
        raise ValueError(f"--what: {unknown[0]!r} is not offered; there is {', '.join(OF_HESSIAN)}")
    model = subject.at(step)
    matrix = probes.Curvature(model, list(text.of(subject)), kind=kind, select=list(select) or None, micro=text.micro)
    options: dict[str, Any] = {} if rtol is None else {"rtol": rtol}
    drawn = {} if samples is None else {"samples": samples}
    with matrix.kept():
        found = [
            getattr(probes, name)(matrix, seed=text.seed, **options, **(drawn if name != "eigenvalues" else {}))
            for name in what
        ]
    found = [one.at(step) for one in found]
    for one in found:
        one.probe += _of(kind, select)
    return found


def _of(kind: str, select: tuple[str, ...]) -> str:
    """So that what is of another matrix has another name, and does not take the other's place in the results."""
    about = ([] if kind == "hessian" else [kind]) + list(select)
    return f" ({', '.join(about)})" if about else ""


def spectra(subject: Subject, step: int | None, *, select: tuple[str, ...] = ()) -> list[Measurement]:
    """Spectra of all matrices at a step, with their eigenvalues."""
    return [spectrum(subject.at(step), select=list(select) or None, eigenvalues=True).at(step)]


def updates(subject: Subject, step: int | None, text: Text) -> list[Measurement]:
    """What the run's next training step does from a checkpoint: sizes and RRC of its updates, noise of its gradients.

    The step that a run takes after its last has no learning rate in its schedule: ask for an earlier one.

    Raises:
        ValueError: the subject is no run, the step its last, or a batch has a single window.
    """
    check_followed(subject, step)
    built = subject.built
    assert built is not None and step is not None
    if text.sequences < 2:
        raise ValueError("--sequences: noise is told from the gradients of parts of a batch; take 2 windows or more")
    model = subject.at(step)
    noise = NoiseScale(model, built.optimizer.blocks)
    for batch in text.of(subject):
        parts = batch.split(max(1, len(batch) // 4))
        noise.add([_gradients(subject, part) for part in parts], samples=[len(part) for part in parts])
    sizes = UpdateSize(model, built.optimizer.blocks)
    sizes.before()
    _one_step(subject, step, built.data.train)
    batch = next(subject.batches(1, text.sequences, seed=text.seed))
    found = [sizes.rrc(batch[:, :-1]), sizes.after(), noise.measure()]
    return [one.at(step) for one in found]


def _gradients(subject: Subject, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    assert subject.built is not None
    model, inputs = subject.model, windows[:, :-1]
    model.zero_grad()
    token_loss(model(inputs), inputs, windows[:, 1:]).backward()
    found = {name: g.clone() for name, g in gradients_of(model, subject.built.optimizer.blocks).items()}
    model.zero_grad()
    return found


def _one_step(subject: Subject, step: int, train: Tokens) -> None:
    built = subject.built
    assert built is not None
    steps = train_steps(built.model, built.optimizer, train, built.data.validation, built.plan, start=step)
    next(steps)
    steps.close()
