"""Which elements do what, and Adam-mini's blocks, of the four tiny models: literal index sets, written by hand.

Independent of `sharpwise.blocks`: the index sets follow from how each model's forward reads its weights. Adam-mini's
cut: token embedding and untied head by token (row); q and k by head (kv heads where they are fewer, the true
head_dim); v, o and MLP by output row (a Conv1D's columns); norms and the rest (positions included) whole tensor;
biases by element.

That positions are one block, not one per position, follows from the published count of 115,130 blocks for nanoGPT's
GPT-2 124M: 50,304 tokens + 12 layers x (2 x 12 heads + 768 v + 768 o + 3,072 up + 768 down + 2 norms) + 1 final norm
= 115,129 without positions, and 1,024 rows would make 116,153. `gpt2_124m_state` gives the 475.5 MiB of the HF model,
where either choice rounds alike (475.529 and 475.533).
"""

from dataclasses import dataclass, field

import numpy as np

from reference.models import GPT2, LLAMA, NANOGPT, NEOX


@dataclass
class Piece:
    """Elements of one parameter with one role: flat row-major indices in row order, and Adam-mini's blocks of them."""

    role: str
    layer: int | None
    index: np.ndarray
    blocks: list[np.ndarray] = field(repr=False)
    bias: bool = False


def _grid(*shape):
    return np.arange(int(np.prod(shape))).reshape(shape)


def _piece(role, layer, blocks):
    return Piece(role, layer, np.concatenate(blocks), blocks)


def _rows(role, layer, grid):
    """One block per row."""
    return _piece(role, layer, list(grid))


def _columns(role, layer, grid):
    """One block per column: a Conv1D weight is [in, out]."""
    return _piece(role, layer, [grid[:, j] for j in range(grid.shape[1])])


def _whole(role, layer, grid):
    """One block."""
    return _piece(role, layer, [grid.ravel()])


def _bias(role, layer, index):
    """Elements are blocks of their own."""
    index = np.asarray(index).ravel()
    return Piece(role, layer, index, [index[i : i + 1] for i in range(index.size)], bias=True)


def _norm(prefix, layer, d):
    return {
        f"{prefix}.weight": [_whole("norm", layer, _grid(d))],
        f"{prefix}.bias": [_bias("norm", layer, _grid(d))],
    }


def gpt2():
    """HF gpt2: c_attn [d, 3d]: columns 0..d-1 are q, head h at columns 4h..4h+3; then k; then v."""
    d, heads, ff = GPT2["d"], GPT2["heads"], GPT2["ff"]
    hd = d // heads
    cut = {
        "transformer.wte.weight": [_rows("tok_emb", None, _grid(GPT2["vocab"], d))],
        "transformer.wpe.weight": [_whole("pos_emb", None, _grid(GPT2["positions"], d))],
    }
    for l in range(GPT2["layers"]):  # noqa: E741 - layer
        h = f"transformer.h.{l}"
        w, b = _grid(d, 3 * d), _grid(3 * d)
        cut |= _norm(f"{h}.ln_1", l, d)
        cut[f"{h}.attn.c_attn.weight"] = [
            _piece("q", l, [w[:, i * hd : (i + 1) * hd].ravel() for i in range(heads)]),
            _piece("k", l, [w[:, d + i * hd : d + (i + 1) * hd].ravel() for i in range(heads)]),
            _columns("v", l, w[:, 2 * d :]),
        ]
        cut[f"{h}.attn.c_attn.bias"] = [_bias("q", l, b[:d]), _bias("k", l, b[d : 2 * d]), _bias("v", l, b[2 * d :])]
        cut[f"{h}.attn.c_proj.weight"] = [_columns("o", l, _grid(d, d))]
        cut[f"{h}.attn.c_proj.bias"] = [_bias("o", l, _grid(d))]
        cut |= _norm(f"{h}.ln_2", l, d)
        cut[f"{h}.mlp.c_fc.weight"] = [_columns("up", l, _grid(d, ff))]
        cut[f"{h}.mlp.c_fc.bias"] = [_bias("up", l, _grid(ff))]
        cut[f"{h}.mlp.c_proj.weight"] = [_columns("down", l, _grid(ff, d))]
        cut[f"{h}.mlp.c_proj.bias"] = [_bias("down", l, _grid(d))]
    return cut | _norm("transformer.ln_f", None, d)


