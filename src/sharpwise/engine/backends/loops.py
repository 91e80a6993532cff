"""Our own loops in C++, for the CPU.

They take all matrices of a step in one call, sum up a block and move it while its gradient is in the cache, and need
none of torch's headers, so that they are built in a second. The arithmetic of a rule is not written twice: it is traced
and put into the loop.
"""

import ctypes
import hashlib
import os
import platform
import stat
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpwise.engine.backends.base import TYPES, check_own
from sharpwise.engine.backends.cpp_print import BOUNDS, NUMBERS, OURS, TABLES, Form, absmax_of, pitches_of, written
from sharpwise.engine.program import Program, usual_defaults

_FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno", "-fwrapv")
"""The first two torch has the other way round; its whole numbers wrap, as those of a hash do."""
_WIDEST = ("-mprefer-vector-width=512",)
"""Where the processor has such vectors. GCC would take 256 bits: 8-bit state, which counts operations, took 1.39 of the
step in fp32 with these and takes 1.20 with those."""
SHARED = 1 << 16
"""Elements from which it pays that threads share them, if they have to meet for it."""


class Squares:
    """Sums of squares of tensors. Raises whatever building the library raises."""

    def __init__(self) -> None:
        self.source = text("sums") + text("squares")
        self._library = library(self.source)
        self._library.total.restype = ctypes.c_double

    @staticmethod
    def takes(g: Tensor) -> bool:
        """Whether it reads such a tensor: contiguous, of `TYPES`, on the CPU."""
        return g.device.type == "cpu" and g.dtype in TYPES and g.is_contiguous()

    def __call__(self, matrices: Sequence[Tensor], dims: Sequence[int], exact: bool = False) -> list[Tensor]:
        """Sums of g*g over dimension 1 or 0 of matrices [rows, columns] that it takes, as fp64 vectors.

        Unless exact, groups of squares are added in fp32.
        """
        sizes = [g.shape[1 - dim] for g, dim in zip(matrices, dims, strict=True)]
        sums = empty(sum(sizes), torch.float64)
        table, out = [], sums.data_ptr()
        for g, dim, n in zip(matrices, dims, sizes, strict=True):
            table += [g.data_ptr(), *g.shape, dim, g.dtype == torch.bfloat16, out]
            out += 8 * n
        widest = max((n for n, dim in zip(sizes, dims, strict=True) if dim == 0), default=0)
        threads = torch.get_num_threads()
        scratch = [empty(widest * threads, torch.float64) for _ in range(2)]
        arguments = torch.tensor(table, dtype=torch.int64, device="cpu")
        self._library.squares(at(arguments), ctypes.c_int64(len(matrices)), *map(at, scratch), int(exact), threads)
        return list(sums.split(sizes))

    def total(self, tensors: Sequence[Tensor], exact: bool = False) -> float:
        """The sum of all squares of tensors that it takes."""
        table, before = [], 0
        for g in tensors:
            n = g.numel()
            table += [g.data_ptr(), n, before, g.dtype == torch.bfloat16]
            before += n
        arguments = array("q", table)
        sizes = ctypes.c_int64(len(tensors)), ctypes.c_int64(before), int(exact), threads_for(before)
        found: float = self._library.total(ctypes.c_void_p(arguments.buffer_info()[0]), *sizes)
        return found


