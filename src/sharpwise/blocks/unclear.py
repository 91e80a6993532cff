"""Where it is not clear what a parameter is: what a user can say, in the words of the function that was called."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn

from sharpwise.blocks.segment import Segment


@dataclass(frozen=True)
class Words:
    """What the options that help are called where they are asked for.

    Attributes:
        role: to say that {name} is a {role}.
        names: to go by names alone.
        batch: to give a batch for a trace.
        anyway: to go on without a role, empty where that cannot be.
    """

    role: str
    names: str
    batch: str
    anyway: str = ""


OF = Words("overrides={{{name!r}: {role!r}}}", "trace=False", "example=batch", "strict=False")
"""Of `BlockMap.of`."""
_NAMES, _BATCH = "blocks=BlockMap.of(model, trace=False)", "blocks=BlockMap.of(model, example=batch)"
BLOCKS = Words("blocks={{{name!r}: {role!r}}}", _NAMES, _BATCH)
"""Of functions that take `blocks=`, overrides or a map."""
A_MAP = Words("blocks=BlockMap.of(model, overrides={{{name!r}: {role!r}}}, ...)", _NAMES, _BATCH)
"""Of the same where a map was given."""
COMMAND = Words(
    "--override '{name}={role}'", "--no-trace", "BlockMap.of(model, example=batch) in Python", "no --strict"
)
"""Of `sharpwise blocks`."""


class Unclear(ValueError):
    """What a parameter is is not clear, and has to be.

    Args:
        problem: what is not clear.
        name, role: a parameter, and what might be said of it.
        do: "choose" where names and dataflow say different things, "say" where they say nothing.
        more: what else a user can do.
        words: of whom the options are.
    """

    def __init__(
        self,
        problem: str,
        name: str,
        role: str,
        do: Literal["choose", "say"] = "say",
        more: str = "",
        words: Words = OF,
    ) -> None:
        super().__init__(problem, name, role, do, more, words)
        self.problem, self.name, self.role, self.do, self.more, self.words = problem, name, role, do, more, words

    def __str__(self) -> str:
        words, say = self.words, f"by name or glob: {self.saying}"
        if self.do == "choose":
            return f"{self.problem}\nSay which is right, {say}; or go by names alone: {words.names}"
        anyway = f"{words.anyway} to treat them as 'other'" if words.anyway else ""
        return (
            f"{self.problem}. Give a batch for the model to run on: {words.batch}; or say what they are, {say}, and "
            f"'other' for what is neither attention, MLP, norm nor embedding"
            + "".join(f"; or {one}" for one in (anyway, self.more) if one)
        )

    @property
    def saying(self) -> str:
        """The option that says of a parameter what it is."""
        return self.words.role.format(name=self.name, role=self.role)

    def by(self, words: Words, who: str = "") -> "Unclear":
        """The same, said by another function."""
        problem = f"{who}: {self.problem}" if who else self.problem
        return Unclear(problem, self.name, self.role, self.do, self.more, words)


@contextmanager
def without_options(model: str) -> Iterator[None]:
    """Around what makes maps for a command or a run, which goes by the `model` alone and has no option to say more.

    Raises:
        ValueError: instead of Unclear.
    """
    try:
        yield
    except Unclear as error:
        more = f"; or, in the table [optimizer], {error.more}" if error.more else ""
        raise ValueError(
            f"{error.problem}{'. ' if error.do == 'say' else chr(10)}There is no option for it here: `sharpwise blocks "
            f"{model} --explain {error.name}` shows what is known, and in Python it is said with "
            f"{error.by(BLOCKS).saying}{more}"
        ) from None


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def example_of(segments: Sequence[Segment], modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The name of one of these that nothing explains, and a role that fits it: what a message shows.

    `modules` are those of the model by canonical path, as far as there is one.
    """
    unknown = [segment for segment in segments if not segment.source] or [*segments]
    segment = next((s for s in unknown if not s.bias), unknown[0])
    return segment.name, _likely(segment, modules)


def _likely(segment: Segment, modules: Mapping[str, nn.Module]) -> str:
    module = modules.get(segment.name.rpartition(".")[0])
    if len(segment.shape) < 2:
        norm = re.search(r"norm|gain|scale|(^|[._])ln", f"{segment.name} {type(module).__name__.lower()}")
        return "norm" if norm and not segment.bias and segment.shape else "other"
    if isinstance(module, CONVOLUTIONS):
        return "other"
    if re.search(r"(^|[._])pos|wpe", segment.name):
        return "pos_emb"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or re.search(
        r"wte|(^|[._])(emb|embed|embeds|embeddings?|tokens)([._]|$)", segment.name
    ):
        return "tok_emb"
    return "head" if re.search(r"(^|[._])(lm_head|unembed|head([._]|$))", segment.name) else "up"
