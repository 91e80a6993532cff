"""The step of one element, traced once from the torch code of its parts: what every printed kernel computes.

    load -> clip, coupled decay -> direction -> (control) -> decay (plain or cautious) -> move -> store

A program is straight-line arithmetic of numbers with named inputs and outputs. A back end prints it by a table of
operations and puts it into its frames, which know where tensors lie. A step that is not to be taken is of the frame
too: it reads nothing and writes nothing.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from sharpwise.controls import Control, Sums
from sharpwise.controls.base import Over, bounded
from sharpwise.rules.base import Rule, add
from sharpwise.storage import Format
from sharpwise.storage.dense import mix


class Language(NamedTuple):
    """How arithmetic is written in a language.

    Attributes:
        name: for messages.
        operations: patterns by operation, or by (operation, dtype of the result); `{0}`, `{1}` are operands, `{type}`
            the type of the result.
        types: names of the types of numbers.
        literal, statement: of `{type}` and `{value}`; a statement also of `{name}`.
    """

    name: str
    operations: Mapping[Any, str]
    types: Mapping[torch.dtype, str]
    literal: str
    statement: str


TILE = 8
"""Elements of the tiles that arithmetic is traced on; it holds for any number."""


class _Recorder(TorchDispatchMode):
    """Writes down the operations on some numbers. make_fx would too, in ten times the time, and with
    what it imports."""

    def __init__(self, numbers: Mapping[str, Tensor], constants: bool) -> None:
        super().__init__()
        self.constants = constants
        self.graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._kept: list[Any] = []  # whose ids are in use
        for i, tensor in enumerate(numbers.values()):
            self._keep(tensor, self.graph.placeholder(f"input_{i}"))

    def node(self, tensor: Tensor) -> fx.Node:
        """What a number is in the graph."""
        if id(tensor) not in self._nodes:
            if not self.constants:
                raise NotImplementedError("a number that comes from elsewhere: arithmetic may use what it is given")
            self._keep(tensor, self.graph.create_node("get_attr", f"table_{len(self._kept)}"))
        return self._nodes[id(tensor)]

    def _keep(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["val"] = tensor
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not isinstance(found, Tensor):
            raise NotImplementedError(f"{func} gives no number")
        if all(found is not a for a in args):
            own = fx.node.map_aggregate(args, lambda a: self.node(a) if isinstance(a, Tensor) else a)
            self._keep(found, self.graph.call_function(func, own, dict(kwargs or {})))
        else:
            raise NotImplementedError(f"{func} writes in place")
        return found


class Arithmetic:
    """Straight-line arithmetic of numbers, or of tiles: vectors of one length, and what is the same for all of them.

    Attributes:
        graph: of aten operations; placeholders in the order of `inputs`.
        inputs: names with their types; outputs: names.
    """

    def __init__(self, graph: fx.Graph, inputs: Mapping[str, torch.dtype], outputs: Sequence[str]) -> None:
        self.graph, self.inputs, self.outputs = graph, dict(inputs), tuple(outputs)

    @staticmethod
    def of(
        function: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        inputs: Mapping[str, torch.dtype],
        tiles: Collection[str] = (),
        constants: bool = False,
    ) -> "Arithmetic":
        """Trace a function of numbers by name.

        Args:
            tiles: names of those that are tiles.
            constants: whether it may read tensors of its own, which are constant.
        """
        with usual_defaults():
            shapes = {name: (TILE,) if name in tiles else () for name in inputs}
            numbers = {name: torch.ones(shapes[name], dtype=dtype, device="cpu") for name, dtype in inputs.items()}
            with _Recorder(numbers, constants) as recorder:
                found = function(numbers)
        recorder.graph.output(tuple(recorder.node(value) for value in found.values()))
        return Arithmetic(recorder.graph, inputs, list(found))

    @property
    def needed(self) -> set[str]:
        """Inputs that an output depends on; others are read for nothing."""
        reached = set(next(node for node in self.graph.nodes if node.op == "output").all_input_nodes)
        for node in reversed(self.graph.nodes):
            reached |= set(node.all_input_nodes) if node in reached else set()
        placeholders = (node for node in self.graph.nodes if node.op == "placeholder")
        return {name for name, node in zip(self.inputs, placeholders, strict=True) if node in reached}

    def __call__(self, **values: Tensor) -> dict[str, Tensor]:
        """What it computes of tensors, by name: that of a reference."""
        tables = {node.target: node.meta["val"] for node in self.graph.nodes if node.op == "get_attr"}
        module = fx.GraphModule(tables, self.graph)
        found = fx.Interpreter(module).run(*(values[name] for name in self.inputs))
        return dict(zip(self.outputs, found, strict=True))

    def in_memory(self, formats: Mapping[str, Format], outputs: Sequence[str], by_hash: bool) -> "Arithmetic":
        """The same of inputs that rest in memory in these formats, as these outputs do too.

        Of a format with blocks it takes the largest of the block, `absmax.NAME`, and what it gives are numbers: they
        are encoded when the largest of these is known.

        Args:
            by_hash: whether it takes the `index` of each number and a `key`, by which formats may round.
        """
        blocked = [name for name, kind in formats.items() if kind.block]

        def run(v: dict[str, Tensor]) -> dict[str, Tensor]:
            read = {name: kind.decode(v[name], v.get(f"absmax.{name}")) for name, kind in formats.items()}
            found = self(**{**v, **read})
            noise = [(v["index"], mix(v["key"] + slot)) if by_hash else None for slot in range(len(outputs))]
            for name, pair in zip(outputs, noise, strict=True):
                found[name] = found[name] if name in blocked else formats[name].encode(found[name], noise=pair)
            return found

        inputs = {**self.inputs, **{name: kind.dtype_for(torch.float32) for name, kind in formats.items()}}
        inputs |= {f"absmax.{name}": torch.float32 for name in blocked}
        inputs |= {"index": torch.int64, "key": torch.int32} if by_hash else {}
        return Arithmetic.of(run, inputs, tiles={*formats, "index"})

    def printed(self, language: Language, inputs: Mapping[str, str], indent: str = "  ") -> tuple[str, dict[str, str]]:
        """Statements that compute it from expressions of its inputs, and the variables of its outputs by name.

        Args:
            inputs: of its constant tables too, by their names.

        Raises:
            NotImplementedError: for an operation that the language lacks.
        """
        names: dict[fx.Node, str] = {}
        lines = []
        given = iter(self.inputs)
        for node in self.graph.nodes:
            if node.op == "output":
                break
            if node.op == "get_attr":
                names[node] = inputs[node.target]
                continue
            dtype = node.meta["val"].dtype
            value = inputs[next(given)] if node.op == "placeholder" else expression(language, node, names)
            names[node] = f"v{len(names)}"
            written = language.statement.format(type=language.types[dtype], name=names[node], value=value)
            lines.append(indent + written)
        return "\n".join(lines), {name: names[v] for name, v in zip(self.outputs, node.args[0], strict=True)}


def expression(language: Language, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """What an operation is in a language, on operands of these names.

    Raises:
        NotImplementedError: if the language lacks it.
    """
    dtype = node.meta["val"].dtype
    pattern = _pattern(language, node, dtype)
    operands = [_operand(language, names, node, a) for a in node.args]
    try:
        return pattern.format(*operands, type=language.types[dtype])
    except IndexError:
        raise NotImplementedError(f"no words in {language.name} for {node.target} of {len(operands)}") from None


def _pattern(language: Language, node: fx.Node, dtype: torch.dtype) -> str:
    pattern = language.operations.get((node.target, dtype)) or language.operations.get(node.target)
    if pattern is None or set(node.kwargs) - {"dtype", "layout", "device", "pin_memory"} or dtype not in language.types:
        raise NotImplementedError(f"no words in {language.name} for {node.target} {node.kwargs or ''}".rstrip())
    return pattern


def _operand(language: Language, names: Mapping[fx.Node, str], node: fx.Node, operand: Any) -> str:
    if isinstance(operand, (list, tuple)) and len(operand) == 1:
        operand = operand[0]
    if isinstance(operand, fx.Node):
        return names[operand]
    if isinstance(operand, torch.dtype):
        return language.types[operand]
    kinds = [a.meta["val"].dtype for a in node.args if isinstance(a, fx.Node)]
    kind = next((k for k in kinds if k.is_floating_point), node.meta["val"].dtype)
    if isinstance(operand, int) and kinds and not any(k.is_floating_point for k in kinds):
        # A comparison of whole numbers gives a bool: they are of the type that is compared.
        return language.literal.format(type=language.types[kinds[0]], value=repr(operand))
    return language.literal.format(type=language.types[kind], value=repr(float(operand)))


def encoding(format: Format) -> Arithmetic:
    """Codes of numbers `x` of a block, the largest of which is `absmax`."""
    kinds = {"x": torch.float32, "absmax": torch.float32}
    return Arithmetic.of(lambda v: {"codes": format.encode(v["x"], v["absmax"])}, kinds, tiles={"x"})


SETTINGS = ("lr", "multiplier", "decay", "weight_decay", "peak", "t", "momentum", "mean_square", "turn")
"""What a control is told of a unit that is the same for all units of a segment."""
OF_UNIT = ("uu", "pu", "pp", "elements", "held", "snr_factor")
"""And what is of the unit alone: with sums over it."""


def overs_of(control: Control) -> tuple[Over, ...]:
    """What a unit may be under a control."""
    return ("row", "matrix") if control.over == "row" else ("matrix",)


def bounding(control: Control, overs: Sequence[Over]) -> Arithmetic:
    """What a control makes of a unit: inputs `OF_UNIT` and `SETTINGS`, outputs `a`, `decay`, `held`; fp64.

    Args:
        overs: what a unit may be; of several, `over` is an input: the number of that which it is.
    """

    def run(v: dict[str, Tensor]) -> dict[str, Tensor]:
        known = {name: v[name] for name in (*SETTINGS, "held", "snr_factor")}
        sums, names = Sums(*(v[name] for name in Sums._fields)), ("a", "decay", "held")
        each = [bounded(control, sums, {**known, "over": over}, control.holds) for over in overs]
        found: tuple[Tensor, ...] = each[0]
        for number, other in enumerate(each[1:], start=1):
            found = tuple(torch.where(v["over"] == number, x, y) for x, y in zip(other, found, strict=True))
        return dict(zip(names, found, strict=True))

    inputs = (*OF_UNIT, *SETTINGS, *(["over"] if len(overs) > 1 else []))
    return Arithmetic.of(run, dict.fromkeys(inputs, torch.float64))


@dataclass(frozen=True)
class Program:
    """The arithmetic of a rule's step.

    Attributes:
        elements, blocks: names of element and block state; scalars: of the rule's own.
        move: inputs `p`, `g`, `state.NAME` of element state, `rate`, `decay` or (coupled) `weight_decay`, `clip`,
            `scalar.NAME`, all fp32; outputs `p` and `state.NAME`. How these are rounded when they
            are stored is of their formats: the noise of the n-th output is that of slot n.
        phase: of one block: inputs `mean` (fp64, of clipped gradients), `state.NAME` of block state, `scalar.NAME`;
            outputs `denominator` and `state.NAME`. None for a rule without block state.
        aim: what a control takes sums of: inputs as of `move`, but `decay`; outputs `p`, and `u`, which would be
            subtracted from it. None where that is not asked for.
    """

    elements: tuple[str, ...]
    blocks: tuple[str, ...]
    scalars: tuple[str, ...]
    move: Arithmetic
    phase: Arithmetic | None
    aim: Arithmetic | None = None

    @staticmethod
    def of(rule: Rule, *, coupled: bool = False, cautious: bool = False, aims: bool = False) -> "Program":
        """Trace a rule; coupled: decay is added to the gradient; cautious: it shrinks what the update shrinks too."""
        assert not (coupled and (cautious or aims))
        elements = tuple(name for name, kind in rule.state.items() if kind == "element")
        blocks = tuple(name for name, kind in rule.state.items() if kind == "block")
        scalars = [name for name in rule.scalars(1, rule.defaults) if name != "bias_correction"]
        own = [f"scalar.{name}" for name in scalars]
        inputs = ["p", "g", *(f"state.{n}" for n in elements), "rate", "weight_decay" if coupled else "decay", "clip"]
        inputs += own

        def aimed(v: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
            x, g = v["p"], v["g"]
            if rule.stage != "move":
                g = g * v["clip"]
                g = add(g, x, v["weight_decay"]) if coupled else g
            old = {name: v[f"state.{name}"] for name in elements}
            return x, *rule.direction(g, old, _short(v, "scalar"))

        def aim(v: dict[str, Tensor]) -> dict[str, Tensor]:
            x, _, numerator, below = aimed(v)
            u = v["rate"] * numerator
            return {"p": x, "u": u if below is None else u / below}

        def move(v: dict[str, Tensor]) -> dict[str, Tensor]:
            x, new, numerator, below = aimed(v)
            written = {f"state.{name}": new[name] for name in elements}
            if rule.stage == "input":
                return {"p": numerator, **written}
            # The control has its place here: rate and decay are what it made of them.
            if not coupled:
                x = decayed(x, numerator, v["decay"], cautious)
            x = add(x, numerator, -v["rate"]) if below is None else x - (v["rate"] * numerator) / below
            return {"p": x, **written}

        def phase(v: dict[str, Tensor]) -> dict[str, Tensor]:
            new, below = rule.block_phase(_short(v, "state"), v["mean"], _short(v, "scalar"))
            return {"denominator": below, **{f"state.{name}": new[name] for name in blocks}}

        to_aim = [name for name in inputs if name != "decay"]
        of_block = ["mean", *(f"state.{name}" for name in blocks), *own]
        return Program(
            elements,
            blocks,
            tuple(scalars),
            Arithmetic.of(move, dict.fromkeys(inputs, torch.float32)),
            Arithmetic.of(phase, {**dict.fromkeys(of_block, torch.float32), "mean": torch.float64}) if blocks else None,
            Arithmetic.of(aim, dict.fromkeys(to_aim, torch.float32)) if aims else None,
        )


def decayed(p: Tensor, u: Tensor, factor: Any, cautious: bool) -> Tensor:
    """p times a factor of decay; if cautious, only where p and what is subtracted from it, u, agree in sign.

    arXiv 2510.12402: p - lr (u + wd 1[u p >= 0] p). Of u the sign counts alone, which no positive denominator changes.
    """
    shrunk = p * factor
    return torch.where(p * u >= 0, shrunk, p) if cautious else shrunk


def _short(values: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Values of one kind, without its name."""
    return {name.removeprefix(f"{kind}."): v for name, v in values.items() if name.startswith(f"{kind}.")}


@contextmanager
def usual_defaults() -> Iterator[None]:
    """torch's own default type and device, whatever the program has set: its compilers make tensors without saying."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        with nullcontext() if device.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
