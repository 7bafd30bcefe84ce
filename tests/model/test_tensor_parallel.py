"""A base that two processes share gives the logits of one that is whole, with adapters of every kind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from parity import logits, make_adapter, read_adapter, save_noisy_adapter
from ranks import RankRunner
from support import COMMON, EXPERTS, make_model, reference, save, uncentred
from torch import Tensor
from transformers import GptOssConfig, LlamaConfig, MixtralConfig, PretrainedConfig

from lora_serve.errors import ModelUnsupported
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.model.parallel_plan import plan_sharding
from lora_serve.model.shape import base_module
from lora_serve.model.tensor_parallel import TensorParallel

pytestmark = [  # PEFT talks about heads, ties and patterns
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATHS = [f"{'self_attn' if name[1] == '_' else 'mlp'}.{name}" for name in LINEAR]
TASK = {"task_type": "CAUSAL_LM"}
# Of the same first token, so that the first logits tell one adapter from another; some are longer than a step.
PROMPTS = [[5, 9, 33, 60, 21], [5, 8, 40, 11, 12, 13, 14, 15, 16, 17, 18, 19], [5], [5, 81, 82, 83, 84, 85, 86]]


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | options)


LORAS = [
    lora(r=7, use_rslora=True),
    lora(r=1, target_modules=["q_proj", "o_proj"]),
    lora(r=16, rank_pattern={"down_proj": 3, "k_proj": 33}, bias="all"),
    lora(target_modules=["gate_proj", "down_proj"], use_dora=True),
]
METHODS: dict[str, list[peft.PeftConfig]] = {
    "embedding, head and tokens": [
        lora(target_modules=["embed_tokens", "lm_head", "o_proj"]),
        lora(target_modules=["q_proj"], trainable_token_indices=[5, 40, 95]),
        lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ],
    "saved modules": [
        lora(target_modules=["q_proj"], modules_to_save=["o_proj", "down_proj", "v_proj"], bias="all"),
        lora(target_modules=["down_proj"], modules_to_save=["q_norm", "input_layernorm", "norm", "gate_proj"]),
    ],
    "gains and virtual tokens": [
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj", "o_proj"], feedforward_modules=["down_proj"]),
        peft.PrefixTuningConfig(num_virtual_tokens=6, **TASK),
        peft.PromptTuningConfig(num_virtual_tokens=5, **TASK),
    ],
}


def serve(folder: Path, adapters: int, parallel: TensorParallel | None = None) -> tuple[list[Tensor], list[list[int]]]:
    """Logits and tokens of prompts under the base and each adapter, in one mixed batch."""
    driver = Driver(folder / "base", max_tokens=11, parallel=parallel)
    routes: list[list[tuple[str, float]]] = [[]]
    for number in range(adapters):
        routes.append([(driver.load_adapter(read_adapter(driver, folder / str(number))), 1.0)])
    rows = driver.teach([PROMPTS[n % len(PROMPTS)] for n in range(len(routes))], decode=3, adapters=routes)
    return rows, driver.sequences


@pytest.fixture(scope="module")
def run_ranks() -> Iterator[RankRunner]:
    with RankRunner() as run:
        yield run


def compare(
    run_ranks: RankRunner, folder: Path, base: Any, configs: Sequence[peft.PeftConfig], near: float = 1e-5
) -> None:
    """Serve adapters of these configurations on one process and on two, whose logits are as near as given."""
    base.save_pretrained(folder / "base")
    for number, config in enumerate(configs):
        save_noisy_adapter(base, folder / str(number), number, config, noise=0.08)
    wanted, tokens = serve(folder, len(configs))
    for got, own in run_ranks(partial(serve, folder, len(configs))):
        assert own == tokens
        torch.testing.assert_close(got, wanted, atol=near, rtol=near)
    assert all(not torch.allclose(wanted[0][:1], rows[:1], atol=1e-3) for rows in wanted[1:]), "an adapter does nothing"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral"])
def test_two_processes_give_the_logits_of_one(architecture: str, run_ranks: RankRunner, tmp_path: Path) -> None:
    compare(run_ranks, tmp_path, reference(architecture), LORAS)


EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERT_LORAS = [
    lora(target_modules=[], target_parameters=EXPERT_PARAMETERS),
    lora(target_modules=["q_proj", "o_proj"], target_parameters=EXPERT_PARAMETERS[1:], r=7),
    lora(target_modules=["k_proj"], modules_to_save=["experts"]),
]


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_are_cut_one_by_one(architecture: str, run_ranks: RankRunner, tmp_path: Path) -> None:
    # Routers with large weights, which tell experts apart, also enlarge what sums in another order differ by.
    compare(run_ranks, tmp_path, uncentred(EXPERTS[architecture]), EXPERT_LORAS, near=2e-4)


def quantized_experts(
    folder: Path, parallel: TensorParallel
) -> tuple[Tensor, list[int], dict[str, Tensor], dict[str, Tensor]]:
    """Logits under an adapter, their tokens, and weights of experts: as lowered against, and as they are here."""
    driver = Driver(folder / "base", max_tokens=23, parallel=parallel, scheme="int4")
    route = [(driver.load_adapter(read_adapter(driver, folder / "0")), 1.0)]
    (rows,) = driver.teach([list(range(5, 45))], decode=3, adapters=[route])
    shape, model = driver.loaded.shape, driver.loaded.model
    lowered = {name: shape.weight(name) for name in shape.sites}
    places = {name: name.partition("[") for name in lowered if name.endswith("]")}
    own = {
        name: base_module(model, path.rpartition(".")[0]).expert_weight(path.rpartition(".")[2], int(index[:-1]))
        for name, (path, _, index) in places.items()
    }
    return rows, driver.sequences[0], lowered, own


def test_parts_of_experts_are_quantised_and_adapters_are_lowered_against_them(
    run_ranks: RankRunner, tmp_path: Path
) -> None:
    theirs = uncentred(MixtralConfig(**COMMON | {"intermediate_size": 128}, num_local_experts=4, num_experts_per_tok=2))
    theirs.save_pretrained(tmp_path / "base")
    save_noisy_adapter(theirs, tmp_path / "0", 0, EXPERT_LORAS[0], noise=0.05)
    (rows, tokens, lowered, first), (others, _, again, second) = run_ranks(partial(quantized_experts, tmp_path))
    assert torch.equal(rows, others)
    assert all(torch.equal(again[name], weight) for name, weight in lowered.items())
    with torch.no_grad():
        for name, weight in lowered.items():
            path, expert, index = name.partition("[")
            if not expert:
                theirs.get_submodule(name).weight.copy_(weight)
                continue
            theirs.get_parameter(path)[int(index[:-1])] = weight
            blocks = [torch.cat(pair) for pair in zip(first[name].chunk(2), second[name].chunk(2), strict=True)]
            whole = torch.cat(blocks) if "gate_up" in path else torch.cat([first[name], second[name]], 1)
            assert torch.equal(whole, weight), name
    plain = logits(theirs.eval(), tokens)
    wanted = logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "0").eval(), tokens)
    errors = [float(((rows - each).norm(dim=1) / each.norm(dim=1)).median()) for each in (wanted, plain)]
    assert errors[0] < 0.05  # of a median: where rows are rounded, other experts may be chosen
    assert errors[0] < 0.4 * errors[1]


def test_biases_of_layers_whose_outputs_are_added_up_count_once(run_ranks: RankRunner, tmp_path: Path) -> None:
    base = make_model(LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True))
    saved = lora(target_modules=["q_proj"], modules_to_save=["o_proj", "down_proj"])
    compare(run_ranks, tmp_path, base, [*LORAS, saved])


@pytest.mark.parametrize("kind", METHODS)
def test_what_adapters_do_beside_deltas_is_cut_as_well(kind: str, run_ranks: RankRunner, tmp_path: Path) -> None:
    compare(run_ranks, tmp_path, reference("qwen3"), METHODS[kind])


def serve_quantized(
    folder: Path, scheme: Scheme, adapters: int, parallel: TensorParallel | None = None
) -> tuple[list[Tensor], list[list[int]], dict[str, Tensor], dict[str, Tensor]]:
    """As `serve` over a quantised base; also the weights that adapters are lowered against, and those in use here."""
    driver = Driver(folder / "base", max_tokens=11, parallel=parallel, scheme=scheme, native=scheme != "fp8")
    routes: list[list[tuple[str, float]]] = [[]]
    for number in range(adapters):
        routes.append([(driver.load_adapter(read_adapter(driver, folder / str(number))), 1.0)])
    rows = driver.teach([PROMPTS[1]] * len(routes), decode=3, adapters=routes)
    lowered = {name: driver.loaded.shape.weight(name) for name in driver.loaded.shape.sites}
    own = {name: base_module(driver.loaded.model, name).full_weight for name in lowered}
    return rows, driver.sequences, lowered, own


@pytest.mark.parametrize(
    "scheme",
    ["int4", pytest.param("int8", marks=pytest.mark.slow), pytest.param("fp8", marks=pytest.mark.slow)],
)
def test_a_base_is_quantised_part_by_part_and_adapters_are_lowered_against_the_parts(
    scheme: Scheme, run_ranks: RankRunner, tmp_path: Path
) -> None:
    theirs = uncentred(LlamaConfig(**COMMON | {"intermediate_size": 128}))
    theirs.save_pretrained(tmp_path / "base")
    for number, config in enumerate(LORAS):
        save_noisy_adapter(theirs, tmp_path / str(number), number, config, noise=0.08)
    ranks = run_ranks(partial(serve_quantized, tmp_path, scheme, len(LORAS)))
    (rows, sequences, lowered, _), second = ranks[0], ranks[1]
    assert all(torch.equal(mine, other) for mine, other in zip(rows, second[0], strict=True))
    for name, whole in lowered.items():
        parts = [each[3][name] for each in ranks]
        cut = 0 if parts[0].shape[0] < whole.shape[0] else 1
        assert torch.equal(parts[0] if parts[0].shape == whole.shape else torch.cat(parts, cut), whole), name
        assert torch.equal(second[2][name], whole), name
    with torch.no_grad():
        for name, weight in lowered.items():
            theirs.get_submodule(name).weight.copy_(weight)
    models = [theirs.eval()]
    models += [peft.PeftModel.from_pretrained(deepcopy(theirs), tmp_path / str(n)).eval() for n in range(len(LORAS))]
    for got, tokens, model in zip(rows, sequences, models, strict=True):
        wanted = logits(model, tokens)
        apart = [(got - logits(other, tokens)).norm().item() for other in models]
        assert apart[models.index(model)] == min(apart) < (0.1 if scheme == "fp8" else 0.05) * wanted.norm()


def first_adapter(folder: Path, dtype: str, parallel: TensorParallel | None = None) -> Tensor:
    """Logits of one prompt under an adapter and under the base."""
    driver = Driver(folder / "base", dtype=dtype, parallel=parallel)
    route = [(driver.load_adapter(read_adapter(driver, folder / "0")), 1.0)]
    return torch.cat(driver.teach([[5, 9, 33, 60, 21, 7, 8, 40]] * 2, decode=1, adapters=[route, []])).float()


def test_in_bf16_two_processes_are_as_close_to_exact_as_one(run_ranks: RankRunner, tmp_path: Path) -> None:
    save("llama", tmp_path / "base")
    make_adapter("llama", tmp_path / "0", 0, LORAS[0], reload=False)
    exact = first_adapter(tmp_path, "float32")
    shared = run_ranks(partial(first_adapter, tmp_path, "bfloat16"))
    assert torch.equal(*shared)
    assert (shared[0] - exact).norm() <= 1.25 * (first_adapter(tmp_path, "bfloat16") - exact).norm()


def reuse_slots(folder: Path, parallel: TensorParallel | None = None) -> list[Tensor]:
    """Logits with two adapters in two slots, then with a third one in the slot of the first."""
    driver = Driver(folder / "base", slots=2, parallel=parallel)
    adapters = [read_adapter(driver, folder / str(number)) for number in range(3)]
    first, second = (driver.load_adapter(adapter) for adapter in adapters[:2])
    before = driver.teach([PROMPTS[0]] * 2, 2, [[(first, 0.7), (second, -0.3)], []])
    driver.device_slots.evict(driver.slots.pop(first))
    third = driver.load_adapter(adapters[2])
    return before + driver.teach([PROMPTS[1]] * 2, 2, [[(second, 1.0)], [(third, 1.0)]])


def test_slots_are_filled_evicted_and_filled_again(run_ranks: RankRunner, tmp_path: Path) -> None:
    save("qwen2", tmp_path / "base")
    for number, config in enumerate(LORAS[:3]):
        make_adapter("qwen2", tmp_path / str(number), number, config, reload=False)

    wanted = reuse_slots(tmp_path)
    for got in run_ranks(partial(reuse_slots, tmp_path)):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def sizes(folder: Path, parallel: TensorParallel | None = None) -> dict[str, int]:
    """Elements of the weights of a layer, KV heads, and bytes of an adapter."""
    driver = Driver(folder / "base", parallel=parallel)
    driver.load_adapter(read_adapter(driver, folder / "0"))
    layer = driver.loaded.model.get_submodule("model.layers.1")
    return {
        "weights": sum(layer.get_submodule(name).weight.numel() for name in PATHS),
        "kv": sum(layer.kv_heads for layer in driver.loaded.layers),
        "adapter": driver.device_slots.bytes,
    }


def test_each_process_has_half_of_the_layers_and_of_the_kv_cache(run_ranks: RankRunner, tmp_path: Path) -> None:
    save("llama", tmp_path / "base")
    make_adapter("llama", tmp_path / "0", 0, lora(r=8), reload=False)

    whole, (first, second) = sizes(tmp_path), run_ranks(partial(sizes, tmp_path))
    assert first == second
    assert first["weights"] == whole["weights"] / 2
    assert first["kv"] == whole["kv"] / 2
    # Per layer, A is whole in q, k, v, gate and up (64 inputs each), and B in o and down (64 outputs each).
    assert whole["adapter"] - first["adapter"] == first["adapter"] - 3 * 8 * 4 * 7 * 64


def refusal(folder: Path, parallel: TensorParallel) -> str:
    """Why a rank refuses a base."""
    with pytest.raises(ModelUnsupported) as refused:
        Driver(folder, parallel=parallel)
    return refused.value.message


@pytest.mark.parametrize(
    ("architecture", "size", "reason"),
    [
        ("gpt2", 2, "gpt2 has no plan for tensor parallelism"),
        ("phi3", 2, "cuts no layers that need no gathering"),
        ("qwen3_moe", 4, "4 attention heads and 2 of keys and values cannot be divided among 4 devices"),
        ("llama", 3, "features of model.layers.0.self_attn.* cannot be divided among 3 devices"),
        ("llama", 4, "4 attention heads and 2 of keys and values cannot be divided among 4 devices"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(
    architecture: str, size: int, reason: str, run_ranks: RankRunner, tmp_path: Path
) -> None:
    save(architecture, tmp_path)

    for message in run_ranks(partial(refusal, tmp_path), size):
        assert re.search(reason, message), message


EXPERT_PLAN = {
    "model.layers.*.mlp.experts": "moe_tp_experts",
    "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.experts.down_proj": "rowwise",
}


@pytest.mark.parametrize(
    ("config", "plan", "reason"),
    [
        (GptOssConfig(**COMMON, head_dim=16, num_local_experts=4), EXPERT_PLAN, "it has biases, transposed weights or"),
        (
            EXPERTS["mixtral"],
            EXPERT_PLAN | {"model.layers.*.mlp.experts.gate_up_proj": "colwise"},
            "it is not cut at the outputs of gate_up_proj and the inputs of down_proj",
        ),
        (EXPERTS["mixtral"], EXPERT_PLAN | {"model.layers.*.mlp": "moe_tp_experts"}, "is a MixtralSparseMoeBlock"),
        (EXPERTS["mixtral"], EXPERT_PLAN | {"model.norm.weight": "rowwise"}, "cuts model.norm.weight .* a Parameter"),
        (EXPERTS["mixtral"], {**EXPERT_PLAN, "lm_head": "gather"}, "cuts lm_head for tensor parallelism as 'gather'"),
    ],
)
def test_a_plan_that_cuts_in_ways_that_are_not_known_is_refused(
    config: PretrainedConfig, plan: dict[str, str], reason: str
) -> None:
    class Planned:
        """A model with another plan."""

        tp_plan = plan

        def __init__(self) -> None:
            self.model = make_model(config)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.model, name)

    ranks: Any = SimpleNamespace(rank=0, size=2)
    with pytest.raises(ModelUnsupported, match=reason):
        plan_sharding(Planned(), [], 3, ranks)
