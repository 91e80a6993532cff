"""How large updates may be; see `sharpwise.controls.base`."""

from sharpwise.controls.angular import Angular
from sharpwise.controls.base import Control, Over, Sums
from sharpwise.controls.hyperball import Hyperball
from sharpwise.controls.l2 import L2
from sharpwise.controls.rms_clip import RMSClip
from sharpwise.controls.spelling import CONTROLS, make_control

__all__ = ["CONTROLS", "L2", "Angular", "Control", "Hyperball", "Over", "RMSClip", "Sums", "make_control"]
