"""Data sets of the hub: `datasets` itself loads small folders laid out like each of the repositories, offline."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharpwise.train.data import hub, prepare_tokens
from sharpwise.train.data.hub import NAMES, HubData, find_data, hub_documents

TRAIN = [f"text {i} to train on, größe" for i in range(40)]
VALIDATION = [f"text {i} held out" for i in range(6)]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def _parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=10)


def _openwebtext(root: Path) -> None:
    for i in range(2):
        _parquet(root / f"plain_text/train-0000{i}-of-00002.parquet", {"text": TRAIN[20 * i : 20 * i + 20]})
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain_text\n  data_files:\n  - split: train\n    path: plain_text/train-*\n"
        "  default: true\n---\n"
    )


def _minipile(root: Path) -> None:
    _parquet(root / "data/train-00000-of-00001.parquet", {"text": TRAIN})
    _parquet(root / "data/validation-00000-of-00001.parquet", {"text": VALIDATION})
    _parquet(root / "data/test-00000-of-00001.parquet", {"text": ["never"]})
    (root / "README.md").write_text("---\nlicense: other\npretty_name: MiniPile\n---\n")


def _c4(root: Path) -> None:
    (root / "en").mkdir(parents=True)
    (root / "realnewslike").mkdir()

    def write(path: Path, texts: list[str]) -> None:
        rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"} for text in texts]
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))

    write(root / "en/c4-train.00000-of-01024.json.gz", TRAIN[:20])
    write(root / "en/c4-train.00001-of-01024.json.gz", TRAIN[20:])
    write(root / "en/c4-validation.00000-of-00008.json.gz", VALIDATION)
    write(root / "realnewslike/c4-train.00000-of-00512.json.gz", ["never"])
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/c4-train.*.json.gz\n"
        "  - split: validation\n    path: en/c4-validation.*.json.gz\n- config_name: realnewslike\n  data_files:\n"
        "  - split: train\n    path: realnewslike/c4-train.*.json.gz\n---\n"
    )


def _fineweb(root: Path) -> None:
    def columns(texts: list[str]) -> dict[str, list[Any]]:
        n = len(texts)
        return {
            "text": texts,
            "id": [f"<urn:uuid:{i}>" for i in range(n)],
            "dump": ["CC-MAIN-2013-20"] * n,
            "url": ["https://example.org"] * n,
            "date": ["2013-05-18T05:48:54Z"] * n,
            "file_path": ["s3://commoncrawl/a.warc.gz"] * n,
            "language": ["en"] * n,
            "language_score": [0.9] * n,
            "token_count": [10] * n,
        }

    for i in range(2):
        _parquet(root / f"sample/10BT/00{i}_00000.parquet", columns(TRAIN[20 * i : 20 * i + 20]))
    _parquet(root / "data/CC-MAIN-2013-20/000_00000.parquet", columns(["never"]))
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n"
        "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )


MAKE = {"openwebtext": _openwebtext, "minipile": _minipile, "c4": _c4, "fineweb": _fineweb}


@pytest.fixture(params=list(NAMES))
def local(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name whose table entry points at a folder laid out like the repository."""
    name: str = request.param
    MAKE[name](tmp_path / name)
    monkeypatch.setitem(NAMES, name, replace(NAMES[name], path=str(tmp_path / name)))
    return name


def test_each_data_set_is_loaded_as_it_lies_on_the_hub(local: str) -> None:
    data = NAMES[local]
    assert [document.text for document in hub_documents(data)] == TRAIN
    assert [document.text for document in hub_documents(data, streaming=not data.streaming)] == TRAIN
    if data.validation:
        assert [document.text for document in hub_documents(data, "validation")] == VALIDATION


def test_each_data_set_is_prepared(local: str, tmp_path: Path) -> None:
    prepared = prepare_tokens([local], tmp_path / "out", vocabulary=300, validation=0.1, chunk_bytes=500)
    counts = prepared.manifest["counts"]
    assert prepared.about["source"] == local
    assert prepare_tokens([local], tmp_path / "out", vocabulary=300, validation=0.1, chunk_bytes=500).folder
    if NAMES[local].validation:
        assert (counts["documents"], counts["validation_documents"]) == (46, 6)
    else:
        assert counts["documents"] == 40
        assert 3 <= counts["validation_documents"] <= 6


def test_any_other_data_set_by_path_and_configuration() -> None:
    assert find_data("hub:roneneldan/TinyStories") == HubData("roneneldan/TinyStories", streaming=True)
    assert find_data("hub:a/b:c", "body") == HubData("a/b", "c", "body", streaming=True)
    assert find_data("folder/file.txt") is None
    assert find_data("c4") is NAMES["c4"]


def test_a_field_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    _parquet(tmp_path / "a/train.parquet", {"body": ["text"], "n": [1]})
    data = HubData(str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"has no field 'text'; its fields are 'body', 'n': .* --field"):
        next(hub_documents(data))
    with pytest.raises(ValueError, match=r"field 'n' holds 1, not text"):
        next(hub_documents(replace(data, field="n")))


@pytest.mark.parametrize("streaming", [False, True])
def test_no_network_is_one_line(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.logging.getLogger("huggingface_hub"), "level", hub.logging.WARNING)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot load a/b from the Hugging Face hub \(.+\); check the name") as caught:
        next(hub_documents(HubData("a/b"), streaming=streaming))
    assert "\n" not in str(caught.value)
    assert hub.logging.getLogger("huggingface_hub").level == hub.logging.WARNING
    with pytest.raises(ValueError, match="cannot load"):
        prepare_tokens(["hub:a/b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
