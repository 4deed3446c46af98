"""The engine against full forward passes, and what it promises of sessions, updates and draws."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.types import Sampling
from palaestra.model.config import ModelConfig
from palaestra.model.network import Hybrid
from palaestra.rollout import hybrid_engine, sampler
from palaestra.rollout.hybrid_engine import EngineConfig, HybridEngine
from palaestra.rollout.sampler import draw, prune, uniforms

CONFIG = ModelConfig(
    hybrid_override_pattern="ME*E",
    vocab_size=48,
    hidden_size=32,
    head_dim=16,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    moe_latent_size=16,
)


def model(seed: int = 0) -> Hybrid:
    torch.manual_seed(seed)
    built = Hybrid(CONFIG)
    for parameter in built.parameters():
        if parameter.dim() >= 2:
            parameter.data *= 5
    return built.eval()


@pytest.fixture(autouse=True, params=["native", "torch"])
def kernels(request, monkeypatch):
    """Decoding and drawing in C, and in PyTorch, as where no compiler was."""
    if request.param == "torch":
        for module in (hybrid_engine, sampler):
            monkeypatch.setattr(module, "library", lambda: None)
    return request.param


def engine_over(network: Hybrid, config: EngineConfig | None = None) -> HybridEngine:
    """On the float32 weights themselves."""
    return HybridEngine(network.config, config, network.weights(nvfp4=False))


async def under_way(engine: HybridEngine) -> None:
    """Until something was drawn."""
    while not engine.stats()["drawn"]:
        await asyncio.sleep(0)


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 48, generator.integers(1, 30)).tolist() for _ in range(count)]


def expected(network: Hybrid, ids: list[int], start: int) -> torch.Tensor:
    with torch.no_grad():
        logprobs = torch.log_softmax(network(torch.tensor([ids]))[0], -1)
    return logprobs[torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])]


@pytest.mark.parametrize("deterministic", [False, True])
async def test_logprobs_are_those_of_a_full_forward_pass_through_turns_and_evictions(deterministic):
    network = model()
    engine = engine_over(network, EngineConfig(slots=6, deterministic=deterministic, burst=3))

    async def talk(number: int, ids: list[int]) -> None:
        for turn in range(3):
            sampling = Sampling(max_tokens=3 + number % 7, seed=100 * number + turn)
            generation = await engine.generate(ids, sampling, f"s{number}")
            start, ids = len(ids), [*ids, *generation.ids.tolist()]
            torch.testing.assert_close(
                torch.from_numpy(generation.logprobs), expected(network, ids, start), atol=1e-5, rtol=1e-5
            )
            assert generation.finish_reason == "length"
            ids = [*ids, 5, 6, number]

    await asyncio.wait_for(asyncio.gather(*(talk(n, ids) for n, ids in enumerate(prompts(15)))), 60)


async def test_a_deterministic_engine_draws_the_same_whatever_shares_its_batch():
    async def play(order: list[int]) -> dict[int, list[int]]:
        engine = engine_over(model(), EngineConfig(slots=5, deterministic=True, burst=2))
        texts = prompts(8)
        drawn: dict[int, list[int]] = {}

        async def one(n: int) -> None:
            generation = await engine.generate(texts[n], Sampling(max_tokens=12 + n, seed=n), f"s{n}")
            drawn[n] = [*generation.ids.tolist(), *generation.logprobs.view(np.int32).tolist()]
            await engine.release(f"s{n}")

        for n in order[:2]:
            await one(n)
        await asyncio.gather(*(one(n) for n in order[2:]))
        return drawn

    assert await play(list(range(8))) == await play([5, 1, 7, 0, 2, 6, 3, 4])


async def test_a_deterministic_engine_draws_the_same_whether_or_not_a_row_is_given_up_meanwhile():
    async def play(slots: int) -> list[list[int]]:
        engine = engine_over(model(), EngineConfig(slots=slots, deterministic=True, burst=2))
        talks, seen = prompts(4), []

        async def turn(n: int, session: str, seed: int) -> None:
            new = await asyncio.wait_for(engine.generate(talks[n], Sampling(max_tokens=6, seed=seed), session), 60)
            talks[n] = [*talks[n], *new.ids.tolist(), 3]
            seen.append([n, seed, *new.logprobs.view(np.int32).tolist()])

        for seed in range(3):
            await asyncio.gather(*(turn(n, f"s{n}", seed) for n in range(4)))
        await engine.fork("s0", "twin")
        await turn(0, "twin", 9)
        assert engine.stats()["sessions"] == 5  # none was released
        return sorted(seen)

    assert await play(1) == await play(2) == await play(8)


async def test_a_session_costs_only_its_new_tokens_and_a_shared_prompt_is_computed_once():
    engine = engine_over(model())
    ids = list(range(20))
    first = await asyncio.gather(*(engine.generate(ids, Sampling(max_tokens=2, seed=n), f"s{n}") for n in range(8)))
    assert engine.stats()["prefilled"] == 19
    await engine.generate([*ids, *first[0].ids.tolist(), 1, 2, 3], Sampling(max_tokens=2, seed=9), "s0")
    assert engine.stats()["prefilled"] == 19 + 3


async def test_a_fork_goes_on_from_a_copy():
    engine = engine_over(model())
    ids = list(range(20))
    drawn = (await engine.generate(ids, Sampling(max_tokens=2, seed=1), "a")).ids.tolist()
    await engine.fork("a", "b")
    before = engine.stats()["prefilled"]
    left, right = await asyncio.gather(
        *(engine.generate([*ids, *drawn, 4], Sampling(max_tokens=5, seed=2), name) for name in ("a", "b"))
    )
    assert engine.stats()["prefilled"] == before + 2
    assert left.ids.tolist() == right.ids.tolist()
    await engine.fork("nobody", "c")


async def test_cancel_ends_a_generation_and_leaves_the_others():
    engine = engine_over(model(), EngineConfig(burst=1))
    long = asyncio.create_task(engine.generate([1, 2], Sampling(max_tokens=400, seed=1), "long"))
    short = asyncio.create_task(engine.generate([1, 2], Sampling(max_tokens=20, seed=2), "short"))
    await under_way(engine)
    await engine.cancel("long")
    with pytest.raises(Failure) as caught:
        await long
    assert caught.value.cause is Cause.CANCELLED
    assert len((await short).ids) == 20


async def test_an_update_in_flight_is_recorded_by_span_and_really_switches():
    engine = engine_over(model(), EngineConfig(burst=2))
    other = model(seed=7)
    await engine.prepare(other.weights(), 5)
    task = asyncio.create_task(engine.generate([1, 2, 3], Sampling(max_tokens=200, seed=3), "s"))
    await under_way(engine)
    with pytest.raises(ValueError, match=r"commit\(4\): prepared is 5"):
        await engine.commit(4)
    await engine.commit(5)
    generation = await task
    assert [version for version, _ in generation.versions] == [0, 5]
    assert sum(count for _, count in generation.versions) == 200
    fresh = await engine.generate([1, 2, 3], Sampling(max_tokens=4, seed=3), "t")
    seen = model()
    seen.load_weights(other.weights())
    ids = [1, 2, 3, *fresh.ids.tolist()]
    torch.testing.assert_close(torch.from_numpy(fresh.logprobs), expected(seen, ids, 3), atol=1e-5, rtol=1e-5)


async def test_an_engine_says_what_it_decodes_with_and_serves_nothing_before_it_has_weights(kernels):
    engine = HybridEngine(CONFIG)
    with pytest.raises(Failure, match="the engine has no weights yet"):
        await engine.generate([1, 2], Sampling(max_tokens=3), "a")
    await engine.prepare(model().weights(), 1)
    await engine.commit(1)
    assert len((await engine.generate([1, 2], Sampling(max_tokens=3, seed=1), "b")).ids) == 3
    assert (engine.stats()["kernels"] == "torch") == (kernels == "torch")


async def test_stop_ids_context_and_too_long_a_prompt():
    engine = engine_over(model(), EngineConfig(context=40))
    everything = Sampling(max_tokens=100, seed=1, stop_ids=tuple(range(48)))
    stopped = await engine.generate([1], everything, "a")
    assert (stopped.finish_reason, len(stopped.ids)) == ("stop", 1)
    full = await engine.generate([1], Sampling(max_tokens=100, seed=1), "b")
    assert (full.finish_reason, len(full.ids)) == ("context", 39)
    with pytest.raises(Failure, match="40 ids; the engine's context is 40"):
        await engine.generate([1] * 40, Sampling(), "c")
    with pytest.raises(ValueError, match="json_schema"):
        await engine.generate([1], Sampling(json_schema={}), "d")


async def test_a_broken_engine_is_the_model_servers_failure_and_the_next_request_is_served():
    engine = engine_over(model())
    with pytest.raises(Failure) as caught:
        await engine.generate([1, 4800], Sampling(max_tokens=3), "a")
    assert caught.value.cause is Cause.MODEL_SERVER
    assert len((await engine.generate([1, 2], Sampling(max_tokens=3, seed=1), "b")).ids) == 3


def test_draws_follow_the_distribution_and_depend_on_seed_and_position_alone():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)).expand(20_000, 12)
    uniform = uniforms([7] * 20_000, list(range(20_000)))
    ids, logprobs = draw(logits, [Sampling(temperature=0.7)] * 20_000, uniform, [[]] * 20_000)
    probabilities = (logits[0] / 0.7).softmax(-1)
    counts = torch.bincount(ids, minlength=12).double()
    chi_square = ((counts - 20_000 * probabilities) ** 2 / (20_000 * probabilities)).sum()
    assert chi_square < 31.3  # the 99.9th percentile with 11 degrees of freedom
    torch.testing.assert_close(logprobs, probabilities.log()[ids])
    assert uniforms([7, 3], [5, 5])[0] == uniforms([7], [5])[0]
    assert len(set(uniforms([1, 2, 1, 2], [1, 1, 2, 2]))) == 4


def test_greedy_and_pruned_draws():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    ids, logprobs = draw(logits, [Sampling(temperature=0)], np.array([0.99]), [[]])
    assert ids.item() == 1
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 1])
    ids, logprobs = draw(logits, [Sampling(temperature=0.5, top_k=2)], np.array([0.95]), [[]])
    assert ids.item() == 2
    torch.testing.assert_close(logprobs, (logits[:, 1:3] / 0.5).log_softmax(-1)[:, 1])

    def kept(history=(), **settings):
        return torch.isfinite(prune(logits[0], Sampling(**settings), list(history))).nonzero().flatten().tolist()

    assert kept(top_k=2) == [1, 2]
    assert kept(top_p=0.7) == [1, 2]
    assert kept(min_p=0.2) == [1, 2]
    assert prune(logits[0], Sampling(frequency_penalty=2.0, presence_penalty=1.0), [1, 1]).argmax().item() == 2


@given(
    width=st.integers(1, 600),
    temperatures=st.lists(st.floats(0, 3).filter(lambda t: not 0 < t < 0.05), min_size=1, max_size=6),
    spread=st.floats(0, 30),
    masked=st.floats(0, 0.9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_draws_are_those_of_a_float64_distribution(width, temperatures, spread, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(temperatures), width, generator=generator) * spread
    hidden = torch.rand(logits.shape, generator=generator) < masked
    hidden[:, seed % width] = False
    logits[hidden] = -torch.inf
    uniform = torch.rand(len(temperatures), generator=generator, dtype=torch.float64).numpy()
    ids, logprobs = draw(logits, [Sampling(temperature=t) for t in temperatures], uniform, [[]] * len(temperatures))
    for row, temperature in enumerate(temperatures):
        exact = torch.log_softmax(logits[row].double() / (temperature or 1.0), -1)
        assert logprobs[row] == pytest.approx(float(exact[ids[row]]), abs=1e-4, rel=1e-5)
        if not temperature:
            assert ids[row] == logits[row].argmax()
            continue
        above = float(exact[: ids[row] + 1].exp().sum())
        assert above - float(exact[ids[row]].exp()) - 1e-5 <= uniform[row] <= above + 1e-5
