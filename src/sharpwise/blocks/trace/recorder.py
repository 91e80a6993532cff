"""Runs a forward and keeps what decides the roles: products, lookups, attentions, norms, and what flows between them.

No matrix is multiplied by data. Where a forward would do so, it gets a fresh leaf of random positive numbers of the
right shape in place of the result. So provenance stops at the nearest matrix: the gradient of a query with respect to
these leaves says exactly which rows of which matrices made it. Weights are not read, may be on the meta device, and
cost no time.

Every call of torch passes through `Recorder`, which asks in turn the handlers that it was given whether it is theirs:
those of `attention`, `matrices` and `elementwise`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sharpwise.blocks.trace.calls import Attention, Call, Use
from sharpwise.blocks.trace.example import device_of
from sharpwise.blocks.trace.graph import Graph, Leaf
from sharpwise.blocks.trace.products import Product, as_product
from sharpwise.blocks.trace.weights import Units, Weight, derived, tensors_in, words

# Of a weight these are asked as they are; these of weights only, whatever data stands beside them.
_QUESTIONS = words(
    "size dim stride numel is_contiguous is_floating_point is_complex element_size nelement data_ptr storage_offset "
    "shape dtype ndim requires_grad grad layout is_leaf names _version"
)
# The answers to these are those of the tensor itself, whatever stands in its place.
_OF_SHAPE = words("shape dtype ndim size dim numel nelement requires_grad is_floating_point is_complex element_size")
_VALUES = frozenset(("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"))
_DEVICES = frozenset(("device", "is_meta", "is_cuda", "is_cpu", "get_device"))
_LIKE = frozenset(("expand_as", "view_as", "reshape_as", "type_as"))
NEW = words(
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_tensor"
)
_NORMS = words("layer_norm rms_norm group_norm batch_norm instance_norm")


class Handlers(NamedTuple):
    """What becomes of the calls of a forward.

    Attributes:
        attention, matrices: (recorder, call, the product that it is) -> the result of a call of theirs, else None.
        elementwise: (recorder, call, the weights among its arguments) -> the result of any other call.
    """

    attention: Callable[["Recorder", Call, Product | None], Any]
    matrices: Callable[["Recorder", Call, Product | None], Any]
    elementwise: Callable[["Recorder", Call, list[Weight]], Any]


class Recorder(TorchFunctionMode):
    """Records one forward of `model`.

    Attributes:
        parameters: of the model; everything refers to them by number.
        touched: number of a parameter -> time of its first use.
        choices: what the largest were taken of, and by which function.
        missed: how many times more tokens a routing would need to reach every expert.
    """

    def __init__(self, model: nn.Module, handlers: Handlers) -> None:
        super().__init__()
        self.handlers = handlers
        self.parameters = list(model.parameters())
        self.weights = {id(p): Weight(p, number=n) for n, p in enumerate(self.parameters)}
        self.device = device_of(model)
        self.graph = Graph()
        self.attentions: list[Attention] = []
        self.choices: list[tuple[Tensor, str]] = []
        self.uses: list[Use] = []
        self.touched: dict[int, int] = {}
        self.missed = 1.0
        self.branches = False  # it read a number that it had computed
        self.weightings: dict[Any, Product] = {}  # softmaxes by node -> the scores
        self.copies: dict[int, int] = {}  # numbers given by the example, viewed or copied -> which
        self.marked: dict[str, set[int]] = {"statistic": set(), "comparison": set(), "choice": set(), "input": set()}
        self.marked["held"] = set()  # made of buffers and other tensors that a model holds
        self.marked |= {"one_hot": set(), "count": set(), "of_scores": set()}
        self.marked["kind"] = set()  # made of comparisons of numbers that were given: kinds of tokens
        self._indexed = 0
        self._by_owner: dict[int, list[Use]] = {}
        self._keep: list[Any] = []
        self._stand_ins: dict[int, Tensor] = {}
        self.units: dict[Any, Units] = {}  # of products and biases, by the shape of a parameter
        self._meta = any(p.device.type == "meta" for p in self.parameters)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name in _OF_SHAPE:
            return func(*args, **(kwargs or {}))
        if name == "_set_grad_enabled":
            return None  # what a forward does without gradients is seen too
        call = Call(func, name, tuple(args), dict(kwargs or {}))
        if name in ("__set__", "__setitem__") and self.weight(call.args[0]) is not None:
            return None  # never write to a parameter
        if kwargs and self.weight(kwargs.get("out")) is not None:
            call.kwargs["out"] = self.real(kwargs["out"]).detach()
        handle = Call.run if name == "__set__" else self._handle
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return handle(call)
        with torch.inference_mode(False), torch.enable_grad():
            return handle(call)

    def _handle(self, call: Call) -> Any:
        given, name = call.tensors, call.name
        weights = [self.weights[id(t)] for t in given if id(t) in self.weights]
        if self._meta:
            call = self._off_meta(call, bool(weights))
        if name in _VALUES and not weights and given:
            self.branches |= given[0].requires_grad or self.is_marked("comparison", given[0])
        if weights:
            if name in _DEVICES:
                return getattr(torch.empty(0, device=self.device), name)
            if name in NEW:
                return call.mapped(self._sized).run()
            call = self._with_queries(call)
        product = as_product(name, call.args, call.kwargs)
        found = self.handlers.attention(self, call, product)
        if found is None and weights:
            found = self.handlers.matrices(self, call, product)
        if found is not None:
            return found
        if weights:
            first = id(given[0]) in self.weights
            if first and name.endswith("_") and not name.endswith("__"):
                return call.args[0]  # never write to a parameter
            data = [t for t in given if id(t) not in self.weights]
            if (first and name in _LIKE) or not any(t.requires_grad or self.is_marked("statistic", t) for t in data):
                return self._of_weights(call)
        return self.handlers.elementwise(self, call, weights)

    def _off_meta(self, call: Call, weights: bool) -> Call:
        """New tensors of a model on the meta device are real ones."""
        args = call.args
        if torch.device in map(type, args) and (call.name == "to" or not weights):
            args = tuple(self.device if isinstance(a, torch.device) and _on_meta(a) else a for a in args)
        if _on_meta(call.kwargs.get("device")):
            return call.on(args, {**call.kwargs, "device": self.device})
        return call if args is call.args else call.on(args, call.kwargs)

    def on_data(self, call: Call) -> Call:
        """A call on what stands in the place of weights, and of buffers on the meta device."""
        for tensor in call.tensors:
            if id(tensor) in self.weights or tensor.is_meta:
                return call.mapped(self.real)
        return call

    def _sized(self, value: Any) -> Any:
        """Numbers of the size of a weight, for what makes others of that size."""
        weight = self.weight(value)
        return value if weight is None else torch.empty_like(weight.value, device=self.real_device(weight.value))

    def _with_queries(self, call: Call) -> Call:
        """A parameter that enters a product or a norm in the place of data is data: a learned query, say."""
        x = call.argument(0, "input")
        weight = self.weight(x)
        if weight is None or not weight.value.is_floating_point():
            return call
        others = [self.weight(t) for t in call.tensors if t is not x]
        if call.name != "linear" and (call.name not in _NORMS or not any(others)):
            return call
        if call.args:
            return call.on((self.real(x), *call.args[1:]), call.kwargs)
        return call.on(call.args, {**call.kwargs, "input": self.real(x)})

    # -- weights -----------------------------------------------------------------------------------------------------

    def weight(self, value: Any) -> Weight | None:
        """The weight that a value is."""
        return self.weights.get(id(value))

    def _of_weights(self, call: Call) -> Any:
        if call.name in _QUESTIONS:
            return call.run()
        if call.name in _VALUES:
            return call.mapped(self.real).run()
        try:
            result = _on_meta_device(call).run()
        except (RuntimeError, NotImplementedError, IndexError):  # a shape that depends on values
            result = call.run()
        made = derived(call.func, call.name, call.args, call.kwargs, self.weights, result)
        for weight in made:
            self.weights[id(weight.value)] = weight
        self._keep.append((made, result))
        return result

    def closed(self, made: Tensor, given: list[Tensor]) -> Tensor:
        """A fresh leaf in place of something made in a way that cannot be read, of which no row is known."""
        if not made.is_floating_point():
            return made
        sources = [t.flatten()[:1] for t in map(self.real, given) if t.requires_grad and t.numel()]
        source = torch.cat([t.to(made.dtype) for t in sources]) if sources else made
        leaf = Leaf(
            self.graph.positive(made.shape, made.dtype, made.device),
            "matrix",
            self.graph.tick(),
            source=source,
            kernel=(0,),
        )
        return self.graph.add(leaf).tensor.clone()

    def opaque(self, call: Call, product: Product) -> Tensor:
        """A fresh leaf in place of a product of data with a matrix that is no parameter."""
        left = product.left.requires_grad
        data, own = (product.left, product.right_axes) if left else (product.right, product.left_axes)
        made = call.mapped(lambda x: self.real(x).detach()).run()
        axes = tuple(product.out_axes.index(label) for label in own if label in product.out_axes)
        kernel = tuple(2 for label in own if label[:1] == ("kernel",))
        leaf = Leaf(
            self.graph.positive(made.shape, made.dtype, made.device),
            "matrix",
            self.graph.tick(),
            source=data,
            axes=axes,
            kernel=kernel,
        )
        return self.graph.add(leaf).tensor.clone()

    def uses_of(self, number: int) -> list[Use]:
        """The uses of a parameter other than by a product."""
        while self._indexed < len(self.uses):
            use = self.uses[self._indexed]
            self._indexed += 1
            for owner in use.weight.owners:
                self._by_owner.setdefault(owner, []).append(use)
        return self._by_owner.get(number, [])

    def touch(self, weight: Weight) -> None:
        """A weight is used now."""
        for number in weight.owners:
            self.touched.setdefault(number, self.graph.time)

    def real(self, value: Any) -> Any:
        """What a call on data gets: stand-ins for weights, plain numbers for buffers on the meta device."""
        weight = self.weight(value)
        if weight is not None:
            self.touch(weight)
            return weight.stand_in(self._stand_in, self.real)
        if not isinstance(value, Tensor) or value.device.type != "meta":
            return value
        if value.dtype in (torch.int32, torch.int64) and value.ndim:
            return torch.arange(value.shape[-1], device=self.device, dtype=value.dtype).expand(value.shape)
        return torch.ones(value.shape, dtype=value.dtype, device=self.device)

    def real_device(self, tensor: Tensor) -> torch.device:
        """Where a tensor lies, or would if it were not on the meta device."""
        return self.device if tensor.device.type == "meta" else tensor.device

    def _stand_in(self, weight: Weight) -> Tensor:
        """A leaf in place of a parameter."""
        if weight.number not in self._stand_ins:
            value = weight.value
            if value.is_floating_point():
                tensor = self.graph.positive(value.shape, value.dtype, self.real_device(value))
                self.graph.add(Leaf(tensor, "weight", self.graph.time, weight))
            else:
                tensor = torch.zeros(value.shape, dtype=value.dtype, device=self.real_device(value))
            self._stand_ins[weight.number] = tensor
        return self._stand_ins[weight.number]

    # -- constants that come from data -----------------------------------------------------------------------------

    def mark(self, what: str, result: Any) -> Any:
        """Remember that constants are a `statistic` or `comparison` of data, a `choice`, or of the `input`."""
        for tensor in tensors_in(result):
            if not tensor.requires_grad:
                self.marked[what].add(id(tensor))
                self._keep.append(tensor)
        return result

    def keep(self, value: Any) -> None:
        """Keep something, so that its id stays its own."""
        self._keep.append(value)

    def is_marked(self, what: str, *values: Any) -> bool:
        """Whether one of these is."""
        marked = self.marked[what]
        return bool(marked) and any(id(value) in marked for value in values)


def _on_meta_device(call: Call) -> Call:
    """A call on weights without numbers: only shapes matter."""
    call = call.mapped(lambda x: x.detach().to("meta") if x.ndim > 0 else x)
    if call.name in ("cpu", "cuda"):
        return Call(torch.Tensor.detach, call.name, call.args[:1])
    args = call.args
    if call.name == "to":
        args = tuple("meta" if isinstance(a, (str, torch.device)) else a for a in args)
    return call.on(args, {k: "meta" if k == "device" else v for k, v in call.kwargs.items()})


def _on_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"
