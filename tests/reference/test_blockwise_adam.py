"""BlockwiseAdam and AdaSGD against the equations, over literal index sets; and what they are at their limits."""

import copy

import pytest
import torch

import sharpwise
from reference import blockwise_adam, driver, models, rig

HYPER = {"lr": 3e-3, "betas": (0.83, 0.961), "eps": 1e-4, "weight_decay": 0.23}
CUTS = ("element", "tensor", "layer", "role", "model")


def against(optimizer, model_name, named, cut, steps=9, max_norm=None, hyper=HYPER):
    """Every parameter and second moment, at every step; returns the reference."""
    names = driver.names_of(named)
    twin = blockwise_adam.Model(
        {name: driver.as_array(p) for name, p in named}, blockwise_adam.partition(model_name, names, cut)
    )
    for t, recorded in enumerate(driver.gradients(named, steps)):
        lr = driver.schedule(hyper["lr"], t)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in named:
            p.grad = recorded[name]
        optimizer.step()
        clipped = driver.clipped(recorded, max_norm) if max_norm else recorded
        arrays = {name: None if g is None else driver.as_array(g) for name, g in clipped.items()}
        twin.step(arrays, **{**hyper, "lr": lr})
        for name, p in named:
            want = twin.p[name]
            tolerance = driver.TOLERANCE.get(p.dtype)
            if tolerance is None:
                assert driver.bf16_ulps(p, want) <= 1, (name, t)
                twin.p[name] = driver.as_array(p)
            else:
                assert driver.error(p, want) <= tolerance, (name, t)
            v, parts = optimizer.state[p]["exp_avg_sq"].reshape(-1), twin.partition[name]
            own = twin.v[name][[index[0] for index, _ in parts]]
            if cut == "element" or (v.numel() == p.numel() != len(parts)):
                own = twin.v[name]
            assert driver.error(v, own) <= max(tolerance or 0, 1e-6), (name, t)
    return twin


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model_name", ["gpt2", "llama"])
def test_every_cut(model_name, cut, compiled):
    model = models.build(model_name)
    optimizer = sharpwise.BlockwiseAdam(model, cut=cut, compile=compiled, **HYPER)
    against(optimizer, model_name, list(model.named_parameters()), cut)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cut", ["layer", "model"])
def test_other_types(cut, dtype):
    model = models.build("nanogpt", dtype)
    optimizer = sharpwise.BlockwiseAdam(model, cut=cut, **HYPER)
    against(optimizer, "nanogpt", list(model.named_parameters()), cut)


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
def test_adasgd_clipped(compiled):
    model = models.build("nanogpt")
    optimizer = sharpwise.AdaSGD(model, max_grad_norm=250.0, compile=compiled, **HYPER)
    against(optimizer, "nanogpt", list(model.named_parameters()), "model", max_norm=250.0)


def test_a_block_spans_groups():
    """The model is one block, whatever the groups; each has its own rate and decay."""
    model, twin = models.build("nanogpt"), models.build("nanogpt")
    named = list(model.named_parameters())
    matrices, vectors = driver.split_groups(named)
    tensors = dict(named)
    groups = [{"params": [tensors[n] for n in own]} for own in (matrices, vectors)]
    rig.steps(sharpwise.AdaSGD(groups, model=model, **HYPER), named, driver.gradients(named, 4))
    rig.steps(sharpwise.AdaSGD(twin, **HYPER), rig.named(twin), driver.gradients(named, 4))
    rig.near(model, twin)


def test_by_row():
    """Rows of a Linear, columns of a Conv1D; elements of a bias."""
    linear, conv = torch.nn.Linear(4, 6), models.build("gpt2")
    for model, name, others in ((linear, "weight", 1), (conv, "transformer.h.0.mlp.c_fc.weight", 0)):
        optimizer = sharpwise.BlockwiseAdam(model, cut="row")
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
        weight = model.get_parameter(name)
        want = 0.001 * driver.as_array(weight.grad.double().square().mean(others))
        assert driver.error(optimizer.state[weight]["exp_avg_sq"], want) <= 1e-6
    assert optimizer.state[conv.get_parameter("transformer.ln_f.bias")]["exp_avg_sq"].numel() > 1


# -- identities --------------------------------------------------------------------------------------------------------


def pair(make_first, make_second, n=12):
    first, second, *_ = rig.both(make_first, make_second, build=lambda: models.build("nanogpt"), n=n)
    return first, second


def test_by_element_is_adamw_to_the_bit():
    rig.bit_equal(
        *pair(
            lambda m: sharpwise.BlockwiseAdam(m, cut="element", compile=False, **HYPER),
            lambda m: sharpwise.AdamW(m, compile=False, **HYPER),
        )
    )


