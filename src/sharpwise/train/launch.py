"""What was launched: which process this is, and a process group with the others for as long as a run lasts."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from sharpwise.train.world import ALONE, World

TIMEOUT = 300.0  # seconds


@dataclass(frozen=True)
class Launch:
    """What a launcher such as torchrun says in the environment: rank of this process, how many, rank on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def of_environment() -> "Launch":
        """One process where nothing is said.

        Raises:
            ValueError: a part is missing, or makes no sense.
        """
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            return Launch()
        said = {name: os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        try:
            launch = Launch(*map(int, said.values()))
        except ValueError:
            raise ValueError(f"the environment says {said}, expected whole numbers, as torchrun sets them") from None
        if launch.size == 1:
            return Launch()
        if not 0 <= launch.rank < launch.size:
            raise ValueError(f"the environment says RANK={launch.rank} of WORLD_SIZE={launch.size} processes")
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ValueError(
                f"the environment says RANK={launch.rank} of WORLD_SIZE={launch.size} processes, but not "
                f"{' and '.join(missing)}, where they meet: there is no process group. Start torchrun "
                "--nproc-per-node N -m sharpwise train ..., or unset RANK and WORLD_SIZE to train in one process"
            )
        return launch


@contextmanager
def joined() -> Iterator[World]:
    """This process among those that were launched with it, or alone.

    Raises:
        ValueError: the environment makes no sense, or the others cannot be reached.
    """
    launch = Launch.of_environment()
    if launch.size == 1:
        yield ALONE
        return
    with _group(launch) as timeout:
        from sharpwise.train.distributed import Several  # one process alone does without torch's sharding

        world = Several(timeout)
        get_error_handler().initialize()
        try:
            yield world
        except Exception as error:
            found = world.explained(error)
            _record(found)
            if found is error:
                raise
            raise found from error


@contextmanager
def _group(launch: Launch) -> Iterator[timedelta]:
    """A process group of all, and how long one waits for another; a group that is there already stays.

    Raises:
        ValueError: they cannot be reached.
    """
    timeout = timedelta(seconds=_timeout())
    owned = not dist.is_initialized()
    if owned:
        cuda = launch.local_rank < torch.cuda.device_count()
        if cuda:
            torch.cuda.set_device(launch.local_rank)
        try:
            store = _meet(launch, timeout)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"rank {launch.rank} of {launch.size}: no process group at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({error}); start all processes with torchrun, or with the same "
                "MASTER_ADDR, MASTER_PORT and WORLD_SIZE and a RANK each"
            ) from error
    yield timeout
    # After an error the others may be gone: the end of the process ends the group.
    if owned:
        dist.destroy_process_group()


def _meet(launch: Launch, timeout: timedelta) -> dist.Store:
    """A store that is new to all processes.

    torchrun keeps its store when it starts the processes again, with the addresses of those that have died in it. So
    every process asks with a word of its own, and rank 0 answers all with the name of a fresh part of the store.

    Raises:
        RuntimeError: not all have come in time.
    """
    store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.size, timeout=timeout))
    if launch.rank > 0:
        word = secrets.token_hex(8)
        store.set(f"sharpwise/asks/{launch.rank}", word)
        store.wait([f"sharpwise/answer/{word}"], timeout)
        place = store.get(f"sharpwise/answer/{word}").decode()
        store.set(f"{place}/heard/{launch.rank}", "")
        return dist.PrefixStore(place, store)
    place = f"sharpwise/{secrets.token_hex(8)}"
    waiting = set(range(1, launch.size))
    until = time.monotonic() + timeout.total_seconds()
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"sharpwise/asks/{rank}"]):
                store.set(f"sharpwise/answer/{store.get(f'sharpwise/asks/{rank}').decode()}", place)
            if store.check([f"{place}/heard/{rank}"]):
                waiting.discard(rank)
        if waiting and time.monotonic() > until:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(waiting)))} did not come")
        time.sleep(0.02)
    return dist.PrefixStore(place, store)


def _record(error: Exception) -> None:
    """Leave it to torchrun, which shows it: the message alone where that is enough."""
    try:
        if isinstance(error, ValueError | OSError | ImportError | ArithmeticError):
            raise type(error)(str(error))
        raise error
    except Exception as found:
        get_error_handler().record_exception(found)


def _timeout() -> float:
    """Seconds that a process waits for the others."""
    text = os.environ.get("SHARPWISE_TIMEOUT", str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 1.0 <= seconds <= 86400.0:
        raise ValueError(f"the environment says SHARPWISE_TIMEOUT={text!r}, expected seconds, between 1 and 86400")
    return seconds
