"""Advantages, losses, batches and the optimiser: pure parts, by hand and by invariance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palaestra.gym.outcome import Cause
from palaestra.gym.types import Completion, Episode, Generation, Group, Message, Outcome, Scored, Task, Turn, Unscored
from palaestra.trainer.advantages import batch_rms, group_std, permuted, returns
from palaestra.trainer.batch import Refused, Sample, micro_batches, pack, paths
from palaestra.trainer.losses import LossConfig, Tokens, rlvr, sft
from palaestra.trainer.optim import OptimConfig, Optimiser, is_hidden_matrix, orthogonal

NAN = float("nan")
TASK = Task(key="t", prompt="?")


def turn(parent, prompt, drawn, sampled=None, agent="main"):
    n = len(drawn)
    generation = Generation(
        np.array(drawn, np.int32),
        -np.arange(1, n + 1, dtype=np.float32),
        np.ones(n, bool) if sampled is None else np.array(sampled),
        ((7, n),),
        "stop",
    )
    completion = Completion(Message(role="assistant"), np.array(prompt, np.int32), generation)
    return Turn(agent, parent, (), completion)


def episode(*turns, result=None, cause=Cause.OK):
    result = Scored(value=1.0) if result is None else result
    return Episode("e", TASK, turns, result=result, outcome=Outcome(cause=cause))


def test_the_advantage_is_the_designs_formula():
    (value,) = group_std([np.array([1.0, 0.0, 0.0, 0.0])])
    spread = np.std([1, 0, 0, 0])
    np.testing.assert_allclose(value, np.array([1, -1 / 3, -1 / 3, -1 / 3]) / (spread + 1e-6))


@pytest.mark.parametrize("value", [[1.0], [NAN, 1.0], [NAN, NAN], [0.3, 0.3, 0.3], []])
def test_a_group_that_tells_nothing_gets_zero(value):
    for form in (group_std, batch_rms):
        assert form([np.array(value)])[0].tolist() == [0.0] * len(value)


def test_an_unscored_episode_neither_gets_nor_moves_an_advantage():
    with_hole, without = group_std([np.array([1.0, NAN, 0.0])])[0], group_std([np.array([1.0, 0.0])])[0]
    assert with_hole[1] == 0
    np.testing.assert_allclose(with_hole[[0, 2]], without)


def test_advantages_are_clipped():
    (value,) = group_std([np.array([0.0] * 9999 + [1.0])])
    assert value.max() == 50.0


def test_batch_rms_scales_all_groups_alike():
    small, large = batch_rms([np.array([0.0, 1.0]), np.array([0.0, 3.0])])
    assert large[1] == pytest.approx(3 * small[1])
    assert np.mean(np.concatenate([small, large]) ** 2) == pytest.approx(1.0, rel=1e-4)


def test_infrastructure_failures_have_no_return():
    group = Group(TASK, 0, [episode(), episode(result=Unscored(cause=Cause.TOOLS), cause=Cause.TOOLS)])
    (value,) = returns([group])
    assert value[0] == 1.0
    assert np.isnan(value[1])


def test_permutation_stays_within_an_environment_and_keeps_holes():
    values = [np.array([1.0, 2.0, NAN]), np.array([10.0, 20.0]), np.array([3.0, 4.0])]
    mixed = permuted(values, ["a", "b", "a"], np.random.default_rng(1))
    assert np.isnan(mixed[0][2])
    assert sorted([*mixed[0][:2], *mixed[2]]) == [1, 2, 3, 4]
    assert sorted(mixed[1]) == [10, 20]
    draws = {tuple(permuted(values, ["a", "b", "a"], np.random.default_rng(s))[0][:2]) for s in range(20)}
    assert len(draws) > 3


def test_the_rlvr_loss_is_the_designs_formula():
    old = torch.tensor([0.0, 0.0, 0.0, 0.0])
    lp = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    mu = torch.tensor([0.0, -10.0, 0.0, 0.0])
    loss, sums = rlvr(Tokens(lp, old, mu, torch.tensor([1.0, 1.0, 1.0, -1.0])), LossConfig())
    assert loss.item() == pytest.approx(-(1.28 + 5 * 1.28 + 0.5 - 0.8))
    loss.backward()
    assert lp.grad.tolist() == pytest.approx([0.0, 0.0, -0.5, 0.0])
    assert sums["importance_clipped"].item() == 1
    assert sums["ratio_clipped"].item() == 4


def test_at_the_old_policy_the_gradient_is_the_weighted_advantage():
    lp = torch.tensor([-1.0, -2.0], requires_grad=True)
    mu = lp.detach() + torch.tensor([0.5, -9.0])
    rlvr(Tokens(lp, lp.detach(), mu, torch.tensor([2.0, -1.0])), LossConfig())[0].backward()
    assert lp.grad.tolist() == pytest.approx([-2.0 * np.exp(-0.5), 5.0])


def test_sft_is_cross_entropy():
    lp = torch.tensor([-1.0, -2.0])
    assert sft(Tokens(lp, lp, lp, lp), LossConfig())[0].item() == 3.0


def test_a_path_is_the_concatenation_of_its_turns_and_forced_tokens_carry_no_loss():
    (sample,) = paths(episode(turn(None, [1, 2], [3, 4], [True, False]), turn(0, [5], [6])), 2.0)
    assert sample.ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert sample.loss.tolist() == [False, False, True, False, False, True]
    assert sample.mu.tolist() == [0, 0, -1, 0, 0, -1]


def test_a_token_that_paths_share_carries_loss_once():
    tree = episode(turn(None, [1], [2, 3]), turn(0, [4], [5]), turn(0, [6], [7]), turn(None, [8], [9]))
    samples = paths(tree, 1.0)
    assert [sample.ids.tolist() for sample in samples] == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 7], [8, 9]]
    assert sum(sample.loss.sum() for sample in samples) == 5
    assert samples[1].loss.tolist() == [False, False, False, False, True]


def test_pack_counts_tokens_and_versions_and_leaves_the_unscored_out():
    lost = episode(turn(None, [1], [2]), result=Unscored(cause=Cause.SANDBOX), cause=Cause.SANDBOX)
    batch = pack([Group(TASK, 0, [episode(turn(None, [1], [2, 3])), lost])], [np.array([1.0, 0.0])])
    assert batch.tokens == 2
    assert batch.versions == {7: 2}
    assert len(batch.sequences) == 1


def test_a_chat_policys_turns_are_refused_and_another_roles_are_skipped():
    chat = Turn("main", None, (), Completion(Message(role="assistant", content="hi")))
    with pytest.raises(Refused, match="no token ids"):
        paths(episode(chat), 1.0)
    user = Turn("user", None, (), Completion(Message(role="assistant", content="hi")))
    assert len(paths(episode(user, turn(None, [1], [2])), 1.0)) == 1
    with pytest.raises(Refused, match="first token"):
        Sample(np.zeros(1, np.int32), np.zeros(1, np.float32), np.ones(1, bool))


def test_micro_batches_hold_each_sequence_once_within_the_budget():
    lengths = [3, 17, 40, 16, 5, 33, 90]
    samples = [Sample(np.arange(n, dtype=np.int32), np.zeros(n, np.float32), np.arange(n) == n - 1) for n in lengths]
    micros = list(micro_batches(samples, range(len(samples)), 64))
    assert sorted(row for micro in micros for row in micro.rows) == list(range(len(samples)))
    for micro in micros:
        assert micro.ids.numel() <= 64 or len(micro.rows) == 1
        assert micro.ids.shape[1] % 16 == 0
        assert micro.lengths.tolist() == [lengths[row] for row in micro.rows]
        assert micro.loss.sum() == len(micro.rows)


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4), (3, 8, 5)])
def test_muons_step_is_nearly_orthogonal(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_orthogonal_treats_a_stack_one_by_one_and_leaves_zero():
    stack = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonal(stack)[1], orthogonal(stack[1]))
    assert orthogonal(torch.zeros(2, 3)).abs().max() == 0


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = torch.nn.Embedding(4, 4)
        self.hidden = torch.nn.Linear(4, 4)
        self.gate = torch.nn.Linear(4, 2, bias=False)


def test_the_optimiser_splits_resumes_and_leaves_the_frozen_alone():
    torch.manual_seed(0)
    model = Two()
    model.gate.requires_grad_(False)
    frozen = model.gate.weight.clone()
    hidden = [name for name, p in model.named_parameters() if is_hidden_matrix(name, p)]
    assert hidden == ["hidden.weight"]

    def steps(optimiser, n):
        for _ in range(n):
            optimiser.zero()
            (model.hidden(model.embeddings(torch.arange(4))) ** 2).sum().backward()
            optimiser.step()

    optimiser = Optimiser(model, OptimConfig(muon=0.01, adamw=0.01))
    steps(optimiser, 3)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    saved = optimiser.state_dict()
    saved = torch.load(_roundtrip(saved), weights_only=True)
    steps(optimiser, 2)
    straight = model.hidden.weight.clone()
    model.load_state_dict(weights)
    again = Optimiser(model, OptimConfig(muon=0.01, adamw=0.01))
    again.load_state_dict(saved)
    steps(again, 2)
    assert torch.equal(model.hidden.weight, straight)
    assert torch.equal(model.gate.weight, frozen)


def _roundtrip(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer
