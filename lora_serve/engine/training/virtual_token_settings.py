"""Settings of the methods that train virtual tokens; names and defaults are PEFT's.

prompt tuning    their embeddings, before every sequence                                  Lester et al. 2021
P-tuning         the same, computed by an encoder whose parameters are trained            Liu et al. 2021
prefix tuning    their keys and values in every layer, or a projection that computes them Li, Liang 2021
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lora_serve.adapters.adapter import BaseShape
from lora_serve.engine.training.table_encoder import TableEncoder
from lora_serve.engine.training.trainable_layout import TrainableLayout
from lora_serve.engine.training.training_settings import check_seed
from lora_serve.errors import BadRequest

MAX_VIRTUAL_TOKENS = 1024
MAX_LSTM_LAYERS = 4  # of them every token is a step that waits for the one before
LSTM_LAYERS = 2  # PEFT's default; its MLP has no other number
MAX_WORK = (
    1 << 33
)  # multiplications of an encoder, which computes between two steps of serving: at most two seconds on two cores
PROMPT_INITIALISATIONS = ("RANDOM", "SAMPLE_VOCAB")
ENCODERS = ("MLP", "LSTM")
_HIDDEN, _LAYERS = "encoder_hidden_size", "encoder_num_layers"


@dataclass(frozen=True)
class PromptTuningSettings:
    """Prompt tuning, as in PEFT's `PromptTuningConfig`.

    Attributes:
        prompt_tuning_init: "RANDOM" (normal) or "SAMPLE_VOCAB" (embeddings of random tokens).
        seed: of the initialisation.
    """

    SIZED_BY: ClassVar = "num_virtual_tokens"

    num_virtual_tokens: int
    prompt_tuning_init: str = "RANDOM"
    seed: int = 0

    def layout(self, base: BaseShape) -> TrainableLayout:
        """The adapter's parts. Raises BadRequest naming the field that does not fit."""
        check_seed(self.seed)
        _check_virtual_tokens(self.num_virtual_tokens)
        if self.prompt_tuning_init not in PROMPT_INITIALISATIONS:
            raise BadRequest(
                f"prompt_tuning_init {self.prompt_tuning_init!r} is none of {', '.join(PROMPT_INITIALISATIONS)}",
                param="prompt_tuning_init",
            )
        return TrainableLayout.of_virtual_tokens(self.num_virtual_tokens, base.hidden_size)

    def peft_config(self, token_dim: int) -> dict[str, Any]:
        """The adapter's `adapter_config.json`."""
        return {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "token_dim": token_dim,
            "prompt_tuning_init": self.prompt_tuning_init,
        }


@dataclass(frozen=True)
class PTuningSettings:
    """P-tuning, as in PEFT's `PromptEncoderConfig`.

    Attributes:
        encoder_reparameterization_type: "MLP" or "LSTM".
        encoder_hidden_size: 0: as wide as the base's hidden states.
        encoder_num_layers: of the LSTM.
        encoder_dropout: 0; others are not trained.
        seed: of the initialisation.
    """

    SIZED_BY: ClassVar = "encoder_hidden_size"

    num_virtual_tokens: int
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int = 0
    encoder_num_layers: int = LSTM_LAYERS
    encoder_dropout: float = 0.0
    seed: int = 0

    def layout(self, base: BaseShape) -> TrainableLayout:
        """The adapter's parts. Raises BadRequest naming the field that does not fit."""
        check_seed(self.seed)
        _check_virtual_tokens(self.num_virtual_tokens)
        kind, layers, width = self.encoder_reparameterization_type, self.encoder_num_layers, base.hidden_size
        if kind not in ENCODERS:
            raise BadRequest(
                f"encoder_reparameterization_type {kind!r} is none of {', '.join(ENCODERS)}",
                param="encoder_reparameterization_type",
            )
        if self.encoder_dropout != 0:
            raise BadRequest("dropout in the encoder is not trained; encoder_dropout is 0", param="encoder_dropout")
        if kind == "MLP" and layers != LSTM_LAYERS:
            raise BadRequest("encoder_num_layers is of the LSTM; PEFT's MLP has no other number", param=_LAYERS)
        if not 0 < layers <= MAX_LSTM_LAYERS:
            raise BadRequest(f"{layers} layers of an LSTM are not trained; 1 to {MAX_LSTM_LAYERS} are", param=_LAYERS)
        hidden = _encoder_width(self.encoder_hidden_size, width)
        if kind == "LSTM":
            encoder = TableEncoder.lstm(self.num_virtual_tokens, width, hidden, layers)
        else:
            encoder = TableEncoder.mlp(self.num_virtual_tokens, width, hidden)
        _check_work(encoder)
        return TrainableLayout.of_virtual_tokens(self.num_virtual_tokens, width, encoder)

    def peft_config(self, token_dim: int) -> dict[str, Any]:
        """The adapter's `adapter_config.json`."""
        return {
            "peft_type": "P_TUNING",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "token_dim": token_dim,
            "encoder_reparameterization_type": self.encoder_reparameterization_type,
            "encoder_hidden_size": _encoder_width(self.encoder_hidden_size, token_dim),
            "encoder_num_layers": self.encoder_num_layers,
            "encoder_dropout": self.encoder_dropout,
        }


