"""Random adapters that PEFT makes, saves and loads: any method, any initialisation, any two or three options together.

A draw is repeated until PEFT takes the options together. Everything follows from the seed.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from support import VOCABULARY, reference
from torch import Tensor

Options = dict[str, Any]
Draw = Callable[[str, random.Random], Options]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "phi3", "mixtral", "qwen3_moe")
EXPERTS = ("mixtral", "qwen3_moe")
LINEAR = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = {"gpt2": ["ln_1", "ln_f"], "gemma3": ["q_norm", "k_norm", "input_layernorm"], "qwen3": ["q_norm", "norm"]}
INVOCATION = [11, 12, 13]
ONLY_REMOVED = "tensors removed, and nothing else"
LISTS = ("target_modules", "modules_to_save", "target_parameters")  # options that add up


def linear(architecture: str) -> list[str]:
    return LINEAR.get(architecture, DENSE)


def norms(architecture: str) -> list[str]:
    return NORMS.get(architecture, ["input_layernorm", "norm"])


def embedding(architecture: str) -> str:
    return "wte" if architecture == "gpt2" else "embed_tokens"


def one_layer(architecture: str, rng: random.Random) -> str:
    """The path of one linear module."""
    name = rng.choice(linear(architecture))
    return rng.choice([path for path, _ in reference(architecture).named_modules() if path.endswith(f".{name}")])


def some(names: list[str], rng: random.Random) -> list[str]:
    return rng.sample(names, rng.randint(1, min(3, len(names))))


def tokens(rng: random.Random) -> list[int]:
    return sorted(rng.sample(range(90), rng.randint(1, 4)))


LORA: dict[str, Draw] = {
    "patterns": lambda a, rng: {
        "rank_pattern": {rng.choice(linear(a)): rng.randint(1, 6)}, "alpha_pattern": {rng.choice(linear(a)): 11},
        "use_rslora": rng.random() < 0.5,
    },
    "pissa": lambda a, rng: {"init_lora_weights": "pissa"},
    "olora": lambda a, rng: {"init_lora_weights": "olora"},
    "initialisation": lambda a, rng: {
        "init_lora_weights": rng.choice(["gaussian", "orthogonal", "mica", False]), "r": 4,
    },
    "kasa": lambda a, rng: {"kasa_config": peft.KasaConfig()},
    "dora": lambda a, rng: {"use_dora": True},
    "lora_bias": lambda a, rng: {"lora_bias": True},
    "bias": lambda a, rng: {"bias": rng.choice(["all", "lora_only"])},
    "head": lambda a, rng: {"target_modules": ["lm_head"]},
    "embedding": lambda a, rng: {"target_modules": [embedding(a)]},
    "ensure tying": lambda a, rng: {"ensure_weight_tying": True},
    "saved head": lambda a, rng: {"modules_to_save": ["lm_head"]},
    "saved embedding": lambda a, rng: {"modules_to_save": [embedding(a)]},
    "saved norms": lambda a, rng: {"modules_to_save": some(norms(a), rng)},
    "saved linear": lambda a, rng: {"modules_to_save": [one_layer(a, rng)]},
    "saved subtree": lambda a, rng: {"modules_to_save": [rng.choice(["mlp", "attn" if a == "gpt2" else "self_attn"])]},
    "token rows": lambda a, rng: {"trainable_token_indices": tokens(rng)},
    "token rows of the head": lambda a, rng: {"trainable_token_indices": {"lm_head": tokens(rng)}},
    "token rows of both": lambda a, rng: {
        "trainable_token_indices": {embedding(a): tokens(rng), "lm_head": tokens(rng)},
    },
    "the same token rows": lambda a, rng: {
        "trainable_token_indices": dict.fromkeys([embedding(a), "lm_head"], tokens(rng)),
    },
    "parameters": lambda a, rng: {
        "target_parameters": some([f"{embedding(a)}.weight", f"{one_layer(a, rng)}.weight", "lm_head.weight"], rng),
    },
    "router": lambda a, rng: {"target_parameters": ["gate.weight"]},
    "experts": lambda a, rng: {"target_parameters": some(["experts.down_proj", "experts.gate_up_proj"], rng)},
    "saved router": lambda a, rng: {"modules_to_save": ["gate"]},
    "layers": lambda a, rng: {"layers_to_transform": rng.sample(range(3), rng.randint(1, 2))},
    "layers by pattern": lambda a, rng: {"layers_to_transform": 1, "layers_pattern": "h" if a == "gpt2" else "layers"},
    "excluded": lambda a, rng: {"exclude_modules": some([*linear(a), one_layer(a, rng)], rng)},
    "expression": lambda a, rng: {"target_modules": rf".*\.[012]\..*({'|'.join(linear(a))})"},
    "all linear": lambda a, rng: {"target_modules": "all-linear"},
    "invocation": lambda a, rng: {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"},
    "resized": lambda a, rng: {"size": rng.choice([90, 104])},
    "new tokens": lambda a, rng: {"size": 100, "trainable_token_indices": [96, 97, 98, 99]},
}  # fmt: skip

METHODS: dict[str, Callable[[str, random.Random], peft.PeftConfig]] = {
    "adalora": lambda a, rng: peft.AdaLoraConfig(init_r=rng.randint(2, 6), total_step=9, lora_alpha=rng.choice([1, 8])),
    "vera": lambda a, rng: peft.VeraConfig(r=rng.choice([2, 8]), save_projection=rng.random() < 0.5),
    "loha": lambda a, rng: peft.LoHaConfig(r=rng.choice([2, 4]), alpha=3),
    "lokr": lambda a, rng: peft.LoKrConfig(r=rng.choice([2, 4]), decompose_both=rng.random() < 0.5),
    "vblora": lambda a, rng: peft.VBLoRAConfig(
        r=2, num_vectors=9, vector_length=4, save_only_topk_weights=rng.random() < 0.5
    ),
    "randlora": lambda a, rng: peft.RandLoraConfig(
        r=rng.choice([4, 16]), randlora_alpha=8, save_projection=rng.random() < 0.5
    ),
    "delora": lambda a, rng: peft.DeloraConfig(r=4),
    "miss": lambda a, rng: peft.MissConfig(r=rng.choice([4, 8])),
    "ia3": lambda a, rng: peft.IA3Config(feedforward_modules=[]),
    "norms": lambda a, rng: peft.LNTuningConfig(target_modules=some(norms(a), rng)),
    "trained tokens": lambda a, rng: peft.TrainableTokensConfig(
        token_indices=tokens(rng), target_modules=some([embedding(a), "lm_head"], rng)
    ),
}
OWN_TARGETS = ("norms", "trained tokens")  # methods that do not target linear modules
BESIDE = ("saved head", "saved embedding", "saved norms", "saved linear", "layers", "excluded", "expression")

# Ways to let configuration and weights of a saved adapter contradict each other.
CONTRADICTIONS: dict[str, Draw] = {
    "layers": lambda a, rng: {"layers_to_transform": rng.choice([1, [0, 2], [2]])},
    "pattern": lambda a, rng: {"layers_to_transform": [1], "layers_pattern": ["h" if a == "gpt2" else "layers"]},
    "no pattern": lambda a, rng: {"layers_to_transform": [1], "layers_pattern": "nothing"},
    "excluded": lambda a, rng: {"exclude_modules": some([*linear(a), one_layer(a, rng)], rng)},
    "excluded by expression": lambda a, rng: {"exclude_modules": r".*\.1\..*"},
    "fewer": lambda a, rng: {"target_modules": rng.sample(linear(a), 2)},
    "more": lambda a, rng: {"target_modules": linear(a)},
    "all": lambda a, rng: {"target_modules": "all-linear"},
    # PEFT forgets the layers of an expression on models whose experts it converts.
    "expression": lambda a, rng: {} if a in EXPERTS else {"target_modules": rf".*\.[01]\..*({'|'.join(linear(a))})"},
}


@dataclass(frozen=True)
class RandomAdapter:
    """A folder that PEFT saved, and what PEFT loads from it.

    Attributes:
        names: of the method or the options.
        size: vocabulary of the base that it was trained on.
    """

    architecture: str
    folder: Path
    model: Any
    names: tuple[str, ...]
    size: int
    config: Options

    def __repr__(self) -> str:
        return f"<{self.architecture}, {' + '.join(self.names)}, {self.size} tokens: {self.config}>"


def draw_lora(
    seed: int, folder: Path, *, options: list[str] | None = None, trained: bool = True, contradicted: bool = False
) -> RandomAdapter:
    """A LoRA with two or three of the options (names in `LORA`), saved in float32 or bfloat16."""

    def attempt(rng: random.Random) -> RandomAdapter:
        architecture = rng.choice(ARCHITECTURES)
        names = rng.sample(options or [*LORA], rng.randint(2, 3))
        config: Options = {"target_modules": some(linear(architecture), rng), "r": rng.randint(1, 5), "lora_alpha": 6}
        for name in names:
            for key, value in LORA[name](architecture, rng).items():
                adds = key in LISTS and isinstance(value, list) and isinstance(config.get(key, []), list)
                config[key] = [*dict.fromkeys([*config.get(key, []), *value])] if adds else value
        if architecture == "gpt2" and "target_parameters" not in config:
            config["fan_in_fan_out"] = True
        size = config.pop("size", VOCABULARY)
        if contradicted and size != VOCABULARY:
            raise ValueError("without its keys, a resized base is anybody's guess")
        save_adapter(architecture, folder, peft.LoraConfig(**config), rng, trained=trained, size=size)
        if contradicted:
            names += _contradict(architecture, folder, rng)
        return _load(architecture, folder, names, size)

    return _first(seed, attempt)


def draw_method(seed: int, folder: Path, *, trained: bool = True) -> RandomAdapter:
    """An adapter of a method other than LoRA, half of them with an option beside it."""

    def attempt(rng: random.Random) -> RandomAdapter:
        architecture, names = rng.choice(ARCHITECTURES), [rng.choice([*METHODS])]
        config = METHODS[names[0]](architecture, rng)
        if names[0] not in OWN_TARGETS:
            config.target_modules = {*some(linear(architecture), rng), *(["lm_head"] if rng.random() < 0.25 else [])}
        if architecture == "gpt2" and hasattr(config, "fan_in_fan_out"):
            config.fan_in_fan_out = True
        if rng.random() < 0.5:
            names.append(rng.choice(BESIDE))
            for key, value in LORA[names[1]](architecture, rng).items():
                if hasattr(config, key) and not (key == "target_modules" and names[0] in OWN_TARGETS):
                    setattr(config, key, value)
        save_adapter(architecture, folder, config, rng, trained=trained)
        return _load(architecture, folder, names, VOCABULARY)

    return _first(seed, attempt)


def save_adapter(
    architecture: str,
    folder: Path,
    config: peft.PeftConfig,
    rng: random.Random,
    *,
    trained: bool = True,
    size: int = VOCABULARY,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> None:
    """Save an adapter as PEFT makes it, or with noise on every trained parameter, in one of the dtypes."""
    torch.manual_seed(rng.randrange(1 << 30))
    model = peft.get_peft_model(resized(architecture, size), config).eval()
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, **({} if size == VOCABULARY else {"save_embedding_layers": True}))
    dtype = rng.choice(dtypes)
    if dtype != torch.float32:
        edit_weights(folder, lambda weights: {name: _cast(tensor, dtype) for name, tensor in weights.items()})


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def resized(architecture: str, size: int = VOCABULARY) -> Any:
    """A copy of the base, with another vocabulary where `size` is not the base's."""
    model = copy.deepcopy(reference(architecture))
    if size != VOCABULARY:
        torch.manual_seed(size)
        model.resize_token_embeddings(size, mean_resizing=False)
    return model


