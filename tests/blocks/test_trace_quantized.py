"""Weights that are not there as numbers: adapters beside them have the roles that LoRA has, or none; never others.

Of bitsandbytes and torchao where they are installed; stand-ins do what those do.
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from reference import models
from torch import Tensor, nn
from torch.nn import functional as F

import sharpwise
from sharpwise.blocks import BlockMap

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*bitsandbytes.*", "ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated"),
]


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=[*TARGETS], init_lora_weights=False))


def targeted(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS


def swapped(make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A small llama, with other modules in place of its matrices."""
    torch.manual_seed(0)
    model = models.llama()
    for name, module in [*model.named_modules()]:
        if targeted(module, name):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, make(module))
    return model


def roles(model: nn.Module) -> dict[str, list[Any]]:
    """By dataflow alone."""
    blocks = BlockMap.of(model, trace=True)
    return {name: [(str(s.role), s.describe_rows(), s.heads) for s in blocks[name]] for name in blocks.names()}


def check_training(model: nn.Module) -> None:
    """AdamW moves what trains, and only that."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = sharpwise.AdamW(model, lr=1e-2, compile=False)
    model(input_ids=torch.arange(8)[None] % 13).logits.float().square().mean().backward()
    optimizer.step()
    assert all((p != before[name]).any() for name, p in model.named_parameters() if p.requires_grad)


# -- stand-ins ---------------------------------------------------------------------------------------------------------


class Codes(nn.Module):
    """Eight bits, and a scale for each row. The product is of what they stand for; `hidden`: inside a function."""

    def __init__(self, linear: nn.Linear, hidden: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.hidden = linear.in_features, linear.out_features, hidden
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight, self.scale = nn.Parameter(codes, requires_grad=False), nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight, self.scale) if self.hidden else F.linear(x, self.weight * self.scale)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return F.linear(x, codes.to(x.dtype) * scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        codes, scale = ctx.saved_tensors
        return grad @ (codes * scale), None, None


class Beside(nn.Module):
    """LoRA of one's own: PEFT knows no such matrices."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 3, bias=False)
        self.b = nn.Linear(3, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def adapted(make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model = swapped(lambda linear: Beside(make(linear)))
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".a.weight", ".b.weight")))
    return model


@pytest.mark.parametrize("hidden", [False, True])
def test_adapters_beside_codes(hidden: bool) -> None:
    plain, quantized = adapted(lambda linear: linear), adapted(lambda linear: Codes(linear, hidden))
    assert roles(quantized) == roles(plain)
    assert {parts[0][0] for parts in roles(plain).values()} == {"q", "k", "v", "o", "gate", "up", "down"}
    check_training(quantized)


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True) / 7
        return (x / scale).round().clamp(-8, 7) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Rounded(nn.Linear):
    """Trained as if it were quantized: weights and inputs are rounded, gradients pass."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(Rounding.apply(x), Rounding.apply(self.weight))


def rounded(linear: nn.Linear) -> nn.Module:
    return Rounded(linear.in_features, linear.out_features, bias=False)


def test_weights_that_are_rounded() -> None:
    model = swapped(rounded)
    assert roles(model) == roles(models.llama())
    check_training(model)


# -- packages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_qlora_of_bitsandbytes(kind: str) -> None:
    nn_of = pytest.importorskip("bitsandbytes").nn

    def quantized(linear: nn.Linear) -> nn.Module:
        sizes = linear.in_features, linear.out_features
        if kind == "int8":
            made = nn_of.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            made.weight = nn_of.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            made = nn_of.Linear4bit(*sizes, bias=False, quant_type=kind, compute_dtype=torch.float32)
            made.weight = nn_of.Params4bit(linear.weight.data, requires_grad=False, quant_type=kind)
        return made.to("cpu")

    model = swapped(quantized)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    model = lora(model)
    assert roles(model) == roles(lora(models.llama()))
    check_training(model)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_adapters_beside_weights_of_torchao(kind: str) -> None:
    ao = pytest.importorskip("torchao.quantization")
    group = pytest.importorskip("torchao.quantization.granularity").PerGroup(4)
    model = models.llama()
    config = ao.Int8WeightOnlyConfig()
    if kind == "int4":
        config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)
    ao.quantize_(model, config, filter_fn=targeted)
    assert type(model.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    model = lora(model)
    assert roles(model) == roles(lora(models.llama()))
    check_training(model)


def test_quantization_aware_training_of_torchao() -> None:
    ao, qat = pytest.importorskip("torchao.quantization"), pytest.importorskip("torchao.quantization.qat")
    model = models.llama()
    of_weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=4)
    of_inputs = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    config = qat.QATConfig(weight_config=of_weights, activation_config=of_inputs, step="prepare")
    ao.quantize_(model, config, filter_fn=targeted)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "FakeQuantizedLinear"
    assert roles(model) == roles(models.llama())
    check_training(model)
