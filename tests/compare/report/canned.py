"""Results of a study that no run made: like those of a real one, the same every time, of any size."""

import math
import random
from typing import Any

NAMES = (
    "adamw", "adamw+blockwise", "adam-mini", "adamw+reversed(blockwise)", "adamw+mean(blockwise)", "lion", "sgd",
    "adam-mini+blockwise",
)  # fmt: skip
# Difference to the baseline, and how far the seeds move it.
EFFECTS = (0.0, -0.112, 0.004, 0.09, -0.031, 0.05, 0.6, -0.10)
BEST_LR = (3e-3, 1e-3, 3e-3, 1e-3, 2e-3, 3e-4, 0.3, 1e-3)
STATE = (2, 2, 1.02, 2, 2, 1, 1, 1.02)
ROLES = {
    "tok_emb": ("Emb", 10.0), "pos_emb": ("Emb", 10.0), "q": ("QK", 8.0), "k": ("QK", 8.0), "v": ("VO", 4.0),
    "o": ("VO", 4.0), "up": ("FFN", 6.0), "down": ("FFN", 6.0), "norm": ("Norm", 1.0),
}  # fmt: skip
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
STEPS, PER_STEP, PARAMETERS = 400, 4096, 560_000
TOKENS = STEPS * PER_STEP


