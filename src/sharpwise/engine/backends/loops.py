"""Our own loops in C++, for the CPU.

They take all matrices of a step in one call, sum up a block and move it while its gradient is in the cache, and need
none of torch's headers, so that they are built in a second. The arithmetic of a rule is not written twice: it is traced
and put into the loop.
"""

import ctypes
import os
import stat
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpwise.engine.backends.base import TYPES, check_own
from sharpwise.engine.program import Language, Program, encoding, usual_defaults
from sharpwise.rules.base import Rule
from sharpwise.storage import FP32, Dense, Format

_FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno", "-fwrapv")
"""The first two torch has the other way round; its whole numbers wrap, as those of a hash do."""
_WIDEST = ("-mprefer-vector-width=512",)
"""Where the processor has such vectors. GCC would take 256 bits: 8-bit state, which counts operations, took 1.39 of the
step in fp32 with these and takes 1.20 with those."""
SHARED = 1 << 16
"""Elements from which it pays that threads share them, if they have to meet for it."""
_OURS = ("clip", "weight_decay")
_aten = torch.ops.aten
_COMPARED = {"ne": "!=", "eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
CPP = Language(
    "C++",
    {
        _aten.add.Tensor: "{0} + {1}",
        _aten.sub.Tensor: "{0} - {1}",
        _aten.rsub.Scalar: "{1} - {0}",
        _aten.mul.Tensor: "{0} * {1}",
        _aten.div.Tensor: "{0} / {1}",
        _aten.neg.default: "-{0}",
        _aten.abs.default: "std::abs({0})",
        _aten.sqrt.default: "std::sqrt({0})",
        _aten.reciprocal.default: "1 / {0}",
        _aten.sign.default: "sign({0})",
        **{getattr(_aten, op).Tensor: f"{{0}} {sign} {{1}}" for op, sign in _COMPARED.items()},
        **{getattr(_aten, op).Scalar: f"{{0}} {sign} {{1}}" for op, sign in _COMPARED.items()},
        _aten.where.self: "{0} ? {1} : {2}",
        _aten.masked_fill.Scalar: "{1} ? {2} : {0}",
        _aten.maximum.default: "larger({0}, {1})",
        _aten.view.dtype: "__builtin_bit_cast({1}, {0})",
        _aten.bitwise_and.Scalar: "{0} & {1}",
        _aten.bitwise_xor.Tensor: "{0} ^ {1}",
        _aten.__rshift__.Scalar: "{0} >> {1}",
        _aten.clamp.default: "clamped({0}, {1}, {2})",
        _aten.round.default: "std::nearbyint({0})",
        _aten.detach.default: "{0}",
        _aten.index.Tensor: "{0}[{1}]",
        _aten._to_copy.default: "to<{type}>({0})",
    },
    {
        torch.bool: "bool",
        torch.float32: "float",
        torch.float64: "double",
        torch.bfloat16: "bfloat16",
        torch.int8: "int8_t",
        torch.uint8: "uint8_t",
        torch.int32: "int32_t",
        torch.int64: "int64_t",
    },
    literal="{type}({value})",
    statement="  const {type} {name} = {type}({value});",
)


class Squares:
    """Sums of squares of tensors. Raises whatever building the library raises."""

    def __init__(self) -> None:
        self.source = _text("sums") + _text("squares")
        self._library = _built(self.source)
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
        self._library.squares(_at(arguments), ctypes.c_int64(len(matrices)), *map(_at, scratch), int(exact), threads)
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


@dataclass(frozen=True)
class Form:
    """What a kernel depends on.

    Attributes:
        param, grad: dtypes; state: formats of state, by name. Without block state it takes rates by block alone.
        coupled, cautious: as a program's; stochastic: bf16 is rounded by hash.
    """

    rule: Rule
    param: torch.dtype
    grad: torch.dtype
    state: tuple[tuple[str, Format], ...]
    coupled: bool = False
    cautious: bool = False
    stochastic: bool = False


NUMBERS = (
    *("owner", "offset", "rows", "columns", "by_row", "before"),
    *("rates_at", "rate_stride", "decays_at", "decay_stride", "scalars_at", "first", "stride", "key", "blocks", "line"),
)
"""What of a tensor the kernel is told in numbers: the number of its gradient, and where it begins there; its shape; 1
if rows have a rate each (0: columns); how many elements there are before it, or -1 if all threads are to meet over it;
where among the values of the step its rates are (-1: elsewhere), how far the rate of one row is from that of the last,
its factors of decay likewise; where the scalars are; the global number of its first element, from row to row; the key
of its noise; blocks of columns; elements of a line, where blocks of state lie within those."""
TABLES = ("rates", "rate_of", "decays", "decay_of", "scalars", "counts", "block_of")
"""And by addresses: rates, fp32, and which is that of a row or column, int64 (0: by the stride); factors of decay, as
rates are; `scalars`; elements per block, fp64; the block of each column, int64 (0: each is one)."""


class Kernel:
    """Moves matrices by steps of a rule. Raises whatever building the library raises, or NotImplementedError.

    A library is built once per source, whatever the rule that it was written for.

    Attributes:
        tensors: names of the tensors whose addresses it takes, `p` and `g` first; then come `NUMBERS` and `TABLES`.
        scalars: names of those that it takes.
    """

    def __init__(self, form: Form) -> None:
        program = Program.of(form.rule, coupled=form.coupled, cautious=form.cautious)
        self.tensors = ("p", "g", *(f"state.{name}" for name, _ in form.state), *_absmax(form))
        self.scalars = (*program.scalars, *_OURS)
        self.width = len(self.tensors) + len(NUMBERS) + len(TABLES)
        self.source = _text("sums") + _written(program, form) + _text("step")
        self._call = _built(self.source).step

    def call(self, table: Tensor, total: int, widest: int, threads: int) -> Callable[[int, int, float], Any]:
        """What moves matrices, and their state, when it is given addresses of gradients (int64 by number), of the
        values of the step (fp32), and the factor on the gradients.

        Args:
            table: int64 [matrices, width]; it is written to.
            total: elements of those for which threads do not meet.
            widest: the most columns, or blocks of columns, of any whose columns have rates.
        """
        scratch = [empty(widest * threads, torch.float64), empty(widest * threads, torch.float64)]
        scratch += [empty(2 * widest * (threads + 1), torch.float32), empty(widest * (threads + 1), torch.float64)]
        fixed = (_at(table), ctypes.c_int64(len(table)), ctypes.c_int64(total), *map(_at, scratch))
        sizes, function = (ctypes.c_int64(widest), ctypes.c_int(threads)), self._call
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


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _text(name: str) -> str:
    return Path(__file__).with_name(f"{name}.cpp").read_text(encoding="utf-8")


def _built(source: str) -> ctypes.CDLL:
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    # Not in torch's own folder: its name below /tmp can be foreseen, and anybody could have put a library there.
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_own_folder())
    try:
        # torch proves each vector instruction set by building and importing a test library, 15 s on a cold machine. The
        # processor's own flags are read all the same.
        with config.patch({"cpp.vec_isa_ok": True}), usual_defaults():
            wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
            return CppCodeCache.load(source, extra_flags=(*_FLAGS, *(_WIDEST if wide else ())))
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


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


