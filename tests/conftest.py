"""What every test starts from: one thread, fixed seeds, Ctrl-C as usual, GPU tests skipped where there is no GPU."""

import gc
import random
import signal
from collections import defaultdict
from collections.abc import Hashable

import hypothesis
import numpy as np
import pytest
import torch
from pairwise import columns, pairwise

# Results are bit-repeatable only at a fixed number of threads, and xdist runs two processes on two cores.
torch.set_num_threads(1)
# A shell starts what is to run in the background (`nohup make test &`) with Ctrl-C ignored, children inherit that, and
# some tests send it to theirs. What is ignored stays so in a new process; what is handled is as usual there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Nothing here is timed: a slow moment of the machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


KIN = {"adasgd", "blockwise-adam", "AdaSGD", "BlockwiseAdam"}
"""Adam-mini's own rule under other cuts."""
THINNED = {"test_devices.py", "test_launches.py", "test_bad_devices.py"}
FEW = {"plain", "everything", "clip-skip", "clip, skip", "two"}
ELEMENTWISE = {"lion", "sgd", "sgd-sai"}
"""Rules that move on several devices as AdamW does: of them `make test` asks what combines the most."""
COMBINED = {"plain", "clip, skip", "stochastic", "blockwise, clip"}
FOR_SOME = {
    "test_a_large_model_asks_for_no_more": {"adamw"},
    "test_moved_to_another_cuda_device": {"adamw", "adam-mini", "muon"},
}
"""Tests that take seconds for each optimizer, and those that `make test` asks."""


def is_for_later(item: pytest.Item) -> bool:
    """Whether a test waits for `make test-all`: most of what goes over all optimizers, where that repeats itself."""
    words = getattr(item, "callspec", None) and [str(value) for value in item.callspec.params.values()]
    if not words or item.path.parent.name not in ("engine", "battery", "identities"):
        return False
    said = {word.strip("'\"() ") for value in words for word in value.split(", ")} | set(words)
    if said & KIN:
        return item.path.name != "test_constructors.py"
    if item.path.name not in THINNED:
        return False
    name = getattr(item, "originalname", "")
    if name in FOR_SOME:
        return not said & FOR_SOME[name]
    if "adapm" in said or "gpt2" in said:
        return not said & {"plain", "everything"}
    several = name == "test_several_devices_do_what_one_does"
    if several and said & ELEMENTWISE and not set(words) & COMBINED:
        return True
    return "with the CPU" in said and not (several and said & FEW)


def thin(items: list[pytest.Item]) -> None:
    """Leave to `make test-all` what adds no pair of values to a test that is marked `pairwise`."""
    cases: dict[Hashable, dict[tuple[Hashable, ...], pytest.Item]] = defaultdict(dict)
    for item in items:
        if item.get_closest_marker("pairwise") and not {"slow", "gpu"} & set(item.keywords):
            cases[item.path, item.originalname][columns(item.callspec.params.values())] = item
    for own in cases.values():
        for case in own.keys() - set(pairwise(list(own))):
            own[case].add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_for_later(item):
            item.add_marker(pytest.mark.slow)
    thin(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is there before the first test stays: half a million objects, which every full collection would go over."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Some libraries report what is still alive when the interpreter ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
