"""Models of other makes: the engine against full forward passes, their templates, and training on them."""

from __future__ import annotations

import asyncio
import json
from functools import partial

import numpy as np
import pytest
import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from palaestra.gym.episode import Bounds
from palaestra.gym.outcome import Failure
from palaestra.gym.registry import UsageError
from palaestra.gym.types import Message, Sampling, ToolCall
from palaestra.model import tokenizer as ours
from palaestra.model.foreign import Foreign
from palaestra.model.template import TemplateRenderer
from palaestra.rollout.actors import Cluster, RemoteEngine
from palaestra.rollout.hybrid_engine import EngineConfig
from palaestra.rollout.policies import transformers as policy_of
from palaestra.rollout.transformers_engine import TransformersEngine
from palaestra.trainer import metrics
from palaestra.trainer.assembly import assemble, foreign_engine
from palaestra.trainer.loop import Run, prepare, train
from palaestra.trainer.recipe import load

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST_THINKS = (  # the last reply alone shows that it was not thought about, as in Qwen's templates
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"properties": {}}}}


def write(folder, template=CHATML, seed=0, eos="<|im_end|>"):
    """A small Llama with our vocabulary and a chat template, as a Hugging Face folder."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    source = ours.Tokenizer.load()._inner
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=source, eos_token=eos, additional_special_tokens=list(ours.HEADS.values())
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("foreign") / "llama")


@pytest.fixture(scope="module")
def model(folder):
    return Foreign.load(str(folder))


@pytest.mark.parametrize("deterministic", [False, True])
async def test_logprobs_are_those_of_a_full_forward_pass(model, deterministic):
    engine = TransformersEngine(model, slots=3, context=64, deterministic=deterministic)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(20, 2000, n).tolist() for n in (3, 17, 9, 5, 30, 1, 12)]

    async def talk(number, ids):
        drawn = await engine.generate(ids, Sampling(max_tokens=2 + 3 * number, seed=number), f"s{number}")
        whole = torch.tensor([[*ids, *drawn.ids.tolist()]])
        with torch.no_grad():
            logprobs = model.inner(input_ids=whole).logits[0].float().log_softmax(-1)
        expected = logprobs[torch.arange(len(ids) - 1, whole.shape[1] - 1), whole[0, len(ids) :]]
        torch.testing.assert_close(torch.from_numpy(drawn.logprobs), expected, atol=1e-4, rtol=1e-4)
        assert drawn.finish_reason == "length"
        assert len(drawn.ids) == 2 + 3 * number

    await asyncio.wait_for(asyncio.gather(*(talk(n, ids) for n, ids in enumerate(prompts))), 60)


async def test_first_come_is_first_served_however_long(model):
    engine = TransformersEngine(model, slots=1, context=64)
    finished = []

    async def ask(length):
        await engine.generate(list(range(30, 30 + length)), Sampling(max_tokens=2, seed=1), f"s{length}")
        finished.append(length)

    await asyncio.wait_for(asyncio.gather(*(ask(length) for length in (40, 3, 20, 1))), 60)
    assert finished == [40, 3, 20, 1]


async def test_an_update_in_flight_stops_cancellation_and_a_context_that_is_too_long(model, folder):
    engine = TransformersEngine(Foreign.load(str(folder)), slots=4, context=600)
    long = asyncio.create_task(engine.generate([30, 31], Sampling(max_tokens=500, seed=1), "long"))
    while engine.stats()["steps"] < 3:
        await asyncio.sleep(0.01)
    other = write(folder.with_name("other"), seed=1)
    await engine.prepare(Foreign.load(str(other)).weights(), 7)
    with pytest.raises(ValueError, match="prepared is 7"):
        await engine.commit(8)
    await engine.commit(7)
    drawn = await asyncio.wait_for(long, 60)
    assert [version for version, _ in drawn.versions] == [0, 7]
    whole = await engine.generate([30, 31], Sampling(max_tokens=9, seed=1), "whole")
    stop = int(whole.ids[3])
    first = await engine.generate([30, 31], Sampling(max_tokens=9, seed=1, stop_ids=(stop,)), "stops")
    assert first.finish_reason == "stop"
    assert first.ids.tolist() == whole.ids.tolist()[: whole.ids.tolist().index(stop) + 1]
    waiting = asyncio.create_task(engine.generate([5], Sampling(max_tokens=500), "gone"))
    await asyncio.sleep(0.05)
    await engine.cancel("gone")
    with pytest.raises(Failure, match="cancelled"):
        await asyncio.wait_for(waiting, 60)
    with pytest.raises(Failure, match="context is 600"):
        await engine.generate(list(range(600)), Sampling(), "much")


@pytest.mark.parametrize("template", [CHATML, WITH_TOOLS])
def test_start_and_extend_give_what_the_template_gives_for_the_whole(model, template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=ours.Tokenizer.load()._inner, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    renderer = TemplateRenderer(tokenizer)
    call = Message(role="assistant", content="I look.", tool_calls=(ToolCall(id="a", name="look", arguments="{}"),))
    conversation = [Message(role="user", content="What is there?"), call]
    ids = renderer.start(conversation[:1], [TOOL], "off")
    assert '"look"' in renderer.decode(ids)
    ids += renderer.reply(call) if template == CHATML else _spelled(tokenizer, call)
    result = Message(role="tool", content="a tree", tool_call_id="a")
    ids += renderer.extend(ids, [result], "off")
    shown = [*conversation, result]
    if template == CHATML:
        declared = renderer.decode(renderer.start(conversation[:1], [TOOL], "off"))
        assert renderer.decode(ids).startswith(declared)
        tail = "<|im_start|>user\n<tool_response>\na tree\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        assert renderer.decode(ids).endswith(tail)
    else:
        assert renderer.decode(ids) == renderer.decode(renderer.start(shown, [TOOL], "off"))
    cut = renderer.extend(ids, [Message(role="user", content="Go on.")], "off")
    assert renderer.decode(cut).startswith("<|im_end|>\n<|im_start|>user\nGo on.")


def test_a_template_that_decorates_the_last_reply_alone_goes_on(model):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=ours.Tokenizer.load()._inner, eos_token="<|im_end|>")
    tokenizer.chat_template = LAST_THINKS
    renderer = TemplateRenderer(tokenizer)
    talk = [
        Message(role="user", content="A?"),
        Message(role="assistant", content="B."),
        Message(role="user", content="C?"),
    ]
    ids = [*renderer.start(talk[:1], [], "off"), *renderer.reply(talk[1])]
    ids += renderer.extend(ids, talk[2:], "off")
    assert renderer.decode(ids) == renderer.decode(renderer.start(talk, [], "off"))


def _spelled(tokenizer, message):
    """The reply as a model that knows the template's form would draw it."""
    call = f"<tool_call>{json.dumps({'name': message.tool_calls[0].name, 'arguments': {}})}</tool_call>"
    return tokenizer(f"{message.content}{call}<|im_end|>", add_special_tokens=False)["input_ids"]


