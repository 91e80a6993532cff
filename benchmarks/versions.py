"""Runs tests under the Python and torch that it is started with, and notes how they ended; no times.

    python benchmarks/versions.py                          all tests that are not slow
    python benchmarks/versions.py tests/engine             a part

`make test TORCH='torch==2.11.0'` makes `.venv` one of another torch, `PYTHON=python3.13` of another Python. What a run
finds goes to results/versions.json, in the place of an earlier one of the same versions and the same part.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from environment import environment

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/versions.json"
KINDS = ("passed", "failed", "error", "errors", "skipped", "xfailed", "deselected")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tests", nargs="*", default=["tests"], help="folders or files, from the repository's root")
    args = parser.parse_args()
    about = environment()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *args.tests]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout[-5000:])
    last = done.stdout.rstrip().rpartition("\n")[2]
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (\w+)", last) if kind in KINDS}
    if not counts.get("passed"):
        sys.exit(f"no test passed, nothing noted: {last!r}")
    failed = sorted(re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE))
    versions = {"python": platform.python_version(), "torch": about["versions"]["torch"], "tests": args.tests}
    found = json.loads(RESULT.read_text()) if RESULT.exists() else []
    found = [one for one in found if {key: one[key] for key in versions} != versions]
    found.append({**versions, **counts, "not_passed": failed, "environment": about})
    RESULT.write_text(json.dumps(sorted(found, key=lambda one: (one["python"], one["torch"])), indent=1) + "\n")
    print(f"Saved {RESULT.relative_to(ROOT)}: {last}")


if __name__ == "__main__":
    main()
