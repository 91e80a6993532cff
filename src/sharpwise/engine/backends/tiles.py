"""Formats in C++: functions that decode or encode a tile of a line, printed from the traced code of a format.

What is the same for the whole tile is worked out once. A maximum over it takes a loop of its own, which computes what
it is of, as do the loops after it once more: tiles are in the cache, and arithmetic is cheaper than memory.
"""

from collections.abc import Sequence

import torch
from torch import fx

from sharpwise.engine.backends.loops import CPP
from sharpwise.engine.program import Arithmetic, expression

_aten = torch.ops.aten
_MAXIMA = (_aten.amax.default, _aten.max.default)


def written(name: str, arithmetic: Arithmetic) -> str:
    """A function `name(int64_t n, inputs..., outputs...)`: pointers to tiles and to results, numbers by value.

    Raises:
        NotImplementedError: for an operation that C++ has no words for.
    """
    nodes = list(arithmetic.graph.nodes)
    results = dict(zip(arithmetic.outputs, nodes[-1].args[0], strict=True))
    names: dict[fx.Node, str] = {}
    arguments, tables, body = [], [], []
    inputs = iter(arithmetic.inputs)
    for node in nodes[:-1]:
        kind = CPP.types[node.meta["val"].dtype]
        if node.op == "placeholder":
            own = next(inputs)
            names[node] = f"{own}[i]" if _is_tile(node) else own
            arguments.append(f"const {kind}* {own}" if _is_tile(node) else f"{kind} {own}")
        elif node.op == "get_attr":
            names[node] = f"{name}_{node.target}"
            numbers = ", ".join(repr(number) for number in node.meta["val"].tolist())
            tables.append(f"static const {kind} {names[node]}[] = {{{numbers}}};\n")
        elif _is_tile(node):
            names[node] = f"v{len(names)}"
        elif node.target in _MAXIMA:
            (source, *_), names[node] = node.all_input_nodes, f"v{len(names)}"
            body.append(f"  {kind} {names[node]} = -INFINITY;\n")
            body.append(_loop([source], names, f"{names[node]} = larger({names[node]}, {names[source]});"))
        else:
            names[node] = f"v{len(names)}"
            body.append(f"  const {kind} {names[node]} = {kind}({expression(CPP, node, names)});\n")
    stores = []
    for own, node in results.items():
        arguments.append(f"{CPP.types[node.meta['val'].dtype]}* {own}")
        if _is_tile(node):
            stores.append(f"{own}[i] = {names[node]};")
        else:
            body.append(f"  *{own} = {names[node]};\n")
    body.append(_loop([node for node in results.values() if _is_tile(node)], names, " ".join(stores)))
    head = f'extern "C" void {name}(int64_t n, {", ".join(arguments)}) {{\n'
    return f"{''.join(tables)}{head}{''.join(body)}}}\n"


def _is_tile(node: fx.Node) -> bool:
    return node.op != "get_attr" and node.meta["val"].numel() > 1


def _loop(wanted: Sequence[fx.Node], names: dict[fx.Node, str], last: str) -> str:
    """A loop over the tile that computes some of its elements and then does something with them."""
    needed: set[fx.Node] = set()
    rest = list(wanted)
    while rest:
        node = rest.pop()
        if node.op == "call_function" and _is_tile(node) and node not in needed:
            needed.add(node)
            rest += node.all_input_nodes
    lines = []
    for node in names:
        if node in needed:
            kind = CPP.types[node.meta["val"].dtype]
            lines.append(f"    const {kind} {names[node]} = {kind}({expression(CPP, node, names)});\n")
    return f"  for (int64_t i = 0; i < n; ++i) {{\n{''.join(lines)}    {last}\n  }}\n" if wanted else ""