def test_replies_are_parsed_thoughts_calls_and_malformed_calls_alike(model):
    renderer = TemplateRenderer(model.tokenizer)

    def parse(text):
        return renderer.parse(model.tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"])

    plain = parse("It is 4.")
    assert (plain.content, plain.tool_calls, plain.reasoning) == ("It is 4.", (), None)
    called = parse('<think>hm</think>Look: <tool_call>{"name": "look", "arguments": {"at": 3}}</tool_call>')
    assert (called.content, called.reasoning) == ("Look:", "hm")
    assert (called.tool_calls[0].name, json.loads(called.tool_calls[0].arguments)) == ("look", {"at": 3})
    assert parse("<tool_call>nonsense</tool_call>").tool_calls[0].name == "nonsense"


def test_what_cannot_be_used_is_refused_by_name(tmp_path, folder):
    with pytest.raises(UsageError, match=r"no model folder.*model fetch smollm2"):
        policy_of(str(tmp_path / "nowhere"))
    mute = write(tmp_path / "mute", template=None)
    with pytest.raises(UsageError, match="no chat template"):
        policy_of(str(mute))
    named = write(tmp_path / "named", template={"default": CHATML, "tool_use": WITH_TOOLS})
    with pytest.raises(UsageError, match=r"named: .*several chat templates \(default, tool_use\)"):
        policy_of(str(named))
    endless = write(tmp_path / "endless", eos=None)
    with pytest.raises(UsageError, match=r"endless: .*no eos token.*tokenizer_config\.json"):
        policy_of(str(endless))
    broken = write(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be loaded"):
        policy_of(str(broken))


WORLD = '''
from palaestra.gym.environment import Environment, reward
from palaestra.gym.types import Task


class Toy(Environment):
    """Say little."""

    tasks = [Task(key=str(n), prompt=f"say {n}", split="held-out" if n % 4 == 0 else "train") for n in range(400)]

    @reward
    def low(self, episode) -> float:
        return float((episode.turns[0].completion.generation.ids < 1024).mean())

    def solution(self, task):
        return "yes"
'''
RECIPE = """
model = "transformers:{model}"
threads = 1
[environments.toy]
use = "{world}:Toy"
[rollout]
max_tokens = 5
context = 96
[evaluation]
tasks = 4
{stage}
[stages.s.optim]
muon = 0
adamw = 0.02
warmup = 0
"""
RL = '[pool]\ngroups = 8\ngroup_size = 8\n[stages.s]\nloss = "rlvr"\nsteps = 16'
SFT = '[stages.s]\nloss = "sft"\nsteps = 12\nbatch = 8\ndrills = 2\ndrill_steps = 2'


@pytest.mark.parametrize("stage", [RL, SFT])
def test_a_foreign_model_is_trained_by_the_same_trainer(tmp_path, folder, stage):
    world = tmp_path / "world.py"
    world.write_text(WORLD)
    recipe_file = tmp_path / "foreign.toml"
    recipe_file.write_text(RECIPE.format(model=folder, world=world, stage=stage))
    recipe = load(str(recipe_file))

    async def run():
        specs = recipe.specs()
        stack = assemble(recipe, specs, prepare(recipe))
        try:
            (tmp_path / "run").mkdir()
            return await train(Run(recipe, tmp_path / "run", stack, specs))
        finally:
            await stack.close()

    summary = asyncio.run(run())
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    if stage == RL:
        assert rows[0]["logprob_gap"] < 1e-5
        assert np.mean([row["reward/toy"] for row in rows[-2:]]) > rows[0]["reward/toy"] + 0.1
        assert summary["environments"]["toy"]["gain"]["mean"] > 0
    else:
        assert rows[-1]["loss"] < 0.5 * rows[2]["loss"]
    again = Foreign.load(str(tmp_path / "run" / "model"))
    again.save(tmp_path / "run" / "model")  # a second time, as a resumed run does
    again = Foreign.load(str(tmp_path / "run" / "model"))
    assert not torch.equal(again.inner.lm_head.weight, Foreign.load(str(folder)).inner.lm_head.weight)


@pytest.mark.slow
def test_a_policy_actor_answers_with_a_foreign_models_delivered_weights(tmp_path, folder):
    other = Foreign.load(str(write(tmp_path / "other", seed=1)))
    build = partial(foreign_engine, str(folder), EngineConfig(slots=4, context=64))

    async def run():
        cluster = Cluster({}, build, None, Bounds())
        try:
            await cluster.deliver(dict(other.weights()), 3)
            return await RemoteEngine(cluster.policy).generate([30, 31], Sampling(max_tokens=8, seed=1), "s")
        finally:
            await cluster.close()

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        drawn = asyncio.run(run())
    finally:
        ray.shutdown()
    assert drawn.versions == ((3, 8),)
    here = TransformersEngine(other, slots=4, context=64)
    expected = asyncio.run(here.generate([30, 31], Sampling(max_tokens=8, seed=1), "s"))
    assert drawn.ids.tolist() == expected.ids.tolist()
    np.testing.assert_allclose(drawn.logprobs, expected.logprobs, atol=1e-5)


def test_nvfp4_has_no_effect_on_a_foreign_model_and_is_refused(tmp_path, folder):
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.format(model=folder, world="math", stage=SFT).replace(":Toy", ""))
    with pytest.raises(UsageError, match="nvfp4 has no effect"):
        load(str(recipe), ["nvfp4=true"])
