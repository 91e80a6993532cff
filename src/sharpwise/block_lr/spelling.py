"""One spelling of a per-block learning rate, the same in Python, in configurations and on the command line.

    block_lr = name | name(arguments)            blockwise, layer_decay(rate=0.9), reversed(blockwise)
             | block_lr * block_lr               sharpness*layer_decay(rate=0.9)
    arguments: of an ablation first the block_lr that it is of, all others as argument=value, separated by commas
    value = number | name | "text" | None | (value, value, ...) | {value: value, ...}

A name as a value is text: `decay=base`, `types=(Emb, QK)`. It is Python's syntax, read by its parser; nothing is
evaluated. `str()` of a BlockLR is its canonical spelling, with only what differs from the defaults.
"""

import ast
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, overload

from sharpwise.block_lr.ablations import Ablation, MeanMatched, Only, Reversed, Shuffled
from sharpwise.block_lr.base import BlockLR, Product, is_number
from sharpwise.block_lr.blockwise import BlockwiseLR
from sharpwise.block_lr.gradient_snr import GradientSNR
from sharpwise.block_lr.heavy_tail import HeavyTailLR
from sharpwise.block_lr.layer_decay import LayerDecay
from sharpwise.block_lr.per_role import PerRole
from sharpwise.block_lr.sharpness import SharpnessLR
from sharpwise.hints import nearest, word

BLOCK_LRS: dict[str, type[BlockLR]] = {
    "blockwise": BlockwiseLR,
    "gradient_snr": GradientSNR,
    "layer_decay": LayerDecay,
    "llr": HeavyTailLR,
    "per_role": PerRole,
    "sharpness": SharpnessLR,
}
"""Every per-block learning rate by name."""

ABLATIONS: dict[str, type[Ablation]] = {
    "mean_matched": MeanMatched,
    "only": Only,
    "reversed": Reversed,
    "shuffled": Shuffled,
}
"""Every ablation of one by name."""


@overload
def make_block_lr(spec: str | Mapping[str, Any] | BlockLR) -> BlockLR: ...
@overload
def make_block_lr(spec: None) -> None: ...
@overload
def make_block_lr(spec: str | Mapping[str, Any] | BlockLR | None) -> BlockLR | None: ...
def make_block_lr(spec: Any) -> BlockLR | None:
    """The per-block learning rate that is meant.

    Args:
        spec: a spelling (see `sharpwise.block_lr.spelling`), a table with `name` and arguments (`of`, and `factors` of
            "product", in these forms too), an instance, or None, which is returned as it is.

    Raises:
        ValueError: for what cannot be read, an unknown name or argument, a value out of its range.
        TypeError: for anything else than the above.

    >>> print(make_block_lr("only(blockwise(emb=8.0), types=Emb)"))
    only(blockwise(emb=8))
    >>> make_block_lr({"name": "layer_decay", "rate": 0.9})
    LayerDecay(decay='scaled', rate=0.9)
    """
    if spec is None or isinstance(spec, BlockLR):
        return spec
    if isinstance(spec, str):
        return _made(_read(spec.strip()))
    if isinstance(spec, Mapping):
        return _made(spec)
    what = f"the class {spec.__name__}; make one of it: {spec.__name__}()" if isinstance(spec, type) else repr(spec)
    raise TypeError(f"block_lr must be a name, a table, a BlockLR or None, got {what}")


# --- from a table ----------------------------------------------------------------------------------------------------


