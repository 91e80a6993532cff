"""Elements of segments: taken out of parameters and put back, and summed up by segment, role, type and layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sharpwise.blocks import Segment, canonical_name
from sharpwise.hints import nearest
from sharpwise.probes.estimate import By, Estimate
from sharpwise.probes.parts import Group, groups, labels

# --- one vector over selected elements -------------------------------------------------------------------------------


class Selection:
    """The elements of some segments as one flat vector: segment by segment, each in the order of its parameter.

    Args:
        segments: in the order of the vector.
        names: of the parameters in the model, by canonical name.
    """

    def __init__(self, segments: Sequence[Segment], names: Sequence[str]) -> None:
        in_model = {canonical_name(name): name for name in names}
        self.segments = tuple(segments)
        self.labels = list(labels(self.segments).values())
        self.names = [in_model[s.name] for s in self.segments]
        self.sizes = [s.numel for s in self.segments]
        self.dim = sum(self.sizes)

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors of whole parameters, by name -> the vector [dim]."""
        pieces = zip(self.segments, self.names, strict=True)
        return torch.cat([segment.take(tensors[name]).reshape(-1) for segment, name in pieces])

    def scatter(self, flat: Tensor) -> dict[str, Tensor]:
        """The vector -> tensors of whole parameters, by name, zero where nothing is selected."""
        whole: dict[str, Tensor] = {}
        for segment, name, piece in zip(self.segments, self.names, flat.split(self.sizes), strict=True):
            if segment.whole and segment.count == 1:
                whole[name] = piece.view(segment.shape)
                continue
            own = whole.setdefault(name, flat.new_zeros(segment.shape))
            shape = segment.take(own).shape
            segment.as_rows(own).index_copy_(segment.first_dim, segment.row_index(flat.device), piece.view(shape))
        return whole

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The vector by segment, shaped as the segment's rows of its parameter."""
        pieces = zip(self.labels, self.segments, flat.split(self.sizes), strict=True)
        return {label: piece.view(piece_shape(segment)) for label, segment, piece in pieces}

    def join(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """What `split` took apart; segments that are left out are zero.

        Raises:
            KeyError: a name that is none of the segments'.
        """
        unknown = sorted(set(pieces) - set(self.labels))
        if unknown:
            raise KeyError(f"no segment {unknown[0]!r} is selected{nearest(unknown[0], self.labels)}")
        like = next(iter(pieces.values()))
        parts = zip(self.labels, self.sizes, strict=True)
        return torch.cat([pieces[n].reshape(-1) if n in pieces else like.new_zeros(size) for n, size in parts])

    def sums(self, flat: Tensor) -> np.ndarray:
        """Of a vector [dim], the sum per segment, float64 [segments]."""
        pieces = flat.split(self.sizes)
        return torch.stack([piece.sum(dtype=torch.float64) for piece in pieces]).cpu().numpy()


def piece_shape(segment: Segment) -> tuple[int, ...]:
    """Of the rows of a segment: the parameter's shape with so many rows."""
    sizes = enumerate(segment.shape)
    return tuple(segment.rows if d == segment.dim else n for d, n in sizes if not segment.first_dim <= d < segment.dim)


def square_sums(tensors: Sequence[Tensor | None], parameters: Sequence[Sequence[Segment]]) -> np.ndarray:
    """Sum of squares per segment, float64 [segments], of tensors of whole parameters (None is zero).

    Rows are summed up in the tensors' own precision (fp32 at least), without a copy of them, and then in fp64.
    """
    found: list[Tensor] = []
    for tensor, segments in zip(tensors, parameters, strict=True):
        if tensor is None:
            found += [torch.zeros((), dtype=torch.float64, device="cpu")] * len(segments)
            continue
        rows = _row_norms(segments[0].as_rows(tensor), segments[0].first_dim).double().square_()
        found += [rows.sum() if s.whole else rows[s.row_index(rows.device)].sum() for s in segments]
    device = next((f.device for f in reversed(found) if f.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([f.to(device) for f in found]).cpu().numpy()


def _row_norms(tensor: Tensor, dim: int) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.ndim < 2:
        return tensor.abs().to(wide).reshape(-1)
    others = [d for d in range(tensor.ndim) if d != dim]
    return torch.linalg.vector_norm(tensor, dim=others, dtype=wide)


# --- by segment, layer, type and role --------------------------------------------------------------------------------


class Groups:
    """All groups of some segments: everything, types, roles, types and roles per layer, and the segments themselves."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.all = groups(segments, ("model", "type", "role"))
        for layer in sorted({s.layer for s in segments if s.layer is not None}):
            self.all += _in_layer(segments, layer, "type") + _in_layer(segments, layer, "role")
        self.all += groups(segments, ("segment",))
        self.sizes = np.array([s.numel for s in segments], dtype=np.float64)
        self.matrix = np.zeros((len(self.all), len(segments)))
        for row, group in enumerate(self.all):
            self.matrix[row, list(group.members)] = 1

    @property
    def elements(self) -> np.ndarray:
        """Of every group, float64 [groups]."""
        return np.array([group.elements for group in self.all], dtype=np.float64)

    def sums(self, of_segments: np.ndarray) -> np.ndarray:
        """[..., segments] -> [..., groups]."""
        return of_segments @ self.matrix.T

    def means(self, of_segments: np.ndarray) -> np.ndarray:
        """Sums of segments [..., segments] -> means over the elements of groups [..., groups], 0 of no element."""
        return self.sums(of_segments) / np.maximum(self.elements, 1)

    def indices(self, by: By) -> list[int]:
        """Which of the groups are by this."""
        return [i for i, group in enumerate(self.all) if group.by == by]

    def estimates(
        self,
        quantity: str,
        values: np.ndarray,
        errors: np.ndarray | None,
        *,
        samples: int,
        unit: str = "",
        kind: Literal["t-interval", "residual", "exact"] = "t-interval",
        by: Sequence[By] | None = None,
    ) -> list[Estimate]:
        """One estimate per group from vectors [groups]."""
        return [
            Estimate(
                quantity,
                group.by,
                group.of,
                float(values[i]),
                None if errors is None else float(errors[i]),
                kind,
                group.layer,
                samples,
                group.elements,
                unit,
            )
            for i, group in enumerate(self.all)
            if by is None or group.by in by
        ]


def _in_layer(segments: Sequence[Segment], layer: int, by: By) -> list[Group]:
    """Types or roles among the segments of one layer; both are of the layer, and told apart by their names."""
    here = [i for i, s in enumerate(segments) if s.layer == layer]
    found = groups([segments[i] for i in here], (by,))
    return [replace(g, by="layer", layer=layer, members=tuple(here[i] for i in g.members)) for g in found]
