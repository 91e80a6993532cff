"""Triton kernels printed from the arithmetic of rules: programs put into the frames of `triton_frames`.

Kernels are found by their text: what prints alike is one kernel, whatever the rule, its hyperparameters or the shapes.
"""

import hashlib
import linecache
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from string import Template
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.controls import Control
from sharpwise.engine.backends import triton_frames as frames
from sharpwise.engine.program import OF_UNIT, SETTINGS, Arithmetic, Language, Program, bounding, encoding, overs_of
from sharpwise.rules.base import Rule
from sharpwise.storage import Dense, Format
from sharpwise.storage.dense import STEP_FACTOR

FIELDS = (
    *("rows", "columns", "pitch", "per", "span", "size", "first", "by_row", "by_column"),
    *("slot", "noise", "key", "counts", "view", "from_gradient", "kind", "sums", "cell"),
)
"""Of a job, before the addresses of the parameter and its state.

    rows, columns, pitch: the rectangle, in elements; per, span: rows and columns of it that a chunk has.
    size: columns of a block; first, by_row, by_column: where steps of blocks lie.
    slot: of its scalars; noise: number of its first element in the whole parameter; key: of its noise.
    counts: address of the elements per block; view: whose gradient; from_gradient: bytes from its begin.
    kind: of sums for a control, of each row, each column or all of a chunk; sums: the first place of these.

Of a job of `bound`: rows: units; columns: cells of each, the first is `cell`; size: elements of a unit; pitch: parts
that are summed up, of which `sums` is the first; per, span: places from unit to unit, and from part to part; first,
by_row, by_column: steps of blocks by unit and cell; kind: number of what a unit is, 2 for none; counts: address of
norms that are held; view: the first factor of gradient SNR.
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
        _aten.sin.default: "sine({0})",
        _aten.cos.default: "sine({0} + 1.5707963267948966)",
        _aten.ones_like.default: "tl.full([], 1.0, {type})",
        _aten.scalar_tensor.default: "tl.full([], {0}, {type})",
        _aten.bitwise_and.Tensor: "{0} & {1}",
        (_aten.sqrt.default, _f32): "tl.sqrt_rn({0})",
        _aten.reciprocal.default: "1.0 / {0}",
        (_aten.reciprocal.default, _f32): "tl.div_rn(tl.where({0} == {0}, 1.0, {0}), {0})",
        _aten.sign.default: "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))",
        (_aten.pow.Tensor_Tensor, _f64): "tl.exp2({1} * tl.log2({0}))",
        (_aten.pow.Tensor_Scalar, _f64): "tl.exp2({1} * tl.log2({0}))",
        (_aten.pow.Scalar, _f64): "tl.exp2({1} * tl.log2({0}))",
        **{getattr(_aten, op).Tensor: f"{{0}} {sign} {{1}}" for op, sign in _COMPARED.items()},
        **{getattr(_aten, op).Scalar: f"{{0}} {sign} {{1}}" for op, sign in _COMPARED.items()},
        _aten.where.self: "tl.where({0}, {1}, {2})",
        _aten.masked_fill.Scalar: "tl.where({1}, {2}, {0})",
        _aten._to_copy.default: "{0}",
        _aten.detach.default: "{0}",
        _aten.view.dtype: "{0}.to({1}, bitcast=True)",
        _aten.bitwise_and.Scalar: "{0} & {1}",
        _aten.bitwise_xor.Tensor: "{0} ^ {1}",
        _aten.__rshift__.Scalar: "{0} >> {1}",
        _aten.maximum.default: "larger({0}, {1})",
        _aten.amax.default: "most({0}, mask)",
        _aten.clamp.default: "tl.where({0} < {1}, {1}, tl.where({0} > {2}, {2}, {0}))",
        _aten.round.default: "nearest({0})",
        _aten.index.Tensor: "tl.load({0} + {1})",
    },
    {
        torch.bool: "tl.int1",
        **{getattr(torch, n): f"tl.{n}" for n in ("float32", "float64", "bfloat16", "int8", "uint8", "int32", "int64")},
    },
    literal="{value}",
    statement="{name} = ({value}).to({type})",
)


class Formats(NamedTuple):
    """How tensors rest in memory: the parameter, its gradient and its state, and whether they are rounded by hash."""

    param: Dense
    grad: Dense
    elements: tuple[Format, ...]
    blocks: tuple[Dense, ...]
    stochastic: bool

    @property
    def granule(self) -> int:
        """Elements that are 16 bytes of the narrowest."""
        return 16 // min(own.dtype_for(_f32).itemsize for own in (self.param, self.grad, *self.elements))

    @property
    def width(self) -> int:
        """Numbers in a job."""
        return len(FIELDS) + 1 + sum(1 + (own.block > 0) for own in self.elements) + len(self.blocks)


class Printed(NamedTuple):
    """The kernels of a program, the names of the scalars that they read, and what they were printed for."""

    text: str
    scalars: tuple[str, ...]
    formats: Formats
    coupled: bool
    control: Control | None


# -- the kernels of a rule ---------------------------------------------------------------------------------------------


def kernels(
    rule: Rule, formats: Formats, coupled: bool, cautious: bool = False, control: Control | None = None
) -> Printed:
    """The kernels that move views of a rule, and bound them under a control.

    Raises:
        NotImplementedError: for an operation that Triton lacks.
    """
    program = Program.of(rule, coupled=coupled, cautious=cautious, aims=control is not None)
    stored = {"p": formats.param} | _of_state(program.elements, formats.elements)
    blocks = _of_state(program.blocks, formats.blocks)
    noisy = formats.stochastic
    own = [f"slot = scalars + tl.load(row + {_at('slot')})"]
    own += [f"s_{name} = tl.load(slot + {i})" for i, name in enumerate(program.scalars)]
    own += [f"{name} = tl.load(slot + {len(program.scalars) + i})" for i, name in enumerate(OURS)]
    own += ["clip64 = tl.load(clip_)", "clip = clip64.to(tl.float32)"]
    begin = len(FIELDS)
    head = [_pointer(_called(name), begin + i, _type(kind)) for i, (name, kind) in enumerate(stored.items())]
    absmax = {name: f"{_called(name)}absmax" for name, kind in stored.items() if kind.block}
    head += [_pointer(own, begin + len(stored) + i, "tl.float32", 1) for i, own in enumerate(absmax.values())]
    at_gradient = f"tl.load(grads + tl.load(row + {_at('view')})) + tl.load(row + {_at('from_gradient')})"
    head.append(f"g_ = address({at_gradient}, {_type(formats.grad)}, ALIGN)")
    if noisy:
        head += [f"noise = tl.load(row + {_at('noise')})"]
        head += [f"key = (tl.load(row + {_at('key')}) + t.to(tl.int64) * {STEP_FACTOR}).to(tl.int32)"]
    begin += len(stored) + len(absmax)
    of_blocks = [_pointer(_called(name), begin + i, _type(kind), 1) for i, (name, kind) in enumerate(blocks.items())]
    of_blocks.append(f"counts_ = address(tl.load(row + {_at('counts')}), tl.float64, 1)")
    scalars = {f"scalar.{name}": f"s_{name}" for name in program.scalars}
    elements = [*map(_called, stored), *absmax.values(), "g_", "decay", "clip"]
    elements += [*(["noise", "key"] if noisy else []), *scalars.values()]
    values: dict[str, str] = {
        "args": "",
        "width": str(formats.width),
        **{name: str(_at(name)) for name in FIELDS},
        "scalars_head": _lines(own, 1),
        "elements_head": _lines([*own, *head], 1),
        "blocks_head": _lines(of_blocks, 1),
        "elements": ", ".join(elements),
        "moved": ", ".join("shrunk" if control is not None and own == "decay" else own for own in elements),
        "blocks": ", ".join([*map(_called, blocks), "step", *scalars.values()]),
        "factors": _lines([frames.RATE] if control is None else frames.CELL, 4),
    }
    text = frames.HEAD + (frames.LARGEST if absmax else "")
    for name in absmax:
        given = {"x": "x", "absmax": "absmax"}
        encode = f"encode_{_called(name)}(x, absmax)"
        text += function(encode, encoding(stored[name]), given, lambda found: [f"return {found['codes']}"])
    text += function(
        f"move({values['elements']}, at, i, mask, rate{', b, held' if absmax else ''})",
        program.move.in_memory({**stored, "g": formats.grad}, list(stored), noisy),
        {name: name for name in ("rate", "decay", "clip", "key")}
        | {"weight_decay": "decay", "index": "noise + at + i", **scalars}
        | {name: f"tl.load({_called(name)} + at + i, mask=mask, other=0)" for name in (*stored, "g")}
        | {f"absmax.{name}": f"tl.load({own} + b, mask=held, other=0)" for name, own in absmax.items()},
        lambda found: _stores(list(stored), absmax, found),
    )
    text += _filled(frames.LINES if absmax else frames.TILES, values)
    if program.phase is not None:
        # Every thread reads what one of them writes: all have to have read it before.
        text += function(
            f"block_step({values['blocks']}, b, held, mask, mean)",
            program.phase.in_memory(blocks, list(blocks), False),
            {"mean": "mean", **scalars}
            | {name: f"tl.load({_called(name)} + b, mask=held, other=0)" for name in blocks},
            lambda found: [
                "tl.debug_barrier()",
                *(f"tl.store({_called(name)} + b, {found[name]}, mask=mask)" for name in blocks),
                f"return (step / {found['denominator']}).to(tl.float32)",
            ],
        )
        own_frames = (frames.PHASE,) if absmax else (frames.ROWS, frames.COLUMNS, frames.PHASE)
        text += "".join(_filled(frame, values) for frame in own_frames)
    names = (*program.scalars, *OURS)
    if control is not None:
        loads = {n: f"tl.load({_called(n)} + at + i, mask=mask, other=0)" for n in (*stored, "g")}
        text += function(
            f"aimed({values['elements']}, at, i, mask, rate)",
            program.aim.in_memory({**stored, "g": formats.grad}, (), False),  # type: ignore[union-attr]
            {"rate": "rate", "clip": "clip", **scalars, **loads},
            lambda found: [f"return {found['p']}, {found['u']}"],
        )
        text += _filled(frames.AIM, values) + _bound(control, names, values)
        names += TOLD
    return Printed(text, names, formats, coupled, control)


TOLD = tuple(f"told_{name}" for name in SETTINGS if name not in OURS)
"""Scalars after those, of a control."""


def _bound(control: Control, names: Sequence[str], values: Mapping[str, str]) -> str:
    """The kernel of what a control makes of units."""
    known = {n: f"tl.load(slot + {i})" for i, n in enumerate((*names, *TOLD))}
    told = {n: known.get(f"told_{n}", n) for n in SETTINGS} | {"elements": "elements", "over": "kind"}
    # As vectors: the interpreter makes numbers of comparisons of scalars, where these meet vectors.
    given = {n: n for n in OF_UNIT} | {n: f"{own} + zero" for n, own in told.items()}
    given["snr_factor"] = "tl.load(snr_ + unit, mask=here, other=1.0)" if control.snr_samples else "zero + 1.0"
    worked_out, found = bounding(control, overs_of(control)).printed(TRITON, given, "    ")
    return _filled(frames.BOUND, {**values, "worked_out": worked_out, **found})


def function(
    head: str, own: Arithmetic, values: Mapping[str, str], last: Callable[[dict[str, str]], Sequence[str]]
) -> str:
    """A function `head` of Triton.

    Args:
        values: expressions of the inputs of its arithmetic, and addresses of its constant tables; a maximum over a tile
            is taken where `mask` holds.
        last: from the names of what it found to what is done with these.

    Raises:
        NotImplementedError: for an operation that Triton lacks.
    """
    body, found = own.printed(TRITON, values, "    ")
    return f"\n@triton.jit\ndef {head}:\n{body}\n{_lines(last(found), 1)}\n"


def _stores(stored: Sequence[str], absmax: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Statements that store what was found, of state with blocks the codes and the largest of each block."""
    lines = [f"{own}_new = largest({found[name]}, mask)" for name, own in absmax.items()]
    # Every thread of a block reads what one of them writes.
    lines += ["tl.debug_barrier()"] * bool(absmax)
    lines += [f"tl.store({own} + b, {own}_new, mask=held)" for own in absmax.values()]
    coded = {name: f"encode_{_called(name)}({found[name]}, {own}_new)" for name, own in absmax.items()}
    return lines + [f"tl.store({_called(n)} + at + i, {coded.get(n, found[n])}, mask=mask)" for n in stored]


