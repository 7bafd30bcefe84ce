"""Sizes of well-known models: config, linear modules and weight tensors, without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama-style decoder. Sizes in elements; `model_type` as in Hugging Face's config."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    context: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of the linear modules of one layer, by name in the layer."""
        kv = self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }

    def tensors(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of a layer's weights, as Hugging Face saves them."""
        prefix = f"model.layers.{layer}"
        for name, (inputs, outputs) in self.linears().items():
            yield f"{prefix}.{name}.weight", (outputs, inputs)
            if self.qkv_bias and name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                yield f"{prefix}.{name}.bias", (outputs,)
        yield f"{prefix}.input_layernorm.weight", (self.hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)

    def ends(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the weights outside the layers."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self, eos: int) -> dict[str, Any]:
        """Hugging Face's config.json."""
        return {
            "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[self.model_type]],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": self.tied,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": eos,
            "use_cache": True,
        }


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a Llama-style decoder's config.json describes. Raises ValueError for another kind of model."""
    if config["model_type"] not in ("llama", "qwen2"):
        raise ValueError(f"the model is a {config['model_type']}; llama and qwen2 are known")
    shape = Shape(
        model_type=config["model_type"],
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=config["tie_word_embeddings"],
        qkv_bias=config["model_type"] == "qwen2",
        context=config["max_position_embeddings"],
        rope_theta=config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
    )
    if config.get("head_dim", shape.head_dim) != shape.head_dim:
        raise ValueError("the model's heads are not as wide as its hidden size divided by their number")
    return shape


SHAPES = {
    "tiny": Shape("qwen2", 4, 128, 4, 2, 384, 2048, True, True, 2048, 1e4),
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 14, 2, 4864, 151936, True, True, 32768, 1e6),
    "qwen2.5-1.5b": Shape("qwen2", 28, 1536, 12, 2, 8960, 151936, True, True, 32768, 1e6),
    "llama-3.1-8b": Shape("llama", 32, 4096, 32, 8, 14336, 128256, False, False, 131072, 5e5),
}
