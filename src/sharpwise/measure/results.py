"""Measurements on disk: a JSON file per probe, and the page of all of them."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from sharpwise.files import parse_json, remove_leftovers, write_whole
from sharpwise.probes import Measurement
from sharpwise.report.measure_page import write_measure_page
from sharpwise.report.measure_text import PLACEHOLDERS, Study


def place_of(subject: Path) -> Path:
    """Where measurements of a run or model are written, where nobody says: beside what was measured."""
    return subject / "measure"


def add(folder: Path, measurements: Iterable[Measurement]) -> None:
    """Put measurements to those that are there; of the same probe at the same step the new one stays."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    by_probe: dict[str, list[Measurement]] = {}
    for one in measurements:
        by_probe.setdefault(one.probe, []).append(one)
    for probe, new in by_probe.items():
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', probe).strip('-')}.json"
        anew = {(one.probe, one.step) for one in new}
        kept = [one for one in read(path) if (one.probe, one.step) not in anew] if path.exists() else []
        whole = sorted([*kept, *new], key=lambda one: -1 if one.step is None else one.step)
        write_whole(path, json.dumps([json.loads(one.to_json()) for one in whole], indent=1) + "\n")


def read(path: Path) -> list[Measurement]:
    """The measurements of one file. Raises ValueError where it is none."""
    try:
        return [Measurement.from_json(json.dumps(one)) for one in parse_json(path.read_text(encoding="utf-8"))]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of measurements ({error}); move it away to measure anew") from None


def write_page(folder: Path, title: str, study: Study = PLACEHOLDERS) -> Path:
    """The page of all measurements in a folder; `study`: what its last command compares."""
    found = [one for path in sorted(folder.glob("*.json")) for one in read(path)]
    return write_measure_page(folder / "index.html", found, title, study)
