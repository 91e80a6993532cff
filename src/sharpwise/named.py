"""Optimizers with options, under names of their own: those of `combinations.PRESETS`."""

from typing import Any, Literal

from torch import Tensor

from sharpwise.combinations import AUX_LR
from sharpwise.controls import L2, Angular
from sharpwise.optim import AdamW, Lion, Muon

__all__ = ["AdamH", "AdamW8bit", "LionA", "LionAR", "Muon8bit", "MuonH"]


def AdamH(first: Any, lr: float | Tensor = 1e-2, *own: Any, aux_lr: float | None = AUX_LR, **options: Any) -> AdamW:
    """`AdamW` whose hidden matrices keep their norms (arXiv 2606.16899): `sharpwise.controls.hyperball`.

    Args:
        first, own, options: as `AdamW` takes them. lr: size of an update in units of the norm of its matrix, about the
            root of AdamW's lr times weight decay. aux_lr: AdamW's own lr, for all that is no hidden matrix.
    """
    return AdamW(first, lr, *own, aux_lr=aux_lr, **{"control": "hyperball", **options})


def AdamW8bit(first: Any, lr: float | Tensor = 1e-3, *own: Any, storage: Any = "int8-dynamic", **options: Any) -> AdamW:
    """`AdamW` with both moments in 8 bits: a quarter of its state, where `keep_fp32=()`.

    Args:
        first, lr, own, options: as `AdamW` takes them. storage: "int8-dynamic", or with "-2048" the larger blocks.
    """
    return AdamW(first, lr, *own, storage=storage, **options)


def Muon8bit(first: Any, lr: float | Tensor = 1e-3, *own: Any, storage: Any = "int8-linear", **options: Any) -> Muon:
    """`Muon` with its momentum in 8 bits (arXiv 2509.23106); of the AdamW half too with `aux_storage="int8-dynamic"`.

    Args:
        first, lr, own, options: as `Muon` takes them. storage: "int8-linear" or "int8-dynamic", both also with "-2048".
    """
    return Muon(first, lr, *own, storage=storage, **options)


def MuonH(first: Any, lr: float | Tensor = 1e-2, *own: Any, aux_lr: float | None = AUX_LR, **options: Any) -> Muon:
    """`Muon` whose matrices keep their norms (arXiv 2606.16899): `sharpwise.controls.hyperball`.

    Args:
        first, own, options: as `Muon` takes them. lr: size of an update in units of the norm of its matrix, about the
            root of AdamW's lr times weight decay. aux_lr: AdamW's own lr, for all that is no hidden matrix.
    """
    return Muon(first, lr, *own, aux_lr=aux_lr, **{"control": "hyperball", **options})


def LionA(
    first: Any,
    lr: float | Tensor = 1e-3,
    beta: float = 0.9,
    weight_decay: float | Tensor = 0.1,
    *,
    inverse_bias_correction: bool = False,
    **options: Any,
) -> Lion:
    """`Lion` with updates of one l2 norm (arXiv 2410.23922): `sharpwise.controls.l2`. AdamW's lr and decay serve.

    Args:
        first, weight_decay, options: as `Lion` takes them. lr: AdamW's. beta: of the momentum, in [0, 1).
        inverse_bias_correction: updates begin small, as the momentum does: times 1 - beta^t.
    """
    return Lion(
        first,
        lr,
        (beta, beta),
        weight_decay,
        **{"control": L2(inverse_bias_correction=inverse_bias_correction), **options},
    )


def LionAR(
    first: Any,
    lr: float | Tensor = 1e-3,
    beta: float = 0.9,
    weight_decay: float | Tensor = 0.1,
    *,
    angle: Literal["linear", "sqrt", "lr"] = "linear",
    inverse_bias_correction: bool = False,
    **options: Any,
) -> Lion:
    """`Lion` whose rows turn by a set angle and keep their norms (arXiv 2410.23922): `sharpwise.controls.angular`.

    Without warm-up the paper takes beta=0.98, nesterov=True and inverse_bias_correction=True.

    Args:
        first, weight_decay, options: as `Lion` takes them; weight_decay sets the angle. lr: AdamW's. beta: of the
            momentum, in [0, 1). angle: how it follows the schedule of lr; with "lr", lr is the angle in radians.
        inverse_bias_correction: angles begin small, as the momentum does: times 1 - beta^t.
    """
    control = Angular(angle=angle, inverse_bias_correction=inverse_bias_correction)
    return Lion(first, lr, (beta, beta), weight_decay, **{"control": control, **options})
