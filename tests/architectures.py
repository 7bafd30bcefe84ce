"""Small bases of every kind: their own names, norms, positions, heads, latents, experts and routers."""

from __future__ import annotations

from typing import Any, NamedTuple

from support import COMMON
from transformers import (
    Cohere2Config,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LongcatFlashConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    SmolLM3Config,
    Starcoder2Config,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]


class Architecture(NamedTuple):
    """A small base, and what its modules are called.

    Attributes:
        linear: all its linear modules but the head.
        stacked: parameters of its experts.
        router: parameters of its routers.
    """

    config: PretrainedConfig
    linear: list[str]
    norms: list[str] = NORMS
    embedding: str = "embed_tokens"
    stacked: tuple[str, ...] = ()
    router: tuple[str, ...] = ()

    @property
    def alone(self) -> list[str]:
        """Linear modules whose names PEFT does not take for those of the experts."""
        return [name for name in self.linear if not (self.stacked and name in GATED)]


MLA: dict[str, Any] = {
    **COMMON, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LATENT_NORMS = ["q_a_layernorm", "kv_a_layernorm", *NORMS]

BASES: dict[str, Architecture] = {
    "cohere": Architecture(
        CohereConfig(**COMMON, use_qk_norm=True), [*ATTENTION, *GATED], ["input_layernorm", "q_norm", "k_norm", "norm"]
    ),
    "cohere2": Architecture(
        Cohere2Config(**COMMON, head_dim=16, sliding_window=6, layer_types=WINDOWS),
        [*ATTENTION, *GATED],
        ["input_layernorm", "norm"],
    ),
    "starcoder2": Architecture(Starcoder2Config(**COMMON, sliding_window=6), [*ATTENTION, "c_fc", "c_proj"]),
    "olmo2": Architecture(
        Olmo2Config(**COMMON),
        [*ATTENTION, *GATED],
        ["q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm", "norm"],
    ),
    "granite": Architecture(
        GraniteConfig(
            **COMMON, embedding_multiplier=2.0, logits_scaling=1.7, residual_multiplier=0.6, attention_multiplier=0.2
        ),
        [*ATTENTION, *GATED],
    ),
    "glm4": Architecture(
        Glm4Config(**COMMON, head_dim=16, partial_rotary_factor=0.5),
        [*ATTENTION, "gate_up_proj", "down_proj"],
        ["post_self_attn_layernorm", "post_mlp_layernorm", *NORMS],
    ),
    "smollm3": Architecture(SmolLM3Config(**COMMON, no_rope_layers=[1, 0, 1]), [*ATTENTION, *GATED]),
    "gemma3": Architecture(
        Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=5, query_pre_attn_scalar=16, layer_types=WINDOWS),
        [*ATTENTION, *GATED],
        ["pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"],
    ),
    "gpt_oss": Architecture(
        GptOssConfig(
            **COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=5, layer_types=WINDOWS,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
        ATTENTION,
        stacked=EXPERTS,
        router=("mlp.router.weight",),
    ),
    "deepseek_v2": Architecture(
        DeepseekV2Config(**MLA, topk_method="greedy"), [*LATENT, *GATED], LATENT_NORMS, stacked=EXPERTS,
        router=("mlp.gate.weight",),
    ),
    "deepseek_v3": Architecture(
        DeepseekV3Config(**MLA), [*LATENT, *GATED], LATENT_NORMS, stacked=EXPERTS, router=("mlp.gate.weight",)
    ),
    "longcat_flash": Architecture(
        LongcatFlashConfig(
            vocab_size=96, hidden_size=64, ffn_hidden_size=96, expert_ffn_hidden_size=32, num_layers=2,
            num_attention_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, head_dim=8,
            v_head_dim=10, n_routed_experts=4, zero_expert_num=2, moe_topk=3, max_position_embeddings=128,
            bos_token_id=1, eos_token_id=2,
        ),
        [*LATENT, *GATED],
        LATENT_NORMS[:2],
        stacked=EXPERTS,
    ),
    "phi": Architecture(
        PhiConfig(**COMMON, partial_rotary_factor=0.5, qk_layernorm=True),
        ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
        ["q_layernorm", "k_layernorm", "input_layernorm", "final_layernorm"],
    ),
    "opt": Architecture(
        OPTConfig(
            vocab_size=96, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=32, do_layer_norm_before=False, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        ),
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"],
        ["self_attn_layer_norm", "final_layer_norm"],
    ),
    "gpt_neox": Architecture(
        GPTNeoXConfig(**COMMON, rotary_pct=0.5),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        NORMS[:2],
        "embed_in",
    ),
}  # fmt: skip
