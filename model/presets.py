"""Named sizes."""

from __future__ import annotations

from palaestra.model.config import ModelConfig

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
}


def preset(name: str) -> ModelConfig:
    """The configuration of that name. Raises KeyError naming the presets."""
    if name not in PRESETS:
        raise KeyError(f"there is no preset {name!r}; the presets are: {', '.join(PRESETS)}")
    return PRESETS[name]
