"""Controls: how large an update may be."""

from sharpwise.controls.base import Control, Over, Sums

__all__ = ["Control", "Over", "Sums"]
