"""Hand-made models from drawn choices: the trace recovers what was built, every time."""

from types import SimpleNamespace as Choices

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.random_models import OPTIONS, VOCAB, build
from blocks.random_parts import Truth
from sharpwise.blocks import Segment
from sharpwise.blocks.trace import trace

ATTENTION = ("q", "k", "v")
CHOICES = st.fixed_dictionaries({name: st.sampled_from(options) for name, options in OPTIONS.items()})
IDS = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def described(parts: list[Segment]) -> dict[str, object]:
    """What segments say about a parameter, row by row."""
    rows: list[tuple[str, int | None]] = [("nothing", None)] * parts[0].output_size
    before = dict.fromkeys(ATTENTION, 0)
    for part in parts:
        for i, row in enumerate(part.row_index().tolist()):
            head = None if part.heads is None else before[part.role] + i * part.heads // part.rows
            rows[row] = (str(part.role), head)
        if part.heads is not None:
            before[part.role] += part.heads
    first = parts[0]
    return {
        "roles": [role for role, _ in rows],
        "heads": grouped(rows),
        "dim": first.dim,
        "stacked": first.stacked,
        "bias": first.bias,
        "layer": first.layer,
    }


def grouped(rows: list[tuple[str, int | None]]) -> set[tuple[int, ...]]:
    """Which rows belong together as a head."""
    heads: dict[tuple[str, int], list[int]] = {}
    for i, (role, head) in enumerate(rows):
        if head is not None:
            heads.setdefault((role, head), []).append(i)
    return {tuple(head) for head in heads.values()}


def expected(truth: Truth) -> dict[str, object]:
    return {
        "roles": [role for role, _ in truth.rows],
        "heads": grouped(list(truth.rows)),
        "dim": truth.dim,
        "stacked": truth.stacked,
        "bias": truth.bias,
        "layer": truth.layer,
    }


def check(**choices: object) -> None:
    c = Choices(**choices)
    torch.manual_seed(0)
    model, truth = build(c)
    traced = trace(model, None if c.embedding == "nn.Embedding" else IDS)
    assert list(traced.segments) == list(truth)
    assert traced.unused == (("unused",) if c.unused else ())
    for name, known in truth.items():
        if name in traced.unused:
            continue
        seen, right = described(traced.segments[name]), expected(known)
        if not known.exact:
            seen["heads"] = right["heads"]
        if c.container == "attributes" and c.place != "pre" and set(right["roles"]) == {"norm"}:
            seen["layer"] = right["layer"]  # between two layers, and no list of modules says to which it belongs
        assert seen == right, f"{name}: {traced.why[name]}"


@given(CHOICES)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_trace_recovers_what_was_built(choices):
    check(**choices)


@pytest.mark.slow
@given(CHOICES)
@settings(max_examples=3000, deadline=None)
def test_trace_recovers_what_was_built_in_many_models(choices):
    check(**choices)


@pytest.mark.parametrize(("name", "option"), [(name, o) for name, options in OPTIONS.items() for o in options])
def test_each_option_on_its_own(name, option):
    check(**{key: options[0] for key, options in OPTIONS.items()} | {name: option})
