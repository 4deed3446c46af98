"""The multi-token-prediction head against a plain version of its own, written from the names on disk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from palaestra.model import load, save
from palaestra.model.config import ModelConfig
from palaestra.model.network import Hybrid

CONFIG = ModelConfig(
    hybrid_override_pattern="M*",
    vocab_size=64,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=48,
    moe_latent_size=16,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
)
NAMES = {
    "mtp.layers.0.enorm.weight": [32],
    "mtp.layers.0.hnorm.weight": [32],
    "mtp.layers.0.eh_proj.weight": [32, 64],
    "mtp.layers.0.norm.weight": [32],
    "mtp.layers.0.mixer.q_proj.weight": [32, 32],
    "mtp.layers.0.mixer.k_proj.weight": [16, 32],
    "mtp.layers.0.mixer.v_proj.weight": [16, 32],
    "mtp.layers.0.mixer.o_proj.weight": [32, 32],
    "mtp.layers.1.norm.weight": [32],
    "mtp.layers.1.mixer.gate.weight": [4, 32],
    "mtp.layers.1.mixer.gate.e_score_correction_bias": [4],
    **{f"mtp.layers.1.mixer.experts.{e}.up_proj.weight": [32, 16] for e in range(4)},
    **{f"mtp.layers.1.mixer.experts.{e}.down_proj.weight": [16, 32] for e in range(4)},
    "mtp.layers.1.mixer.shared_experts.up_proj.weight": [48, 32],
    "mtp.layers.1.mixer.shared_experts.down_proj.weight": [32, 48],
    "mtp.layers.1.mixer.fc1_latent_proj.weight": [16, 32],
    "mtp.layers.1.mixer.fc2_latent_proj.weight": [32, 16],
    "mtp.layers.1.final_layernorm.weight": [32],
}
"""As vLLM's NemotronHMTP and NeMo Automodel read them."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Hybrid(CONFIG).eval()
    for name, tensor in made.state_dict().items():
        if tensor.dim() >= 2 and "conv1d" not in name:
            tensor.normal_(std=0.7 * tensor.shape[-1] ** -0.5)
        elif "norm" in name or "bias" in name:
            tensor.add_(0.2 * torch.randn_like(tensor))
    return made


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.layer_norm_epsilon).sqrt() * weight


def squared(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (x @ up.T).relu().square() @ down.T


def attention(x: Tensor, w: dict[str, Tensor], at: str) -> Tensor:
    """One sequence [L, hidden], head by head."""
    q, k, v = (x @ w[f"{at}.{part}_proj.weight"].T for part in "qkv")
    mask = torch.full((len(x), len(x)), -torch.inf).triu(1)
    heads = []
    for head in range(4):
        mine, theirs = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        heads.append(torch.softmax(q[:, mine] @ k[:, theirs].T / 8**0.5 + mask, -1) @ v[:, theirs])
    return torch.cat(heads, -1) @ w[f"{at}.o_proj.weight"].T


def mixture(x: Tensor, w: dict[str, Tensor], at: str) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for token in x:
        scores = torch.sigmoid(w[f"{at}.gate.weight"] @ token)
        chosen = (scores + w[f"{at}.gate.e_score_correction_bias"]).topk(2).indices
        latent = w[f"{at}.fc1_latent_proj.weight"] @ token
        total = sum(
            scores[e] * squared(latent, w[f"{at}.experts.{e}.up_proj.weight"], w[f"{at}.experts.{e}.down_proj.weight"])
            for e in chosen.tolist()
        )
        rows.append(w[f"{at}.fc2_latent_proj.weight"] @ (total / scores[chosen].sum() * 2.5))
    shared = f"{at}.shared_experts"
    return torch.stack(rows) + squared(x, w[f"{shared}.up_proj.weight"], w[f"{shared}.down_proj.weight"])


def plain(w: dict[str, Tensor], hidden: Tensor, tokens: Tensor) -> Tensor:
    """One depth of one sequence: hidden [L, width], the tokens after them [L]."""
    first, last = "mtp.layers.0", "mtp.layers.1"
    embedded = norm(w["backbone.embeddings.weight"][tokens], w[f"{first}.enorm.weight"])
    x = torch.cat([embedded, norm(hidden, w[f"{first}.hnorm.weight"])], -1) @ w[f"{first}.eh_proj.weight"].T
    x = x + attention(norm(x, w[f"{first}.norm.weight"]), w, f"{first}.mixer")
    x = x + mixture(norm(x, w[f"{last}.norm.weight"]), w, f"{last}.mixer")
    return norm(x, w[f"{last}.final_layernorm.weight"])


@torch.no_grad()
def test_every_depth_is_the_one_block_again_on_what_the_depth_before_found(model):
    ids = torch.randint(0, 64, (3, 12))
    hidden = model.hidden(ids)
    found = model.further(ids, hidden)
    assert [list(part.shape) for part in found] == [[3, 11, 32], [3, 10, 32]]
    w = dict(model.state_dict())
    for row in range(3):
        one = plain(w, hidden[row, :-1], ids[row, 1:])
        two = plain(w, one[:-1], ids[row, 2:])
        torch.testing.assert_close(found[0][row], one, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(found[1][row], two, atol=5e-5, rtol=5e-5)


def test_its_names_and_shapes_are_the_published_ones_and_survive(model, tmp_path):
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name.startswith("mtp.")}
    assert found == NAMES
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_sequence_too_short_has_no_depths_and_a_model_without_a_head_says_so(model):
    assert model.further(torch.zeros(1, 1, dtype=torch.int64), model.hidden(torch.zeros(1, 1, dtype=torch.int64))) == []
    bare = Hybrid(CONFIG.model_copy(update={"num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match="no multi-token-prediction head"):
        bare.further(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, 32))
