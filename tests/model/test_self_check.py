"""A base that would answer other than the model it was loaded from does not start, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driver import CPU, Driver
from support import ARCHITECTURES, COMMON, make_model, save, uncentred
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DiffLlamaConfig, DogeConfig, LlamaConfig

from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.errors import ModelUnsupported
from lora_serve.kernels.contract import AttentionMetadata, Kernels
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.base import ResidentBase
from lora_serve.model.fused import FusedRMSNorm
from lora_serve.model.load import load
from lora_serve.model.self_check import blocks_needed, relative_error


def refusal(folder: Path, kernels: Kernels | None = None, dtype: str = "float32", scheme: Scheme | None = None) -> str:
    with pytest.raises(ModelUnsupported) as caught:
        Driver(folder, kernels=kernels, dtype=dtype, scheme=scheme)
    return str(caught.value)


def test_a_layer_that_calls_attention_twice_is_refused(tmp_path: Path) -> None:
    make_model(DiffLlamaConfig(**COMMON)).save_pretrained(tmp_path)
    assert "diffllama calls attention more than once in a layer" in refusal(tmp_path)


def test_a_model_that_masks_by_its_own_scores_is_refused(tmp_path: Path) -> None:
    uncentred(DogeConfig(**COMMON)).save_pretrained(tmp_path)
    assert "doge in flat batches differs from itself alone" in refusal(tmp_path)


class Leaking(ReferenceKernels):
    """Every sequence sees the KV of the first one."""

    def attention(self, q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, *args: object) -> Tensor:
        table = metadata.block_table[:1].expand_as(metadata.block_table)
        seen = AttentionMetadata(
            metadata.query_start, metadata.context, table, metadata.max_query_len, metadata.max_context_len
        )
        return super().attention(q, keys, values, seen, *args)  # type: ignore[arg-type]


class Windowless(ReferenceKernels):
    """Sees beyond the sliding window."""

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, scale: float,
        window: int | None = None, *args: object,
    ) -> Tensor:  # fmt: skip
        return super().attention(q, keys, values, metadata, scale, None, *args)  # type: ignore[arg-type]


class Forgetful(ReferenceKernels):
    """Does not keep what is decoded: only later tokens miss it."""

    def write_kv(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, kv_index: Tensor) -> None:
        before = keys.clone(), values.clone()
        super().write_kv(keys, values, k, v, kv_index)
        self._last = (keys, before[0]), (values, before[1])

    def attention(self, q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, *args: object) -> Tensor:
        found = super().attention(q, keys, values, metadata, *args)  # type: ignore[arg-type]
        if bool((metadata.query_start.diff() == 1).any()):
            for now, before in self._last:
                now.copy_(before)
        return found


class Inexact(ReferenceKernels):
    """Scores that are two per cent too large."""

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, scale: float, *args: object
    ) -> Tensor:
        return super().attention(q, keys, values, metadata, 1.02 * scale, *args)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", [Leaking, Windowless, Forgetful, Inexact])
def test_faults_of_attention_and_of_its_kv_are_seen(kernels: type[Kernels], dtype: str, tmp_path: Path) -> None:
    message = refusal(save("mistral", tmp_path), kernels(), dtype)
    assert "mistral in flat batches differs from itself alone" in message


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantising_hides_no_fault(scheme: Scheme, tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    Driver(folder, kernels=ReferenceKernels(), scheme=scheme)
    assert "differs from itself alone" in refusal(folder, Inexact(), scheme=scheme)


class Garbled(ReferenceKernels):
    """Reads quantised weights in another order than they were written."""

    def unpack(self, packed: object) -> Tensor:
        return super().unpack(packed).flip(0)  # type: ignore[arg-type]


def test_a_quantised_base_that_answers_noise_is_refused(tmp_path: Path) -> None:
    assert "differs from itself alone" in refusal(save("llama", tmp_path), Garbled(), scheme="int8")


def base_of(folder: Path, dtype: str = "bfloat16") -> tuple[ResidentBase, nn.Module]:
    loaded = load(str(folder), revision=None, dtype=dtype, device=CPU, progress=lambda stage, done: None)
    kv = KVTensors(loaded.layers, blocks_needed(4), 4, loaded.dtype, CPU)
    return ResidentBase(loaded, DeviceSlots(loaded.shape, 2, loaded.dtype, CPU), ReferenceKernels(), kv), loaded.model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_substituted_modules_are_not_their_own_oracle(dtype: str, tmp_path: Path) -> None:
    """A norm that adds one to its weights where the model does not, which a wrong `fuse` might put there."""
    base, model = base_of(save("llama", tmp_path), dtype)
    base.self_check()
    base, model = base_of(tmp_path, dtype)
    path, norm = next((path, each) for path, each in model.named_modules() if isinstance(each, FusedRMSNorm))
    parent, _, leaf = path.rpartition(".")
    setattr(
        model.get_submodule(parent), leaf, FusedRMSNorm(norm.weight, 1e-2, plus_one=False, kernels=ReferenceKernels())
    )
    with pytest.raises(ModelUnsupported, match="llama in flat batches differs from itself alone"):
        base.self_check()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral"])
def test_the_oracle_is_what_transformers_computes_in_float32(architecture: str, tmp_path: Path) -> None:
    folder = save(architecture, tmp_path)
    loaded = load(str(folder), revision=None, dtype="bfloat16", device=CPU, progress=lambda stage, done: None)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").float()
    with torch.inference_mode():
        wanted = exact(torch.tensor(loaded.oracle.tokens), use_cache=False).logits
    assert loaded.oracle.float32_tolerance is not None
    assert relative_error(loaded.oracle.logits, wanted) < 1e-5


class Broken(ReferenceKernels):
    """Fails in a way that nobody thought of."""

    def attention(self, *args: object, **kwargs: object) -> Tensor:
        raise IndexError("no such block\nat line 7")


def test_whatever_error_a_check_ends_in_names_the_model_and_the_reason(tmp_path: Path) -> None:
    message = refusal(save("llama", tmp_path), Broken())
    assert message == "llama cannot be served (IndexError: no such block)"


def test_a_model_that_overflows_in_its_precision_is_refused_with_a_way_out(tmp_path: Path) -> None:
    model = make_model(LlamaConfig(**COMMON))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    model.save_pretrained(tmp_path)
    assert "llama gives logits in float16 that are not finite; try another --dtype" in refusal(
        tmp_path, dtype="float16"
    )
    Driver(tmp_path, dtype="bfloat16")