def test_by_tensor_is_adam_mini_by_tensor_to_the_bit():
    rig.bit_equal(
        *pair(
            lambda m: sharpwise.BlockwiseAdam(m, cut="tensor", compile=False, **HYPER),
            lambda m: sharpwise.AdamMini(m, cut="tensor", compile=False, **HYPER),
        )
    )


def test_by_model_is_adasgd_to_the_bit():
    rig.bit_equal(
        *pair(
            lambda m: sharpwise.BlockwiseAdam(m, cut="model", compile=False, **HYPER),
            lambda m: sharpwise.AdaSGD(m, compile=False, **HYPER),
        )
    )


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_by_head_is_adam_mini_but_for_v(model_name):
    """q, k and all else to the bit; v has a second moment per head, the mean of those of its rows."""
    one, two = models.build(model_name), models.build(model_name)
    grads = driver.gradients(rig.named(one), 5)
    blockwise = sharpwise.BlockwiseAdam(one, cut="head", compile=False, **HYPER)
    mini = sharpwise.AdamMini(two, compile=False, **HYPER)
    rig.steps(blockwise, rig.named(one), grads)
    rig.steps(mini, rig.named(two), grads)
    met = 0
    for (name, p), (_, q) in zip(rig.named(one), rig.named(two), strict=True):
        segments = blockwise.blocks[name]
        v, w = blockwise.state[p]["exp_avg_sq"], mini.state[q]["exp_avg_sq"]
        if not any(s.role == "v" and s.is_matrix for s in segments):
            assert torch.equal(p, q) and torch.equal(v, w), name
            continue
        met += 1
        begin = [0, 0]
        for s in segments:
            sizes = s.heads, (s.rows if s.role == "v" else s.heads)
            ours, theirs = v[begin[0] :][: sizes[0]], w[begin[1] :][: sizes[1]]
            begin = [begin[0] + sizes[0], begin[1] + sizes[1]]
            assert driver.error(ours, driver.as_array(theirs).reshape(s.heads, -1).mean(1)) <= 1e-6, name
    assert met == 2


@pytest.mark.parametrize("cut", ["row", "tensor", "role", "model"])
def test_a_state_dict_goes_on_and_is_for_one_cut(cut):
    model, twin = models.build("llama"), models.build("llama")
    grads = driver.gradients(rig.named(model), 6)
    optimizer = sharpwise.BlockwiseAdam(model, cut=cut, compile=False)
    rig.steps(optimizer, rig.named(model), grads[:3])
    twin.load_state_dict(model.state_dict())
    resumed = sharpwise.BlockwiseAdam(twin, cut=cut, compile=False)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, its in ((optimizer, model), (resumed, twin)):
        rig.steps(own, rig.named(its), grads[3:])
    rig.bit_equal(model, twin)
    other = "layer" if cut == "model" else "model"
    with pytest.raises(ValueError, match=f"saved with cut '{cut}', here it is '{other}'"):
        sharpwise.BlockwiseAdam(models.build("llama"), cut=other).load_state_dict(optimizer.state_dict())


# -- what a map cannot serve -------------------------------------------------------------------------------------------


def mlp():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


@pytest.mark.parametrize("cut", ["head", "layer", "role"])
def test_roles_are_needed(cut):
    with pytest.raises((ValueError, TypeError), match=r"distinguishes roles.*(take|cut)"):
        sharpwise.BlockwiseAdam(mlp(), cut=cut)


def test_layers_are_needed():
    with pytest.raises(ValueError, match="cut='layer': no layers were found"):
        sharpwise.BlockwiseAdam(mlp(), cut="layer", blocks={"*": "up"})


@pytest.mark.parametrize("cut", ["element", "row", "tensor", "model"])
def test_nothing_is_needed(cut):
    model = mlp()
    optimizer = sharpwise.BlockwiseAdam(model, cut=cut)
    model(torch.ones(3, 4)).sum().backward()
    before = copy.deepcopy(model)
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"cut must be one of element, row, .*, got 'rows'"):
        sharpwise.BlockwiseAdam(mlp(), cut="rows")
    with pytest.raises(ValueError, match="many share one; take source='probe'"):
        sharpwise.BlockwiseAdam(models.build("llama"), cut="model", block_lr="sharpness", total_steps=10)
    optimizer = sharpwise.BlockwiseAdam(mlp(), cut="row")
    optimizer.param_groups[0]["cut"] = "tensor"
    with pytest.raises(ValueError, match="cut is fixed when the optimizer is built"):
        optimizer.step()
