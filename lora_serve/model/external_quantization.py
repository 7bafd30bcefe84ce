"""Checkpoints that another library quantised: which are served, what they need, and how their weights are read.

transformers loads them, and their linear modules stay that library's own (`foreign.py`). All that the server knows of
such libraries stands here:

| library | what | kept as |
|---|---|---|
| bitsandbytes | nf4, fp4, LLM.int8() | its own modules |
| torchao | any scheme that its tensors multiply in | `nn.Linear` over its tensors |
| compressed-tensors | integers and floats, grouped or not | compressed; decompressed for each call, one map at a time |
| transformers (fp8) | e4m3, by blocks or whole | its own modules; where the device cannot, dequantised at load |
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

FULL = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantised.

    Attributes:
        label: for people, such as "nf4 by bitsandbytes".
        packages: what transformers needs to load it.
        remark: what an operator should know of it.
        replayable: a pass over its modules makes the same calls, on memory of the same sizes, for any rows of one
            number; only then can a step be recorded or captured.
    """

    label: str
    packages: tuple[str, ...]
    remark: str = ""
    replayable: bool = True


def installed(package: str) -> bool:
    """Whether pip would find a package of that name."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def quantization(name: str, config: Any, device: torch.device) -> Quantization | None:
    """How the checkpoint `name` is quantised, told from its configuration; None if it is not.

    Raises ModelUnsupported if that is not served, or a package is missing.
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
    missing = [package for package in found.packages if not installed(package)]
    if missing:
        raise ModelUnsupported(
            f"{name!r} is quantised ({found.label}), which needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )
    return found


def _bitsandbytes(given: Mapping[str, Any], device: torch.device) -> Quantization:
    four = bool(given.get("load_in_4bit"))
    scheme = str(given.get("bnb_4bit_quant_type") or "fp4") if four else "int8"
    # LLM.int8() takes columns with outliers out of the product: how many, the rows decide.
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
    return Quantization(label, ("compressed-tensors", "accelerate"), remark, replayable=False)  # weights come and go


def _fp8(given: Mapping[str, Any], device: torch.device) -> Quantization:
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    remark = "" if able else f"dequantised at load: there is no computing with them on {device}"
    return Quantization("fp8 by transformers", ("accelerate", "kernels") if able else ("accelerate",), remark)


_METHODS: dict[str, Callable[[Mapping[str, Any], torch.device], Quantization]] = {
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
}


def is_externally_quantized(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a linear module keeps its weights in a form that only its own library reads."""
    if not isinstance(module, nn.Linear):
        return False
    weight = module._parameters.get("weight")
    return type(weight) is not nn.Parameter or weight.dtype not in FULL or hasattr(module, "quantization_scheme")


def settle(name: str, model: Any, dtype: torch.dtype | None) -> None:
    """Make a quantised model's modules work one by one, its weights staying as they came.

    Args:
        dtype: of what is not quantised (bitsandbytes' checkpoints come in their own); None: as it came.
    Raises ModelUnsupported if more than linear modules is quantised.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it has a line for every product
    for path, module in model.named_modules():
        external = is_externally_quantized(module)
        own = module.named_parameters(recurse=False)
        small = [leaf for leaf, each in own if type(each) is not nn.Parameter or each.dtype not in FULL]
        if small and (not external or hasattr(module, "n_groups")):  # (it would be several maps in one)
            raise ModelUnsupported(
                f"{name!r}: {path}.{small[0]} is quantised, and is not the weight of a plain linear module"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it would lay its weights out anew, for no reader but itself
        if external and hasattr(module, "quantization_scheme"):
            if module.quantization_status != "compressed":
                raise ModelUnsupported(f"{name!r}: the weights of {path} are to be quantised, but are not yet")
            module.forward = _decompressing(module)
    came = model.dtype
    for parameter in model.parameters():
        if dtype is not None and parameter.dtype is came and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.to(dtype)
    if hasattr(model, "ct_decompress_hook"):  # it would decompress all modules at once, for good
        model.ct_decompress_hook.remove()


def _decompressing(module: Any) -> Callable[[Tensor], Tensor]:
    """The module's own forward, on weights that exist for the time of the call only."""
    forward = module.forward.__func__
    twin = copy.copy(module)  # others may read the module's weights meanwhile
    twin.__dict__["_parameters"] = dict(module._parameters)

    def call(x: Tensor) -> Tensor:
        twin._parameters["weight"] = dequantized(module).to(x.dtype)
        y: Tensor = forward(twin, x)
        del twin._parameters["weight"]
        return y

    return call


def dequantized(module: Any) -> Tensor:
    """The weights W [out, in] of a foreign module, as its forward pass uses them: in float32 or what it computes in."""
    weight = module._parameters.get("weight")
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None:
        return _decompressed(module, scheme)
    if getattr(weight, "quant_state", None) is not None:  # bitsandbytes, 4 bits
        from bitsandbytes.functional import dequantize_4bit

        dense: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return dense
    if hasattr(module, "state"):  # bitsandbytes, 8 bits; the first call moves them from the weight to the state
        moved = module.state.CB is not None
        numbers, extremes = (module.state.CB, module.state.SCB) if moved else (weight.data, weight.SCB)
        return cast(Tensor, numbers.float() * (extremes.float() / 127)[:, None])
    if hasattr(module, "weight_scale_inv"):  # fp8
        return _unscaled(weight, module.weight_scale_inv.float(), module.block_size)
    return cast(Tensor, weight.dequantize())  # torchao


def _decompressed(module: Any, scheme: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    own = module._parameters | module._buffers
    state = {name: tensor.data for name, tensor in own.items() if tensor is not None}
    if "weight_shape" in state:  # on the device, it would have to be waited for
        state["weight_shape"] = torch.Size((module.out_features, module.in_features))
    kind = BaseCompressor.get_value_from_registry(getattr(scheme.format, "value", scheme.format))
    return cast(Tensor, kind.decompress(state, scheme)["weight"])


def _unscaled(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """weight[o, i] * scale[o // block[0], i // block[1]] (one scale without blocks), float32."""
    if block is not None and scale.ndim == 2:
        tall, wide = weight.shape
        scale = scale.repeat_interleave(block[0], 0)[:tall].repeat_interleave(block[1], 1)[:, :wide]
    return weight.float() * scale