def _first(seed: int, attempt: Callable[[random.Random], RandomAdapter]) -> RandomAdapter:
    """The first draw that PEFT can make, save and load."""
    for number in count():
        try:
            return attempt(random.Random(f"{seed}.{number}"))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError):
            continue
    raise AssertionError


def _contradict(architecture: str, folder: Path, rng: random.Random) -> list[str]:
    """Edit a saved adapter so that its configuration names other modules than its weights; names of what was done."""
    names = rng.sample([*CONTRADICTIONS], rng.randint(0, 1))
    for name in names:
        edit_config(folder, **CONTRADICTIONS[name](architecture, rng))
    if not names or rng.random() < 0.5:
        names.append("tensors removed" if names else ONLY_REMOVED)
        edit_weights(folder, lambda weights: _without_some_modules(weights, rng))
    return names


def _without_some_modules(weights: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    modules = sorted({name.partition(".lora_")[0] for name in weights if ".lora_" in name})
    removed = {*rng.sample(modules, rng.randint(1, len(modules)))}
    return {name: tensor for name, tensor in weights.items() if name.partition(".lora_")[0] not in removed}


def _load(architecture: str, folder: Path, names: list[str], size: int) -> RandomAdapter:
    model = peft.PeftModel.from_pretrained(resized(architecture, size), folder).eval()
    with torch.inference_mode():
        model(input_ids=torch.tensor([[3, *INVOCATION, 5]]), use_cache=False)  # PEFT loads some that it cannot run
    saved = json.loads((folder / "adapter_config.json").read_text())
    config = {key: value for key, value in saved.items() if value not in (None, False, [], {})}
    return RandomAdapter(architecture, folder, model, tuple(names), size, config)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
