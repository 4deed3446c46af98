"""Checkpoint folders: what is read and written, and what is refused, by the name of file and tensor."""

from __future__ import annotations

import json
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from palaestra.kernels import fp8, nvfp4
from palaestra.kernels.layouts import to_compressed, to_modelopt
from palaestra.model import load, save
from palaestra.model.cache import Cache
from palaestra.model.config import ModelConfig
from palaestra.model.network import Hybrid
from palaestra.model.shards import CheckpointError, write

CONFIG = ModelConfig(
    hybrid_override_pattern="ME*-",
    vocab_size=64,
    hidden_size=32,
    num_attention_heads=4,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=48,
    moe_latent_size=16,
    num_nextn_predict_layers=1,
)
UP = "backbone.layers.1.mixer.experts.3.up_proj.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save(Hybrid(CONFIG), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    torch.manual_seed(0)
    save(Hybrid(CONFIG), tmp_path / "model", shard=40_000)
    return tmp_path / "model"


def changed(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def reconfigured(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_many_files_hold_what_one_holds(folder, sharded, tmp_path):
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((sharded / INDEX).read_text())
    tensors = {name: tensor for file in files for name, tensor in load_file(sharded / file).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert all(name in load_file(sharded / file) for name, file in index["weight_map"].items())
    assert max(sum(t.nbytes for t in load_file(sharded / file).values()) for file in files) <= 40_000
    one = load(folder).state_dict()
    assert all(torch.equal(tensor, one[name]) for name, tensor in load(sharded).state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_are_loaded_in_the_dtype_that_is_asked_for_and_the_rest_in_float32(folder, dtype):
    model = load(folder, dtype)
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        assert model(ids).dtype == torch.float32
        found, wanted = model(ids), load(folder)(ids)
        assert float((found - wanted).norm() / wanted.norm()) < (1e-6 if dtype == torch.float32 else 0.03)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert kinds["backbone.layers.0.mixer.in_proj.weight"] == kinds[UP] == dtype
    assert {kinds[f"backbone.layers.{name}"] for name in ("0.mixer.A_log", "1.mixer.gate.weight", "2.norm.weight")} == {
        torch.float32
    }


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors", "fp8"])
def test_quantised_weights_are_read_as_their_values(folder, layout):
    plain = load_file(folder / WEIGHTS)
    weight = plain.pop(UP)
    if layout == "fp8":
        quantised = fp8.quantize(weight)
        plain |= {UP: quantised.values, f"{UP}_scale": quantised.scale}
        wanted = fp8.dequantize(quantised)
    else:
        quantised = nvfp4.quantize(weight)
        plain |= to_modelopt(UP, quantised) if layout == "modelopt" else to_compressed(UP, quantised)
        wanted = nvfp4.dequantize(quantised)
    scales = {
        UP.replace(".weight", ".input_scale"): torch.ones(()),
        "backbone.layers.2.mixer.k_proj.k_scale": torch.ones(()),
    }
    save_file({**plain, **scales}, folder / WEIGHTS)
    assert torch.equal(load(folder).state_dict()[UP], wanted)


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(folder: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(folder.parent / "trap")))


DAMAGE = {
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]),
        r"model\.safetensors is damaged",
    ),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), r"model\.safetensors is damaged"),
    "gone": (lambda f: (f / WEIGHTS).unlink(), r"model\.safetensors is missing"),
    "pickle": (lambda f: pickled(f, "pytorch_model.bin"), r"pytorch_model\.bin is a pickle, which .* is never loaded"),
    "pickle in disguise": (lambda f: pickled(f, WEIGHTS), r"model\.safetensors is damaged or no safetensors"),
    "missing": (lambda f: changed(f, lambda t: t.pop(UP)), rf"{UP} is missing"),
    "many missing": (
        lambda f: changed(f, lambda t: [t.pop(n) for n in list(t) if ".mixer." in n]),
        r"backbone\.layers\.0\.mixer\.A_log \(and \d+ more\) is missing",
    ),
    "unknown": (
        lambda f: changed(f, lambda t: t.update({"backbone.rotary": torch.ones(3)})),
        r"backbone\.rotary has no place",
    ),
    "shape": (
        lambda f: changed(f, lambda t: t.update({"backbone.norm_f.weight": torch.ones(31)})),
        r"model\.safetensors: backbone\.norm_f\.weight is \[31\], where config\.json asks for \[32\]",
    ),
    "half a pair": (
        lambda f: changed(f, lambda t: t.update({UP: torch.zeros(32, 8, dtype=torch.uint8)})),
        rf"{UP} has no {UP}_scale",
    ),
    "wrong block scales": (
        lambda f: changed(
            f,
            lambda t: t.update(
                {
                    UP: torch.zeros(32, 8, dtype=torch.uint8),
                    f"{UP}_scale": torch.zeros(32, 2).to(torch.float8_e4m3fn),
                    f"{UP}_scale_2": torch.ones(()),
                }
            ),
        ),
        r"with \[32, 2\] block scales",
    ),
    "two global scales": (
        lambda f: changed(
            f, lambda t: t.update({**to_modelopt(UP, nvfp4.quantize(t[UP])), f"{UP}_scale_2": torch.ones(2)})
        ),
        rf"{UP}_scale_2 has \[2\] numbers",
    ),
    "a scale of nothing": (
        lambda f: changed(f, lambda t: t.update({f"{UP}_scale": torch.ones(())})),
        rf"{UP} has a strange {UP}_scale",
    ),
    "packed and plain": (
        lambda f: changed(f, lambda t: t.update(to_compressed(UP, nvfp4.quantize(t[UP])))),
        rf"{UP}_packed has a strange {UP}",
    ),
    "another FP8": (
        lambda f: changed(f, lambda t: t.update({UP: t[UP].to(torch.float8_e5m2), f"{UP}_scale": torch.ones(())})),
        rf"{UP} is torch\.float8_e5m2",
    ),
    "integers": (
        lambda f: changed(f, lambda t: t.update({UP: torch.zeros(32, 16, dtype=torch.int32)})),
        rf"{UP} is torch\.int32",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "unknown letter": (
        lambda f: reconfigured(f, hybrid_override_pattern="MX*"),
        r"config\.json: .*hybrid_override_pattern 'MX\*': use the letters M, \*, E, -",
    ),
    "unknown word": (
        lambda f: reconfigured(f, hybrid_override_pattern=None, layers_block_type=["mamba", "hyena"]),
        r"config\.json: .*layers_block_type has 'hyena'",
    ),
    "no pattern": (lambda f: reconfigured(f, hybrid_override_pattern=None), r"config\.json: .*hybrid_override_pattern"),
    "wrong type": (lambda f: reconfigured(f, hidden_size="wide"), r"config\.json: hidden_size"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: an object is expected, not list"),
    "words that are none": (
        lambda f: reconfigured(f, hybrid_override_pattern=None, layers_block_type=[["mamba"]]),
        r"config\.json: layers_block_type has \['mamba'\]",
    ),
    "no heads": (lambda f: reconfigured(f, num_key_value_heads=0), r"config\.json: num_key_value_heads"),
    "too many experts": (lambda f: reconfigured(f, num_experts_per_tok=9), r"config\.json: .*9 experts a token"),
    "tied": (lambda f: reconfigured(f, tie_word_embeddings=True), r"config\.json: .*tie_word_embeddings = True"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_corrupt_or_foreign_checkpoint_is_refused_by_file_and_tensor(folder, damage):
    harm, named = DAMAGE[damage]
    harm(folder)
    with pytest.raises(CheckpointError, match=named) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "trap").exists()


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


SHARDS = {
    "a file that is gone": (lambda f: (f / "model-00002-of-00006.safetensors").unlink(), r"model-00002.* is missing"),
    "a truncated file": (
        lambda f: (f / "model-00002-of-00006.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{"),
        r"model-00002.* is damaged",
    ),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("["), r"index\.json is damaged"),
    "an index without a map": (lambda f: (f / INDEX).write_text("{}"), r"index\.json is damaged"),
    "a tensor elsewhere": (
        lambda f: (f / INDEX).write_text(
            json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00006.safetensors"}})
        ),
        r"model-00001.* (lacks|holds) \S+, unlike what",
    ),
    "a tensor too many": (
        lambda f: (f / INDEX).write_text(
            json.dumps({"weight_map": {n: file for n, file in index_of(f).items() if not n.startswith("mtp.")}})
        ),
        r"holds mtp\.",
    ),
    "files of two checkpoints": (
        lambda f: save_file(
            load_file(f / "model-00002-of-00006.safetensors"),
            f / "model-00002-of-00006.safetensors",
            {"tokenizer_sha256": "other"},
        ),
        r"model-00002.*: its tokenizer_sha256 is 'other'|another file's 'other'",
    ),
    "a file outside": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../x.safetensors"}})),
        r"index\.json is damaged .*outside the folder",
    ),
}


