"""What is written in C++ of a step: the traced arithmetic of a rule, in the loops of step.cpp."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sharpwise.controls import Control
from sharpwise.engine.program import OF_UNIT, SETTINGS, Language, Program, bounding, encoding, overs_of
from sharpwise.rules.base import Rule
from sharpwise.storage import FP32, Dense, Format

OURS = ("clip", "weight_decay")
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
        _aten.sin.default: "std::sin({0})",
        _aten.cos.default: "std::cos({0})",
        _aten.pow.Tensor_Tensor: "std::pow({0}, {1})",
        _aten.reciprocal.default: "1 / {0}",
        _aten.sign.default: "sign({0})",
        **{getattr(_aten, op).Tensor: f"{{0}} {sign} {{1}}" for op, sign in _COMPARED.items()},
        **{getattr(_aten, op).Scalar: f"{{0}} {sign} {{1}}" for op, sign in _COMPARED.items()},
        _aten.where.self: "{0} ? {1} : {2}",
        _aten.masked_fill.Scalar: "{1} ? {2} : {0}",
        _aten.maximum.default: "larger({0}, {1})",
        _aten.view.dtype: "__builtin_bit_cast({1}, {0})",
        _aten.bitwise_and.Scalar: "{0} & {1}",
        _aten.bitwise_and.Tensor: "{0} & {1}",
        _aten.ones_like.default: "{type}(1)",
        _aten.scalar_tensor.default: "{0}",
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


@dataclass(frozen=True)
class Form:
    """What a kernel depends on.

    Attributes:
        param, grad: dtypes; state: formats of state, by name. Without block state it takes rates by block alone.
        coupled, cautious: as a program's; stochastic: bf16 is rounded by hash.
        aims: whether the sums of a control can be asked for; control: whose sums over a row, or over all of a small
            tensor, are taken as that is moved; None for rows whose rates and decays are given.
    """

    rule: Rule
    param: torch.dtype
    grad: torch.dtype
    state: tuple[tuple[str, Format], ...]
    coupled: bool = False
    cautious: bool = False
    stochastic: bool = False
    aims: bool = False
    control: Control | None = None


LONGEST = 1 << 18
"""Elements of a block of codes, at the most: a thread holds one while it works out what they share."""
NUMBERS = (
    *("owner", "offset", "rows", "columns", "by_row", "before"),
    *("rates_at", "rate_stride", "decays_at", "decay_stride", "scalars_at", "first", "stride", "key", "blocks", "line"),
    *("over", "pitch", "unit"),
)
"""What of a tensor the kernel is told in numbers: the number of its gradient, and where it begins there; its shape; 1
if rows have a rate each (0: columns); how many elements there are before it, or -1 if all threads are to meet over it;
where among the values of the step its rates are (-1: elsewhere), how far the rate of one row is from that of the last,
its factors of decay likewise; where the scalars are; the global number of its first element, from row to row; the key
of its noise; blocks of columns; elements of a line, where blocks of state lie within those; of what a control bounds,
which of `overs_of` it is; how far its rows are apart in the parameter and its gradient; and 1 if a control bounds all
of it as one unit."""
TABLES = ("rates", "rate_of", "decays", "decay_of", "scalars", "counts", "block_of")
"""And by addresses: rates, fp32, and which is that of a row or column, int64 (0: by the stride); factors of decay, as
rates are; `scalars`; elements per block, fp64; the block of each column, int64 (0: each is one)."""
BOUNDS = ("settings", "setting_of", "held", "snr_factors", "unit_of", "sums", "apart")
"""And of rows that a control bounds as they move, by addresses: see `base.Told`; 0 for None. Of what is summed up and
not moved, where its sums are, fp64, and how far one kind of sums is from the next."""


def absmax_of(form: Form) -> tuple[str, ...]:
    """Names of the tensors of what blocks share."""
    return tuple(f"absmax.state.{name}" for name, format in form.state if format.block)


def pitches_of(form: Form) -> tuple[str, ...]:
    """Names of how far the rows of element state are apart."""
    return tuple(f"pitch.state.{name}" for name, _ in form.state)


def written(program: Program, form: Form) -> str:
    """What step.cpp needs to know of a rule.

    Raises:
        NotImplementedError: for blocks of codes that are too long.
    """
    state = {f"state.{name}": format for name, format in form.state}
    if long := [own.name for own in state.values() if own.block > LONGEST]:
        raise NotImplementedError(f"{long[0]}: more than {LONGEST:,} elements of a block are not for a thread's stack")
    blocks = {name: own for name, own in state.items() if name.removeprefix("state.") in program.blocks}
    stored = {"p": Dense.of(form.param), **{name: own for name, own in state.items() if name not in blocks}}
    read = {**stored, "g": Dense.of(form.grad)}
    scalars = [*_scalars(program).values(), *(f"s.{name}" for name in OURS)]
    pointers = "".join(_pointer(name, own, _at(name), "const " * (name == "g")) for name, own in read.items())
    return f"""
