"""Parameters that no product uses: biases, norms, embeddings, positions, learned queries.

| role | proof |
|---|---|
| tok_emb | looked up by integers that the model was given |
| pos_emb | looked up by places that the model counts, or is given and begins the stream with; by kinds of tokens, \
added to the tokens; added place by place where the stream begins; joined to it; a stream that begins with a parameter \
(learned queries, class tokens) |
| rel_pos | looked up or computed without data, added to the scores of an attention |
| norm | all that it scales or shifts was normalized |
| conv | the kernel of a convolution |
| a bias | added to the output of a matrix, along its rows: the role of that matrix |
"""

from typing import Any

import numpy as np
from torch import Tensor

from sharpwise.blocks.roles import Role
from sharpwise.blocks.trace.around import ancestors, begins, on_scores
from sharpwise.blocks.trace.calls import Use
from sharpwise.blocks.trace.graph import Leaf
from sharpwise.blocks.trace.infer import QKV, Inference, source
from sharpwise.blocks.trace.rows import ROLES, roles_of

_STARTS = {Role.TOK_EMB, Role.PATCH_EMB, Role.CONV, Role.POS_EMB}


def infer_vectors(found: Inference) -> None:
    """Write into the ledgers what is no matrix. The matrices are known by now."""
    biases = 0
    for attention in found.record.attentions:
        bias = 0 if attention.bias is None else found.graph.mask(attention.bias)
        biases |= 0 if bias & found.paths.made else bias
    lookups = [leaf for leaf in found.leaves if leaf.kind == "lookup"]
    tables = _tables_of_tokens(found, lookups)
    for leaf in lookups:
        _lookup(found, leaf, tables, bool(biases >> leaf.index & 1))
    for leaf in found.leaves:
        if leaf.kind == "weight" and biases >> leaf.index & 1 and leaf.weight is not None:
            found.ledgers[leaf.weight.number].settle(Role.REL_POS, "added to the scores of an attention")
    for matrix in found.matrices:
        _biases(found, matrix)
    for matrix in found.matrices:
        if found.roles(matrix) & {*QKV} and not found.behind(matrix):
            _learned(found, source(matrix))
    for use in found.record.uses:
        for number in use.weight.owners:
            _use(found, use, number)
    for matrix in found.matrices:
        if Role.DOWN in found.roles(matrix):
            for leaf in found.graph.behind(source(matrix)):
                if leaf.kind == "weight" and leaf.weight is not None and leaf.weight.value.numel() == 1:
                    uses = found.record.uses_of(leaf.weight.number)
                    if uses and all(use.weight.number < 0 for use in uses):  # a function of it: no plain gain or slope
                        found.ledgers[leaf.weight.number].settle(Role.UP, "a parameter of an MLP's activation")


def _tables_of_tokens(found: Inference, lookups: list[Leaf]) -> list[Leaf]:
    """The lookups by integers that the model was given. Where it was given several, the places among them are none."""
    copies = found.record.copies
    given = [leaf for leaf in lookups if leaf.source is not None and id(leaf.source) in copies]
    if len({copies[id(leaf.source)] for leaf in given}) <= 1:
        return given
    heads = {n for m in found.matrices if Role.HEAD in found.roles(m) and m.weight is not None for n in m.weight.owners}
    tokens = [leaf for leaf in given if leaf.source is not None and not _are_places(leaf.source)]
    sizes = {leaf.weight.value.shape[0] for leaf in tokens if leaf.weight is not None}
    few = 16  # kinds of tokens, segments
    return [
        leaf
        for leaf in given
        if leaf.weight is not None
        and (
            heads & {*leaf.weight.owners} or (leaf in tokens and (len(sizes) == 1 or leaf.weight.value.shape[0] > few))
        )
    ]


