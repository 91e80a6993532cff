"""The work of `prepare_tokens`: chunk after chunk is split, encoded, written and noted."""

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sharpwise.files import remove_leftovers, replacing, write_whole
from sharpwise.train.data.chunks import Chunk, ahead, chunked, pieces
from sharpwise.train.data.documents import Document
from sharpwise.train.data.files import Meter
from sharpwise.train.data.manifest import FORMAT, JOURNAL, TOKENIZER, TYPES, Journal, Record, Shard, write_manifest
from sharpwise.train.data.split import split_chunk
from sharpwise.train.data.tokenizer import (
    Chosen,
    check_vocabulary,
    find_end_of_text,
    load_tokenizer,
    train_bpe,
    vocabulary_of,
)
from sharpwise.train.data.workers import Here, Pending, Processes

PIECE_BYTES = 2**20  # of text, that a process encodes at a time
Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Plan:
    """What to write where. `share` is that of validation, None where it has documents of its own."""

    out: Path
    share: float | None
    chosen: Chosen
    token_type: str
    end_of_text: str | None
    chunk_bytes: int


@dataclass(frozen=True)
class Tokenization:
    """A tokenizer as it lies in the folder, its end-of-text token and the type of its ids."""

    path: Path
    sha256: str
    vocabulary: int
    end_token: str
    end: int
    token_type: str


@dataclass
class _Work:
    """A chunk whose parts are being encoded; `since` is the position in the sources where it begins."""

    number: int
    chunk: Chunk
    since: int
    parts: dict[str, list[tuple[list[Document], Pending]]]


def write_shards(
    plan: Plan,
    log: Journal,
    parts: dict[str, Iterator[Document]],
    meter: Meter,
    described: dict[str, Any],
    jobs: int,
    report: Report,
) -> None:
    """Write everything that is not there yet, the manifest last.

    Args:
        plan: see there.
        log: what is there.
        parts: the documents of "train" and, where they come apart, of "validation".
        meter: how far the sources have been read.
        described: `source` and `settings` of the manifest.
        jobs: processes; a single chunk is encoded in this one, which is quicker.
        report: called with bytes of text that are done, those of them that were there, and the position in the sources.
    """
    remove_leftovers(plan.out)
    chunks = ahead(
        chunk for part, documents in parts.items() for chunk in chunked(documents, part, plan.chunk_bytes, meter)
    )
    writer = _Writer(plan, log, jobs, report)
    with closing(writer), closing(chunks):
        for chunk in chunks:
            writer.take(chunk)
        writer.finish()
    shards = [shard for record in log.records for shard in record.shards]
    _check_parts(plan, log, shards)
    remove_shards(plan.out, but={shard.file for shard in shards})
    write_manifest(plan.out, _manifest(writer.tokenization(), shards, described))
    (plan.out / JOURNAL).unlink()


class _Writer:
    """Takes chunks in order. While one is written the next one is being encoded (and a third one read)."""

    def __init__(self, plan: Plan, log: Journal, jobs: int, report: Report) -> None:
        self._plan, self._log, self._jobs, self._report = plan, log, jobs, report
        self._encoders: Here | Processes | None = None
        self._tokenization: Tokenization | None = None
        self._working: deque[_Work] = deque()
        self._taken = self._since = 0  # chunks; position in the sources
        self._seen = self._held = 0  # characters; those of them for validation
        self._done = self._kept = 0  # bytes of text; those of them that were there

    def take(self, chunk: Chunk) -> None:
        """Skip a chunk that is there, or else split it and begin to encode it."""
        number, self._taken = self._taken, self._taken + 1
        since, self._since = self._since, chunk.consumed
        if number < len(self._log.records):
            if _is_there(self._plan.out, self._log.records[number], chunk):
                return self._keep(self._log.records[number])
            self._log.drop_from(number)
        if self._encoders is None:  # processes begin to start while the BPE is trained
            self._encoders = Here() if self._jobs == 1 or (chunk.last and number == 0) else Processes(self._jobs)
        split = _split(self._plan, chunk, self._seen, self._held)
        if self._tokenization is None:
            self._tokenization = _make_tokenization(self._plan, split["train"], new=number == 0)
        self._seen += sum(len(document.text) for document in chunk.documents)
        self._held += sum(len(document.text) for document in split["validation"])
        arguments = self._tokenization.path, self._tokenization.end, TYPES[self._tokenization.token_type]
        parts = {
            part: [
                (run, self._encoders.submit(*arguments, [document.text for document in run]))
                for run in pieces(documents, PIECE_BYTES)
            ]
            for part, documents in split.items()
            if documents
        }
        self._working.append(_Work(number, chunk, since, parts))
        if len(self._working) > 1:
            self._write(self._working.popleft())

    def finish(self) -> None:
        """Write what is being encoded, and forget what an earlier run had beyond."""
        while self._working:
            self._write(self._working.popleft())
        self._log.drop_from(self._taken)

    def tokenization(self) -> Tokenization:
        """That of the folder."""
        return self._tokenization or _make_tokenization(self._plan, [], new=False)

    def close(self) -> None:
        """End the processes."""
        if self._encoders is not None:
            self._encoders.close()

    def _keep(self, record: Record) -> None:
        self._seen += record.characters()
        self._held += record.characters("validation")
        self._done += record.bytes
        self._kept += record.bytes
        self._report(self._done, self._kept, self._since)

    def _write(self, work: _Work) -> None:
        begun, shards = self._done, []
        for part, encoded in work.parts.items():
            file = f"{part}-{work.number:05}.bin"
            tokens, digest = 0, hashlib.sha256()
            with replacing(self._plan.out / file) as stream:
                for documents, pending in encoded:
                    ids = self._wait(pending)
                    raw = ids.tobytes()
                    stream.write(raw)
                    digest.update(raw)
                    tokens += len(ids)
                    self._done += sum(document.bytes for document in documents)
                    share = (self._done - begun) / work.chunk.bytes
                    self._report(self._done, self._kept, work.since + share * (work.chunk.consumed - work.since))
            every = [document for documents, _ in encoded for document in documents]
            size, characters = sum(d.bytes for d in every), sum(len(d.text) for d in every)
            shards.append(Shard(file, part, tokens, digest.hexdigest(), len(every), size, characters))
        self._log.add(Record(work.chunk.part, work.chunk.sha256, tuple(shards)))

    def _wait(self, pending: Pending) -> NDArray[Any]:
        try:
            return pending.result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"a process that encodes was ended from outside (no memory?); try fewer --jobs than {self._jobs}: "
                "the same command goes on from here"
            ) from error


