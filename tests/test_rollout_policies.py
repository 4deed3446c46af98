"""Policies that answer in tokens: the checkpoint that ships plays, and stop strings end replies where they stand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palaestra.gym.policies import build
from palaestra.gym.registry import UsageError, spec
from palaestra.gym.tools import Tools
from palaestra.gym.types import Completion, Sampling
from palaestra.model.checkpoint import save
from palaestra.model.network import Hybrid
from palaestra.model.presets import PRESETS
from palaestra.model.renderer import NemotronRenderer
from palaestra.model.tokenizer import Tokenizer
from palaestra.rollout.hybrid_engine import HybridEngine
from palaestra.rollout.policies import model
from palaestra.rollout.policy import LOOK_FOR_STOP_EVERY, TokenPolicy

SETTINGS = Sampling(max_tokens=60, seed=1)


@pytest.fixture(scope="module")
def babbler():
    """A policy of fresh weights: its text ends only at the limit, as good as always."""
    torch.manual_seed(0)
    model = Hybrid(PRESETS["tiny"])
    return TokenPolicy(NemotronRenderer(Tokenizer.load()), HybridEngine(model.config, weights=model.weights()))


async def reply(policy, name: str, session: str, **settings) -> Completion:
    known = spec(name)
    player = known.environment()(known.settings())
    task = next(known.tasks("held-out", 0))
    tools = Tools(player, 1.0, 1.0).declarations
    return await policy.reply([], task.messages(), tools, SETTINGS.model_copy(update=settings), session)


async def test_the_checkpoint_that_ships_calls_a_tool():
    found = await reply(build("model:warmstart"), "search", "tool", temperature=0)
    assert found.finish_reason == "tool_calls"
    assert [call.name for call in found.message.tool_calls] == ["search"]
    assert found.usage["completion_tokens"] == len(found.generation.ids) > 0


@pytest.mark.parametrize("place", [3, LOOK_FOR_STOP_EVERY - 1, LOOK_FOR_STOP_EVERY, 40])
async def test_a_stop_string_ends_the_reply_at_the_token_that_completes_it(babbler, place):
    whole = (await reply(babbler, "code", f"whole{place}")).generation
    ids = whole.ids.tolist()
    assert len(ids) == SETTINGS.max_tokens
    decode = babbler.renderer.decode
    stop = decode(ids[place : place + 2])
    end = next(n for n in range(1, len(ids) + 1) if stop in decode(ids[:n]))
    cut = (await reply(babbler, "code", f"cut{place}", stop=("no such text", stop))).generation
    assert cut.ids.tolist() == ids[:end]
    assert cut.finish_reason == "stop"
    assert cut.sampled.tolist() == [True] * end
    assert sum(count for _, count in cut.versions) == end
    np.testing.assert_allclose(cut.logprobs, whole.logprobs[:end], atol=1e-5)


@pytest.mark.parametrize("limit", [LOOK_FOR_STOP_EVERY, LOOK_FOR_STOP_EVERY + 1, 60])
async def test_a_stop_string_that_never_comes_changes_nothing(babbler, limit):
    whole = (await reply(babbler, "code", f"a{limit}", max_tokens=limit)).generation
    looked = (await reply(babbler, "code", f"b{limit}", max_tokens=limit, stop=("no such text",))).generation
    assert looked.ids.tolist() == whole.ids.tolist()
    assert looked.finish_reason == whole.finish_reason == "length"


def test_a_checkpoint_that_cannot_play_is_refused_in_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        model(str(tmp_path / "model"))
    save(Hybrid(PRESETS["tiny"]), tmp_path / "model", tokenizer_hash="0" * 64)
    with pytest.raises(UsageError, match="trained with another tokenizer"):
        model(str(tmp_path / "model"))


def test_policies_of_other_weights_have_another_hash(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        save(Hybrid(PRESETS["tiny"]), tmp_path / str(seed))
    hashes = {name: model(str(tmp_path / name)).sha256 for name in ("0", "1")}
    assert hashes["0"] != hashes["1"]
    assert all(len(found) == 64 for found in hashes.values())
