"""Our own loops in C++, for the CPU: what a compiler of graphs does not write.

They take all matrices of a step in one call, sum up a block and move it while its gradient is in the cache, and need
none of torch's headers, so that they are built in a second. The arithmetic of a rule is not written twice: it is traced
and put into the loop.
"""

import ctypes
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpwise.engine.program import Language, Program, usual_defaults
from sharpwise.rules.base import Rule

_FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno")  # inductor's are the other way round
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
"""What can be read and written; the arithmetic is fp32."""
_OURS = ("step", "decay", "clip")
_aten = torch.ops.aten
_COMPARED = {"ne": "!=", "eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
CPP = Language(
    "C++",
    {
        _aten.add.Tensor: "{0} + {1}",
        _aten.sub.Tensor: "{0} - {1}",
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
        _aten._to_copy.default: "{0}",
    },
    {torch.bool: "bool", torch.float32: "float", torch.float64: "double"},
    literal="{type}({value})",
    statement="  const {type} {name} = {type}({value});",
)


class Squares:
    """Sums of squares of matrices. Raises whatever building the library raises."""

    def __init__(self) -> None:
        self.source = _text("sums") + _text("squares")
        self._library = _built(self.source)

    def __call__(self, matrices: Sequence[Tensor], dims: Sequence[int], exact: bool = False) -> list[Tensor]:
        """Sums of g*g over dimension 1 or 0 of contiguous matrices [rows, columns] of `TYPES`, as fp64 vectors.

        Unless exact, groups of squares are added in fp32.
        """
        function = self._library.exact_squares if exact else self._library.squares
        sizes = [g.shape[1 - dim] for g, dim in zip(matrices, dims, strict=True)]
        sums = _empty(sum(sizes), torch.float64)
        table, out = [], sums.data_ptr()
        for g, dim, n in zip(matrices, dims, sizes, strict=True):
            table += [g.data_ptr(), *g.shape, dim, g.dtype == torch.bfloat16, out]
            out += 8 * n
        widest = max((n for n, dim in zip(sizes, dims, strict=True) if dim == 0), default=0)
        _run(function, table, len(matrices), _per_thread(widest))
        return list(sums.split(sizes))


Arguments = Sequence[int]
"""Arguments of a `Kernel` for one matrix. Addresses of: parameter, gradient, element state, block state; numbers: rows,
columns, 1 if rows have a number each (0: columns), blocks; addresses of: elements per block, fp64; the block of each
column, int64 (0: each is one); steps and factors on the parameter, per row or column, fp32 (0: `step` and `decay` for
all); `scalars`, fp32."""


class Kernel:
    """Moves matrices by steps of a rule. Raises whatever building the library raises, or NotImplementedError.

    A library is built once per source, whatever the rule that it was written for.

    Args:
        types: of the parameter and its gradient, and of each state tensor, by name.
        scalars: names of the rule's own.
        with_blocks: block state included. Rows are blocks then, columns are or make up blocks, and their denominators
            and the factors per row are worked into the step. Else a step per row is all that is known of blocks.
    """

    def __init__(
        self,
        rule: Rule,
        param: torch.dtype,
        types: Mapping[str, torch.dtype],
        scalars: Sequence[str],
        with_blocks: bool,
    ) -> None:
        self.scalars = (*scalars, *_OURS)
        self._shape = 2 + len(types)
        program = Program.of(rule, scalars)
        text = _text("blocks" if with_blocks else "elements")
        self.source = _text("sums") + _written(program, param, types, with_blocks) + text
        self._call = _built(self.source).step

    def __call__(self, matrices: Sequence[Arguments]) -> None:
        """Move matrices, and their state."""
        shapes = [own[self._shape : self._shape + 4] for own in matrices]
        widest = max((max(columns, n) for _, columns, by_row, n in shapes if not by_row), default=0)
        own = [_empty(widest, dtype) for dtype in (torch.float32, torch.float32, torch.float64)]
        _run(self._call, [n for own in matrices for n in own], len(matrices), _per_thread(widest) + own)


def _run(function: Callable[..., Any], table: Sequence[int], count: int, scratch: Sequence[Tensor]) -> None:
    arguments = torch.tensor(table, dtype=torch.int64, device="cpu")
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in scratch]
    function(ctypes.c_void_p(arguments.data_ptr()), ctypes.c_int64(count), *addresses, torch.get_num_threads())


