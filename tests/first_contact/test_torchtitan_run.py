"""torchtitan 0.3 as a whole: its models by our names of roles, and a training by its own `Trainer`, resumed."""

import copy
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from first_contact.torchtitan_worker import SAVED, STEPS, prepare

import sharpwise

pytest.importorskip("torchtitan.components.optimizer")
WORKER = Path(__file__).with_name("torchtitan_worker.py")
HF = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up"} | {
    "down_proj": "down", "embed_tokens": "tok_emb", "lm_head": "head", "gate": "router", "q_norm": "qk_norm",
    "k_norm": "qk_norm", "input_layernorm": "norm", "post_attention_layernorm": "norm", "norm": "norm",
}  # fmt: skip


def model_of(family: str, flavor: str) -> tuple[Any, Any]:
    """A model of torchtitan with its first two layers, and the adapter that knows its names in transformers."""
    module = importlib.import_module(f"torchtitan.models.{family}")
    spec = copy.deepcopy(module.model_registry(flavor))
    del spec.model.layers[2:]
    with torch.device("meta"):
        model = spec.model.build()
    return model, spec.state_dict_adapter(spec.model, None)


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")
@pytest.mark.parametrize(
    ("family", "flavor"),
    [
        ("llama3", "debugmodel"),
        ("qwen3", "debugmodel"),
        ("qwen3", "debugmodel_non_fused_qkv"),
        ("qwen3", "debugmodel_moe"),
    ],
)
def test_roles_are_those_of_the_names_in_transformers(family: str, flavor: str) -> None:
    """Against two of torchtitan's own: its adapter to transformers, and how it saves a fused q, k, v."""
    from sharpwise.integrations.torchtitan import roles_of

    model, adapter = model_of(family, flavor)
    blocks = sharpwise.BlockMap.of(model, overrides=roles_of(model), trace=False)
    assert not blocks.unexplained
    theirs = {own: hf for hf, own in adapter.from_hf_map.items() if own is not None}
    model.to_empty(device="cpu")
    parameters = dict(model.named_parameters())
    for number, p in enumerate(parameters.values()):
        rows = torch.arange(p.shape[0], dtype=torch.float32).view(-1, *[1] * (p.dim() - 1))
        p.data.copy_((number * 10_000 + rows).expand_as(p))
    for name, saved in model.state_dict().items():
        if name not in blocks and "qkv_linear" not in name:
            continue  # a buffer, or a head that is the embedding
        held = name if name in blocks else re.sub(r"w[qkv](?=\.\w+$)", "wqkv", name)
        general = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        role = HF[theirs[general].removesuffix(".weight").rpartition(".")[2]]
        (own,) = (s for s in blocks[held] if s.role == role)
        layer = re.match(r"layers\.(\d)\.", name)
        assert own.layer == (int(layer[1]) if layer else None)
        if held != name:  # which rows of the fused matrix are those that it saves
            index = own.row_index().tolist()
            assert torch.equal(saved, parameters[held][index])
            assert own.heads == saved.shape[0] // model.layers["0"].attention.head_dim


def trained(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(WORKER), str(folder)], capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / "run.json").read_text()), torch.load(folder / "weights.pt")


@pytest.mark.slow
def test_a_training_by_its_trainer_is_resumed_to_the_bit(tmp_path: Path) -> None:
    for module in ("torchtitan.trainer", "torchao"):
        pytest.importorskip(module, exc_type=ImportError)
    prepare(tmp_path)
    whole, weights = trained(tmp_path)
    assert whole["optimizer"] == "AdamMini" and whole["sharded"]
    assert whole["steps"] == [STEPS] and len(whole["losses"]) == STEPS
    assert whole["losses"][-1] < whole["losses"][0] - 1
    assert {role for _, role, _, _ in whole["blocks"]} == {*"qkvo", "tok_emb", "head", "gate", "up", "down", "norm"}
    assert {heads for _, role, heads, _ in whole["blocks"] if role in "qkv"} == {16}

    shutil.rmtree(tmp_path / "run" / "checkpoint" / f"step-{STEPS}")
    rest, resumed = trained(tmp_path)
    assert rest["losses"] == whole["losses"][SAVED:]
    assert all(torch.equal(p, resumed[name]) for name, p in weights.items())
