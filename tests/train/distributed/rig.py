"""What the tests of several processes share: a model that can be cut, trouble on one rank, and how to launch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 20
LENGTH = 3  # tokens of the text that is written at the end, each a forward pass
TESTS = Path(__file__).parents[2]
HEAD = 8
MLP = {**dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "colwise"), "mlp.down_proj": "rowwise"}
PLANS = {
    "heads apart": {"self_attn.[qkv]_proj": "colwise", "self_attn.o_proj": "rowwise", **MLP},
    "all heads": {"self_attn.[qkv]_proj": "colwise_gather_output", "self_attn.o_proj": "rowwise_split_input", **MLP},
    "queries alone": {"self_attn.q_proj": "colwise", **MLP},
}
"""Of tensor parallelism, per layer. The last cannot be."""


class Block(nn.Module):
    """LLaMA's names; the heads are counted from what there is, as tensor parallelism leaves only some.

    `heads` fixes how many there are, which is wrong then.
    """

    def __init__(self, width: int, dropout: float, heads: int | None) -> None:
        super().__init__()
        self.dropout, self.heads = dropout, heads
        self.input_layernorm = nn.RMSNorm(width)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width, bias=False) for name in "qkvo"})
        self.post_attention_layernorm = nn.RMSNorm(width)
        sizes = {"gate_proj": (width, 88), "up_proj": (width, 88), "down_proj": (88, width)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        h, own = self.input_layernorm(x), self.self_attn
        shape = (self.heads, -1) if self.heads else (-1, HEAD)
        q, k, v = (own[f"{name}_proj"](h).unflatten(-1, shape).transpose(1, 2) for name in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(own["o_proj"](y), self.dropout, self.training)
        h, own = self.post_attention_layernorm(x), self.mlp
        return x + own["down_proj"](F.silu(own["gate_proj"](h)) * own["up_proj"](h))


class Small(nn.Module):
    """A transformer of 50,000 parameters, with a plan for tensor parallelism."""

    def __init__(
        self, vocab_size: int, width: int, heads_tied: bool, dropout: float, heads: int | None, plan: str
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList([Block(width, dropout, heads) for _ in range(2)])
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        if heads_tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.tp_plan = {f"layers.*.{name}": style for name, style in PLANS[plan].items()}
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        if self.training:
            self.calls += 1
            x = trouble(x, self.calls)
        return self.lm_head(self.norm(x))


def build(
    vocab_size: int, width: int = 32, tied: bool = False, dropout: float = 0.0, other: bool = False,
    heads: int | None = None, plan: str = "heads apart",
) -> nn.Module:  # fmt: skip
    """What `model.name` of the tests names; `other` is another model on rank 1."""
    if other and rank() == 1:
        torch.manual_seed(1)
    return Small(vocab_size, width, tied, dropout, heads, plan)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def trouble(x: Tensor, call: int) -> Tensor:
    """What TROUBLE says of a rank and a forward pass, in the first attempt: "kill 1 7", "nan 1 7", "hang 1 7".

    "term 1 7" waits there until SIGTERM has come: the command then lets Ctrl-C end it at once.
    """
    what, who, when = (os.environ.get("TROUBLE") or "none 0 0").split()
    if (rank(), call) != (int(who), int(when)) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return x
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(60)
    while what == "term" and getattr(signal.getsignal(signal.SIGINT), "__name__", "") == "ask":
        time.sleep(0.01)
    return x * float("nan") if what == "nan" else x


def settings(data: Path, **tables: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration; tables are put on top."""
    given: dict[str, Any] = {
        "seed": 3,
        "model": {"name": f"{__name__}:build"},
        "data": {"path": str(data), "context": 16},
        "batch": {"sequences": 6, "micro": 2},
        "optimizer": {"name": "adamw", "block_lr": "blockwise", "lr": 3e-3},
        "schedule": {"steps": STEPS, "warmup": 4},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
        "validation": {"every": 5, "sequences": 7},
        "log": {"diagnostics": 10, "tensorboard": False},
        "checkpoint": {"every": 4, "keep": 3},
    }
    return given | {name: {**given.get(name, {}), **table} for name, table in tables.items()}


def job(name: str, given: Mapping[str, Any], **how: Any) -> dict[str, Any]:
    """One run of a worker.

    `folder` is where, if not under its name; `stop` ends it after so many steps; `trouble` is as above; `rank1` are
    tables of rank 1 alone; `spoil` makes that fail at its third checkpoint.
    """
    return {"name": name, "given": given, **how}


def launch(
    processes: int,
    *command: str,
    timeout: float = 240,
    meanwhile: Callable[[subprocess.Popen[str]], object] = lambda torchrun: None,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """torchrun, on this machine alone; what all processes wrote to stderr is in `stderr`.

    `meanwhile` is called with torchrun when it has started.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--nproc-per-node={processes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    paths = os.pathsep.join([str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    own = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | env
    whole = [sys.executable, "-m", "torch.distributed.run", *options, *command]
    process = subprocess.Popen(
        whole, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        meanwhile(process)
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.terminate()  # torchrun ends its workers
        process.communicate(timeout=60)
        raise
    return subprocess.CompletedProcess(whole, process.returncode, out, err)


def work(
    processes: int, folder: Path, jobs: Sequence[Mapping[str, Any]], **env: str
) -> dict[str, list[dict[str, Any]]]:
    """Run jobs in `folder`, one after the other; what each rank says of each, by the name of the job."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    worker = str(Path(__file__).with_name("worker.py"))
    done = launch(processes, worker, str(folder))
    assert done.returncode == 0, done.stderr[-6000:]
    said = [json.loads((folder / f"said-{rank}-of-{processes}.json").read_text()) for rank in range(processes)]
    return {own["name"]: [ranks[own["name"]] for ranks in said] for own in jobs}
