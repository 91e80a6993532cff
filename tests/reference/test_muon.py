"""Muon against its equations in float64, every step, and against torch's own."""

import numpy as np
import pytest
import torch

import sharpwise
from reference import driver, models, muon
from reference.models import GPT2, LLAMA, NANOGPT, NEOX

CASES = {
    "average, nesterov": {},
    "average": {"nesterov": False, "momentum": 0.83},
    "heavy ball, nesterov": {"heavy_ball": True, "momentum": 0.9},
    "heavy ball, original scale": {"heavy_ball": True, "nesterov": False, "scale": "original", "aux_lr": 7e-4},
    "polar express": {"method": "polar_express"},
    "rows": {"normalize_rows": True, "beta2": 0.91},
    "own aux": {"aux_lr": 1.3e-3, "aux_betas": (0.7, 0.93), "aux_eps": 1e-5, "aux_weight_decay": 0.37},
    "heads": {"per_head": True},
    "heads, rows, polar express": {"per_head": True, "normalize_rows": True, "method": "polar_express"},
}
LR = 2.3e-3
MODELS = ["gpt2", "llama", "gpt_neox", "nanogpt"]


def _grid(*shape):
    return np.arange(int(np.prod(shape))).reshape(shape)


def matrices_of(model_name, named, per_head):
    """Flat indices of the matrices in every parameter, rows are outputs: literal, as each forward reads its weights."""
    found = {name: [] for name, _ in named}
    s = {"gpt2": GPT2, "llama": LLAMA, "gpt_neox": NEOX, "nanogpt": NANOGPT}[model_name]
    d, heads, ff = s["d"], s["heads"], s["ff"]

    def attention(rows, n):
        return list(rows.reshape(n, -1, rows.shape[1])) if per_head else [rows]

    for l in range(s["layers"]):  # noqa: E741 - layer
        if model_name == "gpt2":
            h, w = f"transformer.h.{l}", _grid(d, 3 * d).T
            found[f"{h}.attn.c_attn.weight"] = [m for k in range(3) for m in attention(w[k * d : (k + 1) * d], heads)]
            found[f"{h}.attn.c_proj.weight"] = [_grid(d, d).T]
            found[f"{h}.mlp.c_fc.weight"], found[f"{h}.mlp.c_proj.weight"] = [_grid(d, ff).T], [_grid(ff, d).T]
        elif model_name == "nanogpt":
            h, w = f"transformer.h.{l}", _grid(3 * d, d)
            found[f"{h}.attn.c_attn.weight"] = [m for k in range(3) for m in attention(w[k * d : (k + 1) * d], heads)]
            found[f"{h}.attn.c_proj.weight"] = [_grid(d, d)]
            found[f"{h}.mlp.c_fc.weight"], found[f"{h}.mlp.c_proj.weight"] = [_grid(ff, d)], [_grid(d, ff)]
        elif model_name == "gpt_neox":
            h, w = f"gpt_neox.layers.{l}", _grid(heads, 3, d // heads, d)
            of_role = [attention(w[:, k].reshape(d, d), heads) for k in range(3)]
            found[f"{h}.attention.query_key_value.weight"] = [m for own in of_role for m in own]
            found[f"{h}.attention.dense.weight"] = [_grid(d, d)]
            found[f"{h}.mlp.dense_h_to_4h.weight"] = [_grid(ff, d)]
            found[f"{h}.mlp.dense_4h_to_h.weight"] = [_grid(d, ff)]
        else:
            h, hd, kv = f"model.layers.{l}", s["head_dim"], s["kv_heads"]
            for role, n in (("q", heads), ("k", kv), ("v", kv)):
                found[f"{h}.self_attn.{role}_proj.weight"] = attention(_grid(n * hd, d), n)
            found[f"{h}.self_attn.o_proj.weight"] = [_grid(d, heads * hd)]
            for role, shape in (("gate", (ff, d)), ("up", (ff, d)), ("down", (d, ff))):
                found[f"{h}.mlp.{role}_proj.weight"] = [_grid(*shape)]
    return found


def twin_of(model_name, named, options, weight_decay):
    """The reference of an optimizer with these options."""
    own = dict(options)
    aux = (*own.pop("aux_betas", (0.9, 0.95)), own.pop("aux_eps", 1e-8))
    hyper = {"lr": LR, "weight_decay": weight_decay, "aux": aux, "ratio": own.pop("aux_lr", LR) / LR}
    by_row, beta2 = own.pop("normalize_rows", False), own.pop("beta2", 0.95)
    hyper["normalize_rows_by"] = beta2 if by_row else None
    matrices = matrices_of(model_name, named, own.pop("per_head", False))
    twin = driver.Twin(muon, named, [(driver.names_of(named), hyper | own)], blocks=matrices)
    for state in twin.state.values() if not by_row else ():
        state.pop("row_second_moment", None)  # the optimizer keeps none either
    return twin


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_every_step(case, model_name, compiled):
    model = models.build(model_name, torch.float64)
    named = list(model.named_parameters())
    optimizer = sharpwise.Muon(model, lr=LR, weight_decay=0.21, **CASES[case], compile=compiled)
    twin = twin_of(model_name, named, CASES[case], 0.21)
    _run(optimizer, named, twin, 1e-11)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("case", ["average, nesterov", "heads, rows, polar express"])
def test_every_step_in_fp32(case, model_name):
    """Small singular values are made large, rounding errors with them."""
    model = models.build(model_name)
    named = list(model.named_parameters())
    optimizer = sharpwise.Muon(model, lr=LR, weight_decay=0.21, **CASES[case])
    _run(optimizer, named, twin_of(model_name, named, CASES[case], 0.21), 3e-5)


def _run(optimizer, named, twin, tolerance):
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(LR, t)], steps=11, tolerance=tolerance)