using P = {CPP.types[form.param]};
using G = {CPP.types[form.grad]};
struct Scalars {{ float {", ".join(name.removeprefix("s.") for name in scalars)}; }};
struct Job {{
  void {", ".join(f"*{_named(name)}" for name in ("p", "g", *state, *absmax_of(form)))};
  int64_t {", ".join((*map(_named, pitches_of(form)), *NUMBERS))};
  const float* rates;
  const int64_t* rate_of;
  const float* decays;
  const int64_t* decay_of;
  const Scalars* scalars;
  const double* counts;
  const int64_t* block_of;
  const double* settings;
  const int64_t* setting_of;
  float* held;
  const double* snr_factors;
  const int64_t* unit_of;
  double* sums;
  int64_t apart;
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
inline void move(const Scalars s, const Job& m, int64_t r, int64_t c, int64_t n, Rates rates, Decays decays,
                 int64_t index) {{
{pointers}  const int64_t key = m.key;
{_moves(program, read, list(stored), form)}}}
{_denominator(program, blocks) if blocks else _NO_PHASE}
{_aims(program, read) if form.aims else _NO_AIM}
{_bound(form.control) if form.control is not None else _NO_BOUND}
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
    before, after = "", ""
    for name in blocked:
        own, absmax = _named(name), _named(f"absmax.{name}")
        before += f"  float {own}new[{read[name].block}];\n"
        encoded, codes = encoding(read[name]).printed(
            CPP, {"x": f"{own}new[i - begin]", "absmax": f"{own}most"}, "    "
        )
        after += f"  const float {own}most = *{absmax}++ = most({own}new, end - begin);\n"
        after += f"  #pragma omp simd\n  for (int64_t i = begin; i < end; ++i) {{\n{encoded}\n"
        after += f"    {own}[i] = {codes['codes']};\n  }}\n"
    return before + _by_block(loop, after, read)


def _by_block(loop: str, after: str, read: Mapping[str, Format]) -> str:
    """A loop over elements: one, or one for each block of those that share a number, and what comes after that."""
    blocked = [name for name, own in read.items() if own.block]
    if not blocked:
        return f"  const int64_t begin = 0, end = n;\n{loop}"
    (size,) = {read[name].block for name in blocked}
    before = ""
    for name in blocked:
        own, absmax = _named(name), _named(f"absmax.{name}")
        before += f"  float* {absmax} = line(m.{absmax}, r * m.columns + c, m.line, {size});\n"
        loop = f"  const float {own}old = *{absmax};\n{loop}"
    each = "  for (int64_t begin = 0, end = 0, last = 0; begin < n; begin = end) {\n"
    each += "  last += begin == last ? m.line : 0;\n"
    return f"{before}{each}  end = std::min(std::min(begin + {size}, last), n);\n{loop}{after}  }}\n"


_NO_AIM = """
constexpr bool AIMS = false;
constexpr int64_t CODED = 0;
template <typename Rates> inline void aim(const Scalars, const Job&, int64_t, int64_t, int64_t, Rates, float*) {}
"""
_NO_BOUND = """
constexpr bool CONTROLLED = false, SCALES = false;
inline void bound(const Job&, int64_t, double, const double*, float&, float&) {}
"""


def _aims(program: Program, read: Mapping[str, Format]) -> str:
    """What would be subtracted of n elements of a row; where elements have codes by block, of one block alone."""
    assert program.aim is not None
    blocked = [name for name, own in read.items() if own.block]
    pointers = "".join(_pointer(name, own, _at(name), "const ") for name, own in read.items())
    after = "".join(f"  ++{_named(f'absmax.{name}')};\n" for name in blocked)
    inputs = {name: f"{_named(name)}[i]" for name in read} | {"rate": "rates[i]", "clip": "s.clip"}
    inputs |= {f"absmax.{name}": f"{_named(name)}old" for name in blocked} | _scalars(program)
    aimed, values = program.aim.in_memory(read, (), False).printed(CPP, inputs, "    ")
    loop = f"  #pragma omp simd\n  for (int64_t i = begin; i < end; ++i) {{\n{aimed}\n    u[i] = {values['u']};\n  }}\n"
    return f"""
constexpr bool AIMS = true;
constexpr int64_t CODED = {max((read[name].block for name in blocked), default=0)};
template <typename Rates>
inline void aim(const Scalars s, const Job& m, int64_t r, int64_t c, int64_t n, Rates rates, float* __restrict__ u) {{
{pointers}{_by_block(loop, after, read)}}}
"""


def _bound(control: Control) -> str:
    """Rate and factor of decay of a unit from sums over it."""
    known = {name: name for name in OF_UNIT} | {name: f"told[{i}]" for i, name in enumerate(SETTINGS)}
    known |= {name: f"sums[{i}]" for i, name in enumerate(("uu", "pu", "pp"))}
    known |= {"held": "m.held ? m.held[unit] : 0.0f", "over": "m.over"}
    known |= {"snr_factor": "m.snr_factors ? m.snr_factors[unit] : 1.0"}
    found = bounding(control, overs_of(control))
    worked_out, given = found.printed(CPP, known)
    return f"""
constexpr bool CONTROLLED = true, SCALES = {str(not {"pu", "pp"} & found.needed).lower()};
inline void bound(const Job& m, int64_t r, double elements, const double* sums, float& rate, float& decay) {{
  const int64_t unit = m.unit_of ? m.unit_of[r] : r;
  const double* told = m.settings + (m.setting_of ? m.setting_of[r] : 0) * {len(SETTINGS)};
{worked_out}
  if (m.held) m.held[unit] = float({given["held"]});
  rate = float({given["a"]} * rate), decay = float({given["decay"]});
}}
"""


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
    for what in ("absmax", "pitch"):
        if name.startswith(f"{what}."):
            return f"{_named(name.removeprefix(f'{what}.'))}{what}"
    return f"{name.removeprefix('state.')}_" if name.startswith("state.") else name  # none of ours has a _ there


def _at(name: str) -> str:
    """Where the elements at hand begin: any tensor may be columns of a wider one."""
    return f"r * m.{'pitch' if name in ('p', 'g') else _named(f'pitch.{name}')} + c"


def _type(own: Format) -> str:
    return CPP.types[own.dtype_for(torch.float32)]


def _pointer(name: str, own: Format, at: str, constant: str = "") -> str:
    kind = constant + _type(own)
    return f"  {kind}* __restrict__ {_named(name)} = static_cast<{kind}*>(m.{_named(name)}) + {at};\n"
