"""Links that somebody has put where a run writes: what they point to is never written to."""

import os
from pathlib import Path

import pytest

from sharpwise.files import write_whole
from sharpwise.train.data import prepare_tokens
from sharpwise.train.run import run
from train.kill_rig import settings
from train.run_rig import ADAMW, prepare, stop_after

pytestmark = pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="links")
PRECIOUS = "precious\n"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text(PRECIOUS)
    return path


def test_files_are_written_aside_under_names_that_nobody_foresees(tmp_path: Path, victim: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (f".page.html.{os.getpid()}", f".writing-page.html.{os.getpid()}", ".writing-page.html", "page.html"):
        (folder / name).symlink_to(victim)
    write_whole(folder / "page.html", "a page")
    assert victim.read_text() == PRECIOUS
    assert (folder / "page.html").read_text() == "a page"
    assert not (folder / "page.html").is_symlink()


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "blocks.json", "facts.json", "sample.txt"])
def test_a_run_follows_no_link(tmp_path: Path, victim: Path, name: str) -> None:
    given = settings(prepare(tmp_path), ADAMW)
    folder = tmp_path / "run"
    run(given, folder, **stop_after(2))
    (folder / name).unlink(missing_ok=True)
    if name.endswith(".jsonl"):  # as a new run begins, with nothing to go on from
        for path in (folder / "checkpoints").iterdir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    (folder / name).symlink_to(victim)
    if name.endswith(".jsonl"):
        with pytest.raises(OSError, match=name):
            run(given, folder)
    else:
        assert run(given, folder).state == "finished"
    assert victim.read_text() == PRECIOUS


def test_prepare_follows_no_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "text.txt").write_text("A fox jumps.\n" * 99)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "progress.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match=r"cannot write into .*symbolic links"):
        prepare_tokens([tmp_path / "text.txt"], tmp_path / "tokens", vocabulary=300)
    assert victim.read_text() == PRECIOUS
