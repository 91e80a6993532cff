"""What a step asks of a CUDA device, counted on one that computes nothing (`benchmarks/fake_device.py`).

The bounds only go down. `python benchmarks/launches.py --bounds` prints them as they would be now.
"""

import sys
from pathlib import Path

import pytest
import torch

from sharpwise.engine.backends import triton_launch
from sharpwise.optim import COMBINES, OPTIMIZERS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OWN = ("environment", "fake_device", "launches", "shapes")

BOUNDS = {
    "tiny": """
                       adamw  adam-mini  adapm  adasgd  blockwise-adam  lion  muon  sgd  sgd-sai
plain                  2      4          1212   111     3               2     91    2    2
clip                   5      7          1274   117     6               5     96    5    5
clip-skip              6      9          1381   131     7               6     101   6    6
raise                  4      6          1215   113     5               4     95    4    4
bf16-weights           2      4          1248   111     3               2     91    2    2
bf16-state-stochastic  2      4          1214   111     3               2     91    2    2
bf16-all-stochastic    2      4          1250   111     3               2     91    2    2
8-bit                  3      7          1212   112     6               3     92    3    3
fp64-weights           309    564        1702   796     779             253   358   169  169
eager                  309    319        1498   333     326             253   619   169  169
blockwise              2      4          1212   112     3               2     91    2    2
blockwise-clip         5      7          1274   118     6               5     96    5    5
everything             6      9          1381   176     7               6     101   6    6
sharpness              2      4          1212   -       3               -     -     -    -
sharpness-moving       2      4          1212   -       3               -     -     -    -
llr                    2      4          1216   112     3               2     91    2    2
llr-moving             2      4          1216   112     3               2     91    2    2
gradient_snr           2      4          1212   112     3               2     91    2    -
""",
    "gpt2": """
              adamw  adam-mini  lion  sgd
plain         2      7          2     2
clip          5      9          5     5
clip-skip     6      11         6     6
bf16-weights  2      7          2     2
8-bit         3      9          3     3
blockwise     2      7          2     2
everything    6      11         6     6
""",
}
"""Launches of a step by option and optimizer; "-" where these do not combine."""
READS = {"raise": 1}
"""Host reads of a step, by option. All others have none."""
UPLOADS = {"adapm": 14, "adasgd": 3, "muon": 5}
"""Tables written by the host: scalars, and addresses of gradients, twice where matrices take a way of their own, and
scalars once more for what moves by their updates; of AdaPM's for every matrix of low rank; rates by segment. All others
have two."""


def table(model: str) -> dict[tuple[str, str], int | None]:
    head, *rows = [line.split() for line in BOUNDS[model].strip().splitlines()]
    return {
        (name, row[0]): None if cell == "-" else int(cell)
        for row in rows
        for name, cell in zip(head, row[1:], strict=True)
    }


CASES = [(model, *key) for model in BOUNDS for key in table(model)]
MOST = {"adamw": (4, 12), "lion": (4, 12), "sgd": (4, 12), "adam-mini": (8, 12)}
"""What an 8B model may ask for, plain and with everything on."""


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fake_device
    import launches

    if reason := triton_launch.absent():
        pytest.skip(reason)
    try:
        fake_device.provide_guard()
    except fake_device.CannotFake as error:
        pytest.skip(str(error))
    yield launches
    for name in OWN:
        sys.modules.pop(name, None)


@pytest.fixture
def cuda(launches):
    import fake_device

    with fake_device.FakeCuda() as device:
        yield device


@pytest.mark.parametrize(("model", "name", "option"), CASES)
def test_a_step_launches_no_more_than_it_may(launches, model, name, option):
    bound, case = table(model)[name, option], launches.Case(model, name, option)
    if bound is None:
        with pytest.raises(ValueError, match="block_lr"):
            launches.counted(case, 1)
        return
    begin = 2 if option.startswith(("sharpness", "llr")) else 1  # measured in the second step: read there
    steady = 2 if option in ("plain", "everything") else 1
    for counts in launches.counted(case, begin + steady)[begin:]:
        assert counts.launches.total() <= bound, counts.lines.most_common(10)
        assert counts.reads.total() == READS.get(option, 0), counts.reads
        assert not counts.blocking, counts.blocking
        assert not counts.downloads, counts.downloads
        assert counts.uploads.total() <= UPLOADS.get(name, 2), counts.uploads


