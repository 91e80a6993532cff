"""Blockwise LR by sharpness (arXiv 2502.19002): the learning rate of a block type, float64.

    floor=None:     lr_b = r lr
    floor=min_lr:   lr_b = r lr as long as lr rises (lr = peak, the largest lr seen so far); once it has fallen,
                    lr_b = min_lr + (r peak - min_lr)(lr - min_lr)/(peak - min_lr), and lr_b = lr where lr <= min_lr
    decay "scaled": the decoupled decay uses lr_b;  "base": it uses lr

With the floor every block falls to the same absolute min_lr: lr_b = r peak at lr = peak, min_lr at lr = min_lr. A
warm-up starts from 0, below the floor, and every block rises in proportion there, as in the authors' code.
"""

PAPER = {"emb": 10, "qk": 8, "ffn": 6, "vo": 4, "norm": 1, "head": 1, "pos_emb": 1, "other": 1}

RATIO_OF_ROLE = {
    "tok_emb": "emb",
    "pos_emb": "pos_emb",
    "q": "qk",
    "k": "qk",
    "v": "vo",
    "o": "vo",
    "gate": "ffn",
    "up": "ffn",
    "down": "ffn",
    "norm": "norm",
    "head": "head",
    "other": "other",
}


class BlockwiseLR:
    """The schedule of one parameter group: it remembers the peak."""

    def __init__(self, ratios, *, floor=None, decay="scaled"):
        self.ratios, self.floor, self.decay = {**PAPER, **ratios}, floor, decay
        self.peak = 0.0

    def observe(self, lr):
        """Called once per step, before `rates`."""
        self.peak = max(self.peak, lr)

    def rates(self, role, layer, lr):
        """The learning rate of the update, and the one of the decay, for a role (its layer does not matter)."""
        r, floor = self.ratios[RATIO_OF_ROLE[role]], self.floor
        if floor is None or lr == self.peak:
            block_lr = r * lr
        elif lr <= floor:
            block_lr = lr
        else:
            block_lr = floor + (r * self.peak - floor) * (lr - floor) / (self.peak - floor)
        return block_lr, block_lr if self.decay == "scaled" else lr
