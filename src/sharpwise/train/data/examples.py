"""Prepared tokens that are no text: examples of one length, each of which is a window of its own."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sharpwise.files import check_name, remove_leftovers, write_whole
from sharpwise.train.data.manifest import FORMAT, MANIFEST, TOKENIZER, TYPES, write_manifest
from sharpwise.train.data.tokens import Prepared, open_tokens

FEWEST = 16  # tokens of a part: a run ends with a sample that begins with so many


def write_examples(
    folder: Path | str, train: ArrayLike, validation: ArrayLike, description: str | None = None
) -> Prepared:
    """Write a folder of prepared tokens from examples of one length; training sees each as a whole, in any order.

    The model is given all tokens of an example but the last, and its loss is about all but the first: a sum `[3, 4, 7]`
    asks for 4 after 3, and for 7 after 3, 4. Pictures, or whatever else is no token, stay with the model, which is
    given their numbers: of `[image, class]` the loss is that of the class.

    Args:
        folder: made if need be; a folder of examples there is replaced.
        train, validation: integers from 0 on, [examples, tokens of one], 2 tokens or more.
        description: what they are, for whoever reads a result.

    Raises:
        ValueError: arrays that are not so, or a folder of text.
    """
    check_name(Path(folder))
    folder, parts = Path(folder), {"train": _checked("train", train), "validation": _checked("validation", validation)}
    length = parts["train"].shape[1]
    if parts["validation"].shape[1] != length:
        raise ValueError(f"train has examples of {length} tokens, and validation of {parts['validation'].shape[1]}")
    if (folder / MANIFEST).exists() and "example" not in json.loads((folder / MANIFEST).read_bytes()):
        raise ValueError(f"{folder} holds prepared text; name another folder")
    vocabulary = max(int(examples.max()) for examples in parts.values()) + 1
    token_type = "uint16" if vocabulary <= 2**16 else "uint32"
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    tokenizer = _numbers(vocabulary)
    write_whole(folder / TOKENIZER, tokenizer)
    shards: list[dict[str, Any]] = []
    for part, examples in parts.items():
        raw = examples.astype(TYPES[token_type]).tobytes()
        write_whole(folder / f"{part}-00000.bin", raw)
        sha256 = hashlib.sha256(raw).hexdigest()
        shards.append(
            {"file": f"{part}-00000.bin", "part": part, "tokens": examples.size, "sha256": sha256,
             "documents": len(examples), "bytes": len(raw)}
        )  # fmt: skip
    sums = {key: sum(shard[key] for shard in shards) for key in ("documents", "bytes")}
    counts = {**sums, "validation_documents": shards[1]["documents"], "validation_bytes": shards[1]["bytes"]}
    counts |= {f"{shard['part']}_tokens": shard["tokens"] for shard in shards}
    manifest = {
        "format": FORMAT,
        "source": f"examples of {length} tokens",
        **({} if description is None else {"description": description}),
        "example": length,
        "vocabulary": vocabulary,
        "token_type": token_type,
        "end_of_text": {"token": "0", "id": 0},  # there is none
        "tokenizer_sha256": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "counts": counts,
        "shards": shards,
    }
    write_manifest(folder, manifest)
    return open_tokens(folder)


def _checked(part: str, given: ArrayLike) -> NDArray[Any]:
    examples = np.asarray(given)
    shape = examples.shape
    if examples.dtype.kind not in "iu" or len(shape) != 2 or shape[1] < 2 or examples.size < FEWEST:
        raise ValueError(
            f"{part}: expected integers [examples, 2 or more], {FEWEST} or more in all, got {examples.dtype} "
            f"{list(shape)}"
        )
    if examples.min() < 0 or examples.max() >= 2**32:
        raise ValueError(f"{part}: tokens are 0 to 2^32 - 1, got {examples.min()} to {examples.max()}")
    return examples


def _numbers(vocabulary: int) -> str:
    """A tokenizer whose tokens are their numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(vocabulary)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return str(tokenizer.to_str())
