"""Fixed ratios of learning rates from one measurement: what `SharpnessLR` would follow, as a `BlockwiseLR`."""

import math
from typing import Any

from torch import nn

from sharpwise.block_lr import BlockwiseLR, SharpnessLR
from sharpwise.block_lr.blockwise import KINDS, argument_of
from sharpwise.blocks.map import Blocks, blocks_for
from sharpwise.probes.directional import probed


def calibrate(model: nn.Module, batches: Any, *, blocks: Blocks = None, **settings: Any) -> BlockwiseLR:
    """Ratios by the sharpness of the blocks of this model now.

    Args:
        model: it is left as it was.
        batches: as `sharpwise.probes.sharpness` takes them.
        blocks: the map of its segments, or overrides for the one that is made.
        **settings: of `SharpnessLR`, such as `power`, `max_ratio` and `normalize`; source="norm_11" measures that.

    Returns:
        `BlockwiseLR` with the ratios, to three digits; 1 for types that the model has not.

    Raises:
        ValueError: for settings, or batches that the probe refuses.
    """
    own = SharpnessLR(**{"source": "probe", **settings})
    if own.by != "type":
        raise ValueError(f"{own.name}: calibrate gives one ratio per type, got by={own.by!r}")
    if own.measures != "probe":
        raise ValueError(f"{own.name}: calibrate has a model and no optimizer, got source={own.source!r}; leave it out")
    known = blocks_for(model, blocks, "calibrate")
    own.check(known.segments)
    by_name = probed(model, batches, known, **own.probe_settings)
    nothing = [math.nan]
    values = [by_name.get(name, nothing * len(known[name])) for name in known.names()]
    found = [own.updated(math.nan, value) for per_segment in values for value in per_segment]
    segments = [segment for name in known.names() for segment in known[name]]
    ratios = own.multipliers(segments, {own: found})
    by_kind = {argument_of(segment): ratio for segment, ratio in zip(segments, ratios, strict=True)}
    rounded: dict[str, Any] = {kind: float(f"{by_kind.get(kind, 1.0):.3g}") for kind in KINDS}
    return BlockwiseLR(**rounded, decay=own.decay)


__all__ = ["calibrate"]
