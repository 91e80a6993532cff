"""A CUDA device that computes nothing and counts what is asked of it. Needs neither a GPU nor a CUDA build of torch.

    with FakeCuda() as cuda:
        model, blocks = cuda.model(build)
        optimizer = sharpwise.AdamW(model, blocks=blocks)
        for _ in range(3):
            counts = cuda.step(model, optimizer)

Its tensors are torch's fake tensors: they have a shape, a type and a device, and no elements, so that an 8B model takes
no memory, and an operation that mixes devices raises as it would. Tensors on the CPU are real. Small tensors of the
device have a *twin* on the CPU, which goes through the same operations: counts and multipliers that the host reads back
are then what they would be. Where there is no twin, a read gives 1, or True.

What is counted (see `Counts`) is what torch is asked for. An operation on the device, but for views and allocations, is
one launch: on a list of tensors too, which torch cuts into launches of at most 320 blocks of 65,536 elements. Kernels
in Triton are printed and never compiled.
"""

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import sharpwise
from sharpwise.blocks import BlockMap
from sharpwise.engine.backends import triton_launch

PACKAGE = str(Path(sharpwise.__file__).parent) + "/"
SMALL_FLOAT, SMALL_WHOLE = 1 << 10, 1 << 20
"""Elements up to which a tensor has a twin; layouts are whole numbers, and shapes may depend on them."""
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_LAUNCH = {*ALLOCATIONS, "resize_", "set_", "lift_fresh", "_unsafe_view", "_reshape_alias"}
"""Besides views."""
READS = {"_local_scalar_dense", "equal"}
SHAPED_BY_VALUES = {
    *("nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique2", "unique_consecutive", "unique_dim"),
}
"""The host waits for them, to allocate what they give."""


class CannotFake(RuntimeError):
    """This build of torch cannot be told of a device that it was built without."""


@dataclass
class Counts:
    """What was asked of the device, by operation or by the line of the package that asked.

    Attributes:
        launches: kernels, fills, and copies within the device, by operation; `lines`: the same by line.
        reads: what the host waits for: a number, a copy to the CPU, a shape that depends on values.
        blocking: copies to the device that the host waits for; `uploads`: those that it does not.
        downloads: copies to pinned memory that the host does not wait for.
    """

    launches: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    blocking: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)

    def launch(self, operation: str) -> None:
        """Count one."""
        self.launches[operation] += 1
        self.lines[asked_by(1)] += 1


