"""Layer-wise learning rate decay, float64: the deeper the layer, the larger its learning rate.

    multiplier = rate ** (n_layers + 1 - id),   id = 0 for the embeddings, l + 1 for layer l = 0..n_layers-1,
                                                n_layers + 1 for the final norm and the head

so that head and final norm have multiplier 1, the last layer `rate`, the embeddings rate ** (n_layers + 1).
"""


def multiplier(role, layer, n_layers, rate):
    """role: of the segment; layer: its index in the stack, None outside."""
    if role in ("tok_emb", "pos_emb"):
        number = 0
    elif layer is not None:
        number = layer + 1
    else:
        number = n_layers + 1
    return float(rate) ** (n_layers + 1 - number)


class LayerDecay:
    """As `blockwise_lr.BlockwiseLR`, for the driver of the tests."""

    def __init__(self, rate, n_layers, *, decay="scaled"):
        self.rate, self.n_layers, self.decay = rate, n_layers, decay

    def observe(self, lr):
        """Nothing to remember."""

    def rates(self, role, layer, lr):
        """The learning rate of the update, and the one of the decay."""
        block_lr = lr * multiplier(role, layer, self.n_layers, self.rate)
        return block_lr, block_lr if self.decay == "scaled" else lr