def _lookup(found: Inference, leaf: Leaf, tables: list[Leaf], on_mask: bool) -> None:
    assert leaf.weight is not None and leaf.source is not None
    meetings = list(found.paths.meets(leaf, straight=False))
    sums = [node for node, name, rest, _ in meetings if name in ("Add", "Sub") and rest]
    scores = [node for node in sums if any(_scores(found, n) for n in found.paths.inputs(node))]
    for number in leaf.weight.owners:
        ledger = found.ledgers[number]
        if leaf in tables:
            ledger.settle(Role.TOK_EMB, "looked up by tokens", first=True)
        elif on_mask or scores:
            ledger.settle(Role.REL_POS, "looked up, and added to the scores of an attention")
        elif _are_places(leaf.source) and _alike(leaf.source):
            if id(leaf.source) not in found.record.copies or begins(found, leaf):  # what is given may be anything
                ledger.settle(Role.POS_EMB, "looked up by places")
        elif found.record.is_marked("kind", leaf.source) and begins(found, leaf) and _with(found, meetings, tables):
            ledger.settle(Role.POS_EMB, "looked up by kinds of tokens, and added to the tokens")


def _with(found: Inference, meetings: list[tuple[Any, str, int, bool]], tables: list[Leaf]) -> bool:
    """Whether one of these leaves is in all that a lookup becomes a part of."""
    masks = [found.graph.mask_at(node) for node, _, _, _ in meetings]
    return all(any(mask >> leaf.index & 1 for leaf in tables) for mask in masks)


def _scores(found: Inference, node: object) -> bool:
    return on_scores(found, _At(node))  # type: ignore[arg-type]


class _At:
    """What stands for the tensor that a node makes."""

    def __init__(self, node: object) -> None:
        self.grad_fn = node


def _are_places(ids: Tensor) -> bool:
    """Whether these are positions or constants rather than tokens: consecutive, or all the same."""
    steps = ids.reshape(-1, ids.shape[-1]).diff(dim=-1) if ids.ndim else ids.new_zeros(0)
    return not steps.numel() or bool((steps == steps.reshape(-1)[0]).all())


def _alike(ids: Tensor) -> bool:
    """Whether these are the places of tokens, not of pairs of them."""
    rows = ids.reshape(-1, ids.shape[-1]) if ids.ndim else ids.reshape(1, 1)
    return bool((rows == rows[:1]).all())


def _biases(found: Inference, matrix: Leaf) -> None:
    """What is added to a matrix's output has its roles. The bias of a head tied to an embedding is the head's."""
    if matrix.weight is None or not matrix.biases:
        return
    tied = any(found.ledgers[number].whole is Role.TOK_EMB for number in matrix.weight.owners)
    codes = found.codes(matrix)
    if tied:
        codes = np.full_like(codes, ROLES.index(Role.HEAD))
    roles = roles_of(codes)
    start = bool(roles & {Role.CONV, Role.PATCH_EMB})
    for units in matrix.biases:
        vectors = [number for number in units.owners if len(found.ledgers[number].shape) == 1]
        if len(vectors) < len(units.owners) and (
            start or any(_begins_with(found, 1 << matrix.index, number) for number in units.owners)
        ):
            continue  # a class token, a kind of token
        for number in units.owners:
            found.ledgers[number].bias = True
        for role in sorted(role for role in roles if role is not None):
            found.assign(units, codes == ROLES.index(role), role, f"added to the output of {role}", bias=True)


def _learned(found: Inference, tensor: Tensor) -> None:
    """Parameters that are read in the place of data."""
    for leaf in found.graph.behind(tensor):
        if leaf.kind == "weight" and leaf.weight is not None and leaf.weight.value.ndim > 1:
            ledger = found.ledgers[leaf.weight.number]
            if not any(use.how in ("scale", "other") for use in found.record.uses_of(leaf.weight.number)):
                ledger.settle(Role.POS_EMB, "learned queries")


