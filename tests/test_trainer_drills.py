"""Drills: what they ask for, that their vocabulary grows, and that a small network learns to copy from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palaestra.model.config import ModelConfig
from palaestra.model.network import Hybrid
from palaestra.trainer.batch import Batch
from palaestra.trainer.drills import DOUBLING, FIRST, WAIT, Drills
from palaestra.trainer.learner import Learner, LearnerConfig
from palaestra.trainer.optim import OptimConfig


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), step=st.integers(0, 3000), words=st.integers(16, 300))
def test_every_token_that_carries_loss_is_told_by_what_stands_before_it(seed, step, words):
    for place, sample in enumerate(Drills(range(100, 100 + words), seed).batch(6, step)):
        ids = sample.ids.tolist()
        for at in np.flatnonzero(sample.loss):
            earlier = ids.index(ids[at - 1])  # the same token before, the first time
            assert earlier < at - 1
            assert ids[earlier + 1] == ids[at]
        half = len(ids) // 2
        assert sample.loss.sum() == (half - 1 if place % 2 == 0 else half // 2)


def test_the_vocabulary_grows_and_a_step_is_always_the_same():
    drills = Drills(range(1000), 3)

    def known(step):
        return {int(number) for sample in drills.batch(400, step) for number in sample.ids}

    assert len(known(0)) == len(known(WAIT)) == FIRST
    assert known(0) == known(WAIT)
    assert len(known(WAIT + DOUBLING)) == 2 * FIRST
    assert len(known(WAIT + 10 * DOUBLING)) > 900
    again = Drills(reversed(range(1000)), 3).batch(4, 77)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(drills.batch(4, 77), again, strict=True))


@pytest.mark.slow
def test_a_small_network_learns_to_copy():
    torch.manual_seed(0)
    model = Hybrid(ModelConfig(hybrid_override_pattern="ME*E", vocab_size=64, moe_latent_size=64))
    learner = Learner(model, "sft", LearnerConfig(train_router=True), OptimConfig(muon=0.01, adamw=3e-3, warmup=10))
    drills = Drills(range(10, 50), 0)
    losses = [learner.step(Batch(drills.batch(24, min(step, WAIT))))["loss"] for step in range(400)]
    assert losses[0] > 4
    assert np.mean(losses[-20:]) < 1
