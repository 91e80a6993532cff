"""The Triton kernels compiled for GPUs, without one: registers, spills, and how wide they load and store."""

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch
from pairwise import pairwise

from sharpwise.controls import L2, Angular, Hyperball
from sharpwise.engine.backends import triton, triton_launch, triton_print
from sharpwise.engine.backends.triton_print import FIELDS, Formats
from sharpwise.rules import SGD, AdamMini, AdamW, Lion
from sharpwise.storage import FP32, Dense, Int8

pytestmark = [
    pytest.mark.skipif(bool(triton_launch.absent()), reason=triton_launch.absent() or "triton is here"),
    pytest.mark.skipif(triton_launch.interpreted(), reason="kernels are interpreted"),
]

MOST = {True: 128, False: 160}
"""Registers, by whether addresses are aligned."""
THREADS = 32 * triton_launch.WARPS
POINTERS = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
}
F, B = torch.float32, torch.bfloat16
RULES = {"adamw": AdamW(), "lion": Lion(), "sgd": SGD(momentum=0.9), "adam-mini": AdamMini()}
FORMATS = {
    "fp32": (F, F, F, False),
    "bf16 gradient": (F, B, F, False),
    "bf16 state": (F, F, B, True),
    "bf16 weight": (B, B, F, True),
    "bf16": (B, B, B, True),
    "bf16 nearest": (B, B, B, False),
}
DECAYS = {"plain": (False, False), "coupled": (True, False), "cautious": (False, True)}
KEYS = [("tiles", False), ("tiles", True), ("rows", False), ("rows", True), ("columns",), "phase"]
EVERY = [
    (rule, formats, decay, key if key == "phase" else (*key, aligned), arch)
    for rule, formats, decay, key, aligned, arch in itertools.product(
        RULES, FORMATS, DECAYS, KEYS, (True, False), (80, 90)
    )
    if (rule == "adam-mini" or key == ("tiles", False)) and not (key == "phase" and not aligned)
    and (rule, key) != ("adam-mini", ("tiles", False))
]  # fmt: skip


def compiled(kernel, arguments, constants, arch, folder):
    """Its resources and its PTX."""
    from triton import compile as compile_
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, options = kernel.arg_names, {"num_warps": triton_launch.WARPS, "enable_fp_fusion": False}
    options |= {name: constants.pop(name) for name in set(constants) - set(names)}
    signature = {n: POINTERS[t] for n, t in zip(names, arguments, strict=False)} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
    found = compile_(source, target=GPUTarget("cuda", arch, 32), options=options)
    file = folder / "kernel.cubin"
    file.write_bytes(found.asm["cubin"])
    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    assert numbers, said
    return [int(n) for n in numbers.groups()], found.asm["ptx"]


def wide(ptx, what, words=4):
    """How many loads or stores of so many words of 32 bits there are."""
    return len(re.findall(rf"{what}\.global[^;]*\.v{words}\.b32", ptx))


def check(name, formats, decay, key, arch, folder):
    rule = RULES[name]
    param, grad, state, stochastic = FORMATS[formats]
    elements = [n for n, kind in rule.state.items() if kind == "element"]
    blocks = [n for n, kind in rule.state.items() if kind == "block"]
    state_ = (Dense.of(state),) * len(elements)
    own = Formats(Dense.of(param), Dense.of(grad), state_, (FP32,) * len(blocks), stochastic)
    kernel, constants = triton.kernel_and_constants(key, own.granule)
    module = triton_print.module(triton_print.kernels(rule, own, *DECAYS[decay]).text)
    found, ptx = compiled(getattr(module, kernel), triton.ARGUMENTS[kernel], constants, arch, folder)
    registers, stack, local = found
    aligned = key[-1] if key != "phase" else True
    assert (stack, local) == (0, 0), "it spills"
    assert registers <= MOST[aligned], registers
    if blocks and kernel != "tiles":  # every thread reads block state, one writes it
        store = ptx.index("st.global")
        assert "bar.sync" in ptx[ptx.rindex("ld.global", 0, store) : store]
    if key == "phase" or not aligned:
        return
    tile = {"tiles": constants.get("BLOCK"), "rows": constants.get("PER", 1) * constants.get("BLOCK", 1)}
    each = tile.get(kernel, constants.get("BR", 1) * constants.get("BC", 1)) // THREADS
    stored = [param, *[state] * len(elements)]
    loaded = [*stored, grad] + [grad] * (kernel != "tiles")  # twice: summed up, then used
    assert wide(ptx, "st") == sum(each * t.itemsize for t in stored) // 16
    assert wide(ptx, "ld") == sum(each * t.itemsize for t in loaded) // 16


INT8 = [
    *(("adamw", "fp32", code, 256, True, arch) for code in ("linear", "dynamic") for arch in (80, 90)),
    ("adamw", "fp32", "dynamic", 2048, True, 90),
    ("adamw", "bf16", "dynamic", 2048, False, 90),
    ("adamw", "bf16", "dynamic", 256, False, 80),
    ("adam-mini", "bf16", "dynamic", 256, True, 80),
    ("lion", "bf16 gradient", "linear", 64, True, 90),
]
"""Kernels of 8-bit state: rule, formats of the rest, code, block, aligned, architecture."""


