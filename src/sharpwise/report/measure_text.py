"""What measurements come to: the order of the block types, the learning rates that follow, the command to give next."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from sharpwise.block_lr.spelling import make_block_lr
from sharpwise.probes.estimate import Measurement
from sharpwise.probes.order import Relation, as_block_lr, ranking, relations, suggested_ratios

APART, OVERLAPPING = "<", "≈"


@dataclass(frozen=True)
class Study:
    """What a comparison of learning rates per block has to be told, as words of a command line."""

    model: str
    data: str
    optimizer: str = "adamw"
    init_from: str = ""


PLACEHOLDERS = Study("MODEL", "DATA")
"""Where it is not known."""


def sharpest(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those that have an order of block types, by step."""
    return sorted((one for one in measurements if one.probe == "sharpness" and ranking(one)), key=step_of)


def step_of(one: Measurement) -> int:
    """To sort by: what says no step comes first."""
    return -1 if one.step is None else one.step


def headline(title: str, measurements: Sequence[Measurement]) -> str:
    """The order of the types at the last step, where sharpness was measured."""
    found = sharpest(measurements)
    return f"{title}: sharpness {order(ranking(found[-1]))}" if found else title


def order(found: Sequence[Relation]) -> str:
    """Types from the flattest to the sharpest, < where the intervals are apart and \u2248 where they are not."""
    return found[0].flatter + "".join(f" {APART if one.holds == 'yes' else OVERLAPPING} {one.sharper}" for one in found)


def conclusions(measurements: Sequence[Measurement]) -> list[str]:
    """How sure the order is, how it was at other steps, and what of the paper's it has; nothing without sharpness."""
    found = sharpest(measurements)
    if not found:
        return []
    said = ranking(found[-1])
    steps = "; ".join(f"{one.sharper} is {_times(one)}" for one in said)
    unsure = [f"{one.flatter} and {one.sharper}" for one in said if one.holds == "open"]
    sure = f"Open, as their intervals overlap: {', '.join(unsure)}." if unsure else "No intervals overlap."
    lines = [f"Flattest first, the mean over the parameters of a type. {steps}. {sure}"]
    if len(found) > 1:
        names = [[one.flatter for one in ranking(at)] + [ranking(at)[-1].sharper] for at in found]
        same = sum(own == names[-1] for own in names)
        lines[0] += f" The order was the same at {same} of {len(found)} steps."
    if pairs := relations(found[-1]):
        lines.append(_of_the_paper(pairs))
    return lines


def _times(one: Relation) -> str:
    ends = f"{one.low:.2g} to {one.high:.2g}" if one.high < float("inf") else f"{one.low:.2g} or more"
    return f"{one.ratio:.2g} times {one.flatter} ({ends})"


def _of_the_paper(pairs: Sequence[Relation]) -> str:
    held = sum(one.holds == "yes" for one in pairs)
    rest = [
        f"{'open' if one.holds == 'open' else 'not'}: {one.sharper} is {_times(one)}"
        for one in pairs
        if one.holds != "yes"
    ]
    paper = "Of the order Emb << QK < FFN < VO << Norm (arXiv 2502.19002)"
    return f"{paper}, {held} of {len(pairs)} relations hold{'; ' * bool(rest)}{'; '.join(rest)}."


@dataclass(frozen=True)
class Advice:
    """What to do with what was measured: why, the learning rates as code ("" if none follow), and a command."""

    reason: str
    code: str
    command: str


def advice(measurements: Sequence[Measurement], study: Study) -> Advice:
    """The learning rate per block that the last sharpness suggests, and the comparison that tries it."""
    found = sharpest(measurements)
    if not found:
        return Advice("The sharpness of the blocks says which of them could take larger steps:", "",
                      f"sharpwise measure sharpness {shlex.quote(study.init_from or 'RUN')}")  # fmt: skip
    try:
        ratios = suggested_ratios(found[-1])
    except ValueError as error:
        return Advice(f"No learning rates per block follow: {error}.", "", _compare(study, "blockwise"))
    if set(ratios.values()) == {1.0}:
        reason = "Norm is not sharper than any other type, so that no larger steps follow for them. Those of the paper:"
        return Advice(reason, "", _compare(study, "blockwise"))
    code = f"block_lr=sharpwise.{as_block_lr(ratios)}"
    reason = (
        "Each type could take steps larger than Norm's by (S_Norm / S) to the power 0.6, at most 10. That is a guess "
        "from the curvature at one point: before training with it, compare it with one learning rate for all blocks, "
        "each tuned alike."
    )
    return Advice(reason, code, _compare(study, str(make_block_lr({"name": "blockwise", **ratios}))))


def _compare(study: Study, block_lr: str) -> str:
    words = ["sharpwise", "compare", study.optimizer, f"{study.optimizer}+{block_lr}"]
    words += ["--set", f"model.init_from={study.init_from}"] if study.init_from else ["--model", study.model]
    words += ["--data", study.data, "--budget", "1x"]
    return shlex.join(words)
