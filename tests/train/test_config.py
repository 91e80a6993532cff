"""Configurations: what is said, what is meant, what is written down, and what a run refuses to go on with."""

import pytest

from sharpwise.train.config import Config, OptimizerConfig, check
from sharpwise.train.config_file import as_given, differences, make_config, read_given, set_keys, taking_over, to_toml


def make(*assignments: str) -> Config:
    return make_config(set_keys({}, assignments))


def test_nothing_said_is_a_whole_run() -> None:
    config = make()
    assert config.optimizer.name == "adamw"
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.options["betas"] == [0.9, 0.999]  # of the constructor, written down


def test_written_down_and_read_back_it_is_the_same(tmp_path) -> None:
    config = make(
        "optimizer.name=adam-mini",
        'optimizer.block_lr={name = "blockwise", emb = 5.0, floor = 1e-5}',
        "optimizer.betas=[0.9, 0.95]",
        "optimizer.v_by=tensor",
        "optimizer.cautious_decay=true",
        "model.settings.n_layer=3",
        "schedule.tokens=1_000_000",
        "seed=7",
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    again = make_config(read_given(path))
    assert again == config
    assert make_config(as_given(config)) == config
    assert again.optimizer.block_lr == "blockwise(emb=5, floor=1e-5)"
    assert (again.optimizer.options["v_by"], again.optimizer.options["cautious_decay"]) == ("tensor", True)


@pytest.mark.parametrize(
    "assignments",
    [
        ["optimizer.name=adamw+shuffled(blockwise(emb=5), seed=2)"],
        ["optimizer.name=adamw + shuffled( blockwise(emb=5.0), seed=2 )"],
        ["optimizer.block_lr=shuffled(blockwise(emb=5), seed=2)"],
        ['optimizer.block_lr={name = "shuffled", of = "blockwise(emb=5)", seed = 2}'],
        ['optimizer.block_lr={name = "shuffled", of = {name = "blockwise", emb = 5}, seed = 2}'],
        ["optimizer.name=adamw+shuffled(blockwise(emb=5), seed=2)", "optimizer.block_lr="],
        [
            "optimizer.name=adamw+shuffled(blockwise(emb=5), seed=2)",
            "optimizer.block_lr=shuffled(blockwise(emb=5),seed=2)",
        ],
    ],
)
def test_an_arm_is_one_spelling_however_it_is_given(assignments) -> None:
    config = make(*assignments)
    assert (config.optimizer.name, config.optimizer.block_lr) == ("adamw", "shuffled(blockwise(emb=5), seed=2)")
    assert make_config(as_given(config)) == config
    assert differences(config, make("optimizer.name=adamw+shuffled(blockwise(emb=5),seed=2)")) == []


def test_two_different_block_lrs_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"optimizer\.name: two different block_lrs are given: blockwise in 'adamw\+bl"
    ):
        make("optimizer.name=adamw+blockwise", "optimizer.block_lr=layer_decay")


def test_a_configuration_made_by_hand_is_checked_too() -> None:
    check(Config(optimizer=OptimizerConfig(block_lr={"name": "blockwise"})))
    with pytest.raises(ValueError, match=r"optimizer\.block_lr: no block_lr is called 'x'"):
        check(Config(optimizer=OptimizerConfig(block_lr="x")))


def test_later_assignments_win_over_the_file_and_it_stays_as_it_is() -> None:
    given = {"optimizer": {"lr": 1.0}}
    assert set_keys(given, ["optimizer.lr=2", "optimizer.lr=3"]) == {"optimizer": {"lr": 3}}
    assert given == {"optimizer": {"lr": 1.0}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("runs/x", "runs/x"),
        ('"4"', "4"),
        ("", ""),
        ("a=b", "a=b"),
    ],
)
def test_values_are_toml_and_what_is_none_is_text(text, value) -> None:
    assert set_keys({}, [f"model.name={text}"]) == {"model": {"name": value}}