def _use(found: Inference, use: Use, number: int) -> None:
    ledger = found.ledgers[number]
    vector = sum(n > 1 for n in use.weight.value.shape) < 2
    plain = (len(use.weight.owners) == 1 and not use.weight.mixes) or use.weight.moved
    if use.how == "shift" and len(ledger.shape) == 1 and use.weight.number >= 0:
        ledger.bias = True
    if ledger.known or use.beside is None:
        return
    if use.how == "shift" and use.weight.value.ndim > 1 and on_scores(found, use.beside):
        ledger.settle(Role.REL_POS, "added to the scores of an attention")
    elif not plain:
        return
    elif (
        (use.how == "scale" or (use.how == "shift" and vector))
        and use.weight.value.numel() > 1
        and _always_normed(found, number)
    ):
        if number not in found.unsure:
            ledger.settle(Role.NORM, "scales or shifts what was normalized")
    elif use.how == "conv":
        ledger.settle(Role.CONV, "the kernel of a convolution")
    elif use.how == "join" and len(ledger.shape) > 1:
        ledger.settle(Role.POS_EMB, "joins the stream")
    elif use.how == "shift" and len(ledger.shape) > 1:
        _place_by_place(found, use, number, vector)
    elif (
        use.how in ("shift", "join")
        and use.weight.value.numel() > 1
        and (
            _on_weights(found, use.beside)
            or found.record.is_marked("of_scores", use.beside)  # and so is what all keys sum up to
        )
    ):
        ledger.settle(Role.K, "the score of a key that is always there")
        ledger.bias = True
    elif use.how == "shift":
        _bias(found, use, number)


def _always_normed(found: Inference, number: int) -> bool:
    """Whether all that a parameter scales or shifts was normalized."""
    return all(
        use.beside is not None and found.graph.normed(use.beside, use.how) for use in found.record.uses_of(number)
    )


def _on_weights(found: Inference, tensor: Tensor) -> bool:
    """Whether a tensor is made of scores of which a softmax makes weights."""
    scores = found.graph.nearest(tensor, found.graph.scores)
    return scores is not None and any(scores is one for one in found.record.weightings.values())


def _begins_with(found: Inference, here: int, number: int) -> bool:
    """Whether what is added to a parameter was made of it."""
    own = found.stand_in(number)
    return own is not None and bool(ancestors(found, here) >> own.index & 1)


def _place_by_place(found: Inference, use: Use, number: int, vector: bool) -> None:
    assert use.beside is not None
    ledger = found.ledgers[number]
    mask = found.graph.mask(use.beside)
    here = mask & found.paths.data
    if _begins_with(found, here, number):
        ledger.settle(Role.POS_EMB, "the stream begins with it")
    if ledger.known or vector:
        return
    roles = [found.roles(matrix) for matrix in found.matrices_in(here)[:64]]
    if here & found.paths.of_kind["attention"] or not all(role and role <= _STARTS for role in roles):
        if roles and all(role == {Role.MODULATION} for role in roles):
            ledger.settle(Role.MODULATION, "added to what scales or shifts the stream")
        return
    if not any(other.how == "other" for other in found.record.uses_of(number)):
        ledger.settle(Role.POS_EMB, "added to the stream, place by place, where it begins")


def _bias(found: Inference, use: Use, number: int) -> None:
    assert use.beside is not None
    ledger = found.ledgers[number]
    added = [u.beside for u in found.record.uses_of(number) if u.how in ("shift", "join") and u.beside is not None]
    if any(_begins_with(found, found.graph.mask(beside) & found.paths.data, number) for beside in added):
        if all(_begins_with(found, found.graph.mask(beside) & found.paths.data, number) for beside in added):
            ledger.settle(Role.POS_EMB, "the stream begins with it")
        return
    good, _ = found.paths.straight(use.beside, products=True)
    mask = found.graph.mask(use.beside) & found.paths.data & ~found.routers
    if len(ledger.shape) > 1 or mask & ~good or mask & ~found.paths.of_kind["matrix"]:
        return
    roles = {role for leaf in found.matrices_in(mask)[:64] for role in roles_of(found.codes(leaf))} - {Role.ROUTER}
    role = roles.pop() if len(roles) == 1 else None
    if role is not None:
        ledger.settle(role, f"added to the output of {role}")