def _split(plan: Plan, chunk: Chunk, seen: int, held: int) -> dict[str, list[Document]]:
    if plan.share is None:
        return {"train": [], "validation": [], chunk.part: chunk.documents}
    train, validation = split_chunk(chunk.documents, plan.share, seen=seen, held=held, last=chunk.last)
    return {"train": train, "validation": validation}


def _is_there(out: Path, record: Record, chunk: Chunk) -> bool:
    if (record.part, record.text_sha256) != (chunk.part, chunk.sha256) or not (out / TOKENIZER).is_file():
        return False
    # A shard is in place before its record is written, and whole before it is in place.
    return all((out / shard.file).is_file() for shard in record.shards)


def _make_tokenization(plan: Plan, train: list[Document], *, new: bool) -> Tokenization:
    """The tokenizer of the folder; `new` makes it, a trained one from the first chunk's training documents."""
    from tokenizers import Tokenizer

    path, declared = plan.out / TOKENIZER, None
    if plan.chosen.trained:
        if new:
            write_whole(path, train_bpe(train, plan.chosen.vocabulary).to_str())
    else:
        loaded, declared = load_tokenizer(plan.chosen.spec)
        if new:
            write_whole(path, loaded.to_str())
    tokenizer = Tokenizer.from_file(str(path))
    vocabulary = vocabulary_of(tokenizer)
    token_type = check_vocabulary(vocabulary, plan.token_type, trained=False)
    token, end = find_end_of_text(tokenizer, given=plan.end_of_text, declared=declared)
    return Tokenization(path, hashlib.sha256(path.read_bytes()).hexdigest(), vocabulary, token, end, token_type)


def _check_parts(plan: Plan, log: Journal, shards: list[Shard]) -> None:
    for part, name in (("train", "training"), ("validation", "validation")):
        if any(shard.part == part and shard.bytes for shard in shards):
            continue
        size, documents = sum(shard.bytes for shard in shards), sum(shard.documents for shard in shards)
        log.drop_from(0)  # so that the folder is free for other settings
        if plan.share is None:
            raise ValueError(f"the {name} part is empty: its source has no text; name another one")
        raise ValueError(
            f"the {name} part is empty: the text has {size} bytes in {documents} documents, and validation gets "
            f"{plan.share} of it; give more text, another --validation, or --validation-data"
        )


def _manifest(tokenization: Tokenization, shards: list[Shard], described: dict[str, Any]) -> dict[str, Any]:
    def total(name: str, *parts: str) -> int:
        return sum(getattr(shard, name) for shard in shards if shard.part in parts)

    return {
        "format": FORMAT,
        **described,
        "vocabulary": tokenization.vocabulary,
        "token_type": tokenization.token_type,
        "end_of_text": {"token": tokenization.end_token, "id": tokenization.end},
        "tokenizer_sha256": tokenization.sha256,
        "counts": {
            "documents": total("documents", "train", "validation"),
            "validation_documents": total("documents", "validation"),
            "bytes": total("bytes", "train", "validation"),
            "validation_bytes": total("bytes", "validation"),
            "train_tokens": total("tokens", "train"),
            "validation_tokens": total("tokens", "validation"),
        },
        "shards": [
            {
                "file": s.file,
                "part": s.part,
                "tokens": s.tokens,
                "sha256": s.sha256,
                "documents": s.documents,
                "bytes": s.bytes,
            }
            for s in shards
        ],
    }


def remove_shards(out: Path, but: Collection[str] = ()) -> None:
    """Remove the shards of a folder, `but` those with these names."""
    for pattern in ("train-*.bin", "validation-*.bin"):
        for path in out.glob(pattern):
            if path.name not in but:
                path.unlink()
