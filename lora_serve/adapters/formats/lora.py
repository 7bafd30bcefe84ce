"""LoRA: y = W x + s · B(A x), and the variants that PEFT saves with `peft_type` LORA.

    s = α/r, or α/√r with `use_rslora`; `rank_pattern` and `alpha_pattern` override r and α by module name
    keys: X.lora_A.weight [r, in], X.lora_B.weight [out, r], below base_model.model.; Conv1D modules keep these shapes

    lora_bias            X.lora_B.bias: + s · bias
    DoRA                 X.lora_magnitude_vector: `dora.py`
    embeddings           X.lora_embedding_A [r, ids], X.lora_embedding_B [dim, r]: `embedding.py`
    PiSSA, OLoRA, KaSA   the base is changed as well: `residual.py`
    experts              `target_parameters`, and adapters of experts that were not stacked: `moe.py`
    BD-LoRA              A [r, in / n] or B [out, r / n], n blocks on the diagonal of the full matrix
    aLoRA                active from the last occurrence of its invocation tokens on: `alora.py`
    MiCA, VeLoRA, MonteCLoRA, EVA, orthogonal    plain LoRA at inference

Source: PEFT 0.21, `peft/tuners/lora`. A field that would change the result and is not supported is refused by
name; one that cannot matter at inference is ignored; an unknown one is refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride, Site
from lora_serve.adapters.checkpoint import Checkpoint, shorten
from lora_serve.adapters.formats import alora, dora, embedding, factors, moe, residual, saved, targets
from lora_serve.adapters.formats.budget import ElementBudget
from lora_serve.adapters.formats.fields import Config, Patterns, check_fields, name_list, number
from lora_serve.adapters.formats.keys import check_delta, check_shape, group_by_module
from lora_serve.adapters.formats.refusals import FIELDS, refuse_fields, refuse_initialisation
from lora_serve.adapters.formats.report import report
from lora_serve.adapters.formats.untrained import leave_out_untrained
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta

READ = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias", "lora_bias",
    "use_dora", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_bdlora", "kasa_config",
}  # fmt: skip
# Fields of training and initialisation; their effect is in the weights.
WITHOUT_EFFECT = {
    "lora_dropout", "merge_weights", "megatron_core", "runtime_config", "eva_config", "corda_config", "lora_ga_config",
    "loftq_config", "velora_config", "monteclora_config", "qalora_group_size",
}  # fmt: skip
TAILS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_diag": "diagonal",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
}
VECTORS = ("bias", "magnitude", "diagonal")
TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler.")  # state of samplers and estimators


class Scaling:
    """The scaling s of each module, from the configuration."""

    def __init__(self, config: Config) -> None:
        self._ranks = Patterns(config, "rank_pattern")
        self._alphas = Patterns(config, "alpha_pattern")
        self._rank, self._alpha = number(config, "r", 8), number(config, "lora_alpha", 8)
        self._root = bool(config.get("use_rslora"))
        self._decomposed = {"PiSSA", "OLoRA"} & {*residual.methods(config)}

    def of(self, name: str, rank: int, shape: tuple[int, ...]) -> float:
        """s of a module whose matrices have `rank`. Raises AdapterInvalid if the configuration gives another rank.

        Args:
            shape: of its weight; matrices that are a part of it have no higher rank, whatever is configured.
        """
        configured = self._ranks.get(name, self._rank)
        if rank != (min((configured, *shape)) if self._decomposed else configured):
            raise AdapterInvalid(f"{name} has rank {rank} in the weights and {configured:g} in adapter_config.json")
        alpha = self._alphas.get(name, self._alpha)
        return alpha / math.sqrt(configured) if self._root else alpha / configured


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Lower to deltas and overrides, scaling folded into B. Raises AdapterInvalid naming keys and fields."""
    config = checkpoint.config
    _check_fields(config)
    scaling = Scaling(config)
    budget = ElementBudget(checkpoint.most_elements)
    saved_parameters = saved.split_saved(
        config, residual.with_reduced_tables(config, checkpoint.tensors, scaling.of, base), base
    )
    tensors = {
        key: tensor for key, tensor in saved_parameters.rest.items() if not any(part in key for part in TRAINING_ONLY)
    }
    tensors, untrained = leave_out_untrained(tensors, base)
    experts = moe.split_experts(config, tensors, base, scaling.of)
    found = group_by_module(experts.rest, base, TAILS, lambda name: name in base.sites or name in base.embeddings)
    _check_consistency(config, found)
    for name, matrices in found.items():
        malformed = [matrix for matrix, tensor in matrices.items() if tensor.ndim != (1 if matrix in VECTORS else 2)]
        if malformed:
            raise AdapterInvalid(f"{name} has {', '.join(malformed)} with an impossible number of dimensions")
    deltas, overrides = dict(experts.deltas), dict(saved_parameters.overrides)
    for name, parameters in experts.parameters.items():
        override = overrides.get(name, ModuleOverride())
        overrides[name] = replace(override, parameters=override.parameters | parameters)
    features = [*_features(config), *experts.features, *saved_parameters.features]
    if residual.is_residual(config):  # of which replaced weights are a part
        features = [feature for feature in features if feature != "replaced base weights"]
    for name, matrices in found.items():
        override = overrides.get(name, ModuleOverride())
        if name in base.embeddings:
            overrides[name] = embedding.lower(name, matrices, override, scaling.of, base)
            features.append("embedding")
            continue
        has_own_weight = name in saved_parameters.own
        delta, override = _lower_linear(
            base.sites[name], matrices, override, has_own_weight, config, scaling, base, budget
        )
        if delta is not None:
            deltas[name] = delta
        if override != ModuleOverride():
            overrides[name] = override
    invocation = alora.invocation(config, base)
    if invocation:
        alora.check(config, saved_parameters.overrides, found, base)
    deltas, overrides = factors.fold_head_delta(deltas, overrides, base)
    deltas = {name: deltas[name] for name in base.sites if name in deltas}
    notes = [*experts.lowered, *untrained, *_lowering_notes(config, base)]
    summary = report(
        config,
        base,
        method="LoRA",
        deltas=deltas,
        overrides=overrides,
        features=list(dict.fromkeys(features)),
        lowered=notes,
    )
    return Lowered(deltas, summary, overrides, invocation=invocation)


