"""Both norms of the Hessian of the final models of a study: does |H|_{1,1}/d order the losses, and |H|_2 not?

    python recipes/l_inf/curvature.py runs/l_inf/gpt2        # writes curvature.json in this folder

    |H|_{1,1} / d = 1/d sum_i |H_i|_1    (H v)_i is Cauchy of scale |H_i|_1 for v of independent Cauchy numbers: the
                                         median of |(H v)_i| over 50 of them, corrected for its bias (1.026)
    |H|_2 = max |lambda|                 Lanczos, every vector orthogonal to all before

of the mean loss over the same windows of the validation text for all runs. The first depends on the basis: for a
rotated optimizer it is that of R^T H R, in the basis that it works in, and of H too ("norm_11 / d, of the weights").
Errors: of the first half the 95% t-interval over rounds of ten vectors; of the second the residual |H x - lambda x|,
within which an eigenvalue lies for certain.
See `sharpwise.probes.norm_11` and `eigenvalues`; Xie et al., arXiv 2410.08198.
"""

import argparse
import json
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sharpwise
from sharpwise import probes
from sharpwise.measure.subject import open_subject
from sharpwise.train.config_file import make_config, read_given

QUANTITIES = ("norm_11 / d", "norm_2")
OF_WEIGHTS = "norm_11 / d, of the weights"


class Turned(probes.Operator):
    """R^T H R of the Hessian of a model whose parameters, all together, an optimizer turns by R."""

    def __init__(self, matrix: probes.Operator, model: torch.nn.Module, optimizer: sharpwise.Rotated) -> None:
        super().__init__(matrix.selection, matrix.dtype, matrix.device)
        self.matrix, self.optimizer = matrix, optimizer
        self.names = [name for name, _ in model.named_parameters()]

    def multiply(self, v: Tensor) -> Tensor:
        return self._turned(self.matrix.multiply(self._turned(v, back=True)))

    def _turned(self, v: Tensor, back: bool = False) -> Tensor:
        whole = self.selection.scatter(v)
        turned = self.optimizer._turned(self.names, [whole[name] for name in self.names], back)
        return self.selection.gather(dict(zip(self.names, turned, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of a finished study")
    parser.add_argument("--batches", type=int, default=8, help="of 16 windows each")
    parser.add_argument("--samples", type=int, default=50, help="Cauchy vectors")
    args = parser.parse_args()
    result = json.loads((args.study / "result.json").read_text("utf-8"))
    found: dict[str, Any] = {"study": result["name"], "batches": args.batches, "samples": args.samples, "arms": []}
    for arm in result["arms"]:
        ended = [run for run in arm["final"] if run["final_loss"] is not None]
        runs = [measured(args.study / run["folder"], args.batches, args.samples) for run in ended]
        runs = [{"seed": run["seed"], "loss": run["final_loss"], **own} for run, own in zip(ended, runs, strict=True)]
        found["arms"].append({"name": arm["name"], "runs": runs})
        if runs:
            print(line(arm["name"], runs), flush=True)
    found["agrees"] = {quantity: agreement(found["arms"], quantity) for quantity in QUANTITIES}
    for quantity, (agreeing, pairs) in found["agrees"].items():
        print(f"{quantity} orders {agreeing} of {pairs} pairs of arms as their losses are ordered")
    (args.study / "curvature.json").write_text(json.dumps(found, indent=1) + "\n")


def measured(folder: Path, batches: int, samples: int) -> dict[str, Any]:
    """Both norms of the final model of a run: value and error."""
    from safetensors.torch import load_model

    subject = open_subject(folder, trust_code=True)
    load_model(subject.model, str(folder / "final" / "model.safetensors"))
    matrix = probes.Curvature(subject.model, list(subject.batches(batches, 16)))
    own = make_config(read_given(folder / "config.toml")).optimizer
    found = {}
    with matrix.kept():
        norm = probes.norm_11(matrix, samples=samples).select(by="model")[0]
        largest = probes.eigenvalues(matrix, which="magnitude")[0]
        if own.name == "rotated":
            found[OF_WEIGHTS] = {"value": norm.value, "error": norm.error}
            said = {name: own.options[name] for name in ("rule", "by", "rotation_seed") if name in own.options}
            turned = Turned(matrix, subject.model, sharpwise.Rotated(subject.model, **said))
            norm = probes.norm_11(turned, samples=samples).select(by="model")[0]
    pairs = zip(QUANTITIES, ((norm.value, norm.error), (abs(largest.value), largest.error)), strict=True)
    return found | {name: {"value": value, "error": error} for name, (value, error) in pairs}


def line(name: str, runs: list[dict[str, Any]]) -> str:
    """Means over seeds."""
    means = [f"{quantity} {mean(runs, quantity):.4g}" for quantity in QUANTITIES]
    return f"{name:16s} loss {statistics.mean(run['loss'] for run in runs):.4f}   {'   '.join(means)}"


def mean(runs: list[dict[str, Any]], quantity: str) -> float:
    return statistics.mean(run[quantity]["value"] for run in runs)


def agreement(arms: list[dict[str, Any]], quantity: str) -> tuple[int, int]:
    """Of how many pairs of arms the one with the larger norm has the larger loss, by means over seeds; and of all."""
    points = [(statistics.mean(r["loss"] for r in a["runs"]), mean(a["runs"], quantity)) for a in arms if a["runs"]]
    pairs = list(combinations(points, 2))
    return sum((one[0] < two[0]) == (one[1] < two[1]) for one, two in pairs), len(pairs)


if __name__ == "__main__":
    main()
