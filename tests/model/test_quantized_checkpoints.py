"""Externally quantised checkpoints: every row of a mixed batch equals PEFT over the same checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import CPU, Driver
from parity import logits, read_adapter
from safetensors.torch import save_file
from support import reference, save
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.integrations.finegrained_fp8 import FP8Linear

from lora_serve.errors import ModelUnsupported
from lora_serve.model import external_quantization
from lora_serve.model.external_linear import ExternalLinear, parameter_shapes
from lora_serve.model.linear import AdaptedLinear
from lora_serve.model.load import load

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT talks about heads and ties
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the libraries talk about torch and each other
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: list[dict[str, Any]] = [
    {"target_modules": [*LINEAR, "lm_head"]},
    {"target_modules": LINEAR, "use_dora": True},
    {"target_modules": LINEAR[:3], "modules_to_save": ["lm_head"]},
]
PROMPTS = [[5, 9, 33, 60, 21, 7, 8, 40, 41, 50], [4, 80, 12], [17], [90, 3, 3, 28, 44, 61]]


def bitsandbytes(folder: Path, architecture: str = "llama", **options: Any) -> None:
    pytest.importorskip("bitsandbytes")
    _quantize(folder, architecture, BitsAndBytesConfig(**options))


def torchao(folder: Path, scheme: str) -> None:
    schemes = pytest.importorskip("torchao.quantization")
    _quantize(folder, "llama", TorchAoConfig(getattr(schemes, scheme)(version=2)))


def _quantize(folder: Path, architecture: str, config: Any) -> None:
    plain = save(architecture, folder / "plain")
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder / "base")


def compressed_tensors(
    folder: Path, rows: dict[str, Any] | None = None, *, apart: tuple[str, ...] = ("lm_head",), **weights: Any
) -> None:
    """As its own tools compress a model that was observed: scales from the weights' extremes.

    Args:
        rows, weights: how they are quantised; apart: modules that are not.
    """
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = copy.deepcopy(reference("llama"))
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=None if rows is None else QuantizationArgs(**rows)
    )
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=[*apart]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.data.view(module.out_features, -1, args.group_size or module.in_features)
            scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / "base")
    compressor.update_config(folder / "base")


PER_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
# What makes the checkpoint, what it is called, and how far rounding may move logits (relative, in norm).
# Weight-only schemes multiply in float32. Where rows are rounded to int8 as well, what differs in its last bit may be
# rounded to another whole number, a 127th of the row's largest.
CASES: dict[str, tuple[Callable[[Path], None], str, float]] = {
    "nf4": (
        lambda folder: bitsandbytes(
            folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        "nf4 by bitsandbytes",
        1e-5,
    ),
    "int8": (lambda folder: bitsandbytes(folder, load_in_8bit=True), "int8 by bitsandbytes", 3e-2),
    "torchao": (lambda folder: torchao(folder, "Int8WeightOnlyConfig"), "Int8WeightOnly by torchao", 1e-5),
    "torchao-rows": (
        lambda folder: torchao(folder, "Int8DynamicActivationInt8WeightConfig"),
        "Int8DynamicActivationInt8Weight by torchao",
        3e-2,
    ),
    "w4a16": (
        lambda folder: compressed_tensors(folder, num_bits=4, type="int", strategy="group", group_size=32),
        "int4 by compressed-tensors",
        1e-5,
    ),
    "w8a8": (
        lambda folder: compressed_tensors(folder, PER_TOKEN, num_bits=8, type="int", strategy="channel"),
        "int8 by compressed-tensors",
        3e-2,
    ),
    "fp8": (
        lambda folder: compressed_tensors(folder, num_bits=8, type="float", strategy="channel"),
        "float8 by compressed-tensors",
        1e-5,
    ),
}


def theirs(folder: Path) -> Any:
    """The checkpoint as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", device_map={"": "cpu"}).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' layout for it rounds, and not all widths have it
    if hasattr(model, "ct_decompress_hook"):
        logits(model, [1, 2])  # decompresses it for good: PEFT looks at weights
    return model


