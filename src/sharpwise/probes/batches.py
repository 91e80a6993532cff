"""Batches as probes take them: what a model is given, and the token that it has to say at every position."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""In place of a target: this position does not count. It is torch's and Hugging Face's number for that."""

_FORMS = (
    "int64 tokens [sequences, context + 1], a pair (inputs, targets) of int64 [sequences, context] with -100 where a "
    "target is to be ignored, or a mapping with 'input_ids' and 'labels' as Hugging Face's collators make it"
)


@dataclass(frozen=True)
class Batch:
    """What one batch asks of a model.

    Args:
        targets: int64 [sequences, context], IGNORED where nothing is asked.
        args, kwargs: of the model's forward; tensors with `sequences` rows are cut along with the targets.
        name: for messages.
    """

    targets: Tensor
    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = "the batch"

    @property
    def inputs(self) -> Tensor:
        """The tokens that the model sees, int64 [sequences, context]."""
        found: Tensor = self.args[0] if self.args else self.kwargs["input_ids"]
        return found

    @property
    def tokens(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORED).sum())

    @property
    def sequences(self) -> int:
        """Sequences with at least one target that counts."""
        return int((self.targets != IGNORED).any(1).sum())

    def split(self, micro: int | None) -> Iterator["Batch"]:
        """Parts of at most `micro` sequences (None: all at once) that have a target that counts."""
        rows = len(self.targets)
        for start in range(0, rows, micro or rows):
            part = slice(start, start + (micro or rows))
            if not bool((self.targets[part] != IGNORED).any()):
                continue
            kwargs = {key: _cut(value, part, rows) for key, value in self.kwargs.items()}
            yield Batch(self.targets[part], tuple(_cut(a, part, rows) for a in self.args), kwargs, self.name)


def as_batches(
    batches: Any, *, device: torch.device, vocabulary: int | None = None, who: str = "probe"
) -> Iterator[Batch]:
    """One batch, or an iterable of batches, each checked and moved to a device.

    Args:
        batches: a batch is what `_FORMS` says; a pair of tensors is one batch, other tuples and lists hold batches.
        vocabulary: how many tokens the model knows, None if that is not known.
        who: begins the messages.

    Raises:
        TypeError: this is no batch.
        ValueError: it has no target that counts, tokens beyond the vocabulary, or shapes that do not fit.
    """
    if _is_one(batches):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise TypeError(f"{who}: got {type(batches).__name__}, expected batches: {_FORMS}")
    number = -1
    for number, one in enumerate(batches):
        yield _as_batch(one, f"batch {number}", device, vocabulary, who)
    if number < 0:
        raise ValueError(f"{who}: there are no batches; a batch is {_FORMS}")


def check_micro(micro: int | None, who: str) -> None:
    """Raise ValueError for a number of sequences per pass that is none."""
    if micro is not None and micro < 1:
        raise ValueError(f"{who}: micro is the number of sequences per pass, at least 1, got {micro}")


def _is_one(given: Any) -> bool:
    """Whether this is one batch rather than several."""
    pair = isinstance(given, tuple | list) and len(given) == 2 and all(_is_tokens(part) for part in given)
    # Two batches of tokens in a list look like a pair; only a tuple is taken for one.
    return isinstance(given, Mapping) or hasattr(given, "shape") or (pair and isinstance(given, tuple))


def _is_tokens(given: Any) -> bool:
    return hasattr(given, "shape") and len(given.shape) == 2


def _as_batch(given: Any, name: str, device: torch.device, vocabulary: int | None, who: str) -> Batch:
    what = f"{who}: {name}"
    if isinstance(given, Mapping):
        batch = _of_mapping(given, name, device, what)
    elif isinstance(given, tuple | list) and len(given) == 2:
        inputs, targets = (_tokens(part, device, what) for part in given)
        batch = Batch(targets, (inputs,), name=name)
    else:
        tokens = _tokens(given, device, what)
        if tokens.shape[1] < 2:
            raise ValueError(
                f"{what}: got {_shape(tokens)}, and the last token of a row is only a target; give 2 or more"
            )
        batch = Batch(tokens[:, 1:], (tokens[:, :-1],), name=name)
    if batch.inputs.shape != batch.targets.shape:
        raise ValueError(
            f"{what}: inputs are {_shape(batch.inputs)} and targets {_shape(batch.targets)}; one per input"
        )
    if not batch.tokens:
        raise ValueError(f"{what}: no target counts (of {batch.targets.numel()} all are {IGNORED}); leave it out")
    _check_range(batch.inputs, vocabulary, what, "the input")
    _check_range(batch.targets[batch.targets != IGNORED], vocabulary, what, "the target")
    return batch


def _of_mapping(given: Mapping[str, Any], name: str, device: torch.device, what: str) -> Batch:
    if "input_ids" not in given:
        raise ValueError(f"{what}: a mapping with {sorted(map(str, given))}, without 'input_ids'; expected {_FORMS}")
    inputs = _tokens(given["input_ids"], device, what)
    if given.get("labels") is None:
        labels, seen = inputs, given.get("attention_mask")
        if seen is not None:
            labels = labels.masked_fill(torch.as_tensor(seen, device=device) == 0, IGNORED)
    else:
        labels = _tokens(given["labels"], device, what)
    # Hugging Face's labels stand where the token itself stands, and its models shift them; here targets are shifted.
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    others = {k: v for k, v in given.items() if k not in ("labels", "input_ids") and v is not None}
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in others.items()}
    return Batch(targets, kwargs={"input_ids": inputs, **moved}, name=name)


def _tokens(given: Any, device: torch.device, what: str) -> Tensor:
    if not hasattr(given, "shape"):
        raise TypeError(f"{what}: got {type(given).__name__}, expected {_FORMS}")
    tokens = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"{what}: got {str(tokens.dtype).removeprefix('torch.')} values, expected {_FORMS}")
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(f"{what}: got {_shape(tokens)}, expected {_FORMS}")
    return tokens.to(device=device, dtype=torch.int64)


def _check_range(tokens: Tensor, vocabulary: int | None, what: str, which: str) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    wrong = low if low < 0 else high
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        knows = "tokens are 0 or more" if vocabulary is None else f"the model knows 0 to {vocabulary - 1}"
        raise ValueError(f"{what}: {which} {wrong} is no token, {knows}; was the text made with another tokenizer?")


def _cut(value: Any, part: slice, rows: int) -> Any:
    return value[part] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value


def _shape(tensor: Tensor) -> str:
    return f"a tensor of shape {list(tensor.shape)}"
