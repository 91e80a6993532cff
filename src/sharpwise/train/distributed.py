"""Several processes that train together: how they agree, sum, and say which of them failed.

Small things (decisions, errors, configurations) go over gloo, from host to host; only sums of losses and gradients go
over the device's own backend. What rank 0 alone does, such as reading and writing the folder of the run, it does
through `from_main`, so that an error there ends all processes with the same message.
"""

import copy
import logging
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from sharpwise.shards import is_dtensor, local, place_gradient
from sharpwise.train.config import MeshConfig
from sharpwise.train.parallel import check_same_logits, mesh_sizes, sample_logits, shard_model
from sharpwise.train.world import World, is_marked, mark

logger = logging.getLogger("sharpwise.train")

T = TypeVar("T")

ROLL_CALL = 5.0  # seconds; torchrun kills what is left after 30
BUCKET = 2**22  # elements that are summed at once
_FAILED = "sharpwise/failed/{}"


class Unreachable(ConnectionError):
    """Other processes do not answer; the message names them."""


class Several(World):
    """One of several processes in a process group.

    Attributes:
        hosts: a group over gloo.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.share, self.shares = self.rank, self.size
        self.hosts = dist.new_group(backend="gloo", timeout=timeout)
        self._writers = dist.new_group(backend="gloo", timeout=timeout)
        self.sizes: dict[str, int] = {}
        self._replicas: Any = None

    def about(self) -> dict[str, Any]:
        """How many processes, in which mesh."""
        return {"processes": self.size, "mesh": self.sizes}

    def for_writer(self) -> "Several":
        """See World."""
        other = copy.copy(self)
        other.hosts = self._writers
        return other

    # -- agreeing --------------------------------------------------------------------------------------------------

    def from_main(self, do: Callable[[], T]) -> T:
        """See World."""
        result, error = self._on_main(do)
        return self._sent(result, error)

    def on_main(self, do: Callable[[], T]) -> T | None:
        """See World."""
        result, error = self._on_main(do)
        self._sent(None, error)
        return result

    def _on_main(self, do: Callable[[], T]) -> tuple[T | None, Exception | None]:
        return _tried(do) if self.is_main else (None, None)

    def _sent(self, result: Any, error: Exception | None) -> Any:
        sent = [result, None if error is None else _portable(error)]
        dist.broadcast_object_list(sent, src=0, group=self.hosts)
        if sent[1] is not None:
            raise mark(sent[1], everywhere=True) from error
        return sent[0]

    def together(self, do: Callable[[], T]) -> T:
        """See World."""
        result, error = _tried(do)
        errors = self.all(None if error is None else _portable(error))
        failed = {rank: found for rank, found in enumerate(errors) if found is not None}
        if failed:
            rank, first = next(iter(failed.items()))
            alike = len(failed) == self.size and len({str(found) for found in failed.values()}) == 1
            raise mark(first if alike else with_rank(first, rank), everywhere=True) from error
        return result  # type: ignore[return-value]

    def all(self, here: Any) -> list[Any]:
        """What every process says, by rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, here, group=self.hosts)
        return found

    def any(self, here: bool) -> bool:
        """See World."""
        flag = torch.tensor(here, dtype=torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.hosts)
        return bool(flag)

    def check_same(self, what: str, here: Mapping[str, Any]) -> None:
        """See World."""
        first = self.from_main(lambda: dict(here))
        keys = [key for key in {**first, **here} if first.get(key) != here.get(key)]
        own = f"{keys[0]} is {here.get(keys[0])} there, {first.get(keys[0])} on rank 0" if keys else ""
        for rank, differs in enumerate(self.all(own)):
            if differs:
                wrong = ValueError(
                    f"rank {rank} has another {what} than rank 0: {differs}. All processes must be started with the "
                    "same command, and find the same code and files"
                )
                raise mark(wrong, everywhere=True)

    # -- the model -------------------------------------------------------------------------------------------------

    def arrange(self, mesh: MeshConfig, sequences: int) -> None:
        """See World."""
        self.sizes = mesh_sizes(mesh, self.size)
        self.share, self.shares = self.rank // self.sizes["tp"], self.size // self.sizes["tp"]
        if sequences < self.shares:
            raise ValueError(
                f"batch.sequences={sequences} are too few for {self.shares} processes with a share each; start "
                "fewer, take a larger batch, or a larger mesh.tp"
            )

    def distribute(self, model: nn.Module, device: torch.device) -> None:
        """See World."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        used = {name: size for name, size in self.sizes.items() if size > 1}
        mesh = init_device_mesh(device.type, tuple(used.values()), mesh_dim_names=tuple(used))
        whole = _tried(lambda: sample_logits(model, torch.device("cpu")))[0] if "tp" in used else None
        self.together(lambda: shard_model(model, mesh))
        model.to(device)
        if whole is not None:
            self._check_cut(model, whole, device)
        self._replicas = mesh.get_group("replicate") if "replicate" in used else None

    def _check_cut(self, model: nn.Module, whole: Tensor, device: torch.device) -> None:
        """Raise ValueError on all where the model fails, or computes something else, now that its layers are cut."""
        cut, error = _tried(lambda: sample_logits(model, device))
        if error is not None and _is_of_connection(error):
            raise error
        self.rest(model)
        exact = device.type == "cpu" and all(p.dtype == torch.float32 for p in model.parameters())
        self.together(
            lambda: check_same_logits(model, whole, error if cut is None else cut, self.sizes["tp"], exact=exact)
        )

    def gathered(self, model: nn.Module) -> dict[str, Tensor] | None:
        """See World. One tensor at a time; tied ones stay one."""
        whole: dict[str, Tensor] = {}
        seen: dict[Any, Tensor] = {}
        for name, tensor in model.state_dict().items():
            key = (local(tensor).data_ptr(), tuple(tensor.shape)) if local(tensor).numel() else name
            if self.from_main(lambda key=key: key in seen):  # type: ignore[misc]
                whole[name] = seen.get(key, tensor)
                continue
            full: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
            whole[name] = seen[key] = full.to("cpu", copy=True) if self.is_main else torch.empty(0)
        return whole if self.is_main else {}

    # -- a step ----------------------------------------------------------------------------------------------------

    def before_pass(self, model: nn.Module, last: bool) -> None:
        """See World."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)

    @torch.no_grad()
    def sum_gradients(self, model: nn.Module) -> None:
        """See World. FSDP has summed its own; others are summed over the replicas, in buckets, all at the same time."""
        if isinstance(model, FSDPModule):
            return
        for parameter in model.parameters():
            place_gradient(parameter)
        if self._replicas is None:
            return
        pending = []
        for bucket in _buckets(self._gradients(model)):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            pending.append((bucket, flat, dist.all_reduce(flat, group=self._replicas, async_op=True)))
        for bucket, flat, work in pending:
            work.wait()
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _gradients(self, model: nn.Module) -> list[Tensor]:
        """Those that any process has, zero where this one has none: its windows did not use that part of the model."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        dist.all_reduce(has, dist.ReduceOp.MAX, group=self.hosts)
        found = [p for p, used in zip(parameters, has.tolist(), strict=True) if used]
        for p in found:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [local(p.grad) for p in found if p.grad is not None]

    def rest(self, model: nn.Module) -> None:
        """See World."""
        if isinstance(model, FSDPModule):
            model.reshard()

    def sum(self, here: Tensor) -> Tensor:
        """See World."""
        total = here.clone() if self.rank % self.sizes["tp"] == 0 else torch.zeros_like(here)
        dist.all_reduce(total)
        return total

    # -- failing ---------------------------------------------------------------------------------------------------

    def explained(self, error: Exception) -> Exception:
        """See World. Where the others did not answer it waits a little to hear which of them failed, and why."""
        if is_marked(error):
            return error
        if not _is_of_connection(error):
            self._post(f"{type(error).__name__}: {error}")
            return mark(with_rank(error, self.rank), everywhere=False)
        self._post("")
        said = self._roll_call()
        silent = [str(rank) for rank, text in said.items() if text is None]
        parts = [f"rank {rank} failed: {text}" for rank, text in said.items() if text]
        if silent:
            parts.append(f"no answer from rank {', '.join(silent)}, which was killed, hangs or cannot be reached")
        what = "; ".join(parts) or "the processes lost each other"
        lost = Unreachable(
            f"rank {self.rank} of {self.size}: {what}. The same command goes on from the last checkpoint. "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        )
        return mark(lost, everywhere=False)

    def _post(self, text: str) -> None:
        try:
            _store().set(_FAILED.format(self.rank), text)
        except RuntimeError:
            logger.debug("the store of the process group is gone")

    def _roll_call(self) -> dict[int, str | None]:
        """What the other ranks say about their end, None for those that say nothing for a while."""
        said: dict[int, str | None] = {rank: None for rank in range(self.size) if rank != self.rank}
        until = time.monotonic() + ROLL_CALL
        try:
            store = _store()
            while None in said.values() and time.monotonic() < until:
                for rank in [rank for rank, text in said.items() if text is None]:
                    if store.check([_FAILED.format(rank)]):
                        said[rank] = store.get(_FAILED.format(rank)).decode()
                time.sleep(0.1)
        except RuntimeError:
            logger.debug("the store of the process group is gone")
        return said


def with_rank(error: Exception, rank: int) -> Exception:
    """An error of the same kind with the rank in front of what it says to a user; of a bug, the same with a note."""
    if isinstance(error, OSError) and error.errno is not None:
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        return OSError(error.errno, f"rank {rank}: {what}")
    for kind in (ValueError, ImportError, OSError):
        if isinstance(error, kind):
            return kind(f"rank {rank}: {error}")
    error.add_note(f"on rank {rank}")
    return error


def _is_of_connection(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "Connection closed by peer", "Connection reset", "NCCL", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _tried(do: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return do(), None
    except Exception as error:
        return None, error


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same and can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype each, in their order, until there is enough for a sum."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        bucket = by_dtype.setdefault(gradient.dtype, [])
        bucket.append(gradient)
        if sum(g.numel() for g in bucket) >= BUCKET:
            yield by_dtype.pop(gradient.dtype)
    yield from by_dtype.values()


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