def _per_thread(columns: int) -> list[Tensor]:
    n = columns * torch.get_num_threads()
    return [_empty(n, torch.float64) for _ in range(2)]


def _empty(n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, dtype=dtype, device="cpu")  # whatever the defaults are


def _text(name: str) -> str:
    return Path(__file__).with_name(f"{name}.cpp").read_text(encoding="utf-8")


def _built(source: str) -> ctypes.CDLL:
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    # Not in torch's own folder: its name below /tmp can be foreseen, and anybody could have put a library there.
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_own_folder())
    try:
        with config.patch({"cpp.vec_isa_ok": True}), usual_defaults():  # see inductor._compile
            return CppCodeCache.load(source, extra_flags=_FLAGS)
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
    about = folder.lstat()
    if os.name == "posix" and (about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o077):
        owner = "somebody else's" if about.st_uid != os.geteuid() else "open to others"
        raise PermissionError(f"libraries are loaded from {folder} only if it is yours alone, and it is {owner}")
    if not stat.S_ISDIR(about.st_mode):
        raise NotADirectoryError(f"libraries are kept in {folder}, and that is no folder")
    return folder


def _written(program: Program, param: torch.dtype, types: Mapping[str, torch.dtype], with_blocks: bool) -> str:
    """What blocks.cpp and elements.cpp need to know of a rule."""
    elements, blocks, scalars = program.elements, program.blocks if with_blocks else (), program.scalars
    inputs = {"p": "load(p + i)", "g": "load(g + i)", "rate": "rates[i]", "decay": "decays[i]", "clip": "s.clip"}
    inputs |= {f"state.{name}": f"load({_named(name)} + i)" for name in elements}
    moved, values = program.move.printed(CPP, inputs | _scalars(program))
    kinds = {name: TYPES[dtype] for name, dtype in types.items()}
    pointers = [_pointer("p", "P", "at"), _pointer("g", "P", "at")]
    pointers += [_pointer(_named(name), kinds[name], "at") for name in elements]
    return f"""
using P = {TYPES[param]};
struct Scalars {{ float {", ".join([*map(_named, scalars), *_OURS])}; }};
struct Job {{
  void {", ".join(f"*{name}" for name in ["p", "g", *map(_named, elements), *map(_named, blocks)])};
  int64_t rows, columns, by_row, blocks;
  const double* counts;
  const int64_t* block_of;
  const float *row_step, *row_decay;
  const Scalars* scalars;
}};
template <typename Rates, typename Decays>
inline void move(const Scalars s, const Job& m, int64_t at, int64_t n, Rates rates, Decays decays) {{
{"".join(pointers)}
  #pragma omp simd
  for (int64_t i = 0; i < n; ++i) {{
{moved}
{_stores(["p", *map(_named, elements)], list(values.values()), " + i")}
  }}
}}
{_denominator(program, kinds) if with_blocks else ""}
"""


def _denominator(program: Program, kinds: Mapping[str, str]) -> str:
    assert program.phase is not None
    inputs = {"mean": "mean", **{f"state.{name}": f"load({_named(name)})" for name in program.blocks}}
    worked_out, values = program.phase.printed(CPP, inputs | _scalars(program))
    below, *new = values.values()
    return f"""
inline double denominator(const Scalars& s, const Job& m, int64_t b, double mean) {{
{"".join(_pointer(_named(name), kinds[name], "b") for name in program.blocks)}{worked_out}
{_stores([*map(_named, program.blocks)], new, "")}
  return {below};
}}
"""


def _scalars(program: Program) -> dict[str, str]:
    return {f"scalar.{name}": f"s.{_named(name)}" for name in program.scalars}


def _named(name: str) -> str:
    return f"{name}_"  # none of ours ends so


def _pointer(name: str, kind: str, at: str) -> str:
    return f"  {kind}* __restrict__ {name} = static_cast<{kind}*>(m.{name}) + {at};\n"


def _stores(names: Sequence[str], values: Sequence[str], at: str) -> str:
    return "\n".join(f"  store({name}{at}, {value});" for name, value in zip(names, values, strict=True))
