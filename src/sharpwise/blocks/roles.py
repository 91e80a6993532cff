"""What a parameter is for: the fine role of a segment, and the block type of the papers that it belongs to."""

from collections.abc import Iterable
from enum import StrEnum

from sharpwise.hints import nearest


class Role(StrEnum):
    """The job that a piece of a parameter has in a transformer. A bias has the role of its matrix.

    `o_gate` multiplies an attention's output before `o`, `gate` the hidden units of an MLP. `tok_emb` is looked up,
    `patch_emb` multiplies inputs that are numbers (patches, frames, features). `pos_emb` also holds learned queries and
    class tokens: vectors that are the same for every input. `rel_pos` is added to the scores of an attention, `conv` is
    a convolution, `modulation` scales or shifts the stream by what a model is conditioned on.
    """

    TOK_EMB = "tok_emb"
    POS_EMB = "pos_emb"
    PATCH_EMB = "patch_emb"
    REL_POS = "rel_pos"
    CONV = "conv"
    MODULATION = "modulation"
    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741 - the field's name for the attention output projection
    O_GATE = "o_gate"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    ROUTER = "router"
    NORM = "norm"
    QK_NORM = "qk_norm"
    HEAD = "head"
    OTHER = "other"


class BlockType(StrEnum):
    """The block types of the Sharpness Disparity Principle (arXiv 2502.19002), plus `Head` and `Other`."""

    EMB = "Emb"
    QK = "QK"
    VO = "VO"
    FFN = "FFN"
    NORM = "Norm"
    HEAD = "Head"
    OTHER = "Other"


HIDDEN = {Role.Q, Role.K, Role.V, Role.O, Role.O_GATE, Role.GATE, Role.UP, Role.DOWN}
"""Roles of the matrices within layers."""
BLOCK_TYPE: dict[Role, BlockType] = {
    Role.TOK_EMB: BlockType.EMB,
    Role.POS_EMB: BlockType.EMB,
    Role.PATCH_EMB: BlockType.OTHER,  # of these four no paper has measured a block type
    Role.REL_POS: BlockType.OTHER,
    Role.CONV: BlockType.OTHER,
    Role.MODULATION: BlockType.OTHER,
    Role.Q: BlockType.QK,
    Role.K: BlockType.QK,
    Role.V: BlockType.VO,
    Role.O: BlockType.VO,
    Role.O_GATE: BlockType.VO,
    Role.GATE: BlockType.FFN,
    Role.UP: BlockType.FFN,
    Role.DOWN: BlockType.FFN,
    Role.ROUTER: BlockType.FFN,
    Role.NORM: BlockType.NORM,
    Role.QK_NORM: BlockType.NORM,
    Role.HEAD: BlockType.HEAD,
    Role.OTHER: BlockType.OTHER,
}

_ALSO_CALLED = {
    "embedding": "tok_emb", "embeddings": "tok_emb", "embed": "tok_emb", "wte": "tok_emb", "token": "tok_emb",
    "position": "pos_emb", "wpe": "pos_emb", "query": "q", "key": "k", "value": "v", "output": "o", "out": "o",
    "fc": "up", "mlp": "up", "layernorm": "norm", "rmsnorm": "norm", "ln": "norm", "lm_head": "head",
}  # fmt: skip
"""Names of others for roles."""


def meant(word: object, allowed: Iterable[str]) -> str:
    """A hint for the message about a role or block type that is none, empty where nothing is near.

    >>> meant("emb", Role), meant("ffn", [*BlockType, *Role]), meant("query", Role)
    (" (did you mean 'tok_emb' or 'pos_emb'?)", " (did you mean 'FFN'?)", " (did you mean 'q'?)")
    """
    there = [str(name) for name in allowed]
    low = str(word).lower()
    same = [name for name in there if name.lower() == low]
    inside = [str(role) for role, kind in BLOCK_TYPE.items() if kind.lower() == low and role in there]
    other = _ALSO_CALLED.get(low)
    found = same or inside or ([other] if other in there else [])
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else nearest(str(word), there)
