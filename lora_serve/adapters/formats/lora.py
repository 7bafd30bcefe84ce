"""LoRA as PEFT saves it: y = W x + s · B(A x), and its many relatives that end there.

    s = α/r, or α/√r with `use_rslora`; `rank_pattern` and `alpha_pattern` override r and α by module name
    keys: X.lora_A.weight [r, in], X.lora_B.weight [out, r], below base_model.model.; Conv1D modules keep these shapes

    lora_bias            X.lora_B.bias: + s · bias
    DoRA                 X.lora_magnitude_vector: `dora.py`
    embeddings           X.lora_embedding_A [r, ids], X.lora_embedding_B [dim, r]: `embedding.py`
    PiSSA, OLoRA, KaSA   a base that is changed alike: `residual.py`
    experts              `target_parameters`, and adapters from before experts were stacked: `moe.py`
    BD-LoRA              A [r, in / n] or B [out, r / n], n blocks on the diagonal of the full matrix
    aLoRA                active from its invocation tokens on
    MiCA, VeLoRA, MonteCLoRA, EVA, orthogonal    plain at inference

Source: PEFT 0.21, `peft/tuners/lora`. A field that would change the maths and is not served is refused by name; one
that cannot matter at inference is ignored; an unknown one is refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride, Site
from lora_serve.adapters.checkpoint import Checkpoint, some
from lora_serve.adapters.formats import dora, embedding, factors, moe, residual, saved
from lora_serve.adapters.formats.fields import Config, Patterns, check_fields, number
from lora_serve.adapters.formats.keys import by_module, check_delta, check_shape
from lora_serve.adapters.formats.refusals import FIELDS, refuse_fields, refuse_initialisation
from lora_serve.adapters.formats.report import report
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta

READ = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias", "lora_bias",
    "use_dora", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_bdlora", "kasa_config",
}  # fmt: skip
# How training went or began; what is left of it is in the weights.
WITHOUT_EFFECT = {
    "lora_dropout", "megatron_core", "runtime_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    "velora_config", "monteclora_config", "qalora_group_size",
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
MAX_INVOCATION = 1024
TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler.")  # state of samplers and estimators


class Scaling:
    """The factor on B A of each module, and its rank, by configuration."""

    def __init__(self, config: Config) -> None:
        self._ranks = Patterns(config, "rank_pattern")
        self._alphas = Patterns(config, "alpha_pattern")
        self._rank, self._alpha = number(config, "r", 8), number(config, "lora_alpha", 8)
        self._root = bool(config.get("use_rslora"))

    def of(self, name: str, rank: int) -> float:
        """s of a module whose matrices have `rank`; AdapterInvalid if the configuration gives it another one."""
        configured = self._ranks.get(name, self._rank)
        if configured != rank:
            raise AdapterInvalid(f"{name} has rank {rank} in the weights and {configured:g} in adapter_config.json")
        alpha = self._alphas.get(name, self._alpha)
        return alpha / math.sqrt(rank) if self._root else alpha / rank


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Compile, scaling folded into B in float32. Raises AdapterInvalid naming keys and fields."""
    config = checkpoint.config
    _check_fields(config)
    scaling = Scaling(config)
    taken = saved.take(config, checkpoint.tensors, base)
    tensors = {key: tensor for key, tensor in taken.rest.items() if not any(part in key for part in TRAINING_ONLY)}
    stacks = moe.take(config, tensors, base, scaling.of)
    found = by_module(stacks.rest, base, TAILS, lambda name: name in base.sites or name in base.embeddings)
    _check_kept(config, found)
    for name, matrices in found.items():
        odd = [matrix for matrix, tensor in matrices.items() if tensor.ndim != (1 if matrix in VECTORS else 2)]
        if odd:
            raise AdapterInvalid(f"{name} has {', '.join(odd)} with an impossible number of dimensions")
    deltas, overrides = dict(stacks.deltas), dict(taken.overrides)
    for name, parameters in stacks.parameters.items():
        override = overrides.get(name, ModuleOverride())
        overrides[name] = replace(override, parameters=override.parameters | parameters)
    features = [*_features(config), *stacks.features, *taken.features]
    for name, matrices in found.items():
        override = overrides.get(name, ModuleOverride())
        if name in base.embeddings:
            overrides[name] = embedding.lower(name, matrices, override, scaling.of, base)
            features.append("embedding")
            continue
        delta, override = _linear(base.sites[name], matrices, override, config, scaling, base)
        if delta is not None:
            deltas[name] = delta
        if override != ModuleOverride():
            overrides[name] = override
    deltas, overrides = factors.settled(deltas, overrides, base)
    invocation = _invocation(config, base)
    if invocation and overrides:
        raise AdapterInvalid(
            "alora_invocation_tokens in adapter_config.json: an adapter that is active from some token on cannot also "
            f"replace or rescale parts of the base ({some(overrides)})"
        )
    deltas = {name: deltas[name] for name in base.sites if name in deltas}
    notes = [*stacks.lowered, *_notes(config, base)]
    made = report(
        config,
        base,
        method="LoRA",
        deltas=deltas,
        overrides=overrides,
        features=list(dict.fromkeys(features)),
        lowered=notes,
    )
    return Lowered(deltas, made, overrides, invocation=invocation)