class Kernel:
    """Moves matrices by steps of a rule. Raises whatever building the library raises, or NotImplementedError.

    A library is built once per source, whatever the rule that it was written for.

    Attributes:
        tensors: names of the tensors whose addresses it takes, `p` and `g` first, and of how far rows of state are
            apart; then come `NUMBERS`, `TABLES` and `BOUNDS`. control: by which it bounds rows; None without.
        scalars: names of those that it takes.
    """

    def __init__(self, form: Form) -> None:
        program = Program.of(form.rule, coupled=form.coupled, cautious=form.cautious, aims=form.aims)
        self.tensors = ("p", "g", *(f"state.{name}" for name, _ in form.state), *absmax_of(form), *pitches_of(form))
        self.control = form.control
        self.scalars = (*program.scalars, *OURS)
        self.width = len(self.tensors) + len(NUMBERS) + len(TABLES) + len(BOUNDS)
        self.source = text("sums") + written(program, form) + text("units") + text("step")
        self._library = library(self.source)

    def call(
        self, table: Tensor, total: int, widest: int, threads: int, sums: bool = False
    ) -> Callable[[int, int, float], Any]:
        """What moves matrices, and their state, when it is given addresses of gradients (int64 by number), of the
        values of the step (fp32), and the factor on the gradients.

        Args:
            table: int64 [matrices, width]; it is written to.
            total: elements of those for which threads do not meet.
            widest: the most columns, or blocks of columns, of any whose columns have rates.
            sums: what gives the sums of a control instead, and moves nothing.
        """
        # A control has three sums of each column or unit, and of groups of rows in fp32.
        parts = (5 if self.control is not None else 1) * widest
        scratch = [empty(widest * threads, torch.float64), empty(parts * threads, torch.float64)]
        scratch += [empty(2 * widest * (threads + 1), torch.float32), empty(widest * (threads + 1), torch.float64)]
        fixed = (at(table), ctypes.c_int64(len(table)), ctypes.c_int64(total), *map(at, scratch))
        sizes, function = (ctypes.c_int64(widest), ctypes.c_int(threads)), self._library["sums" if sums else "step"]
        function.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_double]

        def move(gradients: int, values: int, clip: float) -> None:
            function(gradients, values, clip, *fixed, *sizes)

        move.scratch = scratch  # type: ignore[attr-defined]  # which lives as long
        return move


def threads_for(elements: int) -> int:
    """How many threads so many elements are worth."""
    return 1 if elements < SHARED else torch.get_num_threads()


def empty(n: int, dtype: torch.dtype) -> Tensor:
    """A vector on the CPU, whatever the defaults are."""
    return torch.empty(n, dtype=dtype, device="cpu")


def at(tensor: Tensor) -> ctypes.c_void_p:
    """Its address, as an argument."""
    return ctypes.c_void_p(tensor.data_ptr())


def text(name: str) -> str:
    """One of our sources in C++."""
    return Path(__file__).with_name(f"{name}.cpp").read_text(encoding="utf-8")


def library(source: str, *flags: str) -> ctypes.CDLL:
    """Compile a C++ source and load it, or load what was compiled before.

    torch compiles it, once for each kind of processor. Its compiler takes half a second to import, and is not needed
    for a library that is there already.

    Args:
        flags: for this source, besides those for all.
    """
    folder, capability = _own_folder(), torch.backends.cpu.get_cpu_capability()
    flags = (*_FLAGS, *flags, *(_WIDEST if capability == "AVX512" else ()))
    source = f"// {_processor()}\n{source}"
    key = "\0".join((source, *flags, capability, torch.__version__))
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.so"
    with suppress(OSError):
        return ctypes.CDLL(str(path))
    built = _compiled(source, flags, folder)
    with suppress(OSError):  # another process was first, or files cannot have two names there: torch finds it again
        path.unlink(missing_ok=True)
        path.hardlink_to(built._name)
    return built


def _compiled(source: str, flags: Sequence[str], folder: Path) -> ctypes.CDLL:
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    # Not in torch's own folder: its name below /tmp can be foreseen, and anybody could have put a library there.
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    try:
        # torch proves each vector instruction set by building and importing a test library, 15 s on a cold machine. The
        # processor's own flags are read all the same.
        with config.patch({"cpp.vec_isa_ok": True}), usual_defaults():
            return CppCodeCache.load(source, extra_flags=flags)
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


@cache
def _processor() -> str:
    """A hash of what this processor can do: machines that share a home need not be alike."""
    known = [platform.machine(), platform.processor()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        known += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]


def _own_folder() -> Path:
    """Where built loops are kept, made if need be: `sharpwise` in the user's cache.

    Raises:
        OSError: it cannot be made, or others than this user could put a library there.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (base if base.is_absolute() else Path.home() / ".cache") / "sharpwise"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    check_own(folder, 0o077, "libraries")
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise NotADirectoryError(f"libraries are kept in {folder}, and that is no folder")
    return folder
