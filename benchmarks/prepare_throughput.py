"""MB of text per second of `sharpwise prepare`, end to end and encoding alone. Prints JSON, and saves it.

    python benchmarks/prepare_throughput.py --data PATH... [--jobs 1 2] [--rounds 3] [--vocab-size 4096] [--no-save]

End to end is a fresh process of the command line for each figure: start, reading and unpacking, training the BPE,
splitting, encoding, hashing, writing, flushing to the disk. CPU seconds are those of all its processes: what other work
on the machine takes away shows in the rate and hardly in them. Encoding alone is in one process, with the tokenizer of
the last round: by the table of words, and by `tokenizers` itself with as many threads as there are CPUs. MB are 10^6
bytes of UTF-8.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from sharpwise.train.data import open_tokens
from sharpwise.train.data.chunks import pieces
from sharpwise.train.data.encode import Encoder
from sharpwise.train.data.files import Meter
from sharpwise.train.data.shards import PIECE_BYTES
from sharpwise.train.data.sources import LocalFiles

ENCODED_MB = 20  # of the text, for encoding alone


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", nargs="+", type=Path, required=True)
    parser.add_argument("--jobs", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    found = environment()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tokens"
        runs = [
            end_to_end(args.data, out, jobs, args.vocab_size, keep=(i, jobs) == (args.rounds - 1, args.jobs[-1]))
            for i in range(args.rounds)
            for jobs in args.jobs
        ]
        result = {
            "environment": found,
            "data": [path.name for path in args.data],
            "text_mb": runs[0]["text_mb"],
            "vocabulary": args.vocab_size,
            "end_to_end": {
                f"jobs={jobs}": {
                    **summary([run["mb_per_s"] for run in runs if run["jobs"] == jobs]),
                    "cpu_s": [run["cpu_s"] for run in runs if run["jobs"] == jobs],
                }
                for jobs in args.jobs
            },
            "encoding_alone": encoding(args.data, out, args.rounds),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if not args.no_save:
        path = Path(__file__).parent / "results" / "prepare_throughput.json"
        path.write_text(text + "\n")


def end_to_end(data: list[Path], out: Path, jobs: int, vocabulary: int, *, keep: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "sharpwise", "prepare", *map(str, data), "--out", str(out), "--jobs", str(jobs)]
    began, before = time.perf_counter(), cpu_seconds()
    subprocess.run([*command, "--vocab-size", str(vocabulary)], check=True, capture_output=True)
    seconds = time.perf_counter() - began
    size = open_tokens(out).manifest["counts"]["bytes"] / 1e6
    if not keep:
        for path in out.iterdir():
            path.unlink()
    return {"jobs": jobs, "text_mb": size, "mb_per_s": size / seconds, "cpu_s": round(cpu_seconds() - before, 1)}


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def encoding(data: list[Path], out: Path, rounds: int) -> dict[str, Any]:
    prepared = open_tokens(out)
    documents, size = [], 0
    for path in data:
        for document in LocalFiles(path).documents(Meter()):
            documents.append(document)
            size += document.bytes
            if size >= ENCODED_MB * 1e6:
                break
    batches = [[document.text for document in run] for run in pieces(documents, PIECE_BYTES)]
    words, plain = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        encoder = Encoder(prepared.tokenizer(), prepared.end_of_text, np.uint16)
        for texts in batches:
            encoder(texts)
        words.append(size / 1e6 / (time.perf_counter() - began))
        began = time.perf_counter()
        tokenizer = prepared.tokenizer()
        for texts in batches:
            [np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        plain.append(size / 1e6 / (time.perf_counter() - began))
    return {"table_of_words_one_process": summary(words), "tokenizers_all_cpus": summary(plain)}


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "mb_per_s_median": round(statistics.median(values), 2),
        "mb_per_s": [round(value, 2) for value in values],
    }


if __name__ == "__main__":
    main()
