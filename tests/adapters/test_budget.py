"""Lowering is bounded before it begins: a small file never makes a large allocation, whatever rank it asks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import BANK, BASE, GOOD, TALL, WIDE, X, normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_serve.adapters.adapter import BaseShape, Lowered, Site
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats.budget import ElementBudget
from lora_serve.adapters.formats.dispatch import FORMATS, lower
from lora_serve.errors import AdapterInvalid

Case = tuple[dict[str, Tensor], dict[str, Any]]

LORA: Case = ({"q.lora_A.weight": normal(4, WIDE), "q.lora_B.weight": normal(TALL, 4)}, {"r": 4})
TABLE: Case = ({"prompt_embeddings": normal(5, WIDE)}, {})
KV_TABLE: Case = ({"prompt_embeddings": normal(5, 2 * WIDE)}, {})
TASK = {"prefix_task_cols": normal(1, 5, 2), "prefix_task_rows": normal(1, 2, WIDE)}
VALID: dict[str, Case] = GOOD | {
    "LORA": LORA,
    "PROMPT_TUNING": TABLE,
    "P_TUNING": TABLE,
    "CPT": TABLE,
    "MULTITASK_PROMPT_TUNING": (TABLE[0] | TASK, {}),
    "PREFIX_TUNING": KV_TABLE,
    "CARTRIDGE": KV_TABLE,
}
# Methods that are lowered to about as many elements as their files have.
AS_LARGE_AS_ITS_FILE = {
    "LORA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS", "PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING", "CARTRIDGE",
}  # fmt: skip

MANY = 50_000  # far above the rank of any module
INDICES = {f"q.vblora_logits_{m}_topk_indices": torch.zeros(*s, 1, dtype=torch.uint8) for m, s in
           (("A", (MANY, 2)), ("B", (3, MANY)))}  # fmt: skip
NO_WEIGHTS = {f"q.vblora_logits_{m}_topk_weights": torch.zeros(*s, 0) for m, s in (("A", (MANY, 2)), ("B", (3, MANY)))}
# A rank that is far above both widths of the module, in a file as small as the method allows.
ABOVE_THE_MODULE: dict[str, Case] = {
    "LORA": (LORA[0], {"r": MANY}),
    "ADALORA": (
        {"q.lora_A": normal(MANY, WIDE), "q.lora_B": normal(TALL, MANY), "q.lora_E": normal(MANY, 1)},
        {"init_r": MANY},
    ),
    "VERA": (
        {"q.vera_lambda_d": normal(MANY), "q.vera_lambda_b": normal(TALL)},
        {"r": MANY, "save_projection": False},
    ),
    "LOHA": (
        {f"q.hada_w{i}_{m}": normal(*s) for i in (1, 2) for m, s in (("a", (TALL, MANY)), ("b", (MANY, WIDE)))},
        {"r": MANY},
    ),
    "LOKR": (
        {"q.lokr_w1": normal(3, 2), "q.lokr_w2_a": normal(4, MANY), "q.lokr_w2_b": normal(MANY, 4)},
        {"r": MANY},
    ),
    "VBLORA": (
        {BANK: normal(5, 4)} | INDICES | NO_WEIGHTS,
        {"r": MANY, "num_vectors": 5, "vector_length": 4, "topk": 1, "save_only_topk_weights": True},
    ),
    "RANDLORA": (
        {"q.randlora_lambda": normal(MANY, 1), "q.randlora_gamma": normal(1, WIDE)},
        {"r": MANY, "save_projection": False},
    ),
    "DELORA": (
        {"q.delora_A": normal(MANY, WIDE), "q.delora_B": normal(TALL, MANY), "q.delora_lambda": normal(1)},
        {"r": MANY},
    ),
    "MISS": ({"q.miss_block": normal(MANY, 1)}, {"r": MANY, "init_weights": "mini"}),
}
# Ranks that modules of a large base could have, which together are more than host memory holds for adapters.
LARGE_SITES = {f"wide{n}": Site(f"wide{n}", 1 << 20, 1 << 10) for n in range(20)}
LARGE = BaseShape(
    sites=LARGE_SITES, groups=(), weight=lambda name: torch.empty(0), modules={name: {} for name in LARGE_SITES}
)
RANK = 1 << 9
TOO_LARGE: dict[str, Case] = {
    "VERA": (
        {f"{name}.vera_lambda_d": torch.ones(RANK) for name in LARGE_SITES}
        | {f"{name}.vera_lambda_b": torch.ones(1 << 10) for name in LARGE_SITES},
        {"r": RANK, "save_projection": False},
    ),
    "MISS": (
        {f"{name}.miss_block": torch.ones(RANK, 1 << 10) for name in LARGE_SITES},
        {"r": RANK},
    ),
    "VBLORA": (
        {BANK: normal(2, 1 << 10)}
        | {f"{name}.vblora_logits_A_topk_indices": torch.zeros(RANK, 1 << 10, 1).byte() for name in LARGE_SITES}
        | {f"{name}.vblora_logits_B_topk_indices": torch.zeros(1, RANK, 1).byte() for name in LARGE_SITES}
        | {f"{name}.vblora_logits_A_topk_weights": torch.zeros(RANK, 1 << 10, 0) for name in LARGE_SITES}
        | {f"{name}.vblora_logits_B_topk_weights": torch.zeros(1, RANK, 0) for name in LARGE_SITES},
        {"r": RANK, "num_vectors": 2, "vector_length": 1 << 10, "topk": 1, "save_only_topk_weights": True},
    ),
    "LOKR": (
        {f"{name}.lokr_w1": torch.ones(32, 1 << 10) for name in LARGE_SITES}
        | {f"{name}.lokr_w2": torch.ones(32, 1 << 10) for name in LARGE_SITES},
        {},
    ),
    "LOHA": (
        {f"{name}.hada_w{i}_a": torch.ones(1 << 10, 22) for name in LARGE_SITES for i in (1, 2)}
        | {f"{name}.hada_w{i}_b": torch.ones(1, 1).expand(22, 1 << 20) for name in LARGE_SITES for i in (1, 2)},
        {"r": 22},
    ),
}  # fmt: skip


class Allocations(TorchDispatchMode):
    """Elements of the tensors that operators return, the largest and together."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.total += tensor.numel()
        return result