def llama(head_dim=LLAMA["head_dim"], kv_heads=LLAMA["kv_heads"]):
    """HF llama: q_proj [heads * head_dim, d], k_proj and v_proj [kv_heads * head_dim, d], untied head."""
    s = LLAMA
    d, heads, ff = s["d"], s["heads"], s["ff"]
    cut = {"model.embed_tokens.weight": [_rows("tok_emb", None, _grid(s["vocab"], d))]}
    for l in range(s["layers"]):  # noqa: E741
        h = f"model.layers.{l}"
        q, kv = _grid(heads * head_dim, d), _grid(kv_heads * head_dim, d)
        head_rows = [slice(i * head_dim, (i + 1) * head_dim) for i in range(heads)]
        cut[f"{h}.self_attn.q_proj.weight"] = [_piece("q", l, [q[rows].ravel() for rows in head_rows])]
        cut[f"{h}.self_attn.k_proj.weight"] = [_piece("k", l, [kv[rows].ravel() for rows in head_rows[:kv_heads]])]
        cut[f"{h}.self_attn.v_proj.weight"] = [_rows("v", l, kv)]
        cut[f"{h}.self_attn.o_proj.weight"] = [_rows("o", l, _grid(d, heads * head_dim))]
        cut[f"{h}.mlp.gate_proj.weight"] = [_rows("gate", l, _grid(ff, d))]
        cut[f"{h}.mlp.up_proj.weight"] = [_rows("up", l, _grid(ff, d))]
        cut[f"{h}.mlp.down_proj.weight"] = [_rows("down", l, _grid(d, ff))]
        cut[f"{h}.input_layernorm.weight"] = [_whole("norm", l, _grid(d))]
        cut[f"{h}.post_attention_layernorm.weight"] = [_whole("norm", l, _grid(d))]
    cut["model.norm.weight"] = [_whole("norm", None, _grid(d))]
    cut["lm_head.weight"] = [_rows("head", None, _grid(s["vocab"], d))]
    return cut


def gpt_neox():
    """HF gpt_neox: query_key_value [3d, d] is [heads, (q, k, v), head_dim, d]."""
    d, heads, ff = NEOX["d"], NEOX["heads"], NEOX["ff"]
    hd = d // heads
    cut = {"gpt_neox.embed_in.weight": [_rows("tok_emb", None, _grid(NEOX["vocab"], d))]}
    for l in range(NEOX["layers"]):  # noqa: E741
        h = f"gpt_neox.layers.{l}"
        w, b = _grid(heads, 3, hd, d), _grid(heads, 3, hd)
        cut |= _norm(f"{h}.input_layernorm", l, d) | _norm(f"{h}.post_attention_layernorm", l, d)
        cut[f"{h}.attention.query_key_value.weight"] = [
            _piece("q", l, [w[i, 0].ravel() for i in range(heads)]),
            _piece("k", l, [w[i, 1].ravel() for i in range(heads)]),
            _piece("v", l, [w[i, 2, j] for i in range(heads) for j in range(hd)]),
        ]
        cut[f"{h}.attention.query_key_value.bias"] = [_bias(role, l, b[:, i]) for i, role in enumerate("qkv")]
        cut[f"{h}.attention.dense.weight"] = [_rows("o", l, _grid(d, d))]
        cut[f"{h}.attention.dense.bias"] = [_bias("o", l, _grid(d))]
        cut[f"{h}.mlp.dense_h_to_4h.weight"] = [_rows("up", l, _grid(ff, d))]
        cut[f"{h}.mlp.dense_h_to_4h.bias"] = [_bias("up", l, _grid(ff))]
        cut[f"{h}.mlp.dense_4h_to_h.weight"] = [_rows("down", l, _grid(d, ff))]
        cut[f"{h}.mlp.dense_4h_to_h.bias"] = [_bias("down", l, _grid(d))]
    # transformers 5 calls the head lm_head, transformers 4 embed_out; a test keeps the name that its model has.
    head = [_rows("head", None, _grid(NEOX["vocab"], d))]
    return cut | _norm("gpt_neox.final_layer_norm", None, d) | {"lm_head.weight": head, "embed_out.weight": head}


