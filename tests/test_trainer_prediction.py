"""The multi-token-prediction head in supervised training, and that it stays as it is in RLVR."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palaestra.model.config import ModelConfig
from palaestra.model.network import Hybrid
from palaestra.trainer.batch import Batch, Sample
from palaestra.trainer.learner import Learner, LearnerConfig
from palaestra.trainer.optim import OptimConfig

CONFIG = ModelConfig(
    hybrid_override_pattern="ME*",
    vocab_size=32,
    hidden_size=32,
    num_attention_heads=2,
    head_dim=16,
    mamba_num_heads=2,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    num_nextn_predict_layers=1,
)


def counting(count: int) -> Batch:
    """Sequences that count upwards from anywhere; the first four tokens of each carry no loss."""
    rng = np.random.default_rng(0)
    samples = []
    for n in rng.integers(6, 20, count):
        ids = ((rng.integers(32) + np.arange(n)) % 32).astype(np.int32)
        samples.append(Sample(ids, np.zeros(n, np.float32), np.arange(n) >= 4, advantage=1.0))
    return Batch(samples)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Hybrid(CONFIG)


def head(model: Hybrid) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("mtp.")}


def plain(model: Hybrid, batch: Batch) -> float:
    """The mean of both depths' cross entropies over the tokens with loss, sequence by sequence, over all of those."""
    total = 0.0
    with torch.no_grad(), model.quantised():
        for sample in batch.sequences:
            ids = torch.tensor(sample.ids[None], dtype=torch.int64)
            for depth, states in enumerate(model.further(ids, model.hidden(ids)), 1):
                logprobs = model.logits(states)[0].log_softmax(-1)
                for at in range(depth + 1, ids.shape[1]):
                    total -= float(logprobs[at - depth - 1, ids[0, at]]) * bool(sample.loss[at]) / 2
    return total / batch.tokens


@pytest.mark.parametrize("budget", [64, 4096])
def test_its_loss_is_the_mean_over_depths_whatever_the_micro_batches(model, budget):
    batch = counting(9)
    expected = plain(model, batch)
    measured = Learner(model, "sft", LearnerConfig(micro_tokens=budget), OptimConfig()).step(batch)
    assert measured["mtp_loss"] == pytest.approx(expected, rel=1e-5)


def test_it_learns_to_see_two_tokens_further(model):
    learner = Learner(model, "sft", LearnerConfig(), OptimConfig(adamw=3e-3, muon=1e-2, warmup=1))
    losses = [learner.step(counting(24))["mtp_loss"] for _ in range(60)]
    assert losses[0] > 3
    assert losses[-1] < 0.5


@pytest.mark.parametrize(("loss", "factor"), [("rlvr", 0.3), ("sft", 0.0)])
def test_without_its_loss_it_stays_as_it_is_and_the_rest_learns_as_if_it_were_not_there(model, loss, factor):
    bare = Hybrid(CONFIG.model_copy(update={"num_nextn_predict_layers": 0}))
    bare.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("mtp.")})
    before = head(model)
    for network in (model, bare):
        learner = Learner(network, loss, LearnerConfig(mtp_factor=factor), OptimConfig(weight_decay=0.1))
        for _ in range(2):
            assert "mtp_loss" not in learner.step(counting(5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in head(model).items())
    trunk = model.state_dict()
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in bare.state_dict().items())
