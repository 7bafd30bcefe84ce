"""Baichuan checkpoints as they are on the hub give the logits of the papers' formulas, with adapters and without."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import logits, read_adapter
from safetensors.torch import save_file
from torch import Tensor
from training_driver import TrainingDriver, check_parity
from transformers import AutoModelForCausalLM

from lora_serve.engine.training.trainer import Trainer
from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.errors import AdapterInvalid
from lora_serve.model.baichuan import AlibiFeatures, BaichuanConfig, alibi_slopes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT talks about heads

LINEAR = {"self_attn": ["W_pack", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
TARGETS = (["W_pack"], ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"])
SCALING = 1.5


@dataclass(frozen=True)
class Variant:
    """One of the models: what its `config.json` says, and what that means."""

    config: dict[str, Any]
    alibi: bool
    normalized: bool


COMMON: dict[str, Any] = {
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "model_type": "baichuan", "tokenizer_class": "BaichuanTokenizer", "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "hidden_act": "silu", "initializer_range": 0.02, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "use_cache": True, "transformers_version": "4.29.2",
}  # fmt: skip
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
ODD: dict[str, Any] = {"hidden_size": 36, "intermediate_size": 48, "num_attention_heads": 6}
ROPE: dict[str, Any] = {"max_position_embeddings": 4096, "model_max_length": 4096}
LARGE: dict[str, Any] = {"model_max_length": 4096, "z_loss_weight": 0, "gradient_checkpointing": False}
VARIANTS = {
    "Baichuan 7B": Variant(
        {**COMMON, **SMALL, **ROPE, "architectures": ["BaiChuanForCausalLM"], "vocab_size": 64_000}, False, False
    ),
    "Baichuan 2 7B": Variant(
        {**COMMON, **SMALL, **ROPE, "architectures": ["BaichuanForCausalLM"], "vocab_size": 125_696}, False, True
    ),
    "Baichuan 2 13B": Variant(
        {**COMMON, **ODD, **LARGE, "architectures": ["BaichuanForCausalLM"], "vocab_size": 125_696}, True, True
    ),
}
MALICIOUS = "raise RuntimeError('the checkpoint\\'s own code must not run')\n"


def make_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights, not centred, under the names of a Baichuan checkpoint."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]

    def matrix(rows: int, columns: int, mean: float = 0.0) -> Tensor:
        return mean + 0.15 * torch.randn(rows, columns, generator=generator)

    weights = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden, 0.1),
        "lm_head.weight": matrix(config["vocab_size"], hidden, 0.05)
        * (0.2 + torch.rand(config["vocab_size"], 1, generator=generator)),
        "model.norm.weight": 1.3 + 0.3 * torch.randn(hidden, generator=generator),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.self_attn.W_pack.weight": matrix(3 * hidden, hidden),
            f"{name}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{name}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{name}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{name}.mlp.down_proj.weight": matrix(hidden, inner),
            f"{name}.input_layernorm.weight": 1.3 + 0.3 * torch.randn(hidden, generator=generator),
            f"{name}.post_attention_layernorm.weight": 1.3 + 0.3 * torch.randn(hidden, generator=generator),
        }
    return weights


def save_checkpoint(folder: Path, variant: Variant, dtype: torch.dtype) -> dict[str, Tensor]:
    """A folder as on the hub, with code of its own that fails when it is run; returns its weights."""
    folder.mkdir()
    weights = {name: weight.to(dtype) for name, weight in make_weights(variant.config).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    kind = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(variant.config | {"torch_dtype": kind}))
    for name in ("configuration_baichuan.py", "modeling_baichuan.py"):
        (folder / name).write_text(MALICIOUS)
    return weights


@dataclass
class Reference:
    """The model in plain torch, in float32: Llama 2's formulas, ALiBi's and the normalised head.

    Attributes:
        deltas: A and B of LoRA by module.
    """

    variant: Variant
    weights: dict[str, Tensor]
    deltas: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def logits(self, tokens: list[int]) -> Tensor:
        config = self.variant.config
        count, heads, dim = (
            len(tokens),
            config["num_attention_heads"],
            config["hidden_size"] // config["num_attention_heads"],
        )
        x = self._weight("model.embed_tokens")[tokens]
        bias = self._bias(count, heads)
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            packed = self._linear(f"{name}.self_attn.W_pack", self._norm(f"{name}.input_layernorm", x))
            q, k, v = packed.view(count, 3, heads, dim).permute(1, 2, 0, 3)  # each [heads, tokens, dim]
            if not self.variant.alibi:
                q, k = rotated(q), rotated(k)
            mixed = (q @ k.transpose(1, 2) / math.sqrt(dim) + bias).softmax(-1) @ v
            x = x + self._linear(f"{name}.self_attn.o_proj", mixed.transpose(0, 1).reshape(count, -1))
            y = self._norm(f"{name}.post_attention_layernorm", x)
            gate, up = (self._linear(f"{name}.mlp.{leaf}_proj", y) for leaf in ("gate", "up"))
            x = x + self._linear(f"{name}.mlp.down_proj", torch.nn.functional.silu(gate) * up)
        head = self._weight("lm_head")
        if self.variant.normalized:
            head = head / head.square().sum(1, keepdim=True).sqrt()
        return self._norm("model.norm", x) @ head.T

    def _weight(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"].float()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self._weight(name).T
        if name in self.deltas:
            a, b = self.deltas[name]
            y = y + SCALING * x @ a.T @ b.T
        return y

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self._weight(name) * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def _bias(self, count: int, heads: int) -> Tensor:
        """What is added to scores [heads, query, key]: the causal mask, and ALiBi's distances times slopes."""
        distance = torch.arange(count)[:, None] - torch.arange(count)  # [query, key]
        slopes = torch.tensor(slopes_of(heads) if self.variant.alibi else [0.0] * heads)
        return (-slopes[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding of x [heads, tokens, dim], first half with second half, base 10,000."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * 10_000 ** (-torch.arange(half) / half)
    turned = torch.view_as_complex(torch.stack((x[..., :half], x[..., half:]), -1)) * torch.polar(
        torch.tensor(1.0), angles
    )
    return torch.cat((turned.real, turned.imag), -1)


def slopes_of(heads: int) -> list[float]:
    """ALiBi's slopes: 2^(-8/n), its square, …; where n is no power of two, with every second slope of the next one."""
    power = 2 ** math.floor(math.log2(heads))
    own = [(2 ** (-8 / power)) ** (head + 1) for head in range(power)]
    return own if power == heads else own + slopes_of(2 * power)[0::2][: heads - power]


def save_lora(folder: Path, config: dict[str, Any], leaves: list[str], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA as PEFT saves it for a Baichuan model with its own code; returns A and B by module."""
    generator = torch.Generator().manual_seed(seed)
    weights = make_weights(config)
    deltas = {}
    for layer in range(config["num_hidden_layers"]):
        for parent, names in LINEAR.items():
            for leaf in set(names) & set(leaves):
                name = f"model.layers.{layer}.{parent}.{leaf}"
                rows, columns = weights[f"{name}.weight"].shape
                deltas[name] = (
                    torch.randn(4, columns, generator=generator) * 0.2,
                    torch.randn(rows, 4, generator=generator) * 0.2,
                )
    folder.mkdir()
    saved = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4 * SCALING, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"base_model_name_or_path": "baichuan"}))
    tensors = {}
    for name, (a, b) in deltas.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    return deltas


def median_error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Median over all rows of the relative error."""
    pairs = zip(got, wanted, strict=True)
    return float(torch.cat([(own.float() - exact).norm(dim=-1) / exact.norm(dim=-1) for own, exact in pairs]).median())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_mixed_batch_has_the_logits_of_the_formulas(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    weights = save_checkpoint(tmp_path / "base", variant, dtype)
    driver = Driver(tmp_path / "base", dtype="auto", max_tokens=23)
    references, routes = [Reference(variant, weights)], [[]]
    for seed, leaves in enumerate(TARGETS):
        deltas = save_lora(tmp_path / str(seed), variant.config, leaves, seed)
        references.append(Reference(variant, weights, deltas))
        routes.append([(driver.load_adapter(read_adapter(driver, tmp_path / str(seed))), 1.0)])
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 60_000, (n,), generator=generator).tolist() for n in (5, 9, 30, 14, 1, 7)]
    rows = driver.teach(prompts, decode=4, adapters=[routes[i % 3] for i in range(6)])
    wanted = [references[i % 3].logits(tokens) for i, tokens in enumerate(driver.sequences)]
    plain = [references[0].logits(tokens) for tokens in driver.sequences]
    assert not any(torch.allclose(wanted[i], plain[i], atol=0.1) for i in range(6) if i % 3)
    if dtype is torch.float32:
        for got, exact in zip(rows, wanted, strict=True):
            torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-4)
        return
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager", dtype=dtype).eval()
    theirs = [model]
    theirs += [
        peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager", dtype=dtype),
            tmp_path / str(seed),
        ).eval()
        for seed in range(2)
    ]
    own = [logits(theirs[i % 3], tokens) for i, tokens in enumerate(driver.sequences)]
    assert median_error(rows, wanted) <= 1.25 * median_error(own, wanted)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_on_the_base_is_peft_s(name: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", VARIANTS[name], torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    kinds = {"layers": LoraSettings(r=3), "and the head": LoraSettings(r=3, train_lm_head=True, seed=1)}
    driver = TrainingDriver(tmp_path / "base")
    driver.trainer = Trainer(driver.trainable, memory=1 << 28)  # a large vocabulary
    check_parity(driver, model, tmp_path, kinds, steps=3)


def test_a_saved_head_is_normalised_as_the_base_s_is(tmp_path: Path) -> None:
    variant = VARIANTS["Baichuan 2 7B"]
    weights = save_checkpoint(tmp_path / "base", variant, torch.float32)
    driver = Driver(tmp_path / "base")
    folder = tmp_path / "a"
    deltas = save_lora(folder, variant.config, ["W_pack"], 1)
    saved = json.loads((folder / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head", "norm"]}
    (folder / "adapter_config.json").write_text(json.dumps(saved))
    others = {
        "lm_head.weight": weights["lm_head.weight"] * 3 + 0.1,
        "model.norm.weight": weights["model.norm.weight"] * 2,
    }
    tensors = {f"base_model.model.{name}": tensor for name, tensor in others.items()}
    for name, (a, b) in deltas.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    rows = driver.teach(
        [[5, 9, 33, 60]] * 2, decode=2, adapters=[[(driver.load_adapter(read_adapter(driver, folder)), 1.0)], []]
    )
    references = Reference(variant, weights | others, deltas), Reference(variant, weights)
    for got, reference, tokens in zip(rows, references, driver.sequences, strict=True):
        torch.testing.assert_close(got, reference.logits(tokens), atol=1e-4, rtol=1e-4)


def test_a_saved_copy_of_the_base_s_head_is_dropped(tmp_path: Path) -> None:
    variant = VARIANTS["Baichuan 2 7B"]
    weights = save_checkpoint(tmp_path / "base", variant, torch.bfloat16)
    driver = Driver(tmp_path / "base", dtype="bfloat16")
    save_lora(tmp_path / "a", variant.config, ["W_pack"], 1)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {"base_model.model.lm_head.weight": weights["lm_head.weight"]}
    save_file(tensors, file)
    with pytest.raises(AdapterInvalid, match="changes nothing"):
        read_adapter(driver, tmp_path / "a")


@pytest.mark.parametrize("heads", [1, 4, 12, 32, 40])
def test_slopes_are_those_of_the_paper(heads: int) -> None:
    torch.testing.assert_close(alibi_slopes(heads, torch.device("cpu")), torch.tensor(slopes_of(heads)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_distances_are_exact_in_every_precision_and_over_the_whole_context(dtype: torch.dtype) -> None:
    config = BaichuanConfig(hidden_size=5120, num_attention_heads=40, vocab_size=96)
    positions = torch.tensor([[0, 1, 2, 255, 256, 257, 1000, 2049, 8190, 8191, 8192]])
    query, key = AlibiFeatures(config)(torch.zeros(1, 11, 5120, dtype=dtype), positions)
    scores = (query.double() @ key.double().transpose(2, 3))[0] / math.sqrt(128)  # [heads, query, key]
    slopes = torch.tensor(slopes_of(40), dtype=torch.float64)[:, None, None]
    relative = scores - scores.diagonal(dim1=1, dim2=2)[:, :, None]  # softmax ignores what is the same for all keys
    wanted = slopes * (positions[0] - positions[0][:, None])
    torch.testing.assert_close(relative, wanted, atol=1e-6, rtol=2e-5)
    assert scores.diagonal(dim1=1, dim2=2).abs().max() < 0.1  # or half precision would round the rest away


def test_prefix_tuning_on_alibi_is_refused_and_prompt_tuning_is_served(tmp_path: Path) -> None:
    """Keys that PEFT trained alone say nothing of distances; virtual tokens are tokens like others."""
    save_checkpoint(tmp_path / "base", VARIANTS["Baichuan 2 13B"], torch.float32)
    driver = Driver(tmp_path / "base")

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")

    for kind in (peft.PrefixTuningConfig, peft.PromptTuningConfig):
        model = peft.get_peft_model(fresh(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
        model.save_pretrained(tmp_path / kind.__name__)
    with pytest.raises(AdapterInvalid, match="layers that store keys and values of one shape; this base's differ"):
        read_adapter(driver, tmp_path / "PrefixTuningConfig")
    adapter = driver.load_adapter(read_adapter(driver, tmp_path / "PromptTuningConfig"))
    rows = driver.teach([[5, 9, 33, 60, 7]], decode=3, adapters=[[(adapter, 1.0)]])
    model = peft.PeftModel.from_pretrained(fresh(), tmp_path / "PromptTuningConfig").eval()
    torch.testing.assert_close(rows[0], logits(model, driver.sequences[0]), atol=1e-4, rtol=1e-4)
