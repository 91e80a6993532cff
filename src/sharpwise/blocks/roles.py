"""What a parameter is for: the fine role of a segment, and the block type of the papers that it belongs to."""

from enum import StrEnum


class Role(StrEnum):
    """The job that a piece of a parameter has in a transformer. A bias has the role of its matrix.

    `o_gate` multiplies an attention's output before `o`, `gate` the hidden units of an MLP.
    """

    TOK_EMB = "tok_emb"
    POS_EMB = "pos_emb"
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


BLOCK_TYPE: dict[Role, BlockType] = {
    Role.TOK_EMB: BlockType.EMB,
    Role.POS_EMB: BlockType.EMB,
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
