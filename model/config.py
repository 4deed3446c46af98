"""The configuration of a hybrid model, under Hugging Face's keys for `nemotron_h`."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

QUANTISED = ("*.experts.up_proj", "*.experts.down_proj", "*.shared_experts.*", "*.mixer.up_proj", "*.mixer.down_proj",
             "*.mixer.in_proj")  # fmt: skip
FIXED = {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "tie_word_embeddings": False, "use_conv_bias": True,
         "n_shared_experts": 1, "use_bias": False, "mlp_bias": False, "mamba_proj_bias": False}  # fmt: skip
LETTERS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
WORDS = {word: letter for letter, word in LETTERS.items()} | {"mamba": "M", "attention": "*"}
"""Layer kinds as transformers spells them, newer and older."""
DEPTHS = 2
"""How many tokens beyond the next one the multi-token-prediction head foretells, unless a file says so."""


class ModelConfig(BaseModel):
    """Shapes of a model. `hybrid_override_pattern`: M Mamba-2, * attention, E LatentMoE, - MLP, a letter a layer.

    `num_nextn_predict_layers`: multi-token-prediction blocks, 0 or 1; the one is applied again at each of
    `mtp_depths` depths. `nvfp4`: patterns of module names whose weights are quantised. `hf_dt_clamp`: clamp
    Mamba's time step from below as transformers' prefill does (its own decoding does not); for parity tests.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    vocab_size: int = Field(default=2048, gt=0)
    hidden_size: int = Field(default=128, gt=0)
    hybrid_override_pattern: str
    num_attention_heads: int = Field(default=4, gt=0)
    num_key_value_heads: int = Field(default=2, gt=0)
    head_dim: int = Field(default=32, gt=0)
    mamba_num_heads: int = Field(default=4, gt=0)
    mamba_head_dim: int = Field(default=64, gt=0)
    ssm_state_size: int = Field(default=32, gt=0)
    n_groups: int = Field(default=1, gt=0)
    conv_kernel: int = Field(default=4, gt=0)
    chunk_size: int = Field(default=64, gt=0)
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    intermediate_size: int = Field(default=256, gt=0)
    n_routed_experts: int = Field(default=16, gt=0)
    num_experts_per_tok: int = Field(default=4, gt=0)
    moe_intermediate_size: int = Field(default=128, gt=0)
    moe_shared_expert_intermediate_size: int = Field(default=256, gt=0)
    moe_latent_size: int | None = None
    routed_scaling_factor: float = 1.0
    n_group: int = Field(default=1, gt=0)
    topk_group: int = Field(default=1, gt=0)
    norm_topk_prob: bool = True
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    max_position_embeddings: int = 4096
    bos_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int = 0
    num_nextn_predict_layers: int = Field(default=0, ge=0, le=1)
    mtp_hybrid_override_pattern: str = "*E"
    mtp_depths: int = Field(default=DEPTHS, ge=1)
    hf_dt_clamp: bool = False
    nvfp4: tuple[str, ...] = QUANTISED

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        for key in ("hybrid_override_pattern", "mtp_hybrid_override_pattern"):
            pattern = getattr(self, key)
            if set(pattern) - set(LETTERS) or not pattern:
                raise ValueError(f"{key} {pattern!r}: use the letters {', '.join(LETTERS)}")
        if "M" in self.mtp_hybrid_override_pattern:
            raise ValueError("mtp_hybrid_override_pattern: a prediction block has no Mamba layers")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(f"{self.num_experts_per_tok} experts a token are more than all {self.n_routed_experts}")
        if any(pattern.startswith("mtp.") for pattern in self.nvfp4):
            raise ValueError("nvfp4 names modules of the prediction head, which is never quantised")
        if self.num_attention_heads % self.num_key_value_heads or self.mamba_num_heads % self.n_groups:
            raise ValueError("attention heads must divide by KV heads, and Mamba heads by n_groups")
        return self

    @property
    def mamba_width(self) -> int:
        """Inner width of a Mamba-2 mixer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_width(self) -> int:
        """Channels of a Mamba-2 mixer's causal convolution."""
        return self.mamba_width + 2 * self.n_groups * self.ssm_state_size

    def quantises(self, module: str) -> bool:
        """Whether the module of that name runs on NVFP4 weights; the prediction head never does."""
        return not module.startswith("mtp.") and any(fnmatchcase(module, pattern) for pattern in self.nvfp4)

    def to_hf(self) -> dict[str, Any]:
        """config.json in the legacy style, which transformers, vLLM and remote-code readers all parse."""
        return {
            **self.model_dump(),
            "model_type": "nemotron_h",
            "architectures": ["NemotronHForCausalLM"],
            "num_hidden_layers": len(self.hybrid_override_pattern),
            **FIXED,
            "torch_dtype": "float32",
        }

    @classmethod
    def from_hf(cls, path: Path) -> ModelConfig:
        """Read a config.json, of the legacy style or with `layers_block_type`.

        Raises ValueError for what this network lacks.
        """
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict):
            raise ValueError(f"an object is expected, not {type(raw).__name__}")
        for key, words in (
            ("hybrid_override_pattern", "layers_block_type"),
            ("mtp_hybrid_override_pattern", "mtp_layers_block_type"),
        ):
            if raw.get(key) is None and isinstance(raw.get(words), list):
                raw[key] = "".join(_letter(word, words) for word in raw[words])
        unlike = sorted(key for key, value in FIXED.items() if raw.get(key, value) != value)
        if unlike:
            raise ValueError(f"this network has no {', '.join(f'{key} = {raw[key]!r}' for key in unlike)}")
        return cls(**raw)


def module_of(name: str) -> str:
    """The module that a weight belongs to, as patterns know it: without the number of an expert."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", name).removesuffix(".weight")


def _letter(word: Any, key: str) -> str:
    """A layer kind's letter. Raises ValueError for one that this network lacks."""
    if not isinstance(word, str) or word not in WORDS:
        raise ValueError(f"{key} has {word!r}, which is none of {', '.join(WORDS)}")
    return WORDS[word]