@pytest.mark.parametrize(
    ("said", "tokens"), [("8M", 8_000_000), ("2.5k", 2500), ("1b", 1_000_000_000), ("1_500", 1500)]
)
def test_whole_numbers_are_read_as_the_budget_of_a_comparison_is(said: str, tokens: int) -> None:
    assert make_config(set_keys({}, [f"schedule.tokens={said}"])).schedule.tokens == tokens


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "optimizer.nam=lion",
            r"adamw has no such setting \(did you mean 'name'\?\); there are allow_unstable, aux_lr, betas",
        ),
        ("optimizer.betaz=[1]", r"did you mean 'betas'"),
        ("optimizer.model=x", r"optimizer\.model: adamw has no such setting"),
        ("arms=['adamw', 'lion']", r"called 'arms'; .*; a file with arms is a study, for sharpwise compare$"),
        ("optimizer.name=adamww", r"no optimizer is called 'adamww' \(did you mean 'adamw'\?\)"),
        ("optimizer.name=3", r"no optimizer is called 3"),
        ("optimizer.block_lr=blockwize", r"no block_lr is called 'blockwize' \(did you mean 'blockwise'\?\)"),
        ("optimizer.block_lr={emb = 3}", r"optimizer\.block_lr: a block_lr as a table needs a name"),
        ("optimizer.block_lr=3", r"optimizer\.block_lr: expected text or a table, got 3"),
        (
            "optimizer.block_lr=blockwise(embb=3)",
            r"block_lr: blockwise has no argument 'embb' \(did you mean 'emb'\?\)",
        ),
        ("optimizer.block_lr=blockwise(emb=-3)", r"optimizer\.block_lr: blockwise: emb must be a finite number > 0"),
        ("optimizer.block_lr=only(blockwise, types=emb)", r"optimizer\.block_lr: only: types takes .*, got 'emb'"),
        ('optimizer.block_lr={name = "reversed", of = 3}', r"optimizer\.block_lr: block_lr must be a name, .*, got 3"),
        ("optimizer.name=adamw+blockwize", r"optimizer\.name: no block_lr is called 'blockwize' \(did you mean"),
        ("optimizer.name=adamw+", r"optimizer\.name: 'adamw\+' names no block_lr"),
        ("optimizer.on_nonfinite=skp", r"got 'skp' \(did you mean 'skip'\?\), allowed: raise, skip"),
        ("optimizer.lr=fast", r"optimizer\.lr: expected a number, got 'fast'"),
        ("optimizer.lr=-1", r"optimizer\.lr must be at least 0"),
        ("optimizer.max_grad_norm=-1", r"max_grad_norm must be at least 0"),
        ("schedul.steps=1", r"no setting is called 'schedul' \(did you mean 'schedule'\?\)"),
        ("schedule.step=1", r"no setting is called 'schedule\.step' \(did you mean 'steps'\?\)"),
        ("schedule.steps=0", r"schedule\.steps must be at least 1, got 0"),
        ("schedule.tokens=0", r"schedule\.tokens must be at least 1, got 0"),
        ("schedule.steps=1.5", r"schedule\.steps: expected a whole number, got 1\.5"),
        ("schedule.tokens=1.0005k", r"schedule\.tokens: expected a whole number, got '1\.0005k'"),
        ("schedule.tokens=8Q", r"schedule\.tokens: expected a whole number, got '8Q'"),
        ("schedule.tokens='8'", r"schedule\.tokens: expected a whole number, got '8'"),
        ("optimizer.lr=8M", r"optimizer\.lr: expected a number, got '8M'"),
        ("schedule.warmup=-1", r"schedule\.warmup: steps, or a fraction below 1, got -1"),
        ("model.compile=1", r"model\.compile: expected true or false, got 1"),
        ("model=3", r"model: expected a table \[model\], got 3"),
        ("model.attention=flash", r"model\.attention: got 'flash', allowed: eager, sdpa"),
        ("seed=true", r"seed: expected a whole number, got True"),
        ("seed=-1", r"seed must be at least 0"),
        ("batch.micro=3", r"batch\.micro=3 does not divide batch\.sequences=16; divisors are 1, 2, 4, 8, 16"),
        ("batch.sequences=0", r"batch\.sequences must be at least 1"),
        ("compute.precision=bf61", r"got 'bf61' \(did you mean 'bf16'\?\)"),
        ("checkpoint.keep=0", r"checkpoint\.keep must be at least 1"),
        ("data.context=0", r"data\.context must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(assignment, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(assignment)


@pytest.mark.parametrize("assignment", ["lr", "=3", "a..b=1", "seed.x=1"])
def test_what_is_no_assignment_is_refused(assignment) -> None:
    with pytest.raises(ValueError, match="--set"):
        set_keys({"seed": 1}, [assignment])


def test_a_file_that_is_none_is_refused(tmp_path) -> None:
    path = tmp_path / "c.toml"
    with pytest.raises(ValueError, match="cannot read the configuration"):
        read_given(path)
    path.write_text("a = ", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a TOML file"):
        read_given(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not a TOML file"):
        read_given(path)


def test_a_difference_is_shown_and_what_is_left_open_is_none() -> None:
    stored = make("schedule.steps=10", "compute.threads=2", "optimizer.lr=1e-3")
    assert differences(stored, make("schedule.steps=10")) == []
    assert differences(stored, make()) == []  # steps are left open
    assert differences(stored, make("optimizer.lr=2e-3", "seed=1")) == [
        "optimizer.lr: the run has 0.001, now it is 0.002",
        "seed: the run has 0, now it is 1",
    ]
    lines = differences(stored, make("model.settings.n_layer=2", "optimizer.name=lion"))
    assert "model.settings.n_layer: the run has nothing, now it is 2" in lines
    assert "optimizer.name: the run has 'adamw', now it is 'lion'" in lines


def test_what_may_change_is_taken_over() -> None:
    stored = make("checkpoint.every=5", "log.tensorboard=true", "seed=3")
    wanted = make("checkpoint.keep=7", "optimizer.on_nonfinite=skip", "seed=3")
    assert differences(stored, wanted) == []
    both = taking_over(stored, wanted)
    assert (both.checkpoint.every, both.checkpoint.keep, both.log.tensorboard) == (5, 7, True)
    assert (both.optimizer.on_nonfinite, both.seed) == ("skip", 3)
