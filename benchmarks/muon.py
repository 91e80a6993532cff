"""Times a step of Muon beside torch's, on the same matrices: those of GPT-2 124M, and of layers narrow enough to batch.

    python benchmarks/muon.py            result in benchmarks/results/muon.json
    python benchmarks/muon.py --quick    two layers, few rounds; saves nothing

Both split alike: q, k and v are matrices of their own. Arms take turns, in an order that rotates; a ratio is to torch's
step of the same round, its interval draws rounds of this one process. torch's products are in bf16; ours in fp32 where
not said otherwise. `beyond_state` is what lives besides parameters, gradients and state at most within a step.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from intervals import bootstrap, within_rounds
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import sharpwise

HERE = Path(__file__).parent
SHAPES = {"gpt2": (12, 768, 5), "narrow": (12, 256, 31), "tiny": (4, 128, 61)}
"""Layers, width and rounds."""
THEIRS = "torch.optim.Muon"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers and few rounds; saves nothing")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"environment": environment(), "shapes": {}}
    for name, (layers, width, rounds) in SHAPES.items():
        own = (2, width // 4, 3) if args.quick else (layers, width, rounds)
        result["shapes"][name] = compare(*own)
        print(f"{name}: {own[0]} layers of width {width}")
        for arm, found in result["shapes"][name]["arms"].items():
            low, high = found["ratio_95"]
            print(f"  {arm:34s} {found['ms']:9.1f} ms   {found['ratio']:.3f} ({low:.3f} to {high:.3f})")
        print(f"  beyond state {result['shapes'][name]['beyond_state'] / 2**20:.1f} MiB")
    if args.quick:
        print("\nNothing saved: this was not a full run.")
        return
    path = HERE / "results" / "muon.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nSaved {path.relative_to(HERE.parent)}")


class Layer(nn.Module):
    """The matrices of a layer, under names that are known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        shapes = dict.fromkeys("qkvo", (width, width)) | {"up": (4 * width, width), "down": (width, 4 * width)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.02))


def compare(layers: int, width: int, rounds: int) -> dict[str, Any]:
    """Times and ratios of all arms, and the memory of one."""
    torch.manual_seed(0)
    model = nn.ModuleList(Layer(width) for _ in range(layers))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    blocks = {f"*.{name}": name for name in ("q", "k", "v", "o", "up", "down")}
    options: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.1, "blocks": blocks}
    made: dict[str, Callable[[], Any]] = {
        THEIRS: lambda: torch.optim.Muon(model.parameters(), lr=1e-6, adjust_lr_fn="match_rms_adamw"),
        "sharpwise.Muon": lambda: sharpwise.Muon(model, **options),
        "sharpwise.Muon, bf16 products": lambda: sharpwise.Muon(model, **options, precision="bf16"),
        "sharpwise.Muon, one by one": lambda: sharpwise.Muon(model, **options, compile=False),
        "sharpwise.Muon, rows (NorMuon)": lambda: sharpwise.Muon(model, **options, normalize_rows=True),
    }
    arms = {name: make() for name, make in made.items()}
    for arm in arms.values():
        arm.step()
    times: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            begin = time.perf_counter()
            arms[name].step()
            times[name].append(time.perf_counter() - begin)
    found = {}
    for name, own in times.items():
        ratios = within_rounds(own, times[THEIRS])
        found[name] = {"ms": 1e3 * statistics.median(own), "ratio": statistics.median(ratios)}
        found[name] |= {"ratio_95": bootstrap([ratios]), "seconds": own}
    return {"layers": layers, "width": width, "arms": found, "beyond_state": beyond_state(arms["sharpwise.Muon"])}


class Living(TorchDispatchMode):
    """The most bytes of new storages that live at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._known: Any = WeakIdKeyDictionary()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage() for t in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage not in given and storage not in self._known:
                self._known[storage] = storage.nbytes()
        self.most = max(self.most, sum(self._known.values()))
        return out


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in torch.utils._pytree.tree_leaves(value) if isinstance(one, Tensor)]


def beyond_state(optimizer: Any) -> int:
    """Bytes that a step needs besides parameters, gradients and state."""
    with torch.no_grad(), Living() as living:
        optimizer.step()
    return living.most


if __name__ == "__main__":
    main()
