"""Constructors are classes: types, signatures, docstrings, copies and what is printed of them."""

import copy
import inspect
import io
import pickle
import pydoc
import typing

import pytest
import torch

import sharpwise
from sharpwise.combinations import COMMON, CommonOptions
from sharpwise.optim import COMBINES, OPTIMIZERS
from sharpwise.storage import Int8
from sharpwise.testing import run, same, tiny_model

every_class = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=lambda kind: kind.__name__)

# None of them is the default.
GIVEN = {
    "model": tiny_model(),
    "blocks": {"*wte*": "tok_emb"},
    "strict": True,
    "block_lr": "blockwise(emb=3)",
    "aux_lr": 2e-4,
    "control": "l2",
    "storage": "int8-linear",
    "keep_fp32": ("norm", "head"),
    "allow_unstable": True,
    "stochastic_rounding": True,
    "seed": 7,
    "no_decay": ("norm", "bias"),
    "cautious_decay": True,
    "max_grad_norm": 0.5,
    "on_nonfinite": "skip",
    "compile": False,
    "total_steps": 90,
    "probe_batches": [torch.zeros(1, 3, dtype=torch.long)],
}


def parameters_of(kind):
    return list(inspect.signature(kind).parameters.values())


# Types


def test_the_table_names_every_constructor_of_the_package():
    public = [getattr(sharpwise, name) for name in sharpwise.__all__]
    classes = {c for c in public if isinstance(c, type) and issubclass(c, sharpwise.BlockOptimizer)}
    assert classes - {sharpwise.BlockOptimizer, sharpwise.Rotated} == set(OPTIMIZERS.values())
    assert set(OPTIMIZERS) == set(COMBINES)


@every_class
def test_an_optimizer_is_of_its_class_alone(kind):
    optimizer = kind(tiny_model())
    for other in OPTIMIZERS.values():
        assert isinstance(optimizer, other) == (kind is other)
    assert isinstance(optimizer, (sharpwise.BlockOptimizer, torch.optim.Optimizer))
    name = next(name for name, constructor in OPTIMIZERS.items() if constructor is kind)
    assert type(sharpwise.create_optimizer(tiny_model(), name)) is kind


@every_class
def test_nothing_but_a_signature_is_its_own(kind):
    @typing.final
    class Empty(sharpwise.BlockOptimizer):
        """Nothing."""

    assert set(vars(kind)) - {"step"} - set(vars(Empty)) == {"__init__"} and kind.__final__
    assert inspect.unwrap(kind.step) is inspect.unwrap(sharpwise.BlockOptimizer.step)  # torch wraps it in each class


@every_class
def test_step_is_wrapped_once(kind):
    """torch wraps the step of a class when its first optimizer is made, of a base perhaps later."""
    model, calls = tiny_model(), []
    optimizer = kind(model)
    sharpwise.BlockOptimizer(tiny_model(), optimizer.rule, lr=1.0, weight_decay=0.0, options=optimizer.options)
    kind(tiny_model())
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    with torch.profiler.profile() as profile:
        run(model, optimizer, range(1))
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.step#")]
    assert calls == ["pre"] and names == [f"Optimizer.step#{kind.__name__}.step"]


# Signatures and docstrings


def test_all_signatures_have_the_same_options():
    first, *others = OPTIMIZERS.values()
    common = [p for p in parameters_of(first) if p.name in COMMON]
    assert tuple(p.name for p in common) == COMMON == tuple(GIVEN)
    for kind in others:
        assert [p for p in parameters_of(kind) if p.name in COMMON] == common, kind.__name__
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in common)
    assert {p.name: p.annotation for p in common} == typing.get_type_hints(CommonOptions)


@every_class
def test_every_signature_begins_alike_and_is_whole(kind):
    own = [p for p in parameters_of(kind) if p.name not in COMMON]
    assert [p.name for p in own[:2]] == ["params", "lr"] and "weight_decay" in [p.name for p in own]
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in own)
    assert all(p.annotation is not p.empty for p in own)
    assert parameters_of(kind)[-len(COMMON) :] == [p for p in parameters_of(kind) if p.name in COMMON]
    typing.get_type_hints(kind.__init__)


@every_class
def test_the_docstring_has_a_line_for_every_option(kind):
    _, _, arguments = inspect.getdoc(kind).partition("Args:\n")
    lines = arguments.partition("\n\n")[0].splitlines()
    described = [line.strip().partition(": ") for line in lines]
    assert [name for name, _, _ in described] == [p.name for p in parameters_of(kind)]
    assert all(len(text) > 10 and text.endswith(".") for _, _, text in described)