def interval(values: list[float]) -> tuple[float, float, float] | None:
    """Mean and the ends of its t-interval; None with fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    half = T95[n - 1] * math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def factors(name: str) -> dict[str, float]:
    """The multiplier of each role."""
    values = {role: factor for role, (_, factor) in ROLES.items()}
    if "reversed" in name:
        swapped = {"Emb": 1.0, "QK": 4.0, "VO": 8.0, "FFN": 6.0, "Norm": 10.0}
        return {role: swapped[kind] for role, (kind, _) in ROLES.items()}
    if "mean" in name:
        return dict.fromkeys(values, 5.0)
    return values if "blockwise" in name else dict.fromkeys(values, 1.0)


def final_run(name: str, seed: int, end: float, lr: float, folder: str, *, stopped_at: int | None = None):
    """A run with curves; one that stopped has them up to there."""
    chance = random.Random(seed)
    common = random.Random(1000 + seed)
    steps = range(1, (stopped_at or STEPS) + 1)

    def loss(step: int) -> float:
        part = step / STEPS
        return end + 2.6 * math.exp(-9 * part) + 0.75 * (1 - part) ** 1.5 * (1.15 if end < 4.2 else 1)

    train: list[float | None] = [loss(step) + 0.06 * common.gauss(0, 1) + 0.01 * chance.gauss(0, 1) for step in steps]
    if stopped_at:
        train[-1] = None
    evaluated = [step for step in range(40, STEPS + 1, 40) if step <= (stopped_at or STEPS)]
    noted = [step for step in steps if step % 10 == 1]
    schedule = [lr * min(1.0, step / 40) * (0.1 + 0.9 * (STEPS - step) / STEPS) for step in noted]
    return {
        "seed": seed,
        "final_loss": None if stopped_at else end,
        "stopped_at": stopped_at,
        "validation_tokens": [step * PER_STEP for step in evaluated],
        "validation_loss": [loss(step) for step in evaluated],
        "train_tokens": [step * PER_STEP for step in steps],
        "train_loss": train,
        "learning_rate_tokens": [step * PER_STEP for step in noted],
        "learning_rates": {role: [value * factor for value in schedule] for role, factor in factors(name).items()},
        "types": {role: kind for role, (kind, _) in ROLES.items()},
        "folder": folder,
    }


def tuning(name: str, best: float, base: float, *, count: int, weight_decay: bool, diverges: float) -> list[dict]:
    """Runs on both sides of the best learning rate, and with other weight decays where asked."""
    runs = []
    for i in range(count):
        lr = float(f"{best * 10 ** ((i - count // 2) / 2):.3g}")
        loss = None if lr > diverges else min(base + 0.16 * math.log(lr / best) ** 2, 7.4)
        runs.append({"setting": {"optimizer.lr": lr}, "lr": lr, "stage": "even" if i == count - 1 else "tune"})
        runs[-1] |= {"final_loss": loss, "stopped_at": 17 if loss is None else None}
    for decay in (0.0, 0.3) if weight_decay else ():
        setting = {"optimizer.lr": best, "optimizer.weight_decay": decay}
        loss = base + (0.03 if decay else -0.01)
        runs.append({"setting": setting, "lr": best, "stage": "tune", "final_loss": loss, "stopped_at": None})
    for i, run in enumerate(runs):
        run["folder"] = f"runs/{name}-tune-{i}"
    return runs


def arm(i: int, seeds: list[int], *, lost: int = 0, count: int = 5, weight_decay: bool = False) -> dict[str, Any]:
    """One arm; the first `lost` of its final runs diverged."""
    name, lr = NAMES[i], BEST_LR[i]
    ends = [4.05 + EFFECTS[i] + 0.05 * math.sin(7 * seed) + 0.008 * math.sin(3 * seed + 5 * i) for seed in seeds]
    runs = tuning(name, lr, 4.05 + EFFECTS[i], count=count, weight_decay=weight_decay, diverges=2 * lr if i else 99)
    done = [run for run in runs if run["final_loss"] is not None]
    best = min(done, key=lambda run: run["final_loss"])
    final = [
        final_run(name, seed, end, lr, f"runs/{name}-seed-{seed}", stopped_at=30 + seed if j < lost else None)
        for j, (seed, end) in enumerate(zip(seeds, ends, strict=True))
    ]
    kept = [run["final_loss"] for run in final if run["final_loss"] is not None]
    of_mean = interval(kept)
    return {
        "name": name,
        "code": f"sharpwise.create_optimizer(model, {name!r}, lr={lr:g}, weight_decay=0.1)",
        "setting": best["setting"],
        "setting_of": "",
        "edge": "largest" if name == "lion" else "",
        "definition": f"What {name} is.",
        "mean_multiplier": 5.2 if "(" in name or "blockwise" in name else 1.0,
        "mean_lr": best["setting"]["optimizer.lr"] * (5.2 if "(" in name or "blockwise" in name else 1.0),
        "state_bytes": int(4 * STATE[i] * PARAMETERS),
        "divergence_edge": min((run["lr"] for run in runs if run["final_loss"] is None), default=None),
        "tuning": runs,
        "final": final,
        "mean": sum(kept) / len(kept) if kept else None,
        "interval": list(of_mean[1:]) if of_mean else None,
    }


def compared(one: dict[str, Any], base: dict[str, Any], margin: float) -> dict[str, Any]:
    """What the comparison with the baseline adds to an arm."""
    if one is base:
        return {"difference": None, "verdict": "baseline", "sentence": "", "speedup": None}
    pairs = [
        (a["final_loss"], b["final_loss"])
        for a, b in zip(one["final"], base["final"], strict=True)
        if a["final_loss"] is not None and b["final_loss"] is not None
    ]
    deltas = [a - b for a, b in pairs]
    found = interval(deltas)
    mean = sum(deltas) / len(deltas) if deltas else None
    low, high = found[1:] if found else (None, None)
    verdict, said = "undecided", "no difference that these seeds could see"
    if mean is None:
        verdict, said = "diverged", f"diverged at {len(one['final'])} of {len(one['final'])} seeds"
    elif low is not None and high is not None:
        if -margin < low and high < margin:
            verdict, said = "equivalent", f"ended within {margin:g} nats of {base['name']}"
        elif high < 0 or low > 0:
            verdict, side = ("better", "below") if high < 0 else ("worse", "above")
            said = f"ended {abs(mean):.3f} nats {side} {base['name']}"
        said += f" (95% interval of the difference {low:+.3f} to {high:+.3f}, {len(deltas)} seeds)"
    speedup = None
    if mean is not None:
        value = math.exp(-mean * 4)
        bound = "<0.5" if value < 0.5 else ">2" if value > 2 else ""
        ends = [None, None] if low is None or high is None else [math.exp(-high * 4), math.exp(-low * 4)]
        speedup = {"value": None if bound else value, "low": ends[0], "high": ends[1], "bound": bound}
        if bound == "<0.5":
            speedup |= {"low": 0.0, "high": 0.5}
    return {
        "difference": {"mean": mean, "low": low, "high": high, "sd": 0.01, "n": len(deltas), "p": 0.01, "diverged": 0},
        "verdict": verdict,
        "sentence": f"{said}.",
        "speedup": speedup,
    }


def ablations(arms: list[dict[str, Any]], margin: float) -> list[dict[str, Any]]:
    """What the comparison of an arm with its ablations says, where both are there."""
    by_name = {one["name"]: one for one in arms}
    pairs = [(by_name.get(NAMES[1]), by_name.get(NAMES[i])) for i in (3, 4)]
    return [
        {
            "arm": one["name"],
            "ablation": other["name"],
            **{key: value for key, value in compared(one, other, margin).items() if key != "speedup"},
        }
        for one, other in pairs
        if one and other
    ]


def block(name: str, role: str, shape: list[int], arms: list[str], **more: Any) -> dict[str, Any]:
    """One segment of the block map, with the multiplier of each arm."""
    return {
        "name": name, "shape": shape, "type": ROLES[role][0], "role": role, "rows": "all", "heads": None,
        "parameters": math.prod(shape), "tied": [], **more,
        "multipliers": {arm: factors(arm)[role] for arm in arms},
    }  # fmt: skip


def result(
    arms: int | tuple[int, ...] = 4,
    seeds: int = 3,
    *,
    lost: dict[int, int] | None = None,
    weight_decay: bool = False,
    count: int = 5,
) -> dict[str, Any]:
    """A complete study.

    Args:
        arms: how many of `NAMES`, or which.
        seeds: of the final runs.
        lost: by place in `NAMES`, how many of its final runs diverged.
        weight_decay: whether it was tuned too.
        count: learning rates of each arm.
    """
    places = range(arms) if isinstance(arms, int) else arms
    numbers = list(range(1, seeds + 1))
    margin = 0.02
    found = [arm(i, numbers, lost=(lost or {}).get(i, 0), weight_decay=weight_decay, count=count) for i in places]
    names = [one["name"] for one in found]
    return {
        "format": 1,
        "name": "stdlib-0.6m",
        "baseline": names[0],
        "margin": margin,
        "seeds": numbers,
        "complete": True,
        "progress": {"done": 46, "expected": 46},
        "budget": {
            "tokens": TOKENS, "steps": STEPS, "tokens_per_step": PER_STEP, "tokens_per_parameter": TOKENS / PARAMETERS,
        },
        "model": {
            "name": "gpt2-0.6m", "parameters": PARAMETERS, "non_embedding_parameters": 410_000, "vocabulary": 1024,
            "context": 128,
        },
        "data": {
            "source": "Python 3.11 standard library", "documents": 1641, "bytes": 24_000_000, "sha256": "0123456789ab",
            "vocabulary": 1024, "train_tokens": 8_200_000, "bytes_per_token": 2.61,
        },
        "environment": {
            "date": "2026-01-02T03:04:05+00:00", "sharpwise": "0.1", "torch": "2.13", "python": "3.11",
            "transformers": "5.23", "platform": "Linux x86_64", "cpus": 2, "threads": 1, "runs_at_a_time": 2,
            "matrix_products": "fp32",
        },
        "config": {
            "model": {"name": "gpt2-0.6m", "settings": {"n_layer": 2, "n_embd": 128, "context": 128}},
            "batch": {"sequences": 32},
            "optimizer": {"betas": [0.9, 0.95], "weight_decay": 0.1, "max_grad_norm": 1.0},
            "schedule": {"kind": "cosine", "warmup": 40, "floor": 0.1},
        },
        "arms": [{**one, **compared(one, found[0], margin)} for one in found],
        "ablations": ablations(found, margin),
        "horizons": [
            {
                "share": share, "tokens": int(share * TOKENS), "seeds": numbers, "stopped_at": [None] * seeds,
                "final_losses": [4.05 + d + 0.01 * s for s in numbers],
                "folders": [f"runs/{names[0]}-x{share:g}-seed-{s}" for s in numbers],
            }
            for share, d in ((0.5, 0.17), (2.0, -0.17))
        ],
        "blocks": [
            block("transformer.wte.weight", "tok_emb", [1024, 128], names, tied=["lm_head.weight"]),
            *(
                block(f"transformer.h.{layer}.{part}.weight", role, shape, names, **more)
                for layer in range(2)
                for part, role, shape, more in (
                    ("ln_1", "norm", [128], {}),
                    ("attn.c_attn", "q", [128, 128], {"rows": "0:128", "heads": 4}),
                    ("attn.c_attn", "v", [128, 128], {"rows": "256:384", "heads": 4}),
                    ("mlp.c_fc", "up", [128, 512], {}),
                )
            ),
        ],
        "caveats": ["One model and one text: another may order the arms differently."],
        "next": {"reason": "These runs were short.", "command": "sharpwise compare 'runs/a b/study.toml' --budget 9"},
        "not_tested": [
            "Other model sizes, longer contexts, other texts.",
            "Settings that were not tuned: betas, warm-up, the schedule.",
            "What the trained models are good for: loss is all that was measured.",
        ],
    }  # fmt: skip


def step(kind: str, before: float, after: float, moves: list[float | None], *, taken: bool = False) -> dict[str, Any]:
    """A step of a search with its differences at one seed or two; None where the run diverged."""
    against = [4.2, 4.1][: len(moves)]
    losses = [None if move is None else a + move for a, move in zip(against, moves, strict=True)]
    return {
        "type": kind, "round": 1, "before": before, "after": after, "seeds": [1001, 1002][: len(moves)],
        "losses": losses, "against": against, "taken": taken,
    }  # fmt: skip


def searched() -> dict[str, Any]:
    """A study of two arms, the second with searched factors: steps of every kind."""
    whole = result(2)
    spelled = "per_role(ratios={Emb: 4, pos_emb: 1, QK: 1, VO: 0.5, FFN: 1, Norm: 1})"
    runs = [
        {**run, "stage": "roles", "seed": 1001 + i % 2, "setting": {**run["setting"], "optimizer.block_lr": spelled}}
        for i, run in enumerate(whole["arms"][1]["tuning"])
    ]
    whole["arms"][1] |= {
        "setting_of": "adamw", "tuning": [],
        "setting": {"optimizer.lr": 3e-3, "optimizer.block_lr": spelled},
        "search": {
            "block_lr": spelled, "ended": "nothing", "most": 50, "runs": runs,
            "factors": {"Emb": 4.0, "pos_emb": 1.0, "QK": 1.0, "VO": 0.5, "FFN": 1.0, "Norm": 1.0},
            "steps": [
                step("Emb", 1.0, 2.0, [-0.2, -0.1], taken=True), step("Emb", 1.0, 0.5, [0.03]),
                step("VO", 1.0, 2.0, [1.7]), step("VO", 1.0, 0.5, [-0.18, -0.25], taken=True),
                step("FFN", 1.0, 2.0, [-0.01, 0.02]), step("FFN", 1.0, 0.5, [-0.1, 0.2]),
                step("Norm", 1.0, 2.0, [None]), step("QK", 1.0, 2.0, [0.01]),
                step("Emb", 2.0, 4.0, [-0.02, -0.01], taken=True), step("Emb", 4.0, 8.0, [0.05]),
            ],
        },
    }  # fmt: skip
    return whole


def unfinished() -> dict[str, Any]:
    """A study in the midst of its tuning: one arm has final runs, one only tuning runs, one nothing."""
    whole = result(4)
    nothing = {
        "mean": None, "interval": None, "difference": None, "speedup": None, "sentence": "", "final": [], "edge": "",
    }  # fmt: skip
    arms = whole["arms"]
    arms[1] |= {**nothing, "verdict": "undecided", "tuning": arms[1]["tuning"][:3]}
    arms[2] |= {**nothing, "verdict": "undecided", "tuning": [], "setting": None, "state_bytes": None, "mean_lr": None}
    arms[3] |= {"final": arms[3]["final"][:1], "interval": None, "speedup": None, "verdict": "undecided"}
    arms[3]["difference"] |= {"low": None, "high": None, "sd": None, "n": 1, "p": None}
    pair = {**whole["ablations"][0], "difference": None, "verdict": "undecided", "sentence": ""}
    return {
        **whole, "complete": False, "progress": {"done": 17, "expected": 46}, "horizons": [], "ablations": [pair],
    }  # fmt: skip
