"""From sources to a folder of tokens: memory-mapped shards, the tokenizer and a manifest."""

import contextlib
import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sharpwise.files import check_name, printable
from sharpwise.train.data.documents import limited
from sharpwise.train.data.files import Meter
from sharpwise.train.data.listing import grouped
from sharpwise.train.data.manifest import JOURNAL, MANIFEST, TOKENIZER, Journal, differences, journal, write_manifest
from sharpwise.train.data.shards import Plan, remove_shards, write_shards
from sharpwise.train.data.sources import HubSource, Source, find_source
from sharpwise.train.data.tokenizer import BPE, choose_tokenizer
from sharpwise.train.data.tokens import Prepared, open_tokens, read_manifest

CHUNK_BYTES = 32 * 2**20  # of text, that make one shard of each part
OWN = "its own split"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareProgress:
    """How far it is: UTF-8 bytes of text that are done, how many of them were done by an earlier call, and which
    fraction of the whole they are; None where the whole is not known."""

    text_bytes: int
    kept_bytes: int
    fraction: float | None


def prepare_tokens(
    sources: Sequence[str | Path],
    out: Path | str,
    *,
    tokenizer: str | Path = BPE,
    vocabulary: int = 4096,
    validation: float = 0.01,
    validation_data: str | Path | None = None,
    field: str = "text",
    jobs: int = 1,
    max_bytes: int | None = None,
    token_type: str = "auto",
    end_of_text: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    description: str | None = None,
    on_progress: Callable[[PrepareProgress], None] | None = None,
) -> Prepared:
    """Write the tokens of `sources` into the folder `out`, and open it.

    A call that was stopped goes on from its last finished chunk when it is made again; a call for what is already there
    does nothing (sources are compared by names, sizes and times). The files do not depend on `jobs`.

    Args:
        sources: see `find_source`; read in this order. Every document is followed by the end-of-text token.
        out: a folder, made where missing.
        tokenizer: "bpe" trains a byte-level BPE on the first text; else see `choose_tokenizer`.
        vocabulary: entries of that BPE.
        validation: share of the characters that go to validation, by whole documents, see `split_chunk`. Not used
            where `validation_data` is given, or every source has a validation split of its own.
        validation_data: a source whose text is the validation part.
        field: of JSON and parquet: the one that holds the text.
        jobs: processes that encode; more than one needs the calling script's `if __name__ == "__main__"`.
        max_bytes: of UTF-8 text to take from the sources, None for all.
        token_type: "auto" (uint16 up to 65,536 entries, else uint32), "uint16" or "uint32".
        end_of_text: the token, where the tokenizer has an unusual one.
        chunk_bytes: UTF-8 bytes of text from which a shard of each part is made.
        description: what the text is, for whoever reads a result made with it; it can be given later too.
        on_progress: called after about every MB of text; never if there is nothing to do.

    Raises:
        ValueError: a source, the tokenizer or a setting that cannot be used; a part without text; the folder holds
            something else.
        OSError: the files cannot be written, for instance because the disk is full.
    """
    out = Path(out)
    check_name(out)
    if not 0 < validation < 1:
        raise ValueError(
            f"validation must be a share between 0 and 1, got {validation}; for a text of your own, name it"
        )
    if jobs < 1 or chunk_bytes < 1 or (max_bytes is not None and max_bytes < 1):
        raise ValueError(f"jobs, chunk_bytes and max_bytes must be at least 1, got {jobs}, {chunk_bytes}, {max_bytes}")
    if not sources:
        raise ValueError("no source; name a file, a folder or a data set, or stdlib")
    chosen = choose_tokenizer(tokenizer, vocabulary, token_type)
    found = [find_source(source, field) for source in sources]
    if max_bytes is not None:  # a data set is not downloaded for its beginning
        found = [replace(source, streaming=True) if isinstance(source, HubSource) else source for source in found]
    held_out = find_source(validation_data, field) if validation_data is not None else None
    own = held_out is None and all(source.own_validation for source in found)
    settings = {
        "sources": [printable(source) for source in sources],
        "state": [source.state() for source in found],
        "field": field,
        "max_bytes": max_bytes,
        "validation": held_out.state() if held_out else OWN if own else validation,
        "tokenizer": chosen.settings,
        "end_of_text": end_of_text,
        "token_type": token_type,
        "chunk_bytes": chunk_bytes,
    }
    if (out / MANIFEST).is_file():
        manifest = read_manifest(out)
        _refuse_others(out, manifest["settings"], settings)
        _describe(out, manifest, description)
        return open_tokens(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / JOURNAL).is_file():
        raise ValueError(f"{out} holds other files and no prepared tokens; name another folder with --out")
    plan = Plan(out, validation if held_out is None and not own else None, chosen, token_type, end_of_text, chunk_bytes)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with _writing(out), journal(out) as log:
            _refuse_others(out, log.settings or settings, settings, finished=False)
            try:
                if log.settings is None:
                    log.start(settings)
                _write(plan, log, settings, found, held_out, own, max_bytes, jobs, on_progress)
            finally:
                if not log.records:  # nothing worth going on from: other settings may be tried
                    remove_shards(out)
                    (out / TOKENIZER).unlink(missing_ok=True)
                    (out / JOURNAL).unlink(missing_ok=True)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it is there no more, or there is something in it
                folder.rmdir()
    _describe(out, read_manifest(out), description)
    return open_tokens(out)