def _linear(
    site: Site, matrices: dict[str, Tensor], override: ModuleOverride, config: Config, scaling: Scaling, base: BaseShape
) -> tuple[Delta | None, ModuleOverride]:
    """One linear site: its delta, and what else changes there. No delta where the whole weight is replaced."""
    if not {"A", "B"} <= matrices.keys():
        raise AdapterInvalid(f"only one of lora_A and lora_B is there for {site.name}")
    a, b = _whole(site, matrices["A"].float(), matrices["B"].float(), config)
    factor = scaling.of(site.name, matrices["A"].shape[0])
    own = override.parameters.get("weight")
    check_delta(site if own is None else replace(site, out_features=own.shape[0]), a, b)
    b = b * factor
    if (diagonal := matrices.get("diagonal")) is not None:
        check_shape(f"{site.name}.lora_diag", diagonal, (a.shape[0],))
        b = b * diagonal.float()
    bias = matrices.get("bias")
    if bias is not None and "magnitude" in matrices:
        raise AdapterInvalid("lora_bias with use_dora in adapter_config.json is not defined")
    if bias is not None:
        check_shape(f"{site.name}.lora_B.bias", bias, (b.shape[0],))
        bias = bias.float() * factor
    if residual.changes_base(config):
        a, b = residual.added(site, a, b, matrices["A"].shape[0], factor, config, base)
    gain = None
    if "magnitude" in matrices:
        if override.token_rows is not None:
            raise AdapterInvalid("use_dora on a head together with trainable_token_indices is not defined")
        weight = base.weight(site.name).cpu() if own is None else own
        gain = dora.gain(site.name, matrices["magnitude"], weight.float(), b @ a)
        kept = base.bias(site.name)
        if kept is not None and own is None:
            override = saved.shifted(override, kept.float().cpu() * (1 - gain))
    if bias is not None:
        override = saved.shifted(override, bias)
    if own is not None:  # a weight of another vocabulary: one map, not a map and a delta
        merged = own.float() + b @ a
        merged = merged if gain is None else gain[:, None] * merged
        return None, replace(override, parameters=override.parameters | {"weight": merged})
    delta = Delta(a if a.dtype == matrices["A"].dtype else a.to(matrices["A"].dtype), b.T.contiguous())
    return delta, override if gain is None else replace(override, gain_out=gain)


def _whole(site: Site, a: Tensor, b: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """A and B with the blocks of BD-LoRA laid out on the diagonal."""
    given = config.get("use_bdlora")
    if not given:
        return a, b
    blocks = given.get("nblocks") if isinstance(given, dict) else None
    if not isinstance(blocks, int) or isinstance(blocks, bool) or not 0 < blocks <= 4096:
        raise AdapterInvalid("use_bdlora in adapter_config.json has no usable nblocks")
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


def _check_kept(config: Config, found: dict[str, dict[str, Tensor]]) -> None:
    """Refuse a configuration that promises what the weights do not have, or the other way round."""
    for field, matrix in (("use_dora", "magnitude"), ("lora_bias", "bias"), ("kasa_config", "diagonal")):
        has = [name for name, matrices in found.items() if matrix in matrices]
        lacks = [name for name, matrices in found.items() if matrix not in matrices]
        if config.get(field) and lacks:
            raise AdapterInvalid(f"{field} in adapter_config.json needs a {matrix} that is not there for {some(lacks)}")
        if has and not config.get(field):
            raise AdapterInvalid(f"{field} in adapter_config.json is off, but there is a {matrix} for {some(has)}")


def _invocation(config: Config, base: BaseShape) -> tuple[int, ...]:
    tokens = config.get("alora_invocation_tokens")
    if tokens is None:
        return ()
    ids = base.modules.get(base.input_embedding, {}).get("weight", (1 << 31,))[0]
    if not isinstance(tokens, list) or not 0 < len(tokens) <= MAX_INVOCATION:
        raise AdapterInvalid(
            f"alora_invocation_tokens in adapter_config.json is not a list of 1 to {MAX_INVOCATION} ids"
        )
    if not all(type(token) is int and 0 <= token < ids for token in tokens):
        raise AdapterInvalid(f"alora_invocation_tokens in adapter_config.json has ids outside 0..{ids - 1}")
    return tuple(tokens)


def _features(config: Config) -> list[str]:
    fields = ("use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "use_dora", "use_bdlora", "kasa_config",
              "alora_invocation_tokens", "velora_config", "monteclora_config", "ensure_weight_tying")  # fmt: skip
    found = [field for field in fields if config.get(field)]
    initialisation = config.get("init_lora_weights", True)
    return found if isinstance(initialisation, bool | None) else [*found, f"init_lora_weights={initialisation}"]


def _notes(config: dict[str, Any], base: BaseShape) -> list[str]:
    """What became what, where that is not obvious."""
    notes = []
    source = f"the base's weights, dequantised from {base.quantized}" if base.quantized else "the base's own weights"
    if config.get("use_dora"):
        notes.append(f"DoRA: magnitudes became output gains over the norms of {source}")
    if residual.changes_base(config):
        notes.append(
            f"{residual.name(config)}: a second low-rank part takes out of {source} what training had taken out; "
            "it is computed at every load, which a conversion by PEFT would save"
        )
    if config.get("alora_invocation_tokens"):
        notes.append("aLoRA: active from the last occurrence of its invocation tokens in the prompt")
    return notes