@pytest.mark.parametrize("name", MOST)
def test_a_large_model_asks_for_no_more(launches, name):
    plain, everything = MOST[name]
    eight = [("8-bit", plain)] if name in ("adamw", "adam-mini") else []
    for option, most in (("plain", plain), *eight, ("everything", everything)):
        counts = launches.counted(launches.Case("llama3-8b", name, option), 3)[-1]
        assert counts.launches.total() <= most, counts.launches
        assert counts.uploads.total() <= 2, counts.uploads
        assert not counts.reads + counts.blocking


@pytest.mark.parametrize("control", ["l2", "angular", "hyperball"])
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adam-mini"])
@pytest.mark.parametrize("model", ["tiny", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_control_launches_two_more(launches, name, control, model, monkeypatch):
    """What sums up, and what bounds; nothing is read back. Adam-mini moves norms by another rule, which has both too,
    and takes the steps of all blocks before: of a small model, where `rows` and `columns` do, it launches more."""
    monkeypatch.setitem(launches.OF_OPTIMIZER, "sgd", {"momentum": 0.9, "decoupled_weight_decay": True})
    monkeypatch.setitem(launches.OPTIONS, "control", {"control": control})
    monkeypatch.setitem(launches.OPTIONS, "all", launches.OPTIONS["everything"] | {"control": control})
    for option, plain, of_blocks in (("control", "plain", 10), ("all", "everything", 14)):
        counts = launches.counted(launches.Case(model, name, option), 3)[-1]
        most = of_blocks if name == "adam-mini" else table(model)[name, plain] + 2
        assert counts.launches.total() <= most, counts.launches
        assert not counts.reads + counts.blocking + counts.downloads
        assert counts.uploads.total() <= 2, counts.uploads


def test_the_snr_factor_reads_nothing_back(launches, monkeypatch):
    monkeypatch.setitem(launches.OPTIONS, "snr", {"control": "angular(snr=True,batch_size=8)"})
    counts = launches.counted(launches.Case("tiny", "lion", "snr"), 3)[-1]
    assert not counts.reads + counts.blocking + counts.downloads


def test_tables_of_a_large_model_are_small(launches):
    """2 MiB and a byte for 1,000 parameters, besides the block state's own."""
    from fake_device import FakeCuda

    from sharpwise.optim import create_optimizer

    with FakeCuda() as cuda:
        model, blocks = cuda.model(launches.MODELS["llama3-8b"])
        optimizer = create_optimizer(
            model, "adam-mini", lr=1e-3, blocks=blocks, max_grad_norm=1.0, on_nonfinite="skip", block_lr="blockwise"
        )
        cuda.step(model, optimizer)
        (tables,) = [own for view in optimizer._stepper.views for own in view.kept.get("tables", [])]
        held = [
            tables.addresses.tensor,
            tables.inputs.tensor,
            tables.scalars,
            tables.rates,
            tables.sum_jobs,
            tables.starts,
            tables.partial,
        ]
        held += [own for own, _ in tables.sum_chunks.values()]
        held += [t for family in tables.families for t in (family.jobs, *(own for own, _ in family.chunks.values()))]
        total = sum(p.numel() for p in model.parameters())
        assert sum(t.numel() * t.element_size() for t in held) <= (2 << 20) + total // 1000


def test_every_combination_has_a_bound(launches):
    for model in BOUNDS:
        assert {c[1:] for c in CASES if c[0] == model} == {tuple(c)[1:] for c in launches.cases(model)}
    assert set(launches.OPTIMIZERS) == set(OPTIMIZERS)
    for name, (block_lrs, _) in COMBINES.items():
        for option in ("sharpness", "llr", "gradient_snr"):
            assert (table("tiny")[name, option] is None) == (option not in block_lrs)


def on_two(path):
    return "cuda:1" if ".h.1." in f".{path}." else "cuda"


ON_TWO = [
    (name, option)
    for name, option in table("tiny")
    if option in ("plain", "clip-skip", "blockwise", "bf16-state-stochastic", "sharpness")
    and table("tiny")[name, option] is not None
]


@pytest.mark.parametrize(("name", "option"), ON_TWO)
def test_parameters_on_two_devices(launches, name, option):
    *_, last = launches.counted(launches.Case("tiny", name, option), 3, place=on_two)
    assert not last.reads, last.reads
    assert not last.blocking, last.blocking


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: x + torch.ones(2),
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch._fused_adamw_(
            *([[x, y]] * 4),
            [],
            [x.sum(), y.sum()],
            lr=0.1,
            beta1=0.9,
            beta2=0.9,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        ),
    ],
)
def test_the_device_refuses_another(cuda, mix):
    """It raises by itself: nothing else would tell that a step mixes two."""
    with pytest.raises(RuntimeError, match="device"):
        mix(torch.ones(2, device="cuda"), torch.ones(2, device="cuda:1"))


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x, c: x + 1, {"launches": 1}),
        (lambda x, c: x.view(2, 2)[1:].T, {}),
        (lambda x, c: x * torch.tensor(2.0), {"launches": 1}),
        (lambda x, c: torch._foreach_add_([x, x], 1.0), {"launches": 1}),
        (lambda x, c: torch._foreach_add_([x, torch.ones_like(x, device="cuda:1")], 1.0), {"launches": 3}),
        (lambda x, c: x.clone(), {"launches": 1}),
        (lambda x, c: x.add_(1).sum().item(), {"launches": 2, "reads": 1}),
        (lambda x, c: bool((x > 0).any()), {"launches": 2, "reads": 1}),
        (lambda x, c: x.tolist(), {"reads": 1}),
        (lambda x, c: x.cpu(), {"reads": 1}),
        (lambda x, c: c.copy_(x), {"reads": 1}),
        (lambda x, c: x.nonzero(), {"launches": 1, "reads": 1}),
        (lambda x, c: x[x > 0], {"launches": 2, "reads": 1}),
        (lambda x, c: torch.equal(x, x), {"reads": 1}),
        (lambda x, c: c.to("cuda"), {"blocking": 1}),
        (lambda x, c: torch.tensor([1.0], device="cuda"), {"blocking": 1}),
        (lambda x, c: x.copy_(c), {"blocking": 1}),
        (lambda x, c: torch._foreach_copy_([x, x], [c, x]), {"launches": 1, "blocking": 1}),
        (lambda x, c: x[torch.tensor([0, 1])], {"launches": 1, "blocking": 1}),
        (lambda x, c: c.to("cuda", non_blocking=True), {"uploads": 1}),
        (lambda x, c: c.pin_memory().to("cuda", non_blocking=True), {"uploads": 1}),
        (lambda x, c: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True), {"downloads": 1}),
        (lambda x, c: torch.ones(4, device="cuda"), {"launches": 1}),
        (lambda x, c: torch.ones(4) + 1, {}),
    ],
)
def test_the_device_counts(cuda, run, expected):
    x, c = torch.ones(4, device="cuda"), torch.ones(4)
    before = cuda.counts = type(cuda.counts)()
    run(x, c)
    kinds = ("launches", "reads", "blocking", "uploads", "downloads")
    assert {kind: n for kind in kinds if (n := getattr(before, kind).total())} == expected


def test_small_tensors_of_the_device_have_values(cuda):
    step = torch.zeros((), device="cuda")
    torch._foreach_add_([step], 1.0)
    table = torch.tensor([1.0, 10.0]).to("cuda")[torch.tensor([1, 0, 1], device="cuda")]
    table[0] += step
    assert table.tolist() == [11.0, 1.0, 10.0]
    assert torch.arange(5, device="cuda").remainder(2).nonzero().view(-1).tolist() == [1, 3]
    assert torch.ones(1 << 30, device="cuda").sum().item() == 1.0  # not known


def test_counts_that_are_on_the_device_go_up(launches):
    """What the host reads back after four steps is what it would be on a device that computes."""
    from fake_device import FakeCuda

    from sharpwise import AdamMini
    from sharpwise.testing import tiny_model

    with FakeCuda() as cuda:
        model, blocks = cuda.model(tiny_model)
        optimizer = AdamMini(model, lr=1e-3, blocks=blocks, block_lr="blockwise")
        for _ in range(4):
            cuda.step(model, optimizer)
        assert {float(own["step"]) for own in optimizer.state_dict()["state"].values()} == {4.0}
        assert len({row["multiplier"] for row in optimizer.lr_multipliers()}) > 2