def lowered(method: str, case: Case, base: BaseShape = BASE, most_elements: int = 1 << 30) -> Lowered:
    tensors, fields = case
    whole = {key if key.startswith("base_model.") or "." not in key else X + key: each for key, each in tensors.items()}
    if base is BASE:
        base = BaseShape(**{**vars(BASE), "hidden_size": WIDE, "kv": ((2, 4, 4),)})
    checkpoint = Checkpoint({"peft_type": method, **fields}, whole, 0, most_elements=most_elements)
    return lower(checkpoint, base)


def file_elements(case: Case) -> int:
    return sum(tensor.numel() for tensor in case[0].values())


@pytest.mark.parametrize("method", FORMATS)
def test_every_format_is_bounded_by_its_file_or_by_the_budget(method: str) -> None:
    found = lowered(method, VALID[method])
    elements = sum(tensor.numel() for tensor in found.tensors.values())
    if method in AS_LARGE_AS_ITS_FILE:
        assert elements <= 2 * file_elements(VALID[method])
    else:
        assert lowered(method, VALID[method], most_elements=2 * elements).deltas.keys() == found.deltas.keys()
        with pytest.raises(AdapterInvalid, match=r"in adapter_config\.json makes an adapter of \d+ numbers"):
            lowered(method, VALID[method], most_elements=elements - 1)


@pytest.mark.parametrize("method", ABOVE_THE_MODULE)
def test_a_rank_above_a_module_s_widths_is_refused_before_anything_is_allocated(method: str) -> None:
    with Allocations() as allocations, pytest.raises(AdapterInvalid) as caught:
        lowered(method, ABOVE_THE_MODULE[method])
    assert allocations.largest <= max(tensor.numel() for tensor in ABOVE_THE_MODULE[method][0].values())
    if method != "LORA":  # whose weights have another rank
        field = "init_r" if method == "ADALORA" else "r"
        assert f"{field} = 50000 in adapter_config.json" in caught.value.message
        assert "q [12, 8]" in caught.value.message
        assert "at most 1024" in caught.value.message


@pytest.mark.parametrize("method", TOO_LARGE)
def test_an_adapter_larger_than_host_memory_holds_is_refused_before_it_is_expanded(method: str) -> None:
    most = 1 << 20
    with Allocations() as allocations, pytest.raises(AdapterInvalid, match=f"at most {most} are kept"):
        lowered(method, TOO_LARGE[method], LARGE, most_elements=most)
    assert allocations.largest <= max(1 << 10, max(tensor.numel() for tensor in TOO_LARGE[method][0].values()))


def test_a_rank_above_the_module_s_is_kept_at_full_rank() -> None:
    case = {"q.miss_block": normal(100, TALL)}, {"r": 100}
    assert lowered("MISS", case).deltas["q"].a.shape == (WIDE, WIDE)


def test_the_budget_counts_what_is_kept() -> None:
    budget = ElementBudget(1000)
    budget.reserve(Site("a", 8, 12), 10)
    assert budget.reserved == 8 * 20
    with pytest.raises(AdapterInvalid, match=r"r = 1025 in adapter_config\.json is too much for a \[12, 8\]"):
        budget.reserve(Site("a", 8, 12), 1025)
    with pytest.raises(AdapterInvalid, match="1060 numbers; at most 1000"):
        budget.reserve(Site("b", 100, 200), 3)


PEAK = """
import resource, sys
sys.path[:0] = sys.argv[1:]
from test_budget import ABOVE_THE_MODULE, LARGE, TOO_LARGE, lowered
from lora_serve.errors import AdapterInvalid

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for cases, base in ((ABOVE_THE_MODULE, None), (TOO_LARGE, LARGE)):
    for method, case in cases.items():
        try:
            lowered(method, case, *([] if base is None else [base, 1 << 20]))
            raise SystemExit(method)
        except AdapterInvalid:
            pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_no_refused_adapter_takes_memory_of_the_process() -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(here), str(here.parent), str(here.parent.parent)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(run.stdout) < 64 << 10  # KiB