def _absmax(form: Form) -> tuple[str, ...]:
    """Names of the tensors of what blocks share."""
    return tuple(f"absmax.state.{name}" for name, format in form.state if format.block)


def _written(program: Program, form: Form) -> str:
    """What step.cpp needs to know of a rule."""
    state = {f"state.{name}": format for name, format in form.state}
    blocks = {name: own for name, own in state.items() if name.removeprefix("state.") in program.blocks}
    stored = {"p": Dense.of(form.param), **{name: own for name, own in state.items() if name not in blocks}}
    read = {**stored, "g": Dense.of(form.grad)}
    scalars = [*_scalars(program).values(), *(f"s.{name}" for name in _OURS)]
    pointers = "".join(_pointer(name, own, "at", "const " * (name == "g")) for name, own in read.items())
    return f"""
using P = {CPP.types[form.param]};
using G = {CPP.types[form.grad]};
struct Scalars {{ float {", ".join(name.removeprefix("s.") for name in scalars)}; }};
struct Job {{
  void {", ".join(f"*{_named(name)}" for name in ("p", "g", *state, *_absmax(form)))};
  int64_t {", ".join(NUMBERS)};
  const float* rates;
  const int64_t* rate_of;
  const float* decays;
  const int64_t* decay_of;
  const Scalars* scalars;
  const double* counts;
  const int64_t* block_of;
}};
// Completes what the table tells by what is of this step alone.
inline void begin_step(Job* jobs, int64_t count, const int64_t* gradients, const float* values) {{
  for (Job* m = jobs; m < jobs + count; ++m) {{
    m->g = reinterpret_cast<G*>(gradients[m->owner]) + m->offset;
    if (m->rates_at >= 0) m->rates = values + m->rates_at;
    if (m->decays_at >= 0) m->decays = values + m->decays_at;
    m->scalars = reinterpret_cast<const Scalars*>(values + m->scalars_at);
  }}
}}
inline float rate(const Job& m, int64_t r) {{ return m.rates[m.rate_of ? m.rate_of[r] : r * m.rate_stride]; }}
inline float decay(const Job& m, int64_t r) {{ return m.decays[m.decay_of ? m.decay_of[r] : r * m.decay_stride]; }}
template <typename Rates, typename Decays>
inline void move(const Scalars s, const Job& m, int64_t at, int64_t n, Rates rates, Decays decays, int64_t index) {{
{pointers}  const int64_t key = m.key;
{_moves(program, read, list(stored), form)}}}
{_denominator(program, blocks) if blocks else _NO_PHASE}
"""