def test_common_options_are_described_alike():
    def lines(kind):
        return [line for line in kind.__doc__.splitlines() if line.strip().partition(": ")[0] in ("params", *COMMON)]

    first, *others = OPTIMIZERS.values()
    assert len(lines(first)) == len(COMMON) + 1
    for kind in others:
        assert lines(kind) == lines(first), kind.__name__


@every_class
def test_help_shows_every_option_with_its_default(kind):
    text = pydoc.render_doc(kind, renderer=pydoc.plaintext).replace("\n", " ")
    signature, _, rest = text.partition("->")
    for p in parameters_of(kind):
        assert f" {p.name}: " in rest or f"| {p.name}: " in rest, p.name
        default = "" if p.default is p.empty else f" = {p.default!r}"
        assert default in signature.partition(f"{p.name}: ")[2], p.name


# Options that arrive


@every_class
def test_every_option_reaches_the_engine(kind):
    model = GIVEN["model"]
    decoupled = {"decoupled_weight_decay": True} if kind is sharpwise.SGD else {}
    optimizer = kind(list(model.named_parameters()), **GIVEN, **decoupled)
    options = optimizer.options
    assert options.cautious and not kind(model).options.cautious
    for key in ("stochastic_rounding", "seed", "max_grad_norm", "on_nonfinite", "compile", "total_steps"):
        assert getattr(options, key) == GIVEN[key] != getattr(kind(model).options, key), key
    assert options.probe_batches is GIVEN["probe_batches"] and kind(model).options.probe_batches is None
    assert "blockwise(emb=3)" in str(options.block_lr)
    assert (options.storage.format, options.storage.keep_fp32) == (Int8("linear"), ("head", "norm"))
    assert optimizer.strict and optimizer.no_decay == {"norm", "bias"}
    assert optimizer._model() is model and optimizer.blocks["transformer.wte.weight"][0].source == "override"


def test_options_of_their_own_reach_the_rule():
    model = tiny_model()
    mini = sharpwise.AdamMini(model, 2.0, (0.5, 0.6), 0.1, 0.2, v_by="tensor", cut="element")
    assert (mini.rule.betas, mini.rule.eps, mini.rule.v_by, mini.rule.cut) == ((0.5, 0.6), 0.1, "tensor", "element")
    adamw, lion = sharpwise.AdamW(model, 2.0, (0.5, 0.6), 0.1, 0.2), sharpwise.Lion(model, 2.0, (0.5, 0.6), 0.2)
    assert (adamw.rule.betas, adamw.rule.eps, lion.rule.betas) == ((0.5, 0.6), 0.1, (0.5, 0.6))
    sgd = sharpwise.SGD(model, 2.0, 0.5, 0.3, 0.2, False, decoupled_weight_decay=True)
    assert (sgd.rule.momentum, sgd.rule.dampening, sgd.rule.nesterov) == (0.5, 0.3, False) and sgd.options.decoupled
    assert sharpwise.SGD(model, momentum=0.5, nesterov=True).rule.nesterov
    assert not sharpwise.SGD(model).options.decoupled
    sai = sharpwise.SGDSaI(model, 2.0, 0.5, 0.2, normalize="max")
    assert (sai.rule.momentum, sai.options.block_lr.normalize, sai.options.decoupled) == (0.5, "max", True)
    for optimizer in (mini, adamw, lion, sgd, sai):
        assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (2.0, 0.2)


# Options that are refused


@every_class
@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (
            {"weigth_decay": 1},
            TypeError,
            r"no option is called weigth_decay \(did you mean 'weight_decay'\?\); options",
        ),
        ({"fused": True}, TypeError, "no option is called fused; fused: leave out, the fastest kernel is chosen"),
        ({"foreach": 1, "beta": 1}, TypeError, "called beta.*, foreach; foreach: leave out"),
        ({"storage": "fp8"}, ValueError, "no storage is called 'fp8'.*; there are bf16, fp32"),
        ({"block_lr": "blokwise"}, ValueError, "no block_lr is called 'blokwise'"),
        ({"seed": 1.5}, TypeError, "seed must be a whole number, got 1.5"),
        ({"strict": 1}, TypeError, "strict must be True or False, got 1"),
        ({"no_decay": ("norms",)}, ValueError, "norms"),
        ({"total_steps": 0}, ValueError, "total_steps must be a whole number >= 1"),
        ({"probe_batches": []}, ValueError, "probe_batches is empty"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"lr": -1.0}, ValueError, "lr must be a finite number >= 0, got -1.0"),
    ],
    ids=lambda value: "" if isinstance(value, (str, type)) else ",".join(value),
)
def test_messages_name_the_constructor(kind, given, error, says):
    with pytest.raises(error, match=f"^{kind.__name__}: .*{says}"):
        kind(list(tiny_model().named_parameters()), **given)


