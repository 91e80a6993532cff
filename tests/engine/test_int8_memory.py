"""Bytes of state of whole models on the meta device, in 32 bits and in 8: the published ones (arXiv 2509.23106)."""

from functools import cache

import pytest
import torch

import sharpwise

MI, GI = 2**20, 2**30
# Elements; bytes of Muon in fp32, of its momentum in int8 and AdamW in fp32, of both halves in 8 bits; what the second
# saves. Embeddings weigh less in larger models.
PUBLISHED = {
    "gpt2-124m": (124_439_808, 625.4 * MI, 384 * MI, 160 * MI, 0.39),
    "gpt2-1.5b": (1_557_611_200, 6.112 * GI, 2.0 * GI, 1.56 * GI, 0.67),
    "llama-7b": (6_738_415_616, 26.08 * GI, 8.1 * GI, 6.6 * GI, 0.69),
}


@cache
def model_of(name):
    import transformers

    with torch.device("meta"):
        if name == "llama-7b":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig())  # whose defaults are the 7B
        wide = {"n_layer": 48, "n_embd": 1600, "n_head": 25} if name == "gpt2-1.5b" else {}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**wide))


@cache
def blocks_of(name):
    return sharpwise.BlockMap.of(model_of(name))


@cache
def state_bytes(name, optimizer, **options):
    """Of all tensors but the counters."""
    built = getattr(sharpwise, optimizer)(model_of(name), blocks=blocks_of(name), **options)
    built.init_state()
    kept = [t for own in built.state.values() for key, t in own.items() if key != "step"]
    assert kept and all(t.device.type == "meta" for t in kept)
    return sum(t.numel() * t.element_size() for t in kept)


def published(bytes_):
    """To the digits that there are; a row that blocks of 256 do not fit has a scale more."""
    return pytest.approx(bytes_, rel=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_in_fp32(name):
    elements, muon, *_ = PUBLISHED[name]
    assert state_bytes(name, "AdamW") == 8 * elements
    assert state_bytes(name, "Muon") == pytest.approx(muon, rel=1e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_muon_with_its_adamw_half_in_fp32(name):
    _, _, eight, _, saved = PUBLISHED[name]
    found = state_bytes(name, "Muon8bit")
    assert found == published(eight)
    assert 1 - found / state_bytes(name, "Muon") == pytest.approx(saved, abs=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_muon_with_both_halves_in_8_bits(name):
    found = state_bytes(name, "Muon8bit", aux_storage="int8-dynamic")
    assert found == published(PUBLISHED[name][3])
    assert 0.74 <= 1 - found / state_bytes(name, "Muon") <= 0.75


@pytest.mark.parametrize("name", PUBLISHED)
def test_adamw(name):
    """25.5%: a quarter, a scale of four bytes to 256 codes, and what is 1-D in fp32."""
    found = state_bytes(name, "AdamW8bit", keep_fp32=())
    assert 0.25 * (1 + 4 / 256) <= found / state_bytes(name, "AdamW") <= 0.255


@pytest.mark.parametrize("name", PUBLISHED)
def test_adamw_that_keeps_embeddings(name):
    """Embeddings, positions and head, tied or not, weigh what they weigh in fp32."""
    kept = {"tok_emb", "pos_emb", "head"}
    names = {s.name for s in blocks_of(name).segments if str(s.role) in kept}
    elements = sum(p.numel() for n, p in model_of(name).named_parameters() if n in names)
    assert elements > 0
    more = state_bytes(name, "AdamW8bit") - state_bytes(name, "AdamW8bit", keep_fp32=())
    assert more == pytest.approx(8 * elements * (1 - 0.254), rel=1e-3)
