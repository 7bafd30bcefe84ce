"""Mixtures of experts quantised at load: their experts too, with adapters over the dequantised weights."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import logits, read_adapter, save_noisy_adapter
from support import COMMON, EXPERTS, uncentred
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, PretrainedConfig

from lora_serve.kernels.packed_weight import GROUP, Scheme, dequantize, quantize

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns about parameters

BASES: dict[str, PretrainedConfig] = {
    **EXPERTS,  # qwen3_moe's experts have 48 inner features, which are not whole groups of int4
    "gpt_oss": GptOssConfig(  # experts as [in, out], with biases
        **COMMON, head_dim=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=6
    ),
}
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "experts": {"target_modules": [], "target_parameters": EXPERT_PARAMETERS},
    "down and attention": {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERT_PARAMETERS[1:]},
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "dora": {"target_modules": ["k_proj", "o_proj"], "use_dora": True},
    "pissa": {"target_modules": ["k_proj", "o_proj"], "init_lora_weights": "pissa"},
    "saved experts": {"target_modules": ["k_proj"], "modules_to_save": ["experts"]},
}
PROMPT = [(7 * i * i + 3 * i + 5) % 90 for i in range(40)]  # long: rows with other experts do not decide a median


def serve(base: str, folder: Path, scheme: Scheme, dtype: str = "float32", native: bool = True) -> tuple[Driver, Any]:
    """A quantised base, and transformers' model in float32 whose weights are the dequantised ones."""
    kind = getattr(torch, dtype)
    uncentred(BASES[base]).to(kind).save_pretrained(folder)
    driver = Driver(folder, dtype=dtype, max_tokens=23, scheme=scheme, native=native)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, **eager).eval().float()
    shape = driver.loaded.shape
    with torch.no_grad():
        for site in shape.sites:
            module, _, expert = site.partition("[")
            parameter = theirs.get_parameter(module if expert else f"{module}.weight")
            weight = shape.weight(site)
            if not expert:
                parameter.copy_(weight)
            else:
                parameter[int(expert[:-1])] = weight.T if base == "gpt_oss" else weight
    return driver, theirs


def make(name: str, theirs: Any, folder: Path, seed: int) -> Any:
    """A PEFT model whose adapter is its method's initialisation plus noise, saved and loaded again."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | ADAPTERS[name])
    save_noisy_adapter(theirs, folder, seed, config, noise=0.05)
    return peft.PeftModel.from_pretrained(copy.deepcopy(theirs), folder).eval()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("base", BASES)
def test_every_expert_is_quantised_as_specified_and_its_own_weights_are_freed(
    base: str, scheme: Scheme, tmp_path: Path
) -> None:
    driver, _ = serve(base, tmp_path, scheme)
    own = dict(uncentred(BASES[base]).named_parameters())
    stacked = [name for name, parameter in own.items() if parameter.ndim == 3]
    assert stacked
    for name in stacked:
        weights = own[name].transpose(1, 2) if base == "gpt_oss" else own[name]
        kind: Scheme = "int8" if weights.shape[2] % GROUP else scheme
        for expert, weight in enumerate(weights):
            assert driver.loaded.shape.weight(f"{name}[{expert}]").equal(
                dequantize(*quantize(weight, kind, driver.loaded.importance.get(name)))
            )
        assert driver.loaded.shape.parameter(name).equal(own[name])  # as in the checkpoint, to compare saved ones with
    assert not any(parameter.ndim == 3 for parameter in driver.loaded.model.parameters())


def row_errors(got: Tensor, model: Any, tokens: list[int]) -> Tensor:
    """Each row's relative error. Rows are rounded to int8, so in a few of them other experts may be chosen."""
    wanted = logits(model, tokens)
    return (got - wanted).norm(dim=1) / wanted.norm(dim=1)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(
    ("base", "native"), [*((base, True) for base in BASES), ("qwen3_moe", False)], ids=[*BASES, "qwen3_moe reference"]
)
def test_adapters_equal_peft_over_the_dequantised_mixture(
    base: str, native: bool, scheme: Scheme, tmp_path: Path
) -> None:
    driver, theirs = serve(base, tmp_path / "base", scheme, native=native)
    models, routes = [theirs], [[]]
    for seed, name in enumerate(ADAPTERS):
        models.append(make(name, theirs, tmp_path / str(seed), seed))
        routes.append([(driver.load_adapter(read_adapter(driver, tmp_path / str(seed))), 1.0)])
    rows = driver.teach([PROMPT] * len(models), decode=3, adapters=routes)
    for index, (tokens, got) in enumerate(zip(driver.sequences, rows, strict=True)):
        errors = [float(row_errors(got, model, tokens).median()) for model in models]
        own = errors.pop(index)
        assert own < 0.05
        assert own < 0.4 * min(errors)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("base", BASES)
