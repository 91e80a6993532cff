"""Parameters that no product uses: biases, norms, embeddings, positions."""

import numpy as np
from torch import Tensor

from sharpwise.blocks.roles import Role
from sharpwise.blocks.trace.calls import Use
from sharpwise.blocks.trace.graph import Leaf
from sharpwise.blocks.trace.infer import Inference, source
from sharpwise.blocks.trace.rows import Ledger


def infer_vectors(found: Inference) -> None:
    """Write into the ledgers what is no matrix. The matrices are known by now."""
    for leaf in found.leaves:
        if leaf.kind == "lookup":
            _lookup(found, leaf)
    for matrix in found.matrices:
        _biases(found, matrix)
    for use in found.record.uses:
        for number in use.weight.owners:
            _use(found, use, found.ledgers[number])
    for matrix in found.matrices:
        if Role.DOWN in found.roles(matrix):
            for leaf in found.graph.behind(source(matrix)):
                if leaf.kind == "weight" and leaf.weight is not None and leaf.weight.value.numel() == 1:
                    found.ledgers[leaf.weight.number].settle(Role.UP, "a parameter of an MLP's activation")


def _lookup(found: Inference, leaf: Leaf) -> None:
    assert leaf.weight is not None and leaf.source is not None
    on_scores = any(a.bias is not None and leaf in found.graph.behind(a.bias) for a in found.record.attentions)
    record = found.record
    given = record.copies.get(id(leaf.source))
    others = {record.copies.get(id(other.source)) for other in found.leaves if other.kind == "lookup"} - {given, None}
    # Numbers of the example are tokens, whatever they are, unless it gives others too; what a forward counts, places.
    tokens = not _are_places(leaf.source) or (given is not None and not others)
    for number in leaf.weight.owners:
        if on_scores or not tokens:
            found.ledgers[number].settle(Role.POS_EMB, "looked up by places")
        else:
            found.ledgers[number].settle(Role.TOK_EMB, "looked up by tokens", first=True)


def _are_places(ids: Tensor) -> bool:
    """Whether these are positions or constants rather than tokens: consecutive, or all the same."""
    steps = ids.reshape(-1, ids.shape[-1]).diff(dim=-1) if ids.ndim else ids.new_zeros(0)
    return not steps.numel() or bool((steps == steps.reshape(-1)[0]).all())


def _biases(found: Inference, matrix: Leaf) -> None:
    """What is added to a matrix's output has its roles. The bias of a head tied to an embedding is the head's."""
    assert matrix.weight is not None
    tied = any(found.ledgers[number].whole is Role.TOK_EMB for number in matrix.weight.owners)
    roles = [Role.HEAD if tied else role for role in found.role_of_unit(matrix)]
    for units in matrix.biases:
        for number in units.owners:
            found.ledgers[number].bias = True
        for role in {role for role in roles if role is not None}:
            found.assign(units, np.array([r is role for r in roles]), role, f"added to the output of {role}")


def _use(found: Inference, use: Use, ledger: Ledger) -> None:
    vector = sum(n > 1 for n in use.weight.value.shape) < 2
    if use.how == "shift" and len(ledger.shape) == 1 and use.weight.number >= 0:
        ledger.bias = True
    if ledger.known or use.beside is None:
        return
    if use.how in ("scale", "shift") and use.weight.value.numel() > 1 and found.graph.normed(use.beside, use.how):
        ledger.settle(Role.NORM, "scales or shifts what was normalized")
    elif use.how == "join" and len(ledger.shape) > 1:
        ledger.settle(Role.TOK_EMB, "joins the stream as tokens")
    elif use.how == "shift" and not vector:
        ledger.settle(Role.POS_EMB, "added to the stream, place by place")
    elif use.how in ("shift", "join") and found.graph.nearest(use.beside, found.graph.scores) is not None:
        ledger.settle(Role.K, "the score of a key that is always there")
        ledger.bias = True
    elif use.how == "shift":
        behind = found.graph.behind(use.beside)
        roles = {role for leaf in behind if leaf.kind == "matrix" for role in found.role_of_unit(leaf)} - {Role.ROUTER}
        if len(roles) == 1 and not any(leaf.kind in ("lookup", "attention") for leaf in behind):
            role = roles.pop()
            if role is not None:
                ledger.settle(role, f"added to the output of {role}")