def _lower_linear(
    site: Site,
    matrices: dict[str, Tensor],
    override: ModuleOverride,
    has_own_weight: bool,
    config: Config,
    scaling: Scaling,
    base: BaseShape,
    budget: ElementBudget,
) -> tuple[Delta | None, ModuleOverride]:
    """The delta and the override of one linear site; no delta if the adapter replaces the whole weight.

    Args:
        has_own_weight: whether the site's own weight was saved with the adapter.
    """
    if not {"A", "B"} <= matrices.keys():
        raise AdapterInvalid(f"only one of lora_A and lora_B is there for {site.name}")
    a, b = _lay_out_blocks(site, matrices["A"].float(), matrices["B"].float(), config, budget)
    rank, dtype = matrices["A"].shape[0], matrices["A"].dtype
    is_parameter = targets.ends_with(f"{site.name}.weight", frozenset(name_list(config, "target_parameters")))
    residual.check(site, override, config, base)
    if is_parameter and site.transposed:
        a, b = b.T, a.T
    factor = scaling.of(
        f"{site.name}.weight" if is_parameter else site.name, rank, (site.in_features, site.out_features)
    )
    replacement = override.parameters.get("weight")
    check_delta(site if replacement is None else replace(site, out_features=replacement.shape[0]), a, b)
    b = b * factor
    if (diagonal := matrices.get("diagonal")) is not None:
        check_shape(f"{site.name}.lora_diag", diagonal, (a.shape[0],))
        b = b * diagonal.float()
    bias = matrices.get("bias")
    if bias is not None and "magnitude" in matrices:
        raise AdapterInvalid("lora_bias with use_dora in adapter_config.json is not defined")
    if bias is not None and override.token_rows is not None:
        raise AdapterInvalid("lora_bias on a head together with trainable_token_indices of its rows is not served")
    if bias is not None:
        check_shape(f"{site.name}.lora_B.bias", bias, (b.shape[0],))
        bias = bias.float() * factor
    if residual.is_residual(config) and not has_own_weight:
        a, b = residual.subtract(site, a, b, rank, factor, config, base, is_parameter=is_parameter)
        dtype = a.dtype
    gain = None
    if "magnitude" in matrices:
        if override.token_rows is not None:
            raise AdapterInvalid("use_dora on a head together with trainable_token_indices is not defined")
        weight = base.weight(site.name).cpu() if replacement is None else replacement
        gain = dora.gain(site.name, matrices["magnitude"], weight.float(), b @ a)
        base_bias = base.bias(site.name)
        if base_bias is not None and replacement is None:
            override = saved.add_shift(override, base_bias.float().cpu() * (1 - gain))
    if bias is not None:
        override = saved.add_shift(override, bias)
    if replacement is not None:  # the weight is replaced anyway (resized vocabulary): merge the delta into it
        if site.transposed:
            raise AdapterInvalid(
                f"{site.name}, a Conv1D, is replaced whole and adapted as well; only one can be served"
            )
        merged = replacement.float() + b @ a
        merged = merged if gain is None else gain[:, None] * merged
        if override.token_rows is not None:
            override = replace(override, token_rows=override.token_rows.float() + b[list(override.token_ids)] @ a)
        return None, replace(override, parameters=override.parameters | {"weight": merged})
    delta = Delta(a.to(dtype), b.T.contiguous())
    return delta, override if gain is None else replace(override, gain_out=gain)