def test_experts_with_a_single_token_in_half_precision(base: str, dtype: str, scheme: Scheme, tmp_path: Path) -> None:
    """Prompts of one token: most experts have no row, the others one."""
    driver, theirs = serve(base, tmp_path / "base", scheme, dtype)
    adapted = make("experts", theirs, tmp_path / "a", 0)
    routes = [[(driver.load_adapter(read_adapter(driver, tmp_path / "a")), 1.0)], []]
    errors: list[list[float]] = [[], [], [], []]
    for token in range(3, 19):
        got, plain = driver.teach([[token]] * 2, decode=1, adapters=routes)
        pairs = ((got, 0, adapted), (plain, 1, theirs), (got, 0, theirs), (plain, 1, adapted))
        for found, (rows, which, model) in zip(errors, pairs, strict=True):
            found += row_errors(rows.float(), model, driver.sequences[which]).tolist()
    own, others = errors[0] + errors[1], errors[2] + errors[3]
    assert statistics.median(own) < 0.05
    assert statistics.median(own) < 0.4 * statistics.median(others)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("base", EXPERTS)
def test_a_composition_adds_weighted_deltas_to_quantised_experts(base: str, scheme: Scheme, tmp_path: Path) -> None:
    driver, theirs = serve(base, tmp_path / "base", scheme)
    composed, weights = copy.deepcopy(theirs), (0.7, -0.5)
    uses = []
    for seed, (name, weight) in enumerate(zip(("experts", "down and attention"), weights, strict=True)):
        merged = make(name, theirs, tmp_path / str(seed), seed).merge_and_unload()
        with torch.no_grad():
            for path, parameter in composed.named_parameters():
                parameter.add_(weight * (merged.get_parameter(path) - theirs.get_parameter(path)))
        uses.append((driver.load_adapter(read_adapter(driver, tmp_path / str(seed))), weight))
    got, alone = driver.teach([PROMPT] * 2, decode=3, adapters=[uses, uses[:1]])
    own, other = (row_errors(rows, composed, driver.sequences[0]).median() for rows in (got, alone))
    assert own < 0.05
    assert own < 0.4 * other


def test_steps_of_a_quantised_mixture_are_replayed_with_adapters_and_without(tmp_path: Path) -> None:
    drivers = []
    for number in range(2):
        driver, theirs = serve("qwen3_moe", tmp_path / f"base{number}", "int8")
        drivers.append(driver)
    replayed, eager = drivers
    make("experts", theirs, tmp_path / "a", 0)
    eager.base._steps.disabled = "a test wants eager steps"
    prompts, results = [PROMPT, PROMPT[:3], PROMPT[2:7]], []
    for driver in drivers:
        adapter = driver.load_adapter(read_adapter(driver, tmp_path / "a"))
        results.append([driver.teach(prompts, 8, [uses, [], []]) for uses in ([], [(adapter, 1.0)], [])])
    assert replayed.base._steps.disabled is None
    for ours, theirs in zip(*results, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))
    assert not torch.equal(results[0][0][0], results[0][1][0])
    assert torch.equal(results[0][0][0], results[0][2][0])
