"""The network against transformers' implementation, and against itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palaestra.kernels.nvfp4 import dequantize, fake_quantize, quantize
from palaestra.model.cache import Cache
from palaestra.model.checkpoint import CheckpointError, load, save, tokenizer_hash
from palaestra.model.config import ModelConfig
from palaestra.model.network import Hybrid
from palaestra.model.presets import PRESETS, preset

SMALL = ModelConfig(
    hybrid_override_pattern="ME*-ME",
    vocab_size=64,
    hidden_size=32,
    num_attention_heads=4,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_groups=2,
    intermediate_size=48,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=48,
    moe_latent_size=16,
    chunk_size=8,
)


def build(config: ModelConfig = SMALL, seed: int = 0) -> Hybrid:
    torch.manual_seed(seed)
    model = Hybrid(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(".D") or "bias" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif parameter.dim() >= 2:
            parameter.data *= 4
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.copy_(0.3 * torch.randn_like(buffer))
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [{}, {"moe_latent_size": None}, {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}, {"n_groups": 1}],
    ids=["latent", "no-latent", "expert-groups", "one-ssm-group"],
)
def test_logits_agree_with_transformers_on_the_same_checkpoint(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build(SMALL.model_copy(update={**changes, "hf_dt_clamp": True}))
    save(tmp_path / "checkpoint", model)
    theirs, report = transformers.NemotronHForCausalLM.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.randint(0, 64, (2, 21))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(ids)), theirs.eval()(ids).logits, atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(2, 30), min_size=1, max_size=4))
def test_a_cache_filled_in_any_pieces_gives_what_one_pass_gives(data, lengths):
    model = build()
    batch, longest = len(lengths), max(lengths)
    ids = torch.randint(0, 64, (batch, longest))
    cache = Cache.empty(SMALL, batch, longest + 32)
    done = torch.zeros(batch, dtype=torch.int64)
    with torch.no_grad():
        whole = model(ids)
        while bool((done < torch.tensor(lengths)).any()):
            width = data.draw(st.integers(1, 20))
            take = torch.minimum(torch.tensor(lengths) - done, torch.tensor(width))
            at = (done[:, None] + torch.arange(width)).clamp(max=longest - 1)
            hidden = model(ids.gather(1, at), None if width == 1 and bool((take == 1).all()) else take, cache)
            if width == 1 and not bool((take == 1).all()):
                return  # a single-token step moves every row; the engine never mixes finished rows in
            for row in range(batch):
                seen = slice(int(done[row]), int(done[row] + take[row]))
                torch.testing.assert_close(hidden[row, : int(take[row])], whole[row, seen], atol=1e-4, rtol=1e-4)
            done += take
    assert cache.lengths.tolist() == lengths


def test_rows_of_a_cache_can_be_copied_out_and_back():
    model = build()
    ids = torch.randint(0, 64, (3, 9))
    cache = Cache.empty(SMALL, 3, 40)
    token = torch.randint(0, 64, (2, 1))
    with torch.no_grad():
        model(ids, None, cache)
        copy = cache.select(torch.tensor([2, 2]))
        fork = model(token, None, copy)
        whole = model(torch.cat([ids[[2, 2]], token], 1))
        torch.testing.assert_close(fork[:, 0], whole[:, -1], atol=1e-4, rtol=1e-4)
        assert cache.lengths.tolist() == [9, 9, 9]
        cache.write(torch.tensor([0, 1]), copy)
        assert cache.lengths.tolist() == [10, 10, 9]
        torch.testing.assert_close(cache.layers[0][1][0], copy.layers[0][1][0])


def test_a_full_cache_says_how_full():
    model = build()
    with pytest.raises(ValueError, match="holds 4 tokens a row; 5 are needed"), torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.int64), None, Cache.empty(SMALL, 1, 4))


def test_the_forward_pass_on_nvfp4_is_the_published_models_and_its_gradient_reaches_the_masters():
    model = build()
    sampler = build(seed=1)
    sampler.load_weights(model.weights())
    ids = torch.randint(0, 64, (2, 9))
    with model.quantised():
        hidden = model(ids)
        torch.testing.assert_close(hidden, sampler(ids), atol=1e-5, rtol=1e-5)
        model.logits(hidden).square().mean().backward()
    assert not torch.equal(model(ids), hidden)
    experts = model.backbone.layers[1].mixer.experts
    assert experts.up_proj.grad.abs().sum() > 0
    published = dict(model.weights())
    up = published["backbone.layers.1.mixer.experts.3.up_proj.weight"]
    assert (up.dtype, list(up.shape)) == (torch.uint8, [32, 8])
    assert published["backbone.layers.0.mixer.in_proj.weight_scale"].dtype == torch.float8_e4m3fn
    assert published["backbone.layers.2.mixer.q_proj.weight"].dtype == torch.float32


def test_published_weights_are_copies():
    model = build()
    published = dict(model.weights())
    before = {name: tensor.clone() for name, tensor in published.items()}
    for parameter in model.parameters():
        parameter.data += 1
    assert all(torch.equal(before[name].float(), tensor.float()) for name, tensor in published.items())


def test_a_checkpoint_comes_back_as_it_was_under_the_published_names(tmp_path):
    model = build()
    save(tmp_path / "model", model, "abc")
    again = load(tmp_path / "model")
    assert again.config == model.config
    assert tokenizer_hash(tmp_path / "model") == "abc"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    names = set(model.state_dict())
    assert {
        "backbone.embeddings.weight",
        "backbone.layers.0.mixer.A_log",
        "backbone.layers.0.mixer.conv1d.weight",
        "backbone.layers.1.mixer.gate.e_score_correction_bias",
        "backbone.layers.1.mixer.experts.7.down_proj.weight",
        "backbone.layers.1.mixer.shared_experts.up_proj.weight",
        "backbone.layers.1.mixer.fc1_latent_proj.weight",
        "backbone.norm_f.weight",
        "lm_head.weight",
    } <= names


def test_a_damaged_checkpoint_is_refused_with_its_path(tmp_path):
    folder = tmp_path / "model"
    save(folder, build())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or damaged"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_they_say(name):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Hybrid(preset(name)).parameters())
    low, high = {"tiny": (1.5e6, 3e6), "mini": (5e6, 10e6), "small": (20e6, 40e6)}[name]
    assert low < count < high


def test_an_unknown_preset_names_the_presets():
    with pytest.raises(KeyError, match="tiny, mini, small"):
        preset("huge")


def test_router_load_is_counted_in_training_only():
    model = build()
    ids = torch.randint(0, 64, (2, 9))
    model(ids)
    gate = model.backbone.layers[1].mixer.gate
    assert int(gate.load.sum()) == 0
    model.train()(ids)
    assert int(gate.load.sum()) == 2 * 9 * 3


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 4), blocks=st.integers(1, 3), scale=st.sampled_from([1e-30, 1e-3, 1.0, 7.0, 1e20]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_nvfp4_values_are_bf16_numbers_and_codes_agree_with_fake_quantisation(rows, blocks, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, rows, 16 * blocks, generator=generator) * scale
    weight[0, 0, :16] = 0
    values = dequantize(quantize(weight))
    assert torch.equal(values, values.bfloat16().float())
    assert torch.equal(values, fake_quantize(weight))
    assert torch.equal(values[0, 0, :16], torch.zeros(16))
    amax = weight.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True)
    floor = 2.0**-9 * quantize(weight).scale2[:, None, None, None]
    error = (values - weight).unflatten(-1, (-1, 16)).abs()
    assert bool((error <= torch.maximum(amax * (1 / 6 + 1 / 16), floor * 3)).all())


def test_nvfp4_rounds_ties_to_even_codes():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -2.5, 0.26, 0.24, 5.1, 4.9, 0.0, 6.0])
    weight = torch.stack([ties, torch.full((16,), 6.0)])
    quantised = quantize(weight * 448)
    assert quantised.scale2.item() == 1.0
    expected = [0, 1, 1, 2, 2, 4, 4, 6, 0, -2, 0.5, 0, 6, 4, 0, 6]
    assert (dequantize(quantised)[0] / 448).tolist() == expected


@pytest.mark.parametrize("bad", [torch.zeros(2, 15), torch.tensor([[float("inf")] * 16]), torch.zeros(16)])
def test_nvfp4_refuses_what_it_cannot_hold(bad):
    with pytest.raises(ValueError, match="NVFP4"):
        quantize(bad)
