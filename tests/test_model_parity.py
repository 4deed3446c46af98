"""The network against transformers' NemotronH over random configurations: numbers, gradients, both ways of loading."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from palaestra.model import load, save
from palaestra.model.cache import Cache
from palaestra.model.config import ModelConfig
from palaestra.model.network import Hybrid

transformers = pytest.importorskip("transformers")

CONFIGS = 32
NEW = 128
LOGITS, GRADIENTS, TIE = 1e-5, 1e-4, 1e-4
EPS = 2.0**-23
"""Of the whole gradient, below which one is rounding: a router's that chooses one expert and normalises is 0."""


def configuration(seed: int) -> ModelConfig:
    """A random one, attention among its layers: without, transformers' cache does not work."""
    rng = random.Random(seed)
    pattern = [*rng.choices("M*E-", k=rng.randint(2, 7)), "*"]
    rng.shuffle(pattern)
    kv, groups, dim = rng.choice([1, 2]), rng.choice([1, 2, 4]), rng.choice([8, 16])
    router_groups = rng.choice([1, 2, 4])
    experts = rng.choice([8, 16])
    return ModelConfig(
        hybrid_override_pattern="".join(pattern),
        vocab_size=rng.choice([97, 256]),
        hidden_size=rng.choice([32, 48]),
        num_attention_heads=kv * rng.choice([1, 2, 4]),
        num_key_value_heads=kv,
        head_dim=dim,
        mamba_num_heads=groups * rng.choice([1, 2]),
        mamba_head_dim=rng.choice([8, 16]),
        ssm_state_size=rng.choice([8, 16, 32]),
        n_groups=groups,
        conv_kernel=rng.choice([2, 4]),
        chunk_size=rng.choice([8, 16]),
        intermediate_size=rng.choice([40, 64]),
        n_routed_experts=experts,
        num_experts_per_tok=rng.randint(1, 3),
        moe_intermediate_size=rng.choice([16, 24]),
        moe_shared_expert_intermediate_size=rng.choice([32, 48]),
        moe_latent_size=rng.choice([None, 16]),
        n_group=router_groups,
        topk_group=rng.randint(-(-3 * router_groups // experts), router_groups),
        norm_topk_prob=rng.random() < 0.7,
        routed_scaling_factor=rng.choice([1.0, 2.5]),
        num_nextn_predict_layers=rng.choice([0, 1]),
        mtp_hybrid_override_pattern=rng.choice(["*E", "*", "*-"]),
    )


def network(config: ModelConfig, seed: int) -> Hybrid:
    """Random weights, correction biases and norms that are no ones included."""
    torch.manual_seed(seed)
    model = Hybrid(config)
    for name, tensor in model.state_dict().items():
        if tensor.dim() >= 2 and "conv1d" not in name:
            tensor.normal_(std=0.5 * tensor.shape[-1] ** -0.5)
        elif "norm" in name or name.endswith((".D", "correction_bias", "conv1d.bias")):
            tensor.add_(0.2 * torch.randn_like(tensor))
    model.backbone.embeddings.weight.data.normal_()
    model.lm_head.weight.data.normal_(std=3 * config.hidden_size**-0.5)
    return model.eval()


def theirs(folder: Path) -> torch.nn.Module:
    """transformers' network of that folder, time steps not clamped in its prefill either."""
    model, report = transformers.NemotronHForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model.eval()


def left_padded(lengths: list[int], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Random ids and which of them are none of the padding before them."""
    longest = max(lengths)
    seen = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return torch.randint(2, vocabulary, (len(lengths), longest)) * seen, seen


def moved_left(ids: Tensor, lengths: list[int]) -> Tensor:
    """The same rows with their padding behind."""
    return torch.stack([row.roll(length - len(row)) for row, length in zip(ids, lengths, strict=True)])


@pytest.mark.parametrize("seed", range(CONFIGS))
def test_logits_are_those_of_transformers_and_what_either_saves_the_other_loads(seed, tmp_path):
    model = network(configuration(seed), seed)
    save(model, tmp_path / "ours")
    other = theirs(tmp_path / "ours")
    lengths = [23, 9, 1]
    ids, seen = left_padded(lengths, model.config.vocab_size)
    with torch.no_grad():
        wanted = other(ids, attention_mask=seen.long()).logits
        found = model(moved_left(ids, lengths), torch.tensor(lengths))
    for row, length in enumerate(lengths):
        close(found[row, :length], wanted[row, len(seen[row]) - length :], LOGITS)

    other.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has lost its multi-token-prediction head")
        back = load(tmp_path / "theirs").state_dict()
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    assert back.keys() == kept.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in kept.items())
    again = load(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("seed", range(CONFIGS))
def test_greedy_generations_are_those_of_transformers_until_two_tokens_tie(seed, tmp_path):
    model = network(configuration(seed), seed)
    save(model, tmp_path / "ours")
    other = theirs(tmp_path / "ours")
    lengths = [12, 5]
    ids, seen = left_padded(lengths, model.config.vocab_size)
    wanted = other.generate(
        ids, attention_mask=seen.long(), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, ids.shape[1] :]
    for row, length in enumerate(lengths):
        prompt = ids[row, -length:]
        for at, (token, gap) in enumerate(greedy(model, prompt, NEW)):
            if token != int(wanted[row, at]):
                assert gap < TIE, (row, at)
                break


@torch.no_grad()
def greedy(model: Hybrid, prompt: Tensor, count: int) -> list[tuple[int, float]]:
    """The likeliest next tokens one after the other, and by how much each logit is above the next."""
    cache = Cache.empty(model.config, 1, len(prompt) + count)
    logits = model(prompt[None], None, cache)[0, -1]
    found = []
    for _ in range(count):
        best = logits.topk(2)
        found.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
        logits = model(best.indices[None, :1], None, cache)[0, -1]
    return found


@pytest.mark.parametrize("seed", range(CONFIGS))
def test_gradients_are_those_of_transformers(seed, tmp_path):
    model = network(configuration(seed), seed)
    save(model, tmp_path / "ours")
    other = theirs(tmp_path / "ours")
    ids = torch.randint(0, model.config.vocab_size, (2, 17))
    loss = torch.nn.functional.cross_entropy
    for logits in (model(ids), other(ids).logits):
        loss(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    renamed = {name.replace("backbone.", "model."): p for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, parameter in other.named_parameters() if parameter.requires_grad} == renamed.keys()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters() if parameter.grad is not None}
    rounding = EPS * float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
    for name, wanted in gradients.items():
        assert float((renamed[name].grad - wanted).norm()) <= GRADIENTS * float(wanted.norm()) + rounding, name


def test_the_clamp_of_transformers_prefill_is_a_switch(tmp_path):
    config = configuration(1).model_copy(update={"hybrid_override_pattern": "M*M", "num_nextn_predict_layers": 0})
    model = network(config, 0)
    for layer in (0, 2):
        model.backbone.layers[layer].mixer.dt_bias.data.fill_(-9)
    save(model, tmp_path / "ours")
    other = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    clamped = load(tmp_path / "ours")
    clamped.config = config.model_copy(update={"hf_dt_clamp": True})
    for layer in (0, 2):
        clamped.backbone.layers[layer].mixer.config = clamped.config
    ids = torch.randint(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        wanted = other(ids).logits
        close(clamped.eval()(ids), wanted, LOGITS)
        assert float((model(ids) - wanted).abs().max()) > 1e-3 * float(wanted.abs().max())


def test_the_configuration_is_read_in_either_style(tmp_path):
    model = network(configuration(3), 3)
    save(model, tmp_path / "ours")
    theirs(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    new = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "hybrid_override_pattern" not in new
    assert load(tmp_path / "theirs").config.hybrid_override_pattern == model.config.hybrid_override_pattern