def adapted(folder: Path, base: Any, index: int, options: dict[str, Any]) -> Any:
    """An adapter that PEFT makes over the quantised model and saves to a folder, and PEFT with it."""
    torch.manual_seed(index)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(folder / str(index), save_embedding_layers=False)  # not the base's head, be it adapted
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_mixed_batch_equals_peft_over_the_same_checkpoint(case: str, tmp_path: Path) -> None:
    make_adapter, label, tolerance = CASES[case]
    make_adapter(tmp_path)
    driver = Driver(tmp_path / "base", max_tokens=23)
    assert driver.loaded.shape.quantized == label
    assert any(label in note for note in driver.loaded.notes)
    assert driver.loaded.parameters == sum(each.numel() for each in reference("llama").parameters())
    plain = theirs(tmp_path)
    models, routes = [plain], [[]]
    for index, options in enumerate(ADAPTERS):
        models.append(adapted(tmp_path, copy.deepcopy(plain), index, options))
        routes.append([(driver.load_adapter(read_adapter(driver, tmp_path / str(index))), 1.0)])
    rows = driver.teach(PROMPTS, decode=4, adapters=routes)
    for tokens, got, model in zip(driver.sequences, rows, models, strict=True):
        wanted = logits(model, tokens)
        assert (got - wanted).norm() <= tolerance * wanted.norm()
        unadapted = logits(copy.deepcopy(plain), tokens)
        assert model is plain or (got - unadapted).norm() > 3 * (tolerance + 1e-3) * wanted.norm()
    for module in driver.loaded.model.modules():
        if isinstance(module, AdaptedLinear) and module is not driver.loaded.model.lm_head:
            check_weights(module.base, exact=tolerance < 1e-4)


def check_weights(module: nn.Module, *, exact: bool) -> None:
    """Check that the module reports the weights that it multiplies with.

    Args:
        exact: it does not round rows, to whole numbers of which one is no multiple, say.
    """
    assert isinstance(module, ExternalLinear)
    assert module.full_weight.shape == (module.base.out_features, module.base.in_features)
    with torch.inference_mode():
        pushed = module(torch.eye(module.base.in_features)).T
    torch.testing.assert_close(module.full_weight.float(), pushed, atol=1e-5, rtol=1e-5 if exact else 5e-3)


def test_heads_and_some_of_the_modules_that_share_an_input_may_be_quantised(tmp_path: Path) -> None:
    apart = ("model.layers.0.self_attn.k_proj", "re:.*up_proj")
    compressed_tensors(tmp_path, apart=apart, num_bits=8, type="int", strategy="channel")
    driver = Driver(tmp_path / "base", max_tokens=23)
    assert driver.loaded.vocab_size == 96
    model = theirs(tmp_path)
    plain = logits(model, PROMPTS[0])
    model = adapted(tmp_path, model, 0, {"target_modules": [*LINEAR, "lm_head"]})
    route = [(driver.load_adapter(read_adapter(driver, tmp_path / "0")), 1.0)]
    rows = driver.teach(PROMPTS[:1] * 2, decode=0, adapters=[route, []])
    torch.testing.assert_close(rows[0], logits(model, PROMPTS[0]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rows[1], plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["o_proj"]}, {"init_lora_weights": "pissa"}])
