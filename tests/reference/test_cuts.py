"""The hand-written index sets fit the models, and their counts are the published ones."""

import math

import numpy as np
import pytest

from reference import cuts, models
from sharpwise.blocks.map import BlockMap


@pytest.mark.parametrize("name", models.BUILD)
def test_cuts_partition_the_model(name):
    named = list(models.build(name).named_parameters())
    for parameter, parts in cuts.pieces(name, [n for n, _ in named]).items():
        index = np.sort(np.concatenate([part.index for part in parts]))
        blocks = np.sort(np.concatenate([block for part in parts for block in part.blocks]))
        numel = dict(named)[parameter].numel()
        assert np.array_equal(index, np.arange(numel)), parameter
        assert np.array_equal(blocks, np.arange(numel)), parameter


def test_state_of_gpt2_124m():
    blocks, size = cuts.gpt2_124m_state()
    assert (blocks, size) == (217_227, 498_628_732)
    assert round(size / 2**20, 1) == 475.5


@pytest.mark.parametrize("name", models.BUILD)
def test_block_map_finds_the_same_elements(name):
    """Roles, layers and elements of every segment, and Adam-mini's number of blocks of q and k."""
    model = models.build(name)
    named = list(model.named_parameters())
    block_map = BlockMap.of(model, strict=True)
    for parameter, parts in cuts.pieces(name, [n for n, _ in named]).items():
        segments = block_map[parameter]
        assert [(s.role, s.layer, s.bias) for s in segments] == [(p.role, p.layer, p.bias) for p in parts], parameter
        shape = dict(named)[parameter].shape
        grid = np.arange(math.prod(shape)).reshape(shape)
        for segment, part in zip(segments, parts, strict=True):
            rows = grid.take(segment.row_index().numpy(), axis=segment.dim)
            assert np.array_equal(np.sort(rows.ravel()), np.sort(part.index)), parameter
            if part.role in ("q", "k") and not part.bias:
                assert segment.heads == len(part.blocks), parameter