def _of_state(names: Sequence[str], formats: Sequence[Format]) -> dict[str, Format]:
    return {f"state.{name}": own for name, own in zip(names, formats, strict=True)}


def _called(name: str) -> str:
    """The address of a tensor."""
    return f"{name.removeprefix('state.')}_"


def _at(field: str) -> int:
    return FIELDS.index(field)


def _type(own: Format) -> str:
    """The type of the one part of a format."""
    return TRITON.types[own.dtype_for(_f32)]


def _pointer(called: str, at: int, type_: str, align: Any = "ALIGN") -> str:
    return f"{called} = address(tl.load(row + {at}), {type_}, {align})"


def _lines(lines: Sequence[str], deep: int) -> str:
    return "\n".join("    " * deep + line for line in lines)


def _filled(frame: str, values: Mapping[str, str]) -> str:
    """A frame with its values, and no argument that Triton would specialize on."""
    frame = frame.replace("$moves", "jobs, chunks, grads, scalars, clip_, ok_")
    frame = frame.replace("$aligned", "ALIGN: tl.constexpr, G: tl.constexpr")
    frame = frame.replace("$tile", "BY: tl.constexpr, U: tl.constexpr, W: tl.constexpr")
    names = re.search(r"def \w+\(([^)]*)\)", frame)
    assert names is not None
    args = [name.strip() for name in names[1].split(",") if ":" not in name]
    return Template(frame).substitute({**values, "args": repr(args)})