@pytest.mark.parametrize("case", INT8, ids=str)
def test_8_bit_state_compiles(case, tmp_path):
    name, formats, code, block, aligned, arch = case
    rule = RULES[name]
    param, grad, _, stochastic = FORMATS[formats]
    elements = [n for n, kind in rule.state.items() if kind == "element"]
    blocks = [n for n, kind in rule.state.items() if kind == "block"]
    state = tuple(Int8(code, block, unsigned=n == rule.second_moment) for n in elements)
    own = Formats(Dense.of(param), Dense.of(grad), state, (FP32,) * len(blocks), stochastic)
    kernel, constants = triton.kernel_and_constants(("lines", name == "adam-mini", block, aligned), own.granule)
    module = triton_print.module(triton_print.kernels(rule, own, False).text)
    threads = 32 * constants["num_warps"]
    (registers, *spilled), ptx = compiled(
        getattr(module, kernel), triton.ARGUMENTS[kernel], dict(constants), arch, tmp_path
    )
    assert spilled == [0, 0], "it spills"
    assert registers <= MOST[aligned], registers
    store = ptx.index("st.global")
    assert "bar.sync" in ptx[ptx.rindex("ld.global", 0, store) : store]  # all have read what one of them writes
    if not aligned:
        return
    each = constants["BLOCK"] // threads
    assert each == 8
    for what, dense in (("st", [param]), ("ld", [param, grad])):
        assert wide(ptx, what) == sum(each * t.itemsize for t in dense) // 16
        assert wide(ptx, what, 2) == len(elements)  # 8 codes in one


@pytest.mark.parametrize("case", pairwise(EVERY), ids=str)
def test_pairs_compile(case, tmp_path):
    check(*case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_everything_compiles(case, tmp_path):
    check(*case, tmp_path)


CONTROLS = {"l2": L2(), "hyperball": Hyperball(), "angular": Angular(), "snr": Angular(snr=True, batch_size=8)}
BOUNDED = ("tiles", True), ("tiles", False), ("aim", True), ("aim", False), ("bound", True)


@pytest.mark.pairwise
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("key", BOUNDED, ids=str)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("name", RULES)
def test_what_a_control_adds_compiles(name, formats, control, key, arch, tmp_path):
    rule, (kernel, aligned), (param, grad, state, stochastic) = RULES[name], key, FORMATS[formats]
    kinds = {kind: [n for n, own in rule.state.items() if own == kind] for kind in ("element", "block")}
    states = (Dense.of(state),) * len(kinds["element"]), (FP32,) * len(kinds["block"])
    own = Formats(Dense.of(param), Dense.of(grad), *states, stochastic)
    text = triton_print.kernels(rule, own, False, control=CONTROLS[control]).text
    by = kernel == "tiles" or bool(kinds["block"])
    _, constants = triton.kernel_and_constants((kernel, by, *([aligned] if kernel != "bound" else [])), own.granule)
    function = getattr(triton_print.module(text), kernel)
    (registers, *spilled), ptx = compiled(function, triton.ARGUMENTS[kernel], constants, arch, tmp_path)
    assert spilled == [0, 0], "it spills"
    assert registers <= MOST[aligned], registers
    if kernel == "aim" and aligned:
        loaded = [param, grad, *[state] * len(kinds["element"])]
        for words, dtype in ((4, F), (2, B)):  # 4 elements of a thread in one
            assert wide(ptx, "ld", words) == loaded.count(dtype)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("grad", [F, B], ids=str)
def test_sums_compile(grad, aligned, arch, tmp_path):
    kernel, constants = triton.kernel_and_constants((grad, aligned), 16 // grad.itemsize)
    function = triton_print.module(triton_print.squares(grad, len(FIELDS))).squares
    (registers, *spilled), ptx = compiled(function, triton.ARGUMENTS[kernel], constants, arch, tmp_path)
    assert registers <= MOST[aligned]
    assert spilled == [0, 0]
    assert wide(ptx, "ld") == (constants["BLOCK"] // THREADS * grad.itemsize // 16 if aligned else 0)


@pytest.mark.parametrize("name", RULES)
def test_scalars_and_guard_compile(name, tmp_path):
    rule = RULES[name]
    names = [n for n in rule.scalars(1, rule.defaults) if n != "bias_correction"]
    text = triton_print.scalars(rule, rule.defaults, [*names, *triton_print.OURS], coupled=False).text
    types = (torch.float64, torch.int64, torch.float32)
    found, _ = compiled(triton_print.module(text).scalars_of_step, types, {}, 90, tmp_path)
    assert found[1:] == [0, 0]
    types = (*(torch.float64,) * 3, torch.uint8, torch.float32, torch.int64)
    for clips, skips in ((True, False), (False, True), (True, True)):
        function = triton_print.module(triton_print.guard()).guard
        found, _ = compiled(function, types, {"CLIPS": clips, "SKIPS": skips}, 90, tmp_path)
        assert found[1:] == [0, 0]
