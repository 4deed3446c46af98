"""The checkpoint that ships: what it is, and that it is a beginning with something left to find."""

from __future__ import annotations

import asyncio
import hashlib
import json

import numpy as np

from palaestra.model import checkpoint
from palaestra.model.tokenizer import Tokenizer
from palaestra.trainer import evaluation
from palaestra.trainer.assembly import assemble
from palaestra.trainer.loop import prepare
from palaestra.trainer.recipe import load

FOLDER = checkpoint.locate("warmstart")
MEGABYTES = 8


def test_it_is_small_and_comes_from_the_recipe_that_ships():
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert len(weights) < MEGABYTES * 2**20
    assert (FOLDER / "sha256").read_text().split() == [hashlib.sha256(weights).hexdigest(), "model.safetensors"]
    assert json.loads((FOLDER / "recipe.json").read_text()) == json.loads(load("warmstart").model_dump_json())
    assert checkpoint.tokenizer_hash(FOLDER) == Tokenizer.load().sha256
    evaluated = json.loads((FOLDER / "summary.json").read_text())["environments"]
    assert set(evaluated) == {"math", "code", "search", "terminal"}


def test_the_quickstart_begins_between_little_and_much():
    recipe = load("quickstart", ["evaluation.tasks=48"])
    recipe = recipe.without(asyncio.run(recipe.lacking()))

    async def play():
        specs = recipe.specs()
        stack = assemble(recipe, specs, prepare(recipe))
        try:
            await stack.deliver(dict(stack.model.weights()), 0)
            return (await evaluation.evaluate(stack.player, evaluation.held_out(specs, recipe), recipe)).scores
        finally:
            await stack.close()

    scores = asyncio.run(play())
    means = {name: np.mean(list(found["mean"].values())) for name, found in scores.items()}
    assert all(0.2 < mean < 0.85 for mean in means.values()), means
