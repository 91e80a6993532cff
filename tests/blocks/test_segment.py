"""What a segment takes of its parameter, and its sums, against a loop over output rows."""

import pytest
import torch

from sharpwise.blocks import Segment
from sharpwise.blocks.segment import segment_sums

CASES = {
    "all of a matrix": Segment("w", (6, 5)),
    "a range": Segment("w", (6, 5), start=2, length=3),
    "columns": Segment("w", (5, 6), dim=1, start=2, length=3),
    "every other": Segment("w", (12, 5), start=1, length=2, stride=4, count=3),
    "ranges that touch": Segment("w", (12, 5), start=4, length=2, stride=2, count=3),
    "experts": Segment("w", (3, 6, 5), dim=1, start=2, length=3, stacked=True),
    "experts, by columns": Segment("w", (3, 5, 6), dim=2, stacked=True),
    "a kernel": Segment("w", (6, 4, 2), start=3, length=3),
    "a vector": Segment("b", (7,), start=2, length=4, bias=True),
    "a scalar": Segment("b", (), bias=True),
}


@pytest.mark.parametrize("segment", CASES.values(), ids=CASES)
def test_rows_matrices_and_sums_are_those_of_a_loop(segment):
    whole = torch.randn(segment.shape, generator=torch.Generator().manual_seed(0))
    copies = list(whole) if segment.stacked else [whole]
    dim = segment.dim - segment.stacked
    by_row = [list(copy.movedim(dim, 0)) if copy.dim() else [copy] for copy in copies]
    own = segment.row_index().tolist()
    taken = [[rows[i] for i in own] for rows in by_row]

    stacked = torch.stack([torch.stack(rows, dim) if segment.shape else rows[0] for rows in taken])
    assert torch.equal(segment.take(whole), stacked if segment.stacked else stacked[0])
    if segment.is_matrix:
        for matrix, rows in zip(segment.matrices(whole), taken, strict=True):
            assert torch.equal(matrix, torch.stack([row.flatten() for row in rows]))
    sums = torch.tensor([[float(row.double().sum()) for row in rows] for rows in by_row])
    torch.testing.assert_close(segment.row_sums(whole), sums.double())
    total = sum(float(row.double().sum()) for rows in taken for row in rows)
    assert float(segment_sums(whole, [segment])[0]) == pytest.approx(total)


def test_sums_of_the_segments_of_one_parameter():
    whole = torch.arange(24.0).view(6, 4)
    parts = [Segment("w", (6, 4), start=i, length=2) for i in (0, 2, 4)]
    assert [float(x) for x in segment_sums(whole, parts)] == [28.0, 92.0, 156.0]
