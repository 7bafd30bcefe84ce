"""The adapter that a fine-tuning job trains, in PEFT's words: `lora`, or `peft` with any method that is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from lora_serve.api.openai.schemas import Few, Strict
from lora_serve.training_messages import RunSettings

MOST_MODULES = 10_000
WIDEST = 65_536  # of an encoder

Module = Annotated[str, Field(min_length=1, max_length=500)]
ModuleNames = Annotated[list[Module], Field(max_length=MOST_MODULES, fail_fast=True)]
Modules = Module | Annotated[ModuleNames, Field(min_length=1)]
Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[float, Field(gt=0, le=1e6)]
VirtualTokens = Annotated[int, Field(ge=1, le=1024)]
EncoderWidth = Annotated[int, Field(ge=1, le=WIDEST)]


class LoraOptions(Strict):
    """A LoRA adapter; `target_modules`: names of modules, an expression, or "all-linear"."""

    r: Rank | None = None
    lora_alpha: Alpha | None = None
    target_modules: Modules | None = None
    rank_pattern: Annotated[dict[str, Rank], Few] | None = None
    alpha_pattern: Annotated[dict[str, Alpha], Few] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"] | None = None
    train_lm_head: bool | None = Field(None, description="adapt the LM head beside target_modules")


class PeftLoraOptions(LoraOptions):
    """The same, with its type."""

    peft_type: Literal["LORA"]


class PeftIa3Options(Strict):
    """IA³: gains of modules' outputs, or of the inputs of `feedforward_modules`."""

    peft_type: Literal["IA3"]
    target_modules: Modules | None = None
    feedforward_modules: Module | ModuleNames | None = None


class PeftPromptTuningOptions(Strict):
    """Prompt tuning: embeddings of virtual tokens."""

    peft_type: Literal["PROMPT_TUNING"]
    num_virtual_tokens: VirtualTokens
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB"] | None = None


class PeftPTuningOptions(Strict):
    """P-tuning: embeddings of virtual tokens, which an encoder computes."""

    peft_type: Literal["P_TUNING"]
    num_virtual_tokens: VirtualTokens
    encoder_reparameterization_type: Literal["MLP", "LSTM"] | None = None
    encoder_hidden_size: EncoderWidth | None = Field(None, description="default: the base's")
    encoder_num_layers: Annotated[int, Field(ge=1, le=4)] | None = Field(None, description="of the LSTM")
    encoder_dropout: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="none is trained")


class PeftPrefixTuningOptions(Strict):
    """Prefix tuning: keys and values of virtual tokens, or a projection that computes them."""

    peft_type: Literal["PREFIX_TUNING"]
    num_virtual_tokens: VirtualTokens
    prefix_projection: bool | None = None
    encoder_hidden_size: EncoderWidth | None = Field(None, description="of the projection; default: that of the keys")


PeftOptions = Annotated[
    PeftLoraOptions | PeftIa3Options | PeftPromptTuningOptions | PeftPTuningOptions | PeftPrefixTuningOptions,
    Field(discriminator="peft_type"),
]
BEGIN_AS_THE_BASE = (PeftLoraOptions, PeftIa3Options)  # before they have learnt anything
_OF_METHOD: dict[str, type[Strict]] = {
    "LORA": PeftLoraOptions,
    "IA3": PeftIa3Options,
    "PROMPT_TUNING": PeftPromptTuningOptions,
    "P_TUNING": PeftPTuningOptions,
    "PREFIX_TUNING": PeftPrefixTuningOptions,
}


def shown_settings(settings: RunSettings) -> dict[str, Any]:
    """The fields of a run's method, and its seed."""
    own = {*_OF_METHOD[settings.peft_type].model_fields, "seed"}
    return {name: value for name, value in msgspec.to_builtins(settings).items() if name in own}