def _describe(out: Path, manifest: dict[str, Any], description: str | None) -> None:
    if description is not None and manifest.get("description") != description:
        write_manifest(out, {**manifest, "description": description})


def _write(
    plan: Plan,
    log: Journal,
    settings: dict[str, Any],
    found: list[Source],
    held_out: Source | None,
    own: bool,
    max_bytes: int | None,
    jobs: int,
    on_progress: Callable[[PrepareProgress], None] | None,
) -> None:
    meter = Meter()
    parts = {"train": limited((document for source in found for document in source.documents(meter)), max_bytes)}
    if held_out:
        parts["validation"] = held_out.documents(meter)
    elif own:
        parts["validation"] = (document for source in found for document in source.validation())
    sizes = [source.size() for source in (*found, *((held_out,) if held_out else ()))]
    total = None if own or None in sizes else sum(size for size in sizes if size is not None)

    def report(text_bytes: int, kept: int, consumed: float) -> None:
        shares = [consumed / total] if total else []
        shares += [text_bytes / max_bytes] if max_bytes and not held_out and not own else []
        if on_progress:
            on_progress(PrepareProgress(text_bytes, kept, min(max(shares), 1.0) if shares else None))

    name = " + ".join(source.name for source in found[:3]) + (f" + {len(found) - 3} more" if len(found) > 3 else "")
    left_out = grouped(one for source in (*found, *((held_out,) if held_out else ())) for one in source.left_out)
    write_shards(plan, log, parts, meter, {"source": name, "left_out": left_out, "settings": settings}, jobs, report)


class _writing:
    """Says what to do when files cannot be written."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"no space is left for {self._out}: make room (two bytes a token, four for large vocabularies)"
            raise OSError(f"{what}, and the same command goes on from here") from error
        raise OSError(
            f"cannot write into {self._out}: {error.strerror or error}; name another folder with --out"
        ) from error


def _refuse_others(out: Path, there: dict[str, Any], now: dict[str, Any], *, finished: bool = True) -> None:
    """`sources` is only how they are spelled. Where tokens are not finished the texts themselves are compared."""
    left_out = ("sources",) if finished else ("sources", "state")
    lines = differences(*({k: v for k, v in values.items() if k not in left_out} for values in (there, now)))
    if lines:
        state = "tokens" if finished else "unfinished tokens"
        raise ValueError(
            f"{out} holds {state} of other settings ({'; '.join(lines)}); name another --out, or remove it"
        )