class FakeCuda:
    """The device. In this context `device="cuda"` is it, and `counts` grow.

    Args:
        triton: whether kernels in Triton are launched, which compute nothing; else there is none, and small tensors
            hold what torch computes.
    """

    def __init__(self, triton: bool = True) -> None:
        self.counts, self.triton = Counts(), triton
        self._exits = ExitStack()

    def __enter__(self) -> "FakeCuda":
        provide_guard()
        for owner, name, value in (
            (FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),  # torch's own asks once per element
            *(self._of_triton() if self.triton else [(triton_launch, "absent", lambda: "no triton")]),
        ):
            self._exits.enter_context(mock.patch.object(owner, name, value))
        self._exits.enter_context(FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()))
        self._exits.enter_context(_Watch(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exits.close()

    def model(
        self,
        build: Callable[[], nn.Module],
        dtype: torch.dtype | None = None,
        place: Callable[[str], str] = lambda name: "cuda",
    ) -> tuple[nn.Module, BlockMap]:
        """A model and its blocks: built and mapped outside of this device, on the CPU or meta, then moved here.

        Args:
            build: makes it.
            dtype: of the parameters, if it is to be another.
            place: from the name of a module to the device of its own parameters, "cuda:1" being a second one.
        """
        with _disable_current_modes():
            model = build()
            blocks = BlockMap.of(model)
        moved: dict[int, nn.Parameter] = {}
        for path, module in model.named_modules():
            device = place(path)
            for name, p in module._parameters.items():
                if p is not None and id(p) not in moved:  # what is tied stays tied
                    moved[id(p)] = nn.Parameter(_moved(p.detach(), dtype or p.dtype, device), p.requires_grad)
                module._parameters[name] = None if p is None else moved[id(p)]
            for name, b in module._buffers.items():
                module._buffers[name] = None if b is None else _moved(b, b.dtype, device)
        return model, blocks

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Counts:
        """What one step asks for, with a gradient for every parameter that requires one, each of another size."""
        for i, p in enumerate(model.parameters(), start=1):
            p.grad = torch.full_like(p, i) if p.requires_grad else None
        self.counts = asked = Counts()
        optimizer.step()
        self.counts = Counts()  # what follows is none of it
        return asked

    def _of_triton(self) -> list[tuple[Any, str, Any]]:
        return [
            (FakeTensor, "data_ptr", _address),
            (triton_launch, "build", lambda *_: None),
            (triton_launch, "launch", self._launched),
        ]

    def _launched(self, kernel: Any, *_: Any) -> None:
        self.counts.launch(f"Triton kernel {kernel.__name__}")


class _Watch(TorchDispatchMode):
    """Sees every operation before torch's fake mode does."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.pinned: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if name == "device":
            return func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        fakes = [t for t in given if isinstance(t, FakeTensor)]
        if not fakes and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return self._on_host(func, name, args, kwargs)
        if name in ("_to_copy", "copy_", "_foreach_copy_"):
            return self._copied(func, name, args, kwargs)
        counts, twins = self.cuda.counts, _Twins(func, args, kwargs)
        if name in READS:
            counts.reads[asked_by(3)] += 1
            known = twins.run()
            return known if known is not None else True if name == "equal" else _one(args[0].dtype)
        if name in ("index", "index_put", "index_put_"):
            indices = [i for i in args[1] if i is not None]
            for _ in (i for i in indices if i.device.type == "cpu"):
                counts.blocking[asked_by(1)] += 1
            by_mask = any(i.dtype == torch.bool for i in indices)
        else:
            by_mask = False
        if by_mask or name in SHAPED_BY_VALUES:
            counts.reads[asked_by(3)] += 1
            if (known := twins.run()) is not None:
                counts.launch(name)
                return known if name == "index_put_" else tree_map(lambda t: _faked(t, fakes[0].device), known)
        on = {t.device for t in fakes}
        if len(on) > 1 and name.startswith("_fused_"):  # the fake mode does not look into lists
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {sorted(map(str, on))}")
        # Fake mode does not know all overloads of torch's own optimizers, which only write in place.
        out = None if name.startswith("_fused_") else func(*args, **kwargs)
        twins.follow(out)
        if len(on) > 1 and name.startswith("_foreach_"):
            for _ in args[0]:  # tensor by tensor
                counts.launch(name)
        elif name not in NO_LAUNCH and not func.is_view:
            counts.launch(name)
        return out

    def _on_host(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """As it is, but that memory may be pinned, for which torch would ask a real device."""
        with unset_fake_temporarily():
            if name == "is_pinned":
                return self._is_pinned(args[0])
            if name == "_pin_memory":
                return self._pinned(args[0].clone())
            if kwargs.get("pin_memory"):
                return self._pinned(func(*args, **{**kwargs, "pin_memory": False}))
            return func(*args, **kwargs)

    def _pinned(self, tensor: Tensor) -> Tensor:
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that nothing else comes to lie there
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def _copied(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A copy, which may be to or from the host."""
        counts, twins = self.cuda.counts, _Twins(func, args, kwargs)
        waits = not (kwargs.get("non_blocking") or (name != "_to_copy" and len(args) > 2 and args[2]))
        out = func(*args, **kwargs)
        if name == "_to_copy":
            sources, targets = [args[0]], [out]
        else:
            sources, targets = (args[1], args[0]) if name[0] == "_" else ([args[1]], [args[0]])
        within = 0
        for source, target in zip(sources, targets, strict=True):
            if source.device.type == "cpu":
                (counts.blocking if waits else counts.uploads)[asked_by(1)] += 1
            elif target.device.type == "cpu":
                pinned = not isinstance(target, FakeTensor) and self._is_pinned(target)
                (counts.downloads if pinned and not waits else counts.reads)[asked_by(3)] += 1
            else:
                within += 1
        if within:
            counts.launch(name)
        if all(isinstance(t, FakeTensor) and t.device.type != "cpu" for t in targets):
            twins.follow(out)
            return out
        known = twins.run()  # written to the real tensors too
        if known is not None:
            return known
        with unset_fake_temporarily():
            if name == "_to_copy":
                return torch.ones(out.shape, dtype=out.dtype)
            for target in targets:
                target.fill_(1)
        return args[0]


class _Twins:
    """An operation on the twins of its arguments."""

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.there = all(hasattr(t, "twin") for t in _tensors((args, kwargs)) if isinstance(t, FakeTensor))

    def run(self) -> Any:
        """What it gives, None if some argument has no twin."""
        if not self.there:
            return None
        given = self.args, self.kwargs
        args, kwargs = tree_map(lambda x: getattr(x, "twin", x) if isinstance(x, Tensor) else x, given)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        with unset_fake_temporarily():
            out = self.func(*args, **kwargs)
            if self.func._schema.name.split("::")[1] in ALLOCATIONS:
                out.fill_(1)
        return out

    def follow(self, out: Any) -> None:
        """Give twins to what came out or was written, where it is small."""
        made = list(_tensors(out))  # none, where a list is written in place
        if self.there and all(_is_small(t) for t in made or _tensors((self.args, self.kwargs))):
            for fake, twin in zip(made, _tensors(self.run()), strict=True):
                _with_twin(fake, twin)


def _address(t: Tensor) -> int:
    """An address that no other tensor has that lives; aligned as the allocator's are."""
    return (id(t.untyped_storage()) << 12) + t.storage_offset() * t.element_size()


def _is_small(t: Tensor) -> bool:
    return t.numel() <= (SMALL_FLOAT if t.is_floating_point() else SMALL_WHOLE)


def _with_twin(fake: Tensor, twin: Tensor) -> Tensor:
    fake.twin = twin  # type: ignore[attr-defined]
    return fake


def _faked(t: Tensor, device: torch.device | str) -> Tensor:
    return _with_twin(torch.empty(t.shape, dtype=t.dtype, device=device), t)


def _moved(t: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    if t.device.type != "meta" and _is_small(t):
        return _faked(t.to(dtype, copy=True), device)
    return torch.empty(t.shape, dtype=dtype, device=device)


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def asked_by(frames: int) -> str:
    """The innermost lines of the package that are being run, from the last on."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < frames:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            found.append(f"{code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "elsewhere"


def provide_guard() -> None:
    """Let torch index tensors of a device that it was built without.

    It asks a guard to make the device the current one, and a CPU build has none for CUDA. Torch's fake mode puts one
    there that does nothing, if the one that is there counts no devices: that of lazy tensors counts none.

    Raises:
        CannotFake: if this build does not have these two.
    """
    kinds = torch._C._autograd.DeviceType
    library = next((Path(torch.__file__).parent / "lib").glob("*c10.*"), None)
    try:
        count = int(kinds.PrivateUse1) + 1
        guards = (ctypes.c_void_p * count).in_dll(
            ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE"
        )
        replace = torch._C._ensureCUDADeviceGuardSet
    except (AttributeError, OSError, ValueError) as error:
        raise CannotFake(f"torch {torch.__version__} cannot take a guard for CUDA: {error}") from error
    if guards[int(kinds.CUDA)] is None:
        if guards[int(kinds.Lazy)] is None:
            raise CannotFake(f"torch {torch.__version__} was built without lazy tensors")
        guards[int(kinds.CUDA)] = guards[int(kinds.Lazy)]
        replace()