@every_class
def test_unknown_options_are_answered_with_all_there_are(kind):
    with pytest.raises(TypeError) as caught:
        kind(tiny_model(), nothing=1)
    known = ", ".join(p.name for p in parameters_of(kind)[1:])
    assert str(caught.value) == f"{kind.__name__}: no option is called nothing; options are {known}"


def test_a_subclass_of_the_engine_with_options_of_its_own_is_left_alone():
    class Own(sharpwise.BlockOptimizer):
        def __init__(self, first, **options):
            self.given = options
            like = sharpwise.AdamW(first)
            super().__init__(first, like.rule, lr=1e-3, weight_decay=0.0, options=like.options)

    assert Own(tiny_model(), anything=1).given == {"anything": 1}
    with pytest.raises(TypeError, match=r"^BlockOptimizer: no option is called ruel \(did you mean 'rule'\?\)"):
        sharpwise.BlockOptimizer(tiny_model(), ruel=1)


# Copies


def through_torch(it):
    file = io.BytesIO()
    torch.save(it, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": through_torch,
    **{f"pickle {p}": lambda it, p=p: pickle.loads(pickle.dumps(it, p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)},
}


@every_class
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_in_the_middle_of_a_run_goes_on_bit_for_bit(kind, way):
    options = {"max_grad_norm": 0.7, "block_lr": "layer_decay(rate=0.9)", "no_decay": ("norm",), "seed": 3}
    model = tiny_model(torch.bfloat16)
    parameters = list(model.named_parameters())
    groups = [{"params": parameters[:3], "lr": 3e-2}, {"params": parameters[3:], "weight_decay": 0.2}]
    optimizer = kind(groups, lr=1e-2, model=model, stochastic_rounding=True, on_nonfinite="skip", **options)
    run(model, optimizer, range(2))
    twin, other = COPIES[way]((model, optimizer))
    assert type(other) is kind and other.who == kind.__name__
    assert (other.rule, other.options) == (optimizer.rule, optimizer.options)
    assert other.options.probe is optimizer.options.probe is not None
    assert (other.no_decay, other.strict) == (optimizer.no_decay, optimizer.strict) and other.blocks == optimizer.blocks
    assert str(other) == str(optimizer)
    run(model, optimizer, range(2, 5))
    assert not same(model, twin)  # nothing is shared
    run(twin, other, range(2, 5))
    assert same(model, twin)
    for one, its in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(one[key], its[key]) for key in one) and one.keys() == its.keys()


# What is printed


@every_class
def test_repr_names_the_optimizer_and_its_groups_and_no_parameter(kind):
    model = tiny_model()
    parameters = list(model.named_parameters())
    groups = [{"params": parameters[:1], "lr": 0.25}, {"params": parameters[1:]}, {"params": []}]
    text = repr(kind(groups, model=model))
    assert text.startswith(f"{kind.__name__} (\nParameter Group 0\n    ") and text.endswith("\n)")
    assert not any(name in text for name, _ in parameters) and "param_names" not in text
    counts = [len(parameters[0][1].flatten()), sum(p.numel() for _, p in parameters[1:])]
    for number, count, of in zip((1, len(parameters) - 1, 0), (*counts, 0), range(3), strict=True):
        group = text.partition(f"Parameter Group {of}\n")[2].partition("Parameter Group")[0]
        assert f"    params: {number}, of {count:,} elements\n" in group
        assert f"    lr: {0.25 if of == 0 else inspect.signature(kind).parameters['lr'].default}\n" in group


def test_repr_has_the_form_of_torchs():
    model = tiny_model()
    ours = repr(sharpwise.AdamW(model)).splitlines()
    theirs = repr(torch.optim.AdamW(model.parameters())).splitlines()
    assert ours[:2] == theirs[:2] and ours[-1] == theirs[-1]
    shared = ("betas", "decoupled_weight_decay", "eps", "lr", "weight_decay")
    assert [line for line in ours if line.strip().startswith(shared)] == [
        line for line in theirs if line.strip().startswith(shared)
    ]
