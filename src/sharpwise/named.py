"""Optimizers with options, under names of their own: those of `combinations.PRESETS`."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Unpack, cast

from torch import Tensor

from sharpwise.combinations import AUX_LR, CommonOptions
from sharpwise.controls import L2, Angular
from sharpwise.hints import without_model
from sharpwise.optim import AdamW, Lion, Muon
from sharpwise.rules.muon import Method, Scale
from sharpwise.storage import Format

__all__ = ["AdamH", "AdamW8bit", "LionA", "LionAR", "Muon8bit", "MuonH"]

Function = TypeVar("Function", bound=Callable[..., Any])


class MuonOptions(CommonOptions, total=False):
    """The options of `Muon` that are given by name."""

    aux_betas: tuple[float, float]
    aux_eps: float
    aux_weight_decay: float | None
    scale: Scale
    heavy_ball: bool
    method: Method
    ns_steps: int
    normalize_rows: bool
    beta2: float
    per_head: bool
    precision: Literal["fp32", "bf16"] | None
    bf16_exchange: bool
    process_group: Any
    aux_storage: str | Format | None


def _options_of(kind: type, **defaults: Any) -> Callable[[Function], Function]:
    """Write what `kind` takes by name into the signature and the docstring of a function that hands it all on."""

    def written(function: Function) -> Function:
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [p for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
        more = [p.replace(default=defaults.get(p.name, p.default)) for p in more if p.name not in own.parameters]

        @functools.wraps(function)
        def called(*given: Any, **options: Any) -> Any:
            if not given and next(iter(own.parameters)) not in options:
                raise TypeError(without_model(function.__name__))
            return function(*given, **options)

        told = [re.search(rf"^ {{8}}{p.name}: .*(?:\n {{12}}.*)*", kind.__doc__ or "", re.MULTILINE) for p in more]
        called.__doc__ = "\n".join([(function.__doc__ or "").rstrip(), *(text[0] for text in told if text), "    "])
        called.__signature__ = own.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
        return cast(Function, called)

    return written


@_options_of(AdamW, control="hyperball", aux_lr=AUX_LR)
def AdamH(
    params: Any,
    lr: float | Tensor = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.01,
    **options: Unpack[CommonOptions],
) -> AdamW:
    """`AdamW` whose hidden matrices keep their norms (arXiv 2606.16899): `sharpwise.controls.hyperball`.

    Args:
        params, betas, eps, weight_decay: as `AdamW` takes them.
        lr: size of an update in units of the norm of its matrix, about the root of AdamW's lr times weight decay.
    """
    options.setdefault("control", "hyperball")
    options.setdefault("aux_lr", AUX_LR)
    return AdamW(params, lr, betas, eps, weight_decay, **options)


@_options_of(AdamW, storage="int8-dynamic")
def AdamW8bit(
    params: Any,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.01,
    **options: Unpack[CommonOptions],
) -> AdamW:
    """`AdamW` with both moments in 8 bits: a quarter of its state, where `keep_fp32=()`.

    Args:
        params, lr, betas, eps, weight_decay: as `AdamW` takes them.
    """
    options.setdefault("storage", "int8-dynamic")
    return AdamW(params, lr, betas, eps, weight_decay, **options)


@_options_of(Muon, storage="int8-linear")
def Muon8bit(
    params: Any,
    lr: float | Tensor = 1e-3,
    momentum: float = 0.95,
    weight_decay: float | Tensor = 0.1,
    nesterov: bool = True,
    **options: Unpack[MuonOptions],
) -> Muon:
    """`Muon` with its momentum in 8 bits (arXiv 2509.23106); of the AdamW half too with `aux_storage="int8-dynamic"`.

    Args:
        params, lr, momentum, weight_decay, nesterov: as `Muon` takes them.
    """
    options.setdefault("storage", "int8-linear")
    return Muon(params, lr, momentum, weight_decay, nesterov, **options)


@_options_of(Muon, control="hyperball", aux_lr=AUX_LR)
def MuonH(
    params: Any,
    lr: float | Tensor = 1e-2,
    momentum: float = 0.95,
    weight_decay: float | Tensor = 0.1,
    nesterov: bool = True,
    **options: Unpack[MuonOptions],
) -> Muon:
    """`Muon` whose matrices keep their norms (arXiv 2606.16899): `sharpwise.controls.hyperball`.

    Args:
        params, momentum, weight_decay, nesterov: as `Muon` takes them.
        lr: size of an update in units of the norm of its matrix, about the root of AdamW's lr times weight decay.
    """
    options.setdefault("control", "hyperball")
    options.setdefault("aux_lr", AUX_LR)
    return Muon(params, lr, momentum, weight_decay, nesterov, **options)


@_options_of(Lion, control="l2")
def LionA(
    params: Any,
    lr: float | Tensor = 1e-3,
    beta: float = 0.9,
    weight_decay: float | Tensor = 0.1,
    *,
    nesterov: bool = False,
    inverse_bias_correction: bool = False,
    **options: Unpack[CommonOptions],
) -> Lion:
    """`Lion` with updates of one l2 norm (arXiv 2410.23922): `sharpwise.controls.l2`. AdamW's lr and decay serve.

    Args:
        params, weight_decay, nesterov: as `Lion` takes them.
        lr: AdamW's. beta: of the momentum, in [0, 1).
        inverse_bias_correction: updates begin small, as the momentum does: times 1 - beta^t.
    """
    options.setdefault("control", L2(inverse_bias_correction=inverse_bias_correction))
    return Lion(params, lr, (beta, beta), weight_decay, nesterov=nesterov, **options)


@_options_of(Lion, control="angular")
def LionAR(
    params: Any,
    lr: float | Tensor = 1e-3,
    beta: float = 0.9,
    weight_decay: float | Tensor = 0.1,
    *,
    nesterov: bool = False,
    angle: Literal["linear", "sqrt", "lr"] = "linear",
    inverse_bias_correction: bool = False,
    snr: bool = False,
    batch_size: int | None = None,
    **options: Unpack[CommonOptions],
) -> Lion:
    """`Lion` whose rows turn by a set angle and keep their norms (arXiv 2410.23922): `sharpwise.controls.angular`.

    Without warm-up the paper takes beta=0.98, nesterov=True and inverse_bias_correction=True.

    Args:
        params, weight_decay, nesterov: as `Lion` takes them; weight_decay sets the angle.
        lr: AdamW's. beta: of the momentum, in [0, 1).
        angle: how it follows the schedule of lr; with "lr", lr is the angle in radians.
        inverse_bias_correction: angles begin small, as the momentum does: times 1 - beta^t.
        snr: angles are smaller where gradients of a batch agree: `sharpwise.controls.snr`.
        batch_size: sequences of a step, of all processes together; for `snr`.
    """
    own = Angular(angle=angle, inverse_bias_correction=inverse_bias_correction, snr=snr, batch_size=batch_size)
    options.setdefault("control", own)
    return Lion(params, lr, (beta, beta), weight_decay, nesterov=nesterov, **options)
