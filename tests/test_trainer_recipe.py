"""Recipes: what is refused, and with which words."""

from __future__ import annotations

from itertools import islice

import pytest

from palaestra.gym.registry import UsageError
from palaestra.trainer.recipe import RlvrStage, SftStage, load

GOOD = """
model = "preset:tiny"
[environments.math]
use = "math"
[stages.rl]
loss = "rlvr"
steps = 3
"""


def write(tmp_path, text=GOOD):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_a_recipe_is_named_after_its_file_and_keeps_the_order_of_its_stages(tmp_path):
    recipe = load(write(tmp_path, GOOD + '[stages.after]\nloss = "sft"\nsteps = 1\n'))
    assert recipe.name == "mine"
    assert list(recipe.stages) == ["rl", "after"]
    assert isinstance(recipe.stages["rl"], RlvrStage)
    assert isinstance(recipe.stages["after"], SftStage)


@pytest.mark.parametrize("name", ["quickstart", "warmstart", "control", "swe-mini", "smollm2"])
def test_the_tasks_of_a_shipped_recipe_can_be_drawn(name):
    recipe = load(name)
    for spec in recipe.specs().values():
        for split in ("train", "held-out"):
            assert list(islice(spec.tasks(split, recipe.seed), 100))


def test_the_shipped_recipes_load():
    assert list(load("quickstart").environments) == ["math", "code", "search", "terminal"]
    assert load("warmstart").stages["sft"].optim.bias_step > 0


def test_overrides_are_toml(tmp_path):
    keys = ["stages.rl.optim.muon=0.5", "seed=7", 'environments.math.config.source="x"', "pool.groups=3", "device=cpu"]
    assert load(write(tmp_path), ["model=./a/b"]).model == "./a/b"
    recipe = load(write(tmp_path), keys)
    assert recipe.stages["rl"].optim.muon == 0.5
    assert (recipe.seed, recipe.pool.groups, recipe.device) == (7, 3, "cpu")
    assert recipe.environments["math"].config == {"source": "x"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sede=1", r"unknown key sede: did you mean 'seed'\?"),
        ("pool.group=1", r"unknown key pool.group: did you mean 'groups'\?"),
        ("stages.rl.optim.moun=1", r"unknown key stages.rl.optim.moun: did you mean 'muon'\?"),
        ("environments.math.wieght=1", r"unknown key environments.math.wieght: did you mean 'weight'\?"),
        ("stages.rl.batch=3", r"unknown key stages.rl.batch.*has an effect only in sft stages"),
        ("stages.rl.loss='ppo'", r"stages.rl.loss is 'ppo'; known: rlvr, sft"),
        ("pool.group_size=1", r"pool.group_size = 1 leaves RLVR nothing to compare"),
        ("evaluation.tasks=1", r"evaluation.tasks = 1 gives no interval"),
        ("stages.rl.steps=0", r"steps: .*greater than or equal to 1"),
        ("pool.group_size=0", r"pool.group_size: .*greater than or equal to 1"),
        ("stages.rl.steps='many'", r"stages.rl.rlvr.steps|stages.rl.steps"),
        ("ray.address='x'", r"ray has no effect here: placement"),
        ("stages.rl.optim.bias_step=0.1", r"bias_step has no effect here: RLVR freezes"),
        ("seed", r"override 'seed': write dotted.key=VALUE"),
        ("seed=[", r"no TOML value"),
        ("seed.x=1", r"."),
        ("stages=3", r"stages must be a table, such as \[stages.NAME\]"),
        ("environments=[1]", r"environments must be a table"),
    ],
)
def test_a_bad_key_is_refused_with_place_and_fix(tmp_path, override, words):
    with pytest.raises(UsageError, match=words):
        load(write(tmp_path), [override])


def test_keys_without_effect_in_a_mode_are_refused(tmp_path):
    sft = GOOD.replace('"rlvr"', '"sft"') + "[pool]\ngroups = 2\n"
    with pytest.raises(UsageError, match="pool has no effect here: no stage is RLVR"):
        load(write(tmp_path, sft))
    with pytest.raises(UsageError, match="drill_steps has no effect here: drills is 0"):
        load(write(tmp_path, GOOD.replace('"rlvr"', '"sft"')), ["stages.rl.drill_steps=3"])
    with pytest.raises(UsageError, match="cannot end a deterministic run"):
        load(write(tmp_path), ["deterministic=true", "stages.rl.minutes=1"])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the recipe .*nope\.toml"):
        load(str(tmp_path / "nope.toml"))
    with pytest.raises(UsageError, match=r"no recipe 'quikstart': did you mean 'quickstart'\?"):
        load("quikstart")
    with pytest.raises(UsageError, match=r"mine.toml is not TOML"):
        load(write(tmp_path, "model = "))
    with pytest.raises(UsageError, match="model is missing"):
        load(write(tmp_path, GOOD.replace('model = "preset:tiny"', "")))


def test_an_unknown_environment_is_named(tmp_path):
    recipe = load(write(tmp_path), ["environments.math.use='maths'"])
    with pytest.raises(UsageError, match=r"unknown environment 'maths': did you mean 'math'\?"):
        recipe.specs()