def nanogpt():
    """nanoGPT: as HF gpt2, with Linear weights [out, in]."""
    s = NANOGPT
    d, heads, ff = s["d"], s["heads"], s["ff"]
    hd = d // heads
    cut = {
        "transformer.wte.weight": [_rows("tok_emb", None, _grid(s["vocab"], d))],
        "transformer.wpe.weight": [_whole("pos_emb", None, _grid(s["positions"], d))],
    }
    for l in range(s["layers"]):  # noqa: E741
        h = f"transformer.h.{l}"
        w, b = _grid(3, heads, hd, d), _grid(3, d)
        cut |= _norm(f"{h}.ln_1", l, d) | _norm(f"{h}.ln_2", l, d)
        cut[f"{h}.attn.c_attn.weight"] = [
            _piece("q", l, [w[0, i].ravel() for i in range(heads)]),
            _piece("k", l, [w[1, i].ravel() for i in range(heads)]),
            _rows("v", l, w[2].reshape(d, d)),
        ]
        cut[f"{h}.attn.c_attn.bias"] = [_bias(role, l, b[i]) for i, role in enumerate("qkv")]
        cut[f"{h}.attn.c_proj.weight"] = [_rows("o", l, _grid(d, d))]
        cut[f"{h}.attn.c_proj.bias"] = [_bias("o", l, _grid(d))]
        cut[f"{h}.mlp.c_fc.weight"] = [_rows("up", l, _grid(ff, d))]
        cut[f"{h}.mlp.c_fc.bias"] = [_bias("up", l, _grid(ff))]
        cut[f"{h}.mlp.c_proj.weight"] = [_rows("down", l, _grid(d, ff))]
        cut[f"{h}.mlp.c_proj.bias"] = [_bias("down", l, _grid(d))]
    return cut | _norm("transformer.ln_f", None, d)


CUT = {"gpt2": gpt2, "llama": llama, "gpt_neox": gpt_neox, "nanogpt": nanogpt}


def pieces(model_name, names):
    """{parameter name: its pieces in row order} for the names that the model has; every name must be known."""
    cut = CUT[model_name]()
    return {name: cut[name] for name in names}


def mini_blocks(parts, v_by="row"):
    """Adam-mini's blocks of one parameter: per piece in row order; a bias in the order of its elements."""
    if parts[0].bias:
        return [np.array([i]) for i in range(sum(part.index.size for part in parts))]
    return [
        block for part in parts for block in ([part.index] if part.role == "v" and v_by == "tensor" else part.blocks)
    ]


def gpt2_124m_state():
    """Adam-mini's state of GPT-2 124M as HF builds it, fp32: (blocks, bytes), by arithmetic alone."""
    layers, heads, d, ff, vocab = 12, 12, 768, 3072, 50257
    parameters = 124_439_808
    matrices = heads + heads + d + d + ff + d  # q, k, v, o, up, down
    biases = 3 * d + d + ff + d + 2 * d  # c_attn, attn.c_proj, c_fc, mlp.c_proj, the two norms'
    blocks = vocab + 1 + layers * (matrices + 2 + biases) + 1 + d
    counters = 2 + layers * 12 + 2  # one fp32 step each
    assert counters == 148
    return blocks, 4 * (parameters + blocks + counters)