def squares(grad: torch.dtype, numbers: int) -> str:
    """The kernel that sums up gradients of a type; `numbers` in a job."""
    values = {name: str(_at(name)) for name in FIELDS} | {"width": str(numbers), "gradient": TRITON.types[grad]}
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

    @property
    def width(self) -> int:
        """Numbers of a segment."""
        return len(FACTORS) + len(self.inputs)


FACTORS = ("lr", "of_rate", "of_decay", "weight_decay", "peak")
"""Inputs besides the hyperparameters, as `StepScalars.factors` gives them."""


def scalars(
    rule: Rule, hyper: Mapping[str, Any], names: Sequence[str], coupled: bool, origin: Rule | None = None
) -> DeviceScalars:
    """Print the scalars of a rule, and what a control is told of it, as functions of its hyperparameters and the number
    of the step.

    Args:
        origin: the rule of which it is a stage.

    Raises:
        Exception: whatever tracing arithmetic that wants to know a number raises.
    """
    leaves = tuple(_leaves(hyper))
    inputs = ["t", *FACTORS, *map(_of_leaf, leaves)]

    def work(v: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {name: _filled_in(name, value, v) for name, value in hyper.items()}
        found = dict(rule.scalars(v["t"], own))
        correction = found.pop("bias_correction", 1.0)
        lr, wd = v["lr"], v["weight_decay"]
        found["step"] = lr * v["of_rate"] / correction
        found["decay"] = wd if coupled else 1 - lr * v["of_decay"] * wd
        found["t"] = v["t"]
        if TOLD[0] in names:
            told = origin or rule
            found |= {"told_lr": lr * v["of_rate"], "told_multiplier": v["of_rate"], "told_weight_decay": wd}
            found |= {"told_peak": v["peak"], "told_turn": told.turn}
            found |= {"told_momentum": told.momentum_of(own), "told_mean_square": told.mean_square(own)}
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


def _of_leaf(leaf: Leaf) -> str:
    return f"hyper.{leaf[0]}.{leaf[1]}"


def _filled_in(name: str, value: Any, v: Mapping[str, Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(v[_of_leaf((name, i))] for i in range(len(value)))
    return v[_of_leaf((name, None))] if isinstance(value, (float, Tensor)) else value


# -- modules -----------------------------------------------------------------------------------------------------------


@cache
def module(text: str) -> Any:
    """The kernels of a text. Triton wants to read it: it is kept with the lines of files, under a name of its own."""
    name = f"<sharpwise {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    found: dict[str, Any] = {"__name__": f"sharpwise_triton_{hashlib.sha256(text.encode()).hexdigest()[:16]}"}
    exec(compile(text, name, "exec"), found)
    return SimpleNamespace(**{key: value for key, value in found.items() if not key.startswith("__")})
