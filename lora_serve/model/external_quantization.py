"""Externally quantised checkpoints: which are served, what they need, and how their weights are read.

transformers loads them, and their linear modules stay the library's own (`external_linear.py`). Everything specific to
these libraries is in this module:

| library | schemes | kept as |
|---|---|---|
| bitsandbytes | nf4, fp4, LLM.int8() | its own modules |
| torchao | any scheme whose tensors support matmul | `nn.Linear` over its tensors |
| compressed-tensors | integers and floats, grouped or not | compressed; one module at a time is decompressed per call |
| transformers (fp8) | e4m3, one scale or one per block | its own modules; dequantised at load on devices without fp8 |
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from lora_serve.errors import ModelUnsupported

FULL_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantised.

    Attributes:
        label: for messages, such as "nf4 by bitsandbytes".
        packages: packages that transformers needs to load it.
        remark: what an operator should know.
        replayable: whether forward passes on the same number of rows make the same calls on memory of the same sizes;
            only then can a step be recorded or captured.
    """

    label: str
    packages: tuple[str, ...]
    remark: str = ""
    replayable: bool = True


def is_installed(package: str) -> bool:
    """Whether a distribution of that name is installed."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def find_quantization(name: str, config: Any, device: torch.device) -> Quantization | None:
    """How the checkpoint `name` is quantised, from its configuration; None if it is not.

    Raises ModelUnsupported if the method is not served or a package is missing.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    given = given if isinstance(given, dict) else given.to_dict()
    bits = given.get("load_in_4bit") or given.get("load_in_8bit")
    method = str(given.get("quant_method") or ("bitsandbytes" if bits else "an unnamed method"))
    if method not in _METHODS:
        raise ModelUnsupported(
            f"{name!r} is quantised by {method}, which is not served; what is: {', '.join(sorted(_METHODS))}, "
            "or an unquantised checkpoint with --quantize"
        )
    found = _METHODS[method](given, device)
    if given.get("kv_cache_scheme"):
        raise ModelUnsupported(f"{name!r} ({found.label}) quantises its KV as well, which is not served")
    missing = [package for package in found.packages if not is_installed(package)]
    if missing:
        raise ModelUnsupported(
            f"{name!r} is quantised ({found.label}), which needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )
    return found


def _bitsandbytes(given: Mapping[str, Any], device: torch.device) -> Quantization:
    four = bool(given.get("load_in_4bit"))
    scheme = str(given.get("bnb_4bit_quant_type") or "fp4") if four else "int8"
    # LLM.int8() multiplies columns with outliers separately; how many these are depends on the input.
    return Quantization(f"{scheme} by bitsandbytes", ("bitsandbytes", "accelerate"), replayable=four)


def _torchao(given: Mapping[str, Any], device: torch.device) -> Quantization:
    kind = given.get("quant_type")
    kind = kind.get("default", kind) if isinstance(kind, dict) else kind
    kind = kind.get("_type", "mixed") if isinstance(kind, dict) else kind
    return Quantization(f"{str(kind).removesuffix('Config')} by torchao", ("torchao", "accelerate"))


def _compressed_tensors(given: Mapping[str, Any], device: torch.device) -> Quantization:
    weights = [group.get("weights") or {} for group in (given.get("config_groups") or {}).values()]
    schemes = sorted({f"{each.get('type', 'float')}{each.get('num_bits', '')}" for each in weights})
    label = f"{', '.join(schemes) or given.get('format')} by compressed-tensors"
    remark = "decompressed for each product, which keeps memory small and takes time"
    return Quantization(
        label, ("compressed-tensors", "accelerate"), remark, replayable=False
    )  # weights are allocated per call


def _fp8(given: Mapping[str, Any], device: torch.device) -> Quantization:
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    remark = "" if has_fp8 else f"dequantised at load: there is no computing with them on {device}"
    return Quantization("fp8 by transformers", ("accelerate", "kernels") if has_fp8 else ("accelerate",), remark)


_METHODS: dict[str, Callable[[Mapping[str, Any], torch.device], Quantization]] = {
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
}


def is_externally_quantized(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a linear module keeps its weight in a form that only its own library can read."""
    if not isinstance(module, nn.Linear):
        return False
    weight = module._parameters.get("weight")
    return (
        type(weight) is not nn.Parameter or weight.dtype not in FULL_PRECISION or hasattr(module, "quantization_scheme")
    )


def prepare_modules(name: str, model: Any, dtype: torch.dtype | None) -> None:
    """Prepare a quantised model so that each module runs on its own; weights stay as they were loaded.

    Args:
        dtype: of parameters that are not quantised; None: as loaded (bitsandbytes checkpoints set their own).
    Raises ModelUnsupported if anything except linear modules is quantised.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line for every matmul
    for path, module in model.named_modules():
        external = is_externally_quantized(module)
        own = module.named_parameters(recurse=False)
        small = [leaf for leaf, each in own if type(each) is not nn.Parameter or each.dtype not in FULL_PRECISION]
        if small and (not external or hasattr(module, "n_groups")):  # n_groups: several linear layers in one
            raise ModelUnsupported(
                f"{name!r}: {path}.{small[0]} is quantised, and is not the weight of a plain linear module"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it would repack its weights so that only it can read them
        if external and hasattr(module, "quantization_scheme"):
            if module.quantization_status != "compressed":
                raise ModelUnsupported(f"{name!r}: the weights of {path} are to be quantised, but are not yet")
            module.forward = _decompress_per_call(module)
    loaded_dtype = model.dtype
    for parameter in model.parameters():
        if dtype is not None and parameter.dtype is loaded_dtype and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.to(dtype)
    if hasattr(model, "ct_decompress_hook"):  # it would decompress all modules permanently
        model.ct_decompress_hook.remove()


def _decompress_per_call(module: Any) -> Callable[[Tensor], Tensor]:
    """The module's own forward on a decompressed weight that is freed after the call."""
    forward = module.forward.__func__
    twin = copy.copy(module)  # the module's own weight may be read meanwhile
    twin.__dict__["_parameters"] = dict(module._parameters)

    def call(x: Tensor) -> Tensor:
        twin._parameters["weight"] = dequantized_weight(module).to(x.dtype)
        y: Tensor = forward(twin, x)
        del twin._parameters["weight"]
        return y

    return call


def dequantized_weight(module: Any) -> Tensor:
    """W [out, in] of an externally quantised module as its forward pass uses it, in float32 or its compute dtype."""
    weight = module._parameters.get("weight")
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None:
        return _decompress(module, scheme)
    if getattr(weight, "quant_state", None) is not None:  # bitsandbytes, 4 bits
        from bitsandbytes.functional import dequantize_4bit

        dense: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return dense
    if hasattr(module, "state"):  # bitsandbytes, 8 bits; the first call moves the weight into the state
        moved = module.state.CB is not None
        integers, absmax = (module.state.CB, module.state.SCB) if moved else (weight.data, weight.SCB)
        return cast(Tensor, integers.float() * (absmax.float() / 127)[:, None])
    if hasattr(module, "weight_scale_inv"):  # fp8
        return _apply_scale(weight, module.weight_scale_inv.float(), module.block_size)
    return cast(Tensor, weight.dequantize())  # torchao


def _decompress(module: Any, scheme: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    own = module._parameters | module._buffers
    state = {name: tensor.data for name, tensor in own.items() if tensor is not None}
    if "weight_shape" in state:  # reading it from the device would synchronise
        state["weight_shape"] = torch.Size((module.out_features, module.in_features))
    compressor = BaseCompressor.get_value_from_registry(getattr(scheme.format, "value", scheme.format))
    return cast(Tensor, compressor.decompress(state, scheme)["weight"])


def _apply_scale(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """weight[o, i] * scale[o // block[0], i // block[1]] (one scale without blocks), float32."""
    if block is not None and scale.ndim == 2:
        tall, wide = weight.shape
        scale = scale.repeat_interleave(block[0], 0)[:tall].repeat_interleave(block[1], 1)[:, :wide]
    return weight.float() * scale
