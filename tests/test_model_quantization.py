"""Recipes of quantisation: which weights are how, what is written, and what a policy then plays on."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from palaestra.kernels import nvfp4
from palaestra.model import load, save
from palaestra.model.checkpoint import weights
from palaestra.model.cli import app
from palaestra.model.network import Hybrid
from palaestra.model.presets import preset
from palaestra.model.quantization import FP8, KEPT, NVFP4, RECIPES, chosen, quantize
from palaestra.model.stored import names, values, weight

LAYER = "backbone.layers.{}.mixer.{}.weight"
MINI = preset("mini").model_copy(update={"num_nextn_predict_layers": 1, "vocab_size": 64})
"""MEM*EMEME."""
EXPECTED = {
    "rl": {
        LAYER.format(0, "in_proj"): NVFP4,
        LAYER.format(2, "in_proj"): NVFP4,
        LAYER.format(0, "out_proj"): KEPT,
        LAYER.format(1, "experts.3.up_proj"): NVFP4,
        LAYER.format(1, "shared_experts.down_proj"): NVFP4,
        LAYER.format(1, "fc1_latent_proj"): KEPT,
        LAYER.format(3, "q_proj"): KEPT,
    },
    "nano": {
        LAYER.format(0, "in_proj"): NVFP4,
        LAYER.format(0, "out_proj"): NVFP4,
        LAYER.format(2, "in_proj"): KEPT,  # before the attention
        LAYER.format(2, "out_proj"): KEPT,
        LAYER.format(1, "experts.3.up_proj"): NVFP4,
        LAYER.format(1, "shared_experts.down_proj"): NVFP4,
        LAYER.format(3, "o_proj"): KEPT,
    },
    "super": {
        LAYER.format(0, "in_proj"): FP8,
        LAYER.format(2, "out_proj"): FP8,
        LAYER.format(1, "experts.3.up_proj"): NVFP4,
        LAYER.format(1, "shared_experts.down_proj"): FP8,
        LAYER.format(1, "fc2_latent_proj"): FP8,
        LAYER.format(3, "o_proj"): FP8,
        LAYER.format(3, "k_proj"): KEPT,
    },
}
ALWAYS_KEPT = (
    "backbone.embeddings.weight",
    "lm_head.weight",
    LAYER.format(1, "gate"),
    LAYER.format(0, "conv1d"),
    "backbone.layers.0.norm.weight",
    "mtp.layers.1.mixer.experts.0.up_proj.weight",
    "mtp.layers.0.eh_proj.weight",
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("quantization") / "plain"
    save(Hybrid(MINI), folder, "abc")
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_quantises_what_it_says_and_nothing_else(recipe):
    found = chosen(MINI, RECIPES[recipe])
    assert {name: found[name] for name in EXPECTED[recipe]} == EXPECTED[recipe]
    assert {found[name] for name in ALWAYS_KEPT} == {KEPT}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_written_is_read_again_by_the_network_and_the_engine(plain, tmp_path, recipe):
    folder = tmp_path / "quantised"
    rows = quantize(plain, folder, recipe)
    formats, before, found = chosen(MINI, RECIPES[recipe]), load(plain), load(folder)
    on_disk = load_file(folder / "model.safetensors")
    for name, tensor in before.state_dict().items():
        kept = found.state_dict()[name]
        if formats[name] == NVFP4:
            quantised = nvfp4.quantize(tensor, nvfp4.Recipe("error"))
            assert torch.equal(kept, nvfp4.dequantize(quantised)), name
            assert torch.equal(on_disk[name], quantised.codes)
        elif formats[name] == FP8:
            assert on_disk[name].dtype == torch.float8_e4m3fn
            assert float((kept - tensor).norm() / tensor.norm()) < 0.04, name
        else:
            close = 0 if on_disk[name].dtype == torch.float32 else 2.0**-8
            torch.testing.assert_close(kept, tensor, atol=0, rtol=close)
    published = dict(weights(folder))
    assert all(
        torch.equal(values(weight(published, name)).float(), found.state_dict()[name]) for name in names(published)
    )
    assert {row.format for row in rows} == set(formats.values()) - {KEPT}
    assert all(0.05 < row.error < 0.11 for row in rows if row.format == NVFP4)
    assert all(3.3 < row.before / row.after < 3.6 for row in rows if row.format == NVFP4)


def test_the_configuration_says_what_is_how(plain, tmp_path):
    for recipe, algorithm in (("rl", "W4A16_NVFP4"), ("super", "MIXED_PRECISION")):
        quantize(plain, tmp_path / recipe, recipe)
        config = json.loads((tmp_path / recipe / "config.json").read_text())
        described = json.loads((tmp_path / recipe / "hf_quant_config.json").read_text())["quantization"]
        assert config["quantization_config"]["quant_method"] == "modelopt"
        assert config["quantization_config"]["quant_algo"] == described["quant_algo"] == algorithm
        assert {"lm_head", "backbone.embeddings", "backbone.layers.1.mixer.gate"} <= set(described["exclude_modules"])
        assert config["tokenizer_sha256"] == "abc"
    layers = described["quantized_layers"]
    assert layers["backbone.layers.1.mixer.experts.up_proj"] == {"quant_algo": "W4A16_NVFP4"}
    assert layers["backbone.layers.0.mixer.in_proj"] == {"quant_algo": "FP8"}


def test_quantising_again_changes_nothing(plain, tmp_path):
    quantize(plain, tmp_path / "once", "rl")
    assert load(tmp_path / "once").config.nvfp4
    published = dict(weights(tmp_path / "once"))
    on_disk = load_file(tmp_path / "once" / "model.safetensors")
    assert all(torch.equal(tensor.float(), on_disk[name].float()) for name, tensor in published.items())


def test_the_command_shows_the_errors_and_refuses_with_reasons(plain, tmp_path):
    done = CliRunner().invoke(app, ["quantize", str(plain), "-o", str(tmp_path / "q"), "--recipe", "nano"])
    assert done.exit_code == 0, done.output
    assert "times smaller" in done.output
    for arguments, named in (
        ([str(plain), "-o", str(tmp_path / "x"), "--recipe", "ultra"], "choose one of rl, nano, super"),
        ([str(tmp_path / "none"), "-o", str(tmp_path / "x")], "config.json"),
    ):
        refused = CliRunner().invoke(app, ["quantize", *arguments])
        assert refused.exit_code == 1
        assert named in refused.output
        assert not (tmp_path / "x").exists()
    model = Hybrid(MINI)
    model.backbone.layers[0].mixer.in_proj.weight.data[0, 0] = torch.nan
    save(model, tmp_path / "nan")
    refused = CliRunner().invoke(app, ["quantize", str(tmp_path / "nan"), "-o", str(tmp_path / "x")])
    assert refused.exit_code == 1
    assert "backbone.layers.0.mixer.in_proj.weight: NVFP4 cannot hold" in refused.output
    assert not (tmp_path / "x").exists()
