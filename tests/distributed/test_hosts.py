"""Two processes under Accelerate, the Trainer and DDP equal one; what no optimizer of blocks can run on is refused."""

import re
from pathlib import Path

import pytest
import torch
from first_contact.tiny import gpt2

from distributed.hosts_worker import OFFLOADED, STEPS, losses_of, trainer
from distributed.launch import launch
from distributed.serving import Found, of


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two processes found, all cases in one start."""
    return launch("distributed.hosts_worker", 2, tmp_path_factory.mktemp("hosts"))


def report(parameters: float) -> None:
    """Not bounded: where a gradient is 0 but for rounding, as of a key's bias, Adam divides that by its own size."""
    print(f"max|dp| / max|p| after {STEPS} steps: {parameters:.2g}")


@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_accelerate_under_fsdp2_equals_one_process(found: Found, name: str) -> None:
    """`save_state` and `load_state` in the middle: of shards (adamw) and of the whole (adam-mini)."""
    result = of(found, f"accelerate, {name}")
    assert result["losses"] <= 1e-3
    assert result["fell"] != 0.0
    assert result["sharded"]
    assert result["state"], "state is held for other parameters than the model's"
    assert result["steps"] == [STEPS]
    report(result["parameters"])


def test_the_trainer_under_fsdp2_equals_one_process(found: Found, tmp_path: Path) -> None:
    result = of(found, "trainer")
    alone = trainer(str(tmp_path), gpt2(), 4)
    alone.train()
    differences = [abs(a - b) for a, b in zip(result["losses"], losses_of(alone), strict=True)]
    assert len(differences) == STEPS
    assert max(differences) <= 1e-3
    assert result["sharded"]
    assert result["resumed"] == 0.0
    weights = [(torch.tensor(result["weights"][n]), p.detach()) for n, p in alone.model.named_parameters()]
    report(max(float((p - q).abs().max() / q.abs().max()) for p, q in weights))


@pytest.mark.parametrize("name", OFFLOADED)
def test_parameters_offloaded_to_cpus_train_as_others(found: Found, name: str) -> None:
    assert of(found, f"offload, {name}") == {"parameters": 0.0, "state": 0.0, "places": ["cpu"]}


def test_a_process_group_that_cannot_sum_what_is_offloaded_is_named(found: Found) -> None:
    said = of(found, "no backend")
    assert said.startswith("ValueError: AdamW: parameters lie on cpu (CPUOffloadPolicy?)")
    assert "serves cuda:gloo" in said
    assert "init_process_group('cpu:gloo,cuda:gloo')" in said


@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_ddp_equals_one_process_where_branches_get_no_gradient(found: Found, name: str) -> None:
    result = of(found, f"ddp, {name}")
    assert result["losses"] <= 1e-6
    assert result["parameters"] <= 1e-6
    steps = {name.split(".")[0]: n for name, n in result["steps"].items()}
    assert steps == {"inner": STEPS, "first": 13, "second": 7, "never": 0}


@pytest.mark.parametrize(
    ("what", "shared", "error"),
    [
        ("ddp", True, 0.0),
        ("compiled", True, 0.0),
        ("parameters", True, 0.0),
        ("bf16", True, 1e-4),  # three updates of about LR, off by 2**-8 of their largest element
        ("one shard each", True, 0.0),
        ("experts", False, 0.0),
    ],
)
def test_replicas_share_the_matrices_of_muon_and_stay_replicas(
    found: Found, what: str, shared: bool, error: float
) -> None:
    """What DDP leaves to each process, as experts are, is not shared."""
    result = of(found, "muon")[what]
    assert result["error"] <= error
    assert (result["shared"] < 1.0) is shared
    assert result["same"] is shared


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_parameters_that_fsdp1_flattened_are_refused(found: Found, name: str, original: bool) -> None:
    result = of(found, f"fsdp1, {name}, use_orig_params={original}")
    for way, said in result.items():
        assert said.startswith("ValueError: Adam"), (way, said)
        assert "cannot be found in flattened" in said and "fully_shard(model)" in said, (way, said)
        assert "FSDP1 (FullyShardedDataParallel)" in said or ("28 parameters" in said and "1 tensors" in said), (
            way,
            said,
        )


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("shape", ["rank 0 has transformer.wte.weight (65, 33)", "rank 1 has transformer.wte.weight (66, 33)"]),
        ("rule", ["rank 0 has group 0", "'rule': 'adamw'", "'rule': 'lion'"]),
        ("block_lr", ["block_lr=None", "block_lr=BlockwiseLR("]),
        ("lr", ["rank 0 has group 0: {'lr': 0.001", "rank 1 has group 0: {'lr': 0.002"]),
        ("betas", ["(0.9, 0.99)", "(0.9, 0.95)"]),
        ("rows", ["rows=False", "rows=True"]),
        ("roles", ["transformer.wpe.weight (16, 33) torch.float32: adamw (pos_emb", "adamw (other"]),
    ],
)
def test_ranks_that_differ_are_told_so_at_the_first_step(found: Found, what: str, names: list[str]) -> None:
    said = of(found, "ranks that differ")[what]
    assert re.match("ValueError: (AdamW|Muon): ranks differ in model or settings", said), said
    assert all(name in said for name in names), said


@pytest.mark.parametrize("what", ["same", "compile"])
def test_ranks_that_may_step_together(found: Found, what: str) -> None:
    assert of(found, "ranks that differ")[what] == "nothing"


def test_one_rank_may_ask_alone(found: Found) -> None:
    result = of(found, "one rank asks")
    assert result["rows"] > 0
    assert result["steps"] == [1.0]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_sharded_behind_the_optimizers_back_is_noticed(found: Found, when: str) -> None:
    """Torch's optimizers go on with the old tensors, which nothing trains."""
    said = of(found, "left behind")[f"sharded {when} the first step"]
    assert "RuntimeError: AdamMini: the model was sharded after this optimizer was built" in said
    assert "fully_shard(model)" in said and "Accelerator.prepare" in said
