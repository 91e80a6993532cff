"""Data sets of the Hugging Face hub, through `datasets`."""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sharpwise.installing import needs
from sharpwise.train.data.documents import Document, encodable

PREFIX = "hub:"
ROWS = 256  # fetched at a time


@dataclass(frozen=True)
class HubData:
    """A data set: its path on the hub, its configuration, the field of the text, whether it has a validation split of
    its own, and whether it is read as it arrives in place of being downloaded first."""

    path: str
    config: str | None = None
    field: str = "text"
    validation: bool = False
    streaming: bool = False


NAMES: dict[str, HubData] = {
    "openwebtext": HubData("Skylion007/openwebtext", "plain_text"),
    "minipile": HubData("JeanKaddour/minipile", validation=True),
    "c4": HubData("allenai/c4", "en", validation=True, streaming=True),
    "fineweb": HubData("HuggingFaceFW/fineweb", "sample-10BT", streaming=True),
}


def find_data(name: str, field: str = "text") -> HubData | None:
    """A name of `NAMES`, or `hub:owner/name[:config]` for any other; None for what is neither."""
    if name in NAMES:
        return NAMES[name]
    if not name.startswith(PREFIX):
        return None
    path, _, config = name.removeprefix(PREFIX).partition(":")
    if not path:
        raise ValueError(f"{name!r} names no data set; write {PREFIX}owner/name or {PREFIX}owner/name:config")
    return HubData(path, config or None, field, streaming=True)


def suggestion(name: str) -> str:
    """What to say about a name that is none of `NAMES`: the nearest one, and all."""
    near = difflib.get_close_matches(name.lower(), [*NAMES, "stdlib"], 1)
    names = f"the data sets are stdlib, {', '.join(NAMES)} and {PREFIX}owner/name"
    return f"did you mean {near[0]}? ({names})" if near else names


def hub_documents(data: HubData, split: str = "train", *, streaming: bool | None = None) -> Iterator[Document]:
    """The documents of a split.

    Args:
        data: from `find_data`.
        split: "train" or "validation".
        streaming: read as it arrives; None does what the table says.

    Raises:
        ValueError: the hub is not reached, has no such data set, or the field is missing.
    """
    with needs(f"reading {data.path}", "train"):
        import datasets
    rows = _rows(datasets, data, split, data.streaming if streaming is None else streaming)
    for number, row in enumerate(rows):
        if data.field not in row:
            names = ", ".join(map(repr, row)) or "none"
            raise ValueError(
                f"{data.path} has no field {data.field!r}; its fields are {names}: name that of the text with --field"
            )
        text = row[data.field]
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"{data.path}: field {data.field!r} holds {text!r:.40}, not text; name another with --field"
            )
        if text and text.strip():
            yield Document(f"{split}#{number}", encodable(text))


def _rows(datasets: Any, data: HubData, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
    try:
        with quietly():
            loaded = datasets.load_dataset(data.path, data.config, split=split, streaming=streaming)
            for columns in loaded.iter(batch_size=ROWS):
                names = list(columns)
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(names, values, strict=True))
    except Exception as error:  # the hub, the network and the file formats each have their own kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"cannot load {data.path} from the Hugging Face hub ({lines[0]}); check the name and the network, or give "
            f"local files"
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """The hub's client keeps its retries to itself; the error at the end says what happened."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