@pytest.mark.parametrize("damage", SHARDS)
def test_damage_to_one_of_many_files_is_refused_by_its_name(sharded, damage):
    assert (sharded / "model-00005-of-00006.safetensors").exists()
    harm, named = SHARDS[damage]
    harm(sharded)
    with pytest.raises(CheckpointError, match=named):
        load(sharded)


def test_a_bf16_model_goes_on_from_a_cache(folder):
    model = load(folder, torch.bfloat16)
    ids = torch.randint(0, 64, (2, 9))
    cache = Cache.empty(CONFIG, 2, 16)
    with torch.no_grad():
        whole = model(ids)
        model(ids[:, :6], None, cache)
        steps = torch.cat([model(ids[:, at : at + 1], None, cache) for at in range(6, 9)], 1)
    assert float((steps - whole[:, 6:]).norm() / whole[:, 6:].norm()) < 0.02


def test_no_more_than_a_file_and_a_tensor_is_held_while_writing(tmp_path):
    alive, most = weakref.WeakSet(), 0

    def tensors():
        nonlocal most
        for at in range(12):
            tensor = torch.zeros(1000)
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"t{at}", tensor

    write(tmp_path, tensors(), {}, 4 * 4000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert most <= 6


def test_a_head_that_another_program_dropped_is_missed_once(folder):
    changed(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.")])
    with pytest.warns(UserWarning, match="has lost its multi-token-prediction head"):
        model = load(folder)
    assert model.mtp is None
    assert model.config.num_nextn_predict_layers == 0


def test_a_folder_that_cannot_be_written_is_named_and_what_was_there_stays(folder, tmp_path):
    before = (folder / WEIGHTS).read_bytes()
    torch.manual_seed(1)
    with pytest.raises(OSError, match="cannot write checkpoint"):
        save(Hybrid(CONFIG), Path("/proc/model"))

    class Broken(Exception):
        pass

    model = Hybrid(CONFIG)
    model.state_dict = lambda: (_ for _ in ()).throw(Broken())
    with pytest.raises(Broken):
        save(model, folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
