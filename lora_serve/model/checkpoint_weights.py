"""Weights of the base, read one module at a time from its checkpoint, for lowering adapters in another process.

Adapters are lowered where the resident base is not at hand. A few formats need weights of it (DoRA, PiSSA, OLoRA, KaSA,
saved heads); these are read as the resident base got them: by transformers' own conversion from checkpoint to
modules, in the serving dtype, and rounded where the resident base was quantised at load.
"""

from __future__ import annotations

import mmap
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

import lora_serve.model.baichuan  # noqa: F401  # registers its classes with transformers
from lora_serve.adapters.adapter import divide_rows
from lora_serve.adapters.checkpoint import DTYPES as PARAMETER_DTYPES
from lora_serve.adapters.checkpoint import INDEX_DTYPES
from lora_serve.adapters.sharding import stack_of
from lora_serve.kernels.packed_weight import Scheme, dequantize, quantize
from lora_serve.model.checkpoint_files import CheckpointTensor, read_header, weight_files
from lora_serve.model.experts import expert_weight
from lora_serve.model.external_quantization import dequantized_weight, is_externally_quantized, prepare_modules
from lora_serve.model.identity_experts import mark_experts

_EXPERT = re.compile(r"(.+)\.(\w+)\[(\d+)\]")


DTYPES = PARAMETER_DTYPES | INDEX_DTYPES | {"I8": torch.int8, "BOOL": torch.bool}


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a safetensors file, as transformers' loader takes it: read when it is indexed.

    The mapping is read-only and shared, so it is no memory of this process, as safetensors' own would be.
    """

    mapping: mmap.mmap
    stored: CheckpointTensor

    def __getitem__(self, index: Any) -> Tensor:
        stored, dtype = self.stored, DTYPES[self.stored.dtype]
        with warnings.catch_warnings(action="ignore"):  # that it cannot be written
            flat = torch.frombuffer(self.mapping, dtype=dtype, count=prod(stored.shape), offset=stored.start)
        whole: Tensor = flat.view(stored.shape)[index]
        return whole


def map_tensors(path: Path) -> dict[str, MappedTensor]:
    """The tensors of a safetensors file, by name."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {each.name: MappedTensor(mapping, each) for each in read_header(path)}


class _Checkpoint(NamedTuple):
    """The model without weights, and its checkpoint's tensors by the path that each one has in the model."""

    model: Any
    slices: dict[str, Any]  # by name in the checkpoint; read when they are sliced
    paths: dict[str, str]  # name in the checkpoint → path in the model
    loading: LoadStateDictConfig


@dataclass
class CheckpointWeights:
    """Weights of a base by module path. Picklable; files are opened on first use.

    Args:
        name, revision: of the base, as it was loaded.
        dtype: in which the resident base holds its parameters.
        head: path of the LM head.
        tied: path of the embedding whose weight the head shares; empty if it has its own.
        divided: modules whose weight's rows are divided by their lengths at load.
        schemes: how the resident base's sites were quantised at load, by site.
        importance: of their inputs for that, by site; one for all experts.
        parts: sites whose inputs several devices share, each of which quantised its part: the number of parts; one for
            all experts.
        external: whether the checkpoint itself is quantised, so that its library has to load it as a whole.
    """

    name: str
    revision: str | None
    dtype: torch.dtype
    head: str
    tied: str = ""
    divided: frozenset[str] = frozenset()
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    external: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_checkpoint", "_loaded")}

    def weight(self, site: str) -> Tensor:
        """A site's weight [out, in] as the resident base's forward pass uses it. Raises KeyError if it has none."""
        expert = _EXPERT.fullmatch(site)
        if expert is not None:
            weight = expert_weight(self._module(expert[1]), expert[2], int(expert[3]))
        else:
            module = self._module(site)
            if is_externally_quantized(module):
                return dequantized_weight(module)
            weight = self._parameter(site, module, "weight")
            weight = weight.T if isinstance(module, Conv1D) else weight
        scheme = self.schemes.get(site)
        if scheme is None:
            return weight.detach()
        stack = stack_of(site)
        importance, count = self.importance.get(stack), self.parts.get(stack, 1)
        own = [None] * count if importance is None else importance.chunk(count)
        parts = zip(weight.chunk(count, 1), own, strict=True)
        return torch.cat([dequantize(*quantize(part, scheme, each)) for part, each in parts], 1)

    def parameter(self, path: str) -> Tensor:
        """A parameter by its path in the model, as the checkpoint has it. Raises KeyError if there is none."""
        name, _, leaf = path.rpartition(".")
        module = self._module(name)
        if leaf == "weight" and is_externally_quantized(module):
            return dequantized_weight(module)
        return self._parameter(name, module, leaf)

    def _parameter(self, path: str, module: Any, leaf: str) -> Tensor:
        parameter = getattr(module, leaf, None)
        if not isinstance(parameter, Tensor):
            raise KeyError(f"{path}.{leaf}")
        return divide_rows(parameter.detach()) if leaf == "weight" and path in self.divided else parameter.detach()

    def _module(self, path: str) -> Any:
        """The module at a path, with its own parameters."""
        path = self.tied if self.tied and path == self.head else path
        if self.external:
            return self._loaded.get_submodule(path)
        module = self._checkpoint.model.get_submodule(path)
        if _on_meta(module):
            self._read(f"{path}.")
        if _on_meta(module):  # made of tensors that go by another name: its neighbours come with it
            self._read(f"{path.rpartition('.')[0]}.")
        if _on_meta(module):
            raise KeyError(path)
        return module

    def _read(self, prefix: str) -> None:
        """Read all parameters below a prefix."""
        checkpoint = self._checkpoint
        wanted = {name: checkpoint.slices[name] for name, path in checkpoint.paths.items() if path.startswith(prefix)}
        if wanted:
            convert_and_load_state_dict_in_model(checkpoint.model, wanted, checkpoint.loading)

    @cached_property
    def _checkpoint(self) -> _Checkpoint:
        config = AutoConfig.from_pretrained(self.name, revision=self.revision, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=self.dtype, trust_remote_code=False
            )
        mapping = get_model_conversion_mapping(model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        mark_experts(model)
        state = model.state_dict()
        slices: dict[str, Any] = {}
        for file in weight_files(self.name, self.revision):
            slices |= map_tensors(file)
        prefix = model.base_model_prefix
        paths = {name: rename_source_key(name, renamings, converters, prefix, state)[0] for name in slices}
        loading = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=model._get_dtype_plan(self.dtype),
            weight_mapping=mapping,  # type: ignore[arg-type]  # declared as a list of a subclass
        )
        disable_progress_bar()  # type: ignore[no-untyped-call]
        return _Checkpoint(model, slices, paths, loading)

    @cached_property
    def _loaded(self) -> Any:
        """The whole model, as its quantisation library loads it on the CPU."""
        disable_progress_bar()  # type: ignore[no-untyped-call]
        model = AutoModelForCausalLM.from_pretrained(
            self.name, revision=self.revision, dtype=self.dtype, use_safetensors=True, device_map="cpu"
        )
        prepare_modules(self.name, model, self.dtype)
        return model


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))
