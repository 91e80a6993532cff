"""torch's own layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, CLASSES = 16, 2, 3
LAYER: dict[str, Any] = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 24, "dropout": 0.0, "batch_first": True}


class Translation(nn.Module):
    """An encoder-decoder over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.places = nn.Embedding(11, WIDTH), nn.Embedding(13, WIDTH), nn.Embedding(8, WIDTH)
        self.model = nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **LAYER)
        self.head = nn.Linear(WIDTH, 13)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        at = torch.arange(8, device=source.device)
        x = self.source(source) + self.places(at[: source.shape[1]])
        y = self.target(target) + self.places(at[: target.shape[1]])
        return self.head(self.model(x, y))


class Pooled(nn.Module):
    """Pre-norm encoder layers over patches, and attention of one learned query over what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        layer = nn.TransformerEncoderLayer(**LAYER, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pool, self.head = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.encoder(self.patches(image).flatten(2).transpose(1, 2))
        return self.head(self.pool(self.query.expand(len(x), -1, -1), x, x)[0].squeeze(1))


class Memory(nn.Module):
    """Keys and values of other widths than the queries, and a learned pair of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.read = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=10, add_bias_kv=True, batch_first=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.read(x, keys, values)[0]))


class Recurrent(nn.Module):
    """Two LSTM layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.recurrent = nn.LSTM(WIDTH, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(tokens))[0])


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 24),
        nn.ReLU(),
        nn.Linear(24, CLASSES),
    )


def _tokens(*lengths: int) -> tuple[Tensor, ...]:
    return tuple(torch.randint(11, (2, length)) for length in lengths)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "torch/transformer": lambda: (Translation(), _tokens(6, 5)),
    "torch/encoder-pooled": lambda: (Pooled(), torch.randn(2, 3, 16, 16)),
    "torch/multihead-memory": lambda: (Memory(), (*_tokens(5), torch.randn(2, 7, 6), torch.randn(2, 7, 10))),
    "torch/lstm": lambda: (Recurrent(), _tokens(6)),
    "torch/convolutions": lambda: (_convolutions(), torch.randn(2, 3, 8, 8)),
}
