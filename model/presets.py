"""Named sizes."""

from __future__ import annotations

from typing import Any

from palaestra.model.config import ModelConfig

PUBLISHED: dict[str, Any] = {
    "vocab_size": 131072,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "chunk_size": 128,
    "max_position_embeddings": 262144,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What Nemotron 3 Nano and Super have in common."""

PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(hybrid_override_pattern="ME*EMEME", moe_latent_size=64),
    "mini": ModelConfig(
        hybrid_override_pattern="MEM*EMEME",
        hidden_size=256,
        mamba_num_heads=8,
        ssm_state_size=64,
        n_groups=2,
        num_attention_heads=8,
        moe_latent_size=128,
        moe_intermediate_size=256,
        moe_shared_expert_intermediate_size=512,
    ),
    "small": ModelConfig(
        hybrid_override_pattern="MEMEM*EMEMEM*EMEME",
        hidden_size=384,
        mamba_num_heads=12,
        ssm_state_size=64,
        n_groups=2,
        num_attention_heads=12,
        num_key_value_heads=2,
        n_routed_experts=32,
        moe_latent_size=128,
        moe_intermediate_size=256,
        moe_shared_expert_intermediate_size=768,
    ),
    "base": ModelConfig(
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEME",
        hidden_size=768,
        mamba_num_heads=24,
        ssm_state_size=128,
        n_groups=8,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=64,
        n_routed_experts=64,
        num_experts_per_tok=6,
        moe_latent_size=256,
        moe_intermediate_size=512,
        moe_shared_expert_intermediate_size=1536,
    ),
    "nano-30b": ModelConfig(
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        hidden_size=2688,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        intermediate_size=1856,
        routed_scaling_factor=2.5,
        mamba_num_heads=64,
        **PUBLISHED,
    ),
    "super-120b": ModelConfig(
        hybrid_override_pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
        hidden_size=4096,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_latent_size=1024,
        moe_intermediate_size=2688,
        moe_shared_expert_intermediate_size=5376,
        intermediate_size=2688,
        routed_scaling_factor=5.0,
        mamba_num_heads=128,
        num_nextn_predict_layers=1,
        **PUBLISHED,
    ),
}


def preset(name: str) -> ModelConfig:
    """The configuration of that name. Raises KeyError naming the presets."""
    if name not in PRESETS:
        raise KeyError(f"there is no preset {name!r}; the presets are: {', '.join(PRESETS)}")
    return PRESETS[name]