def _lay_out_blocks(site: Site, a: Tensor, b: Tensor, config: Config, budget: ElementBudget) -> tuple[Tensor, Tensor]:
    """A and B with the blocks of BD-LoRA on their diagonals; unchanged for other adapters."""
    blocks_option = config.get("use_bdlora")
    if not blocks_option:
        return a, b
    blocks = blocks_option.get("nblocks") if isinstance(blocks_option, dict) else None
    if not isinstance(blocks, int) or isinstance(blocks, bool) or not 0 < blocks <= 4096:
        raise AdapterInvalid("use_bdlora in adapter_config.json has no usable nblocks")
    budget.reserve(site, a.shape[0])
    if a.shape[1] * blocks == site.in_features and a.shape[0] % blocks == 0:
        a = torch.block_diag(*a.chunk(blocks))  # type: ignore[no-untyped-call]
    if b.shape[1] * blocks == a.shape[0] and b.shape[0] % blocks == 0:
        b = torch.block_diag(*b.chunk(blocks))  # type: ignore[no-untyped-call]
    return a, b


def _check_fields(config: Config) -> None:
    if config.get("bias", "none") not in ("none", "all", "lora_only", None):
        raise AdapterInvalid(f"bias = {str(config['bias'])[:60]!r} in adapter_config.json is not one of PEFT's")
    refuse_initialisation(config.get("init_lora_weights", True))
    refuse_fields(config)
    check_fields(config, READ, WITHOUT_EFFECT | FIELDS.keys())


def _check_consistency(config: Config, found: dict[str, dict[str, Tensor]]) -> None:
    """Raise AdapterInvalid if configuration and weights disagree about DoRA, bias or diagonal."""
    for field, matrix in (("use_dora", "magnitude"), ("lora_bias", "bias"), ("kasa_config", "diagonal")):
        has = [name for name, matrices in found.items() if matrix in matrices]
        lacks = [name for name, matrices in found.items() if matrix not in matrices]
        if config.get(field) and lacks:
            raise AdapterInvalid(
                f"{field} in adapter_config.json needs a {matrix} that is not there for {shorten(lacks)}"
            )
        if has and not config.get(field):
            raise AdapterInvalid(f"{field} in adapter_config.json is off, but there is a {matrix} for {shorten(has)}")


def _features(config: Config) -> list[str]:
    fields = ("use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "use_dora", "use_bdlora", "kasa_config",
              "alora_invocation_tokens", "velora_config", "monteclora_config", "ensure_weight_tying")  # fmt: skip
    found = [field for field in fields if config.get(field)]
    initialisation = config.get("init_lora_weights", True)
    return found if isinstance(initialisation, bool | None) else [*found, f"init_lora_weights={initialisation}"]


def _lowering_notes(config: dict[str, Any], base: BaseShape) -> list[str]:
    """Sentences for the report on how variants were lowered."""
    notes = []
    source = f"the base's weights, dequantised from {base.quantized}" if base.quantized else "the base's own weights"
    if config.get("use_dora"):
        notes.append(f"DoRA: magnitudes became output gains over the norms of {source}")
    if residual.is_residual(config):
        notes.append(
            f"{residual.method_name(config)}: what its initialisation takes out of {source} "
            "was subtracted from what was trained"
        )
    if config.get("alora_invocation_tokens"):
        notes.append("aLoRA: what it adds is active from the last occurrence of its invocation tokens in the prompt")
    return notes
