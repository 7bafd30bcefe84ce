"""Methods with virtual tokens: lowering to a prefix, refusals, and the traits of a stored version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import BASE, write
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride, Prefix
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.lowering_job import LoweringContext, LoweringJob, run
from lora_serve.adapters.traits import Traits, traits
from lora_serve.errors import AdapterInvalid, TooLarge
from lora_serve.kernels.contract import Delta

HIDDEN, HEADS, DIM = 8, 2, 4
SHAPE = BaseShape(
    sites=BASE.sites,
    groups=BASE.groups,
    weight=BASE.weight,
    modules={
        "model.embed": {"weight": (12, HIDDEN)},
        "model.norm": {"weight": (HIDDEN,)},
        "head": {"weight": (12, HIDDEN)},
    },
    parameter=lambda path: torch.ones(HIDDEN) if path.startswith("model.norm") else torch.zeros(12, HIDDEN),
    embeddings={"model.embed": 1.0},
    input_embedding="model.embed",
    head="head",
    hidden_size=HIDDEN,
    kv=((HEADS, DIM, DIM),) * 3,
)
TABLE = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
KV_TABLE = torch.randn(5, 3 * 2 * HEADS * DIM, generator=torch.Generator().manual_seed(2))


PLAIN = {"r": None, "lora_alpha": None, "target_modules": None}


def lowered(folder: Path, tensors: dict[str, Tensor], base: BaseShape = SHAPE, **fields: Any) -> Lowered:
    return lower(read(write(folder, tensors, **{**PLAIN, **fields}), max_bytes=1 << 20), base)


def prompt(folder: Path, *, table: Tensor = TABLE, more: dict[str, Tensor] | None = None, **fields: Any) -> Lowered:
    given = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, **fields}
    return lowered(folder, {"prompt_embeddings": table} | (more or {}), **given)


def prefix(folder: Path, *, table: Tensor = KV_TABLE, base: BaseShape = SHAPE, **fields: Any) -> Lowered:
    return lowered(folder, {"prompt_embeddings": table}, base, **{"peft_type": "PREFIX_TUNING", **fields})


def test_prefix_tuning_is_split_into_keys_and_values_per_layer(tmp_path: Path) -> None:
    found = prefix(
        tmp_path, num_virtual_tokens=5, num_layers=3, num_attention_heads=HEADS, token_dim=HEADS * DIM
    ).prefix
    assert found is not None
    assert (found.length, found.embeddings) == (5, None)
    whole = KV_TABLE.view(5, 3, 2, HEADS, DIM)
    for layer in range(3):
        assert torch.equal(found.keys[layer], whole[:, layer, 0])
        assert torch.equal(found.values[layer], whole[:, layer, 1])


def test_single_task_multitask_prompt_tuning_is_multiplied_out(tmp_path: Path) -> None:
    columns, rows = torch.randn(1, 5, 2), torch.randn(1, 2, HIDDEN)
    more = {"prefix_task_cols": columns, "prefix_task_rows": rows}
    found = prompt(tmp_path, peft_type="MULTITASK_PROMPT_TUNING", num_tasks=1, num_ranks=2, more=more).prefix
    assert found is not None
    assert found.embeddings is not None
    torch.testing.assert_close(found.embeddings, TABLE * (columns[0] @ rows[0]))


def test_modules_to_save_are_found_under_the_keys_that_peft_uses_here(tmp_path: Path) -> None:
    norm = {"base_model.model.norm.weight": torch.full((HIDDEN,), 2.0)}
    found = prompt(tmp_path, more=norm, modules_to_save=["norm"])
    assert list(found.overrides) == ["model.norm"]
    assert found.not_additive


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"table": TABLE[:, :7].contiguous()}, r"prompt_embeddings takes \[5, 8\]"),
        ({"num_virtual_tokens": 4}, "num_virtual_tokens = 4"),
        ({"token_dim": 16}, "token_dim = 16"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules = 2"),
        ({"more": {"else": torch.ones(1)}}, "1 tensors of the adapter have no place in this base: else"),
        ({"more": {"base_model.model.embed.weight": torch.ones(12, HIDDEN)}}, "model.embed is replaced"),
        ({"surprise": 3}, "surprise"),
        ({"peft_type": "CPT", "cpt_token_ids": [1, 2]}, "cpt_token_ids"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2}, "num_tasks .* is not 1"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "prefix_task_cols and prefix_task_rows"),
    ],
)
def test_invalid_prompt_tuning_is_refused_by_name(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=said):
        prompt(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"table": KV_TABLE[:, :40].contiguous()}, r"prompt_embeddings takes \[5, 48\]"),
        ({"num_layers": 2}, "num_layers = 2"),
        ({"num_attention_heads": 4}, "num_attention_heads = 4"),
        ({"token_dim": HIDDEN * 2}, "token_dim = 16"),
    ],
)
def test_invalid_prefix_tuning_is_refused_by_name(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=said):
        prefix(tmp_path, **fields)


def test_prefix_tuning_needs_layers_of_one_kv_shape(tmp_path: Path) -> None:
    uneven = BaseShape(BASE.sites, BASE.groups, BASE.weight, kv=((HEADS, DIM, DIM), (1, DIM, DIM)))
    with pytest.raises(AdapterInvalid, match="prefix tuning needs layers"):
        prefix(tmp_path, base=uneven)


def test_a_version_has_its_traits_and_its_total_size(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"prompt_embeddings": TABLE}, **PLAIN, peft_type="PROMPT_TUNING")
    summary = run(LoweringJob(str(folder)), LoweringContext(SHAPE, "a base", torch.float32, 1 << 20, 100)).summary
    assert summary.traits == Traits(virtual=5, not_additive="it puts virtual tokens before the prompt")
    assert (summary.rank, summary.modules) == (0, 0)
    with pytest.raises(TooLarge, match="40 numbers"):
        run(LoweringJob(str(folder)), LoweringContext(SHAPE, "a base", torch.float32, 1 << 20, 39))


def table(rows: int) -> ModuleOverride:
    return ModuleOverride(parameters={"weight": torch.zeros(rows, HIDDEN)})


def test_traits_have_the_size_of_a_replaced_vocabulary() -> None:
    both = Lowered({}, {}, {"model.embed": table(15), "head": table(15)})
    assert traits(both, SHAPE).vocabulary == 15
    assert traits(Lowered({}, {}, {"head": table(10)}), SHAPE).vocabulary == 10
    assert traits(Lowered({}, {}, {"model.embed": table(15)}), SHAPE).vocabulary == 12
    assert traits(Lowered({}, {}, {"model.embed": table(12), "head": table(12)}), SHAPE).vocabulary == 0
    with pytest.raises(AdapterInvalid, match="head makes 15 tokens"):
        traits(Lowered({}, {}, {"head": table(15)}), SHAPE)


def test_an_additive_adapter_can_be_composed() -> None:
    delta = Delta(torch.zeros(1, 8), torch.zeros(1, 12))
    assert traits(Lowered({"layers.0.q_proj": delta}, {}, invocation=(3, 4)), SHAPE) == Traits(invocation=(3, 4))
    assert traits(Lowered({}, {}, prefix=Prefix(2, TABLE[:2])), SHAPE).virtual == 2