def _moves(program: Program, read: Mapping[str, Format], stored: Sequence[str], form: Form) -> str:
    """The loops over the elements: one, or, where there are blocks, two for each of them."""
    noisy = form.stochastic and any(read[name] != FP32 and not read[name].block for name in stored)
    blocked = [name for name in stored if read[name].block]
    inputs = {name: f"{_named(name)}[i]" for name in read} | {"rate": "rates[i]", "decay": "decays[i]"}
    inputs |= {"clip": "s.clip", "weight_decay": "s.weight_decay", "index": "index + i", "key": "key"}
    inputs |= {f"absmax.{name}": f"{_named(name)}old" for name in blocked} | _scalars(program)
    moved, values = program.move.in_memory(read, stored, noisy).printed(CPP, inputs, "    ")
    targets = {name: f"{_named(name)}new[i - begin]" if name in blocked else f"{_named(name)}[i]" for name in stored}
    stores = "\n".join(f"    {target} = {values[name]};" for name, target in targets.items())
    loop = f"  #pragma omp simd\n  for (int64_t i = begin; i < end; ++i) {{\n{moved}\n{stores}\n  }}\n"
    if not blocked:
        return f"  const int64_t begin = 0, end = n;\n{loop}"
    (size,) = {read[name].block for name in blocked}
    before, after = "", ""
    for name in blocked:
        own, absmax = _named(name), _named(f"absmax.{name}")
        before += f"  float {own}new[{size}];\n  float* {absmax} = line(m.{absmax}, at, m.line, {size});\n"
        loop = f"  const float {own}old = *{absmax};\n{loop}"
        encoded, codes = encoding(read[name]).printed(
            CPP, {"x": f"{own}new[i - begin]", "absmax": f"{own}most"}, "    "
        )
        after += f"  const float {own}most = *{absmax}++ = most({own}new, end - begin);\n"
        after += f"  #pragma omp simd\n  for (int64_t i = begin; i < end; ++i) {{\n{encoded}\n"
        after += f"    {own}[i] = {codes['codes']};\n  }}\n"
    each = "  for (int64_t begin = 0, end = 0, last = 0; begin < n; begin = end) {\n"
    each += "  last += begin == last ? m.line : 0;\n"
    return f"{before}{each}  end = std::min(begin + {size}, last);\n{loop}{after}  }}\n"


_NO_PHASE = """
constexpr bool BLOCKS = false;
inline double denominator(const Scalars&, const Job&, int64_t, double) { return 1; }
"""


def _denominator(program: Program, blocks: Mapping[str, Format]) -> str:
    assert program.phase is not None
    inputs = {"mean": "mean", **{name: f"to<float>(*{_named(name)})" for name in blocks}, **_scalars(program)}
    worked_out, values = program.phase.printed(CPP, inputs)
    stores = [f"  *{_named(name)} = to<{_type(own)}>({values[name]});" for name, own in blocks.items()]
    pointers = "".join(_pointer(name, own, "b") for name, own in blocks.items())
    return f"""
constexpr bool BLOCKS = true;
inline double denominator(const Scalars& s, const Job& m, int64_t b, double mean) {{
{pointers}{worked_out}
{chr(10).join(stores)}
  return {values["denominator"]};
}}
"""


def _scalars(program: Program) -> dict[str, str]:
    return {f"scalar.{name}": f"s.{name}_" for name in program.scalars}


def _named(name: str) -> str:
    if name.startswith("absmax."):
        return f"{_named(name.removeprefix('absmax.'))}absmax"
    return f"{name.removeprefix('state.')}_" if name.startswith("state.") else name  # none of ours has a _ there


def _type(own: Format) -> str:
    return CPP.types[own.dtype_for(torch.float32)]


def _pointer(name: str, own: Format, at: str, constant: str = "") -> str:
    kind = constant + _type(own)
    return f"  {kind}* __restrict__ {_named(name)} = static_cast<{kind}*>(m.{_named(name)}) + {at};\n"
