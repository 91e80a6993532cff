"""The rules of evidence: every role is a proof, and what has none is `other`.

A *straight* path moves, rotates, scales, normalizes or adds numbers (`paths`). Whatever else a forward does ends it: an
activation, a convolution, a pool, a product of two things that depend on data, a product with a matrix that is no
parameter, a function of which only the outside is seen. The *stream* of a matrix is what its input is made of, where
factors that it alone reads are left aside. The order counts: who is proven first stays. What is proven of some rows
holds for these rows.

| role | what is seen behind it | what is seen before it |
|---|---|---|
| q, k, v | any stream; a product over features, token by token | a straight path to an attention; nothing reads these \
rows as a stream is read; parts that are summed are made of the same stream |
| router | a stream | a choice, and a product with what was chosen; one number, and a product with what MLPs make |
| o | an attention, by a straight path; what is beside it multiplies it (o_gate) or is joined to it (up, gate) | |
| up, gate, down | makers that read one stream, token by token, for nothing else; an activation or a product \
between | what down makes is added to that stream before anything reads it or weighs by its softmax |
| head | | the model's output, made of nothing else |
| the same role | a stream | a straight path to a matrix that alone reads it: the factors of a low-rank product |
| patch_emb | inputs that are numbers; patches side by side | a straight path into a stream that is added to |
| modulation | no attention, nothing of what it scales | a product with what was normalized |
| conv | any other convolution | |

Roles of parameters that no product uses: `vectors`.
"""

from sharpwise.blocks.roles import Role
from sharpwise.blocks.trace.around import settle_around
from sharpwise.blocks.trace.attend import attentions, choice, output
from sharpwise.blocks.trace.infer import Inference
from sharpwise.blocks.trace.mlp import chain, down, factors, head, hidden_of_head
from sharpwise.blocks.trace.vectors import infer_vectors


def weigh(found: Inference) -> None:
    """Write what is proven into the ledgers."""
    attentions(found)
    for x, how in found.record.choices:
        choice(found, x, how)
    found.note_routers()
    for step in (output, down, head):
        for matrix in found.matrices:
            if found.free(matrix) and matrix.pointwise:
                step(found, matrix)
    heads = [matrix for matrix in found.matrices if found.roles(matrix) == {Role.HEAD}]
    while sum(chain(found, matrix) for matrix in found.matrices):
        pass
    for matrix in heads:
        hidden_of_head(found, matrix)
    for matrix in found.matrices:
        factors(found, matrix)
    settle_around(found)
    infer_vectors(found)