@dataclass(frozen=True)
class PrefixTuningSettings:
    """Prefix tuning, as in PEFT's `PrefixTuningConfig`.

    Attributes:
        prefix_projection: train a projection that computes keys and values.
        encoder_hidden_size: of the projection; 0: as wide as the keys of a layer.
        seed: of the initialisation.
    """

    SIZED_BY: ClassVar = "num_virtual_tokens"

    num_virtual_tokens: int
    prefix_projection: bool = False
    encoder_hidden_size: int = 0
    seed: int = 0

    def layout(self, base: BaseShape) -> TrainableLayout:
        """The adapter's parts. Raises BadRequest if it does not fit the base."""
        check_seed(self.seed)
        _check_virtual_tokens(self.num_virtual_tokens)
        if len(set(base.kv)) != 1 or base.kv[0][1] != base.kv[0][2]:
            raise BadRequest(
                "prefix tuning needs layers with keys and values of one shape; this base's differ", param="peft_type"
            )
        (heads, dim, _), layers, tokens = base.kv[0], len(base.kv), self.num_virtual_tokens
        encoder = None
        if self.prefix_projection:
            hidden, width = _encoder_width(self.encoder_hidden_size, heads * dim), heads * dim
            encoder = TableEncoder.projection(tokens, width, hidden, layers * 2 * width)
            _check_work(encoder)
        elif self.encoder_hidden_size:
            raise BadRequest("encoder_hidden_size is of the projection: set prefix_projection", param=_HIDDEN)
        return TrainableLayout.of_prefix(tokens, layers, heads, dim, encoder)

    def peft_config(self, layers: int, heads: int, dim: int) -> dict[str, Any]:
        """The adapter's `adapter_config.json`; `layers`, `heads` and `dim` are those of the base's keys and values."""
        return {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "token_dim": heads * dim,
            "num_attention_heads": heads,
            "num_layers": layers,
            "prefix_projection": self.prefix_projection,
            "encoder_hidden_size": _encoder_width(self.encoder_hidden_size, heads * dim),
        }


def _check_virtual_tokens(count: int) -> None:
    if not 0 < count <= MAX_VIRTUAL_TOKENS:
        raise BadRequest(
            f"{count} virtual tokens are not trained; 1 to {MAX_VIRTUAL_TOKENS} are", param="num_virtual_tokens"
        )


def _encoder_width(given: int, default: int) -> int:
    if given < 0:
        raise BadRequest(f"an encoder of width {given} is none", param=_HIDDEN)
    return given or default


def _check_work(encoder: TableEncoder) -> None:
    """Raise BadRequest for an encoder that would keep the streams beside it waiting."""
    if encoder.work > MAX_WORK:
        raise BadRequest(
            f"an encoder of {encoder.size} parameters is not trained for {encoder.tokens} virtual tokens, only one of "
            f"at most {MAX_WORK // encoder.tokens}; make encoder_hidden_size smaller",
            param=_HIDDEN,
        )
