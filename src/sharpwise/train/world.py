"""Where a process stands among those that train together, and what they do together; for one alone, nothing.

Everything that a run asks of other processes goes through a `World`. The class itself is one process alone: it answers
every question for itself, `torch.distributed` is not imported, and a run comes out to the bit as it would without. The
other kind is `sharpwise.train.distributed.Several`; `sharpwise.train.launch.joined` says which of them a process is in.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sharpwise.train.config import MeshConfig

T = TypeVar("T")


class World:
    """One process alone.

    Attributes:
        rank, size: of this process, of all.
        share, shares: the batch is cut into so many shares, and this process has that one of them.
    """

    rank: int = 0
    size: int = 1
    share: int = 0
    shares: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def about(self) -> dict[str, Any]:
        """What `environment.json` says about the processes, nothing for one."""
        return {}

    def for_writer(self) -> "World":
        """The same processes, for the thread that writes checkpoints while the main thread goes on."""
        return self

    # -- agreeing --------------------------------------------------------------------------------------------------

    def from_main(self, do: Callable[[], T]) -> T:
        """What `do` gives on rank 0, on all; an error there is raised on all. The result is sent: plain and small."""
        return do()

    def on_main(self, do: Callable[[], T]) -> T | None:
        """The same, but the result stays on rank 0, and the others have None."""
        return do()

    def together(self, do: Callable[[], T]) -> T:
        """What `do` gives here; an error on any process is raised on all, with its rank. `do` talks to no other."""
        return do()

    def any(self, here: bool) -> bool:
        """Whether something holds on any process."""
        return here

    def check_same(self, what: str, here: Mapping[str, Any]) -> None:
        """Raise ValueError on all processes where they do not all have the same values, naming the first difference."""

    def explained(self, error: Exception) -> Exception:
        """What to raise in place of an error: one that says which process it is about."""
        return error

    # -- the model -------------------------------------------------------------------------------------------------

    def arrange(self, mesh: MeshConfig, sequences: int) -> None:
        """Take a place in the mesh that the configuration asks for, and a share of the batch.

        Raises:
            ValueError: it takes another number of processes, or there are more shares than sequences.
        """
        needed = max(mesh.fsdp, 1) * mesh.tp
        if needed > 1:
            raise ValueError(
                f"mesh.fsdp={mesh.fsdp} and mesh.tp={mesh.tp} take {needed} processes (or a multiple), and this is one "
                f"alone, in no process group: start torchrun --nproc-per-node {needed} -m sharpwise train ..., or "
                "--set mesh.fsdp=1 --set mesh.tp=1"
            )

    def distribute(self, model: nn.Module, device: torch.device) -> None:
        """Cut the parameters as the mesh says, and move them; they were built alike on all processes.

        Raises:
            ValueError: this model cannot be cut in this way.
        """

    def gathered(self, model: nn.Module) -> dict[str, Tensor] | None:
        """All weights, on the CPU of rank 0; {} on others, and None where the model has them as they are."""
        return None

    # -- a step ----------------------------------------------------------------------------------------------------

    def before_pass(self, model: nn.Module, last: bool) -> None:
        """Before every forward and backward pass of a step: gradients are exchanged in the last one."""

    def sum_gradients(self, model: nn.Module) -> None:
        """After the last: sum over the shares what is not summed yet."""

    def rest(self, model: nn.Module) -> None:
        """After forward passes without backward ones: let go of weights that were gathered for them."""

    def sum(self, here: Tensor) -> Tensor:
        """The sum over the shares of the batch."""
        return here


ALONE = World()


def mark(error: Exception, *, everywhere: bool) -> Exception:
    """Note of an error that it says whose it is; and whether all processes raise it, so that one needs to say it."""
    error._sharpwise_everywhere = everywhere  # type: ignore[attr-defined]
    return error


def is_marked(error: BaseException) -> bool:
    """Whether the error says which process it is about, or is of all."""
    return hasattr(error, "_sharpwise_everywhere")


def is_everywhere(error: BaseException) -> bool:
    """Whether all processes raise this error."""
    return getattr(error, "_sharpwise_everywhere", False)


# --- shares ----------------------------------------------------------------------------------------------------------


def share_of(n: int, share: int, shares: int) -> slice:
    """The part of n items, in their order, that is a share: sizes differ by one at most, the larger come first.

    >>> [share_of(5, i, 3) for i in range(3)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size, larger = divmod(n, shares)
    start = share * size + min(share, larger)
    return slice(start, start + size + (share < larger))


def passes_of(n: int, micro: int, shares: int) -> int:
    """Passes that every process takes for n windows, `micro` at a time: as many as the largest share needs.

    >>> passes_of(5, 1, 2)
    3
    """
    return math.ceil(math.ceil(n / shares) / micro)
