"""Triton kernels printed from the arithmetic of rules: programs put into the frames of `triton_frames`.

Kernels are found by their text: what prints alike is one kernel, whatever the rule, its hyperparameters or the shapes.
"""

import hashlib
import linecache
import re
from collections.abc import Mapping, Sequence
from functools import cache
from string import Template
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.backends import triton_frames as frames
from sharpwise.engine.program import Arithmetic, Language, Program
from sharpwise.rules.base import Rule

TYPES = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16"}
"""What can be read and written; the arithmetic is fp32."""
FIELDS = (
    *("rows", "columns", "pitch", "per", "span", "size", "first", "by_row", "by_column"),
    *("slot", "noise", "key", "counts", "view", "from_gradient"),
)
"""Of a job, before the addresses of the parameter and its state.

    rows, columns, pitch: the rectangle, in elements; per, span: rows and columns of it that a chunk has.
    size: columns of a block; first, by_row, by_column: where steps of blocks lie.
    slot: of its scalars; noise: number of its first element in the whole parameter; key: of its noise.
    counts: address of the elements per block; view: whose gradient; from_gradient: bytes from its begin.
"""
OURS = ("step", "decay", "t")
"""Scalars after those of a rule; decay is in units of the learning rate where it is coupled."""
_aten = torch.ops.aten
_COMPARED = {"ne": "!=", "eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_f32, _f64 = torch.float32, torch.float64
TRITON = Language(
    "Triton",
    {  # Division and root as IEEE has them: of fp32 the plain ones are approximations on a device.
        _aten.add.Tensor: "{0} + {1}",
        _aten.sub.Tensor: "{0} - {1}",
        _aten.rsub.Scalar: "{1} - {0}",
        _aten.mul.Tensor: "{0} * {1}",
        _aten.div.Tensor: "{0} / {1}",
        (_aten.div.Tensor, _f32): "tl.div_rn({0}, {1})",
        _aten.neg.default: "-{0}",
        _aten.abs.default: "tl.abs({0})",
        _aten.sqrt.default: "tl.sqrt({0})",
        (_aten.sqrt.default, _f32): "tl.sqrt_rn({0})",
        _aten.reciprocal.default: "1.0 / {0}",
        (_aten.reciprocal.default, _f32): "tl.div_rn({0} * 0.0 + 1.0, {0})",
        _aten.sign.default: "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))",
        (_aten.pow.Tensor_Tensor, _f64): "tl.exp2({1} * tl.log2({0}))",
        (_aten.pow.Tensor_Scalar, _f64): "tl.exp2({1} * tl.log2({0}))",
        (_aten.pow.Scalar, _f64): "tl.exp2({1} * tl.log2({0}))",
        **{getattr(_aten, op).Tensor: f"{{0}} {sign} {{1}}" for op, sign in _COMPARED.items()},
        **{getattr(_aten, op).Scalar: f"{{0}} {sign} {{1}}" for op, sign in _COMPARED.items()},
        _aten.where.self: "tl.where({0}, {1}, {2})",
        _aten._to_copy.default: "{0}",
    },
    {torch.bool: "tl.int1", _f32: "tl.float32", _f64: "tl.float64"},
    literal="{value}",
    statement="{name} = ({value}).to({type})",
)


class Formats(NamedTuple):
    """How tensors rest in memory: types of the parameter, its gradient and its state, and how bf16 is rounded."""

    param: torch.dtype
    grad: torch.dtype
    elements: tuple[torch.dtype, ...]
    blocks: tuple[torch.dtype, ...]
    stochastic: bool

    @property
    def granule(self) -> int:
        """Elements that are 16 bytes of the narrowest."""
        return 16 // min(t.itemsize for t in (self.param, self.grad, *self.elements))


class Printed(NamedTuple):
    """The kernels of a program, and the names of the scalars that they read."""

    text: str
    scalars: tuple[str, ...]


def width(formats: Formats) -> int:
    """Numbers in a job."""
    return len(FIELDS) + 1 + len(formats.elements) + len(formats.blocks)


def kernels(rule: Rule, formats: Formats, coupled: bool, cautious: bool = False) -> Printed:
    """The kernels that move views of a rule.

    Raises:
        NotImplementedError: for an operation that Triton lacks.
    """
    program = Program.of(rule, coupled=coupled, cautious=cautious)
    noisy = formats.stochastic and torch.bfloat16 in (formats.param, *formats.elements)
    elements = [f"{name}_" for name in program.elements]
    blocks = [f"{name}_" for name in program.blocks]
    at = len(FIELDS)
    head = [_pointer("p_", at, formats.param)]
    head += [_pointer(name, at + 1 + i, t) for i, (name, t) in enumerate(zip(elements, formats.elements, strict=True))]
    head.append(
        f"g_ = address(tl.load(grads + tl.load(row + {_at('view')})) + tl.load(row + {_at('from_gradient')}), "
        f"{TYPES[formats.grad]}, ALIGN)"
    )
    own = ["slot = scalars + tl.load(row + " + f"{_at('slot')})"]
    own += [f"s_{name} = tl.load(slot + {i})" for i, name in enumerate(program.scalars)]
    own += [f"{name} = tl.load(slot + {len(program.scalars) + i})" for i, name in enumerate(OURS)]
    own += ["clip64 = tl.load(clip_)", "clip = clip64.to(tl.float32)"]
    if noisy:
        head += [f"noise = tl.load(row + {_at('noise')})"]
        own += [f"key = tl.load(row + {_at('key')}).to(tl.uint32) + t.to(tl.int64).to(tl.uint32) * 0x9E3779B1"]
    at += 1 + len(elements)
    begin = [_pointer(name, at + i, t, 1) for i, (name, t) in enumerate(zip(blocks, formats.blocks, strict=True))]
    begin.append(f"counts_ = address(tl.load(row + {_at('counts')}), tl.float64, 1)")
    values: dict[str, str] = {
        "args": "",
        "width": str(width(formats)),
        **{name: str(_at(name)) for name in FIELDS},
        "scalars_head": _lines(own, 1),
        "elements_head": _lines([*head, *own], 1),
        "blocks_head": _lines(begin, 1),
        "move_flat": _move(program, formats, coupled, noisy, 3),
    }
    text = frames.HEAD + (frames.NOISE if noisy else "") + _filled(frames.TILES, values)
    if program.phase is not None:
        for name, deep, mask in (
            ("rows", 2, "held"),
            ("columns", 1, "lane < tl.where(size == 1, n, 1)"),
            ("phase", 1, "held"),
        ):
            values[f"phase_{name}"], values["denominator"] = _phase(program, formats, deep, mask)
        values["move_rows"] = _move(program, formats, coupled, noisy, 3)
        values["move_columns"] = _move(program, formats, coupled, noisy, 2)
        text += "".join(_filled(frame, values) for frame in (frames.ROWS, frames.COLUMNS, frames.PHASE))
    return Printed(text, (*program.scalars, *OURS))


def _at(field: str) -> int:
    return FIELDS.index(field)


def _pointer(name: str, at: int, dtype: torch.dtype, align: Any = "ALIGN") -> str:
    return f"{name} = address(tl.load(row + {at}), {TYPES[dtype]}, {align})"


def _lines(lines: Sequence[str], deep: int) -> str:
    return "\n".join("    " * deep + line for line in lines)


def _filled(frame: str, values: Mapping[str, str]) -> str:
    """A frame with its values, and no argument that Triton would specialize on."""
    frame = frame.replace("$moves", "jobs, chunks, grads, scalars, clip_, ok_")
    frame = frame.replace("$aligned", "ALIGN: tl.constexpr, G: tl.constexpr")
    names = re.search(r"def \w+\(([^)]*)\)", frame)
    assert names is not None
    args = [name.strip() for name in names[1].split(",") if ":" not in name]
    return Template(frame).substitute({**values, "args": repr(args)})


def _scalars(program: Program) -> dict[str, str]:
    return {f"scalar.{name}": f"s_{name}" for name in program.scalars}


def _move(program: Program, formats: Formats, coupled: bool, noisy: bool, deep: int) -> str:
    """Load, move and store the elements at `at + i` where `mask` holds."""

    def loaded(name: str) -> str:
        return f"tl.load({name} + at + i, mask=mask, other=0.0).to(tl.float32)"

    inputs = {"p": loaded("p_"), "g": loaded("g_"), "rate": "rate", "clip": "clip"}
    inputs["weight_decay" if coupled else "decay"] = "decay"
    inputs |= {f"state.{name}": loaded(f"{name}_") for name in program.elements} | _scalars(program)
    moved, values = program.move.printed(TRITON, inputs, "    " * deep)
    kinds = {"p": formats.param, **dict(zip(program.elements, formats.elements, strict=True))}
    lines = []
    for slot, (output, value) in enumerate(values.items()):
        name = output.removeprefix("state.")
        value = f"{value}.to({TYPES[kinds[name]]})"
        if noisy and kinds[name] == torch.bfloat16:
            value = f"stochastic({values[output]}, noise + at + i, mix(key + {slot}))"
        lines.append(f"tl.store({name}_ + at + i, {value}, mask=mask)")
    return moved + "\n" + _lines(lines, deep)


def _phase(program: Program, formats: Formats, deep: int, mask: str) -> tuple[str, str]:
    """Block state of the blocks `b`, stored where `mask` holds; and what the denominator is called."""
    assert program.phase is not None
    inputs = {"mean": "mean"} | _scalars(program)
    inputs |= {f"state.{n}": f"tl.load({n}_ + b, mask=held, other=0.0).to(tl.float32)" for n in program.blocks}
    worked_out, values = program.phase.printed(TRITON, inputs, "    " * deep)
    kinds = dict(zip(program.blocks, formats.blocks, strict=True))
    stores = [
        f"tl.store({name}_ + b, {values[f'state.{name}']}.to({TYPES[kinds[name]]}), mask={mask})"
        for name in program.blocks
    ]
    # Every thread reads what one of them writes: all have to have read it before.
    text = f"{worked_out}\n{_lines(['tl.debug_barrier()', *stores], deep)}"
    # Names of its own: what is assigned before a loop and in it again is carried through it.
    text = re.sub(r"\bv(\d+)\b", r"w\1", text)
    return text, values["denominator"].replace("v", "w")


def squares(grad: torch.dtype, numbers: int) -> str:
    """The kernel that sums up gradients of a type; `numbers` in a job."""
    values = {name: str(_at(name)) for name in FIELDS} | {"width": str(numbers), "gradient": TYPES[grad]}
    return frames.HEAD + _filled(frames.SQUARES, values)


def guard() -> str:
    """The kernel that makes a factor and a decision of the norm."""
    return frames.HEAD + _filled(frames.GUARD, {})


# -- the scalars of a step, where only a device knows its number -------------------------------------------------------

Leaf = tuple[str, int | None]
"""A number among the hyperparameters of a group: a name, and a place where it is a tuple."""


class DeviceScalars(NamedTuple):
    """The kernel that works out the scalars of a step, and the numbers it takes from the host."""

    text: str
    inputs: tuple[Leaf, ...]


FACTORS = ("lr", "of_rate", "of_decay", "weight_decay", "of_weight_decay")
"""Inputs besides the hyperparameters, as `StepScalars.factors` gives them."""


def scalars(rule: Rule, hyper: Mapping[str, Any], names: Sequence[str], coupled: bool) -> DeviceScalars:
    """Print the scalars of a rule as functions of its hyperparameters and the number of the step.

    Raises:
        Exception: whatever tracing arithmetic that wants to know a number raises.
    """
    leaves = tuple(_leaves(hyper))
    inputs = ["t", *FACTORS, *map(_called, leaves)]

    def work(v: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {name: _filled_in(name, value, v) for name, value in hyper.items()}
        found = dict(rule.scalars(v["t"], own))
        correction = found.pop("bias_correction", 1.0)
        lr, wd = v["lr"], v["weight_decay"]
        found["step"] = lr * v["of_rate"] / correction
        found["decay"] = wd * v["of_weight_decay"] if coupled else 1 - lr * v["of_decay"] * wd
        found["t"] = v["t"]
        return {n: x.double() if isinstance(x := found[n], Tensor) else 0 * v["t"] + x for n in names}

    arithmetic: Arithmetic = Arithmetic.of(work, dict.fromkeys(inputs, _f64))
    given = {"t": "t", **{name: f"tl.load(row + {i})" for i, name in enumerate(inputs[1:])}}
    worked_out, values = arithmetic.printed(TRITON, given, "    ")
    stores = [f"tl.store(out + {i}, {values[name]}.to(tl.float32))" for i, name in enumerate(names)]
    filled = {"inputs": str(len(inputs) - 1), "outputs": str(len(names)), "worked_out": worked_out}
    text = frames.HEAD + _filled(frames.SCALARS, filled | {"stores": _lines(stores, 1)})
    return DeviceScalars(text, leaves)


def _leaves(hyper: Mapping[str, Any]) -> list[Leaf]:
    found: list[Leaf] = []
    for name, value in hyper.items():
        if isinstance(value, tuple):
            found += [(name, i) for i in range(len(value))]
        elif isinstance(value, (float, Tensor)):
            found.append((name, None))
    return found


def _called(leaf: Leaf) -> str:
    return f"hyper.{leaf[0]}.{leaf[1]}"


def _filled_in(name: str, value: Any, v: Mapping[str, Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(v[_called((name, i))] for i in range(len(value)))
    return v[_called((name, None))] if isinstance(value, (float, Tensor)) else value


# -- modules -----------------------------------------------------------------------------------------------------------


@cache
def module(text: str) -> Any:
    """The kernels of a text. Triton wants to read it: it is kept with the lines of files, under a name of its own."""
    name = f"<sharpwise {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    found: dict[str, Any] = {"__name__": f"sharpwise_triton_{hashlib.sha256(text.encode()).hexdigest()[:16]}"}
    exec(compile(text, name, "exec"), found)
    return SimpleNamespace(**{key: value for key, value in found.items() if not key.startswith("__")})
