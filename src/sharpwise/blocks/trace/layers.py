"""The layer of every parameter, from the lists of modules that hold layers and the order of execution."""

from collections.abc import Iterable, Mapping

from torch import nn

from sharpwise.blocks.roles import Role
from sharpwise.blocks.trace.graph import Leaf
from sharpwise.blocks.trace.infer import Inference
from sharpwise.blocks.trace.rows import Ledger

Path = tuple[str, ...]
_OUTSIDE = {Role.TOK_EMB, Role.POS_EMB, Role.PATCH_EMB, Role.REL_POS, Role.CONV, Role.MODULATION, Role.HEAD}


def find_layers(model: nn.Module, found: Inference) -> None:
    """Write the layers into the ledgers.

    A layer is the place in the order of execution among the members of the list of modules that holds the layers. In a
    model without such a list it is the number of attentions before.
    """
    weights = found.record.weights
    places = [
        (tuple(name.split(".")[:-1]), weights[id(p)].number)
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    lists = _lists(model, found, places)
    for path, number in places:
        ledger = found.ledgers[number]
        for i in range(len(path)):
            if ledger.layer is None and path[:i] in lists:
                ledger.layer = lists[path[:i]].get(path[: i + 1])
    if not lists and found.record.attentions:
        _by_time(found)


def _below(path: Path, at: Path) -> bool:
    return path[: len(at)] == at


def _lists(model: nn.Module, found: Inference, places: list[tuple[Path, int]]) -> dict[Path, dict[Path, int]]:
    """The outermost lists of layers: path of the list -> path of the member -> layer."""
    lists: dict[Path, dict[Path, int]] = {}
    touched = found.record.touched
    by_order: dict[int, set[int]] = {}
    for number, order in found.attention_of.items():
        by_order.setdefault(order, set()).add(number)
    attentions = list(by_order.values())
    for name, module in model.named_modules():
        own = tuple(name.split(".")) if name else ()
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(_below(own, other) for other in lists):
            continue
        inside: dict[Path, set[int]] = {}
        for path, n in places:
            if _below(path, own) and len(path) > len(own):
                inside.setdefault(path[: len(own) + 1], set()).add(n)
        attending = _attending(attentions, inside)
        if attentions and not attending:
            continue  # a list of experts, or of the matrices of an attention
        working = {m for m, ns in inside.items() if any(n in touched and _works(found.ledgers[n]) for n in ns)}
        if isinstance(module, nn.Sequential):
            # Not the chain of embedding, layers, head; or of that chain the layers only.
            if len(attending) < 2 and attending != inside.keys():
                continue
            working &= attending
        if working:
            # Of members that are one and the same the first counts.
            begins = {m: min(touched[n] for n in inside[m] & touched.keys()) for m in inside if m in working}
            lists[own] = {member: i for i, member in enumerate(sorted(begins, key=begins.__getitem__))}
    return lists


def _attending(attentions: Iterable[set[int]], inside: Mapping[Path, set[int]]) -> set[Path]:
    """The members that hold all parameters of an attention."""
    holders: dict[int, list[Path]] = {}
    for member, numbers in inside.items():
        for number in numbers:
            holders.setdefault(number, []).append(member)
    return {
        member for attention in attentions for member in holders.get(min(attention), ()) if attention <= inside[member]
    }


def _works(ledger: Ledger) -> bool:
    """Whether this is a matrix of a layer."""
    return ledger.known and not ledger.roles & (_OUTSIDE | {Role.NORM, Role.QK_NORM})


def _by_time(found: Inference) -> None:
    """A matrix used once the i-th attention has begun and before the next one has is of layer i.

    What acts on the output of matrices of one layer belongs to it, and so does what only they read. A norm that
    several layers read lies on the stream, behind the matrix before it.
    """
    touched, orders = found.record.touched, found.attention_of
    begins = [min(touched[n] for n, order in orders.items() if order == i) for i in sorted(set(orders.values()))]
    works = {n: touched[n] for n, ledger in found.ledgers.items() if n in touched and _works(ledger)}
    for n, time in works.items():
        found.ledgers[n].layer = max(sum(begin <= time for begin in begins) - 1, 0)

    def layers(matrices: Iterable[Leaf]) -> set[int | None]:
        return {found.ledgers[n].layer for m in matrices if m.weight is not None for n in m.weight.owners if n in works}

    for leaf in found.leaves:
        if leaf.kind != "weight" or leaf.weight is None or leaf.weight.number in works:
            continue
        number = leaf.weight.number
        beside = next((u.beside for u in found.record.uses if number in u.weight.owners), None)
        behind = (
            []
            if beside is None
            else [leaf for leaf in found.graph.behind(beside) if leaf.kind not in ("weight", "input")]
        )
        stream = any(m.weight is None or not set(m.weight.owners) & works.keys() for m in behind)
        read = set() if stream else layers(behind)
        if len(read) != 1:
            read = layers(found.readers(leaf))
        if len(read) > 1:
            read = layers([m for m in found.matrices if m.time < touched[number]][-1:])
        if len(read) == 1 and not found.ledgers[number].roles & _OUTSIDE:
            found.ledgers[number].layer = read.pop()