def _made(table: Mapping[str, Any]) -> BlockLR:
    if "name" not in table:
        raise ValueError(f"a block_lr as a table needs a name, one of {_all_names()}; got {dict(table)!r}")
    if table["name"] == Product.name:
        return _product(table)
    kind = _kind(table["name"])
    given: dict[str, Any] = {key: _plain(value) for key, value in table.items() if key != "name"}
    allowed = _arguments(kind)
    for key in given:
        if key not in allowed:
            hint = nearest(str(key), allowed)
            if kind is PerRole and not hint:
                hint = f"; write per_role(ratios={{{key}: {given[key]}}})"
            raise ValueError(f"{kind.name} has no argument {key!r}{hint}; there are {', '.join(allowed)}")
    if issubclass(kind, Ablation):
        if given.get("of") is None:
            raise ValueError(f"{kind.name} is an ablation of another block_lr; say of which, as {kind.name}(blockwise)")
        given["of"] = make_block_lr(given["of"])
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _product(table: Mapping[str, Any]) -> BlockLR:
    factors = table.get("factors")
    if set(table) != {"name", "factors"} or not isinstance(factors, (list, tuple)):
        raise ValueError(f"{Product.name} takes factors, a list of block_lrs, and nothing else; got {dict(table)!r}")
    made = [make_block_lr(factor) for factor in factors]
    return Product(tuple(factor for factor in made if factor is not None))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # TOML has lists, and a BlockLR is hashed


def _kind(name: object) -> type[BlockLR]:
    kinds: dict[str, type[BlockLR]] = {**BLOCK_LRS, **ABLATIONS}
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"no block_lr is called {name!r}{nearest(str(name), kinds)}; there are {_all_names()}")
    return kinds[name]


def _arguments(kind: type[BlockLR]) -> list[str]:
    return [f.name for f in fields(kind) if f.init]


def _all_names() -> str:
    return f"{', '.join(BLOCK_LRS)}, and of each of them {', '.join(ABLATIONS)}, as in reversed(blockwise)"


# --- from text -------------------------------------------------------------------------------------------------------


def _read(text: str) -> dict[str, Any]:
    """A spelling as a table; nested tables are those of `of`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what Python only warns of, such as 5and, is no spelling
            node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(_no_spelling(text)) from None
    return _table(node, text)


def _table(node: ast.expr, text: str) -> dict[str, Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return {"name": Product.name, "factors": [_table(node.left, text), _table(node.right, text)]}
    called = isinstance(node, ast.Call)
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name):
        raise ValueError(_no_spelling(text))
    kind = _kind(name.id)
    table: dict[str, Any] = {"name": name.id}
    if not called:
        return table
    assert isinstance(node, ast.Call)
    if len(node.args) > (1 if issubclass(kind, Ablation) else 0):
        but = ", but for the block_lr that it is of" if issubclass(kind, Ablation) else ""
        raise ValueError(
            f"{name.id} takes its arguments by name{but}; there are {', '.join(_arguments(kind))}; "
            f"got {ast.get_source_segment(text, node)}"
        )
    if node.args:
        table["of"] = _table(node.args[0], text)
    for argument in node.keywords:
        if argument.arg is None or argument.arg == "name":
            raise ValueError(_no_spelling(text))
        if argument.arg in table:
            raise ValueError(f"{name.id}: {argument.arg} is given twice, in {text!r}")
        of = argument.arg == "of" and issubclass(kind, Ablation)
        table[argument.arg] = _table(argument.value, text) if of else _value(argument.value, text)
    return table


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return word(node.id)
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (bool, int, float, str))):
        return node.value
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(part, text) for part in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(k, text): _value(v, text) for k, v in zip(node.keys, node.values, strict=True) if k}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        number: Any = node.operand.value
        if not is_number(number):
            raise ValueError(f"-{number!r} is no number, in {text!r}")
        return -number
    raise ValueError(f"{ast.get_source_segment(text, node)} is no number, name or text, in {text!r}")


def _no_spelling(text: str) -> str:
    hint = nearest(text.partition("(")[0].strip(), {**BLOCK_LRS, **ABLATIONS})
    if "+" in text:
        hint = f"; several are multiplied: {text.replace('+', '*')}"
    return (
        f"{text!r} is no block_lr{hint}; there are {_all_names()}. Arguments are given by name, as in blockwise(emb=5)"
    )
