"""Prompt tuning, P-tuning, CPT and multitask prompt tuning of one task: [E; e(prompt)], learned embeddings E first.

    keys: E = prompt_embeddings [tokens, hidden]; for multitask prompt tuning also
          prefix_task_cols P [tasks, tokens, rank], prefix_task_rows Q [tasks, rank, hidden]: the embeddings are E ⊙ P Q

PEFT saves the output of its encoders (the MLP or LSTM of P-tuning; CPT's token embeddings plus projected deltas), so
each method is one table at inference. It replaces the input embedding's output; the prompt's positions continue after
the virtual tokens. Source: PEFT 0.21, `peft/tuners/prompt_tuning`, `p_tuning`,
`cpt`, `multitask_prompt_tuning` and `peft_model.py`.
"""

from __future__ import annotations

from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride, Prefix
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats import virtual_tokens
from lora_serve.adapters.formats.keys import check_shape
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.virtual_tokens import TABLE
from lora_serve.errors import AdapterInvalid

# Fields of initialisation and training, per method.
PROMPT = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
P_TUNING = {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
CPT = {
    "cpt_mask", "cpt_tokens_type_mask", "tokenizer_name_or_path", "opt_weighted_loss_type", "opt_loss_decay_factor",
    "opt_projection_epsilon", "opt_projection_format_epsilon",
}  # fmt: skip
MULTITASK = PROMPT | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task", "num_ranks"}
COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower prompt tuning. Raises AdapterInvalid naming keys and fields."""
    tensors, overrides, features = virtual_tokens.read_tensors(checkpoint, base, without_effect=PROMPT)
    return _to_prefix("prompt tuning", checkpoint, base, tensors, overrides, features)


def lower_p_tuning(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower P-tuning, saved with its encoder applied. Raises AdapterInvalid naming keys and fields."""
    tensors, overrides, features = virtual_tokens.read_tensors(checkpoint, base, without_effect=P_TUNING)
    return _to_prefix("P-tuning", checkpoint, base, tensors, overrides, features)


def lower_cpt(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower CPT, saved with its deltas added. Raises AdapterInvalid naming keys and fields."""
    tensors, overrides, features = virtual_tokens.read_tensors(
        checkpoint, base, read={"cpt_token_ids"}, without_effect=CPT
    )
    ids = checkpoint.config.get("cpt_token_ids")
    if ids is not None and (not isinstance(ids, list) or len(ids) != tensors[TABLE].shape[0]):
        raise AdapterInvalid("cpt_token_ids in adapter_config.json is not one token id for each virtual token")
    return _to_prefix("CPT", checkpoint, base, tensors, overrides, features)


def lower_multitask(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower multitask prompt tuning of one task; several would need a task id per request. Raises AdapterInvalid."""
    tensors, overrides, features = virtual_tokens.read_tensors(
        checkpoint, base, read={"num_tasks"}, without_effect=MULTITASK
    )
    if checkpoint.config.get("num_tasks", 1) != 1:
        raise AdapterInvalid(
            "num_tasks in adapter_config.json is not 1: its prompt depends on a task id, which a request here does not "
            "have. Instead: upload one prompt tuning adapter a task: a PROMPT_TUNING configuration, and for task t as "
            f"{TABLE} model.get_prompt(1, task_ids=torch.tensor([t]))[0]."
        )
    table, columns, rows = tensors[TABLE], tensors.pop(COLUMNS, None), tensors.pop(ROWS, None)
    if columns is None or rows is None:
        raise AdapterInvalid(f"{COLUMNS} and {ROWS} of multitask prompt tuning are missing")
    rank = columns.shape[-1] if columns.ndim else 0
    check_shape(COLUMNS, columns, (1, table.shape[0], rank))
    check_shape(ROWS, rows, (1, rank, table.shape[1]))
    tensors[TABLE] = table.float() * (columns[0].float() @ rows[0].float())
    return _to_prefix("multitask prompt tuning", checkpoint, base, tensors, overrides, features)


def _to_prefix(
    method: str,
    checkpoint: Checkpoint,
    base: BaseShape,
    tensors: dict[str, Tensor],
    overrides: dict[str, ModuleOverride],
    features: list[str],
) -> Lowered:
    virtual_tokens.refuse_unknown_tensors(tensors, {TABLE})
    if base.input_embedding in overrides:
        # PEFT embeds the prompt with the original module, and what is generated after it with the replaced one.
        raise AdapterInvalid(f"{base.input_embedding} is replaced, which PEFT does not apply to prompts of {method}")
    table = tensors[TABLE]
    check_shape(TABLE, table, (table.shape[0], base.hidden_size))
    virtual_tokens.check_size(checkpoint.config, "token_dim", base.hidden_size)
    summary = report(
        checkpoint.config,
        base,
        method=method,
        overrides=overrides,
        features=features,
        lowered=[virtual_tokens.sharing_note(table.shape[0])],
    )
    return Lowered({}, summary, overrides, Prefix(table.shape[0], embeddings=table))
