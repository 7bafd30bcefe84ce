"""From a client's `lora_config` to the settings of a training run."""

from __future__ import annotations

import zlib

from lora_serve.api.tinker.tinker_bodies import LoraBody
from lora_serve.errors import BadRequest
from lora_serve.training_messages import RunSettings

ALPHA = 32.0  # Tinker's, whatever the rank
# Parts of paths of modules, as bases of transformers have them; only linear modules are adapted.
ATTENTION = r".*\.(self_attn|attn|attention|self_attention|linear_attn)\..*"
MLP = r".*\.(mlp|feed_forward|ffn|block_sparse_moe|moe|shared_expert|fc1|fc2|dense_h_to_4h|dense_4h_to_h)(\..*)?"


def run_settings(lora: LoraBody, model_id: str) -> RunSettings:
    """The adapter that is asked for; `train_unembed` adapts the LM head, and no tied embedding. Raises `BadRequest`.

    Args:
        model_id: the seed, where none is given, so that the same model is made again after a restart.
    """
    if lora.train_mlp and lora.train_attn:
        targets = "all-linear"
    elif lora.train_mlp or lora.train_attn:
        targets = MLP if lora.train_mlp else ATTENTION
    else:
        raise BadRequest("train_mlp or train_attn is needed: an adapter of the LM head alone is not trained")
    seed = zlib.crc32(model_id.encode()) if lora.seed is None else lora.seed
    return RunSettings(
        r=lora.rank,
        lora_alpha=ALPHA,
        target_modules=targets,
        train_lm_head=lora.train_unembed,
        seed=seed & 0x7FFF_FFFF,
    )