def test_module_overrides_equal_peft_over_the_dequantised_checkpoint(options: dict[str, Any], tmp_path: Path) -> None:
    bitsandbytes(tmp_path, "qwen2", load_in_4bit=True, bnb_4bit_quant_type="fp4")
    driver = Driver(tmp_path / "base", max_tokens=23)
    base = copy.deepcopy(reference("qwen2"))
    with torch.no_grad():
        for name in driver.loaded.shape.sites:
            base.get_submodule(name).weight.copy_(driver.loaded.shape.weight(name))
    plain = logits(base, PROMPTS[0])
    adapted(tmp_path, copy.deepcopy(base), 0, {"target_modules": LINEAR[:3]} | options)
    driver.load_adapter(read_adapter(driver, tmp_path / "0"))
    rows = driver.teach(PROMPTS[:2], decode=0, adapters=[[(next(iter(driver.slots)), 1.0)], []])
    model = peft.PeftModel.from_pretrained(base, tmp_path / "0").eval()
    torch.testing.assert_close(rows[0], logits(model, PROMPTS[0]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(rows[0], plain, atol=1e-2)


@pytest.mark.parametrize("case", ["nf4", "torchao", "w4a16", "w8a8"])
def test_the_rest_of_the_model_has_the_configured_dtype(case: str, tmp_path: Path) -> None:
    CASES[case][0](tmp_path)
    driver = Driver(tmp_path / "base", dtype="bfloat16")
    rows = driver.teach(PROMPTS[:1], decode=3)[0]
    assert rows.dtype is torch.bfloat16
    wanted = logits(theirs(tmp_path), driver.sequences[0])  # in float32
    assert (rows - wanted).norm() < 0.05 * wanted.norm()


def test_a_module_that_computes_in_another_dtype_returns_its_input_s_dtype() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    module = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float16, quant_type="nf4").to("cpu")
    assert ExternalLinear(module)(torch.ones(3, 64)).dtype is torch.float32


def test_fp8_is_dequantised_at_load_on_devices_without_fp8(tmp_path: Path) -> None:
    model = copy.deepcopy(reference("llama"))
    tensors = {}
    for name, weight in model.state_dict().items():
        if name.split(".")[-2] not in LINEAR:
            tensors[name] = weight
            continue
        tall, wide = weight.shape
        blocks = weight.view(tall // 32, 32, wide // 32, 32)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        tensors[name] = (blocks / scale).view(tall, wide).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.view(tall // 32, wide // 32)
        model.get_parameter(name).data.copy_((tensors[name].float().view_as(blocks) * scale).view(tall, wide))
    save("llama", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    configure(tmp_path, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[32, 32])
    driver = Driver(tmp_path)
    assert driver.loaded.notes == [
        "the base's weights are fp8 by transformers, dequantised at load: there is no computing with them on cpu"
    ]
    rows = driver.teach(PROMPTS[:1], decode=3)[0]
    torch.testing.assert_close(rows, logits(model, driver.sequences[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block", [(32, 48), None])
def test_fp8_modules_report_their_weights(block: tuple[int, int] | None) -> None:
    module = FP8Linear(96, 80, block_size=block)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module.weight.copy_(torch.randn(80, 96, generator=generator))
        module.weight_scale_inv.uniform_(0.5, 2, generator=generator)
    wanted = module.weight.detach().float()
    for o in range(80):
        for i in range(96):
            wanted[o, i] *= module.weight_scale_inv[(o // block[0], i // block[1]) if block else ()].item()
    assert external_quantization.is_externally_quantized(module)
    assert parameter_shapes(module) == {"weight": (80, 96)}
    torch.testing.assert_close(ExternalLinear(module).full_weight, wanted)


def configure(folder: Path, **quantization: Any) -> None:
    """Add a quantisation configuration to a checkpoint."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))


@pytest.fixture
def load_error(tmp_path: Path) -> Callable[..., str]:
    """The error of loading a checkpoint with such a quantisation configuration and no weights."""
    save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()

    def refusal(scheme: Any = None, **quantization: Any) -> str:
        configure(tmp_path, **quantization)
        with pytest.raises(ModelUnsupported) as raised:
            load(str(tmp_path), revision=None, dtype="auto", device=CPU, progress=lambda *_: None, scheme=scheme)
        return raised.value.message.replace(repr(str(tmp_path)), "it")

    return refusal


@pytest.mark.parametrize(
    ("method", "label", "missing"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "nf4 by bitsandbytes",
            ["bitsandbytes", "accelerate"],
        ),
        ({"load_in_8bit": True}, "int8 by bitsandbytes", ["bitsandbytes"]),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}},
            "Float8WeightOnly by torchao",
            ["torchao"],
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"type": "int", "num_bits": 4}}}},
            "int4 by compressed-tensors",
            ["compressed-tensors"],
        ),
        ({"quant_method": "fp8"}, "fp8 by transformers", ["accelerate"]),
    ],
)
def test_a_missing_package_is_named_before_weights_are_read(
    method: dict[str, Any],
    label: str,
    missing: list[str],
    load_error: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(external_quantization, "is_installed", lambda package: package not in missing)
    assert load_error(**method) == (
        f"it is quantised ({label}), which needs {' and '.join(missing)}: pip install {' '.join(missing)}"
    )


def test_is_installed_finds_distributions() -> None:
    assert external_quantization.is_installed("torch")
    assert not external_quantization.is_installed("kernels-of-nobody")


def test_other_methods_are_refused_by_name(load_error: Callable[..., str]) -> None:
    assert load_error(quant_method="gptq", bits=4) == (
        "it is quantised by gptq, which is not served; what is: bitsandbytes, compressed-tensors, fp8, torchao, "
        "or an unquantised checkpoint with --quantize"
    )


def test_quantize_is_refused_for_a_quantised_checkpoint(
    load_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_quantization, "is_installed", lambda package: True)
    assert load_error(scheme="int8", quant_method="fp8") == (
        "it is quantised already (fp8 by transformers): leave --quantize away, or name the original checkpoint"
    )


def test_a_checkpoint_that_contradicts_its_configuration_is_refused(tmp_path: Path) -> None:
    compressed_tensors(tmp_path, num_bits=4, type="int", strategy="group", group_size=32)
    file = tmp_path / "base" / "config.json"
    file.write_text(file.read_text().replace('"num_bits": 4', '"num_bits": 2'))
    with pytest.raises(ModelUnsupported, match=r"\(int2 by compressed-tensors\) cannot be loaded"):
        Driver(tmp_path / "base")


def test_quantised_keys_and_values_are_refused(load_error: Callable[..., str]) -> None:
    message = load_error(quant_method="compressed-tensors", config_groups={}, kv_cache_scheme={"num_bits": 8})
    assert "quantises its KV as well, which is not served" in message


def test_more_than_linear_modules_quantised_is_refused_by_name() -> None:
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelUnsupported, match=r"'it': experts\.gate_up_proj is quantised, and is not the weight of a"):
        external_quantization.prepare_modules("it", model, None)
