"""Measured launch plans: written, read back, validated, and chosen by card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("triton")

from lora_serve.kernels.gpu.plan_table import (
    AttentionProblem,
    DecodeAttentionEntry,
    DecodeAttentionPlan,
    DeltaEntry,
    DeltaPlan,
    DeltaProblem,
    MatmulEntry,
    MatmulPlan,
    MatmulProblem,
    PlanFile,
    PrefillAttentionEntry,
    PrefillAttentionPlan,
    find,
    read,
    rows_bucket,
    write,
)

DELTA = DeltaEntry(DeltaProblem(4096, (4096, 1024), 32, False), DeltaPlan(4, 16, 256, 512, 16, 4, 4, "beside"))
MATMUL = MatmulEntry(MatmulProblem(4096, 6144, "int8", 1), MatmulPlan(5, 16, 64, 4, 6))


HEADS = AttentionProblem(8, 4, 128, 128, 2, 32)
DECODING = DecodeAttentionEntry(HEADS, DecodeAttentionPlan(64, 4, 3, 1, 256))
PROMPTS = PrefillAttentionEntry(HEADS, PrefillAttentionPlan(128, 64, 8, 3))
ATTENTION: dict[str, Any] = {"decode_attention": (DECODING,), "prefill_attention": (PROMPTS,)}


def a_file(card: str = "NVIDIA H200", **others: Any) -> PlanFile:
    given = {"format": 1, "card": card, "capability": (9, 0), "triton": "3.6.0", "pointwise": "in_turn"}
    return PlanFile(**(given | {"delta": (DELTA,), "matmul": (MATMUL,)} | ATTENTION | others))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write(a_file(), tmp_path / "tuned")
    assert path.name == "nvidia-h200.json"
    assert read(path) == a_file()


def test_a_card_gets_its_own_plans_or_those_of_its_compute_capability(tmp_path: Path) -> None:
    other = DeltaPlan(1, 16, 256, 128, 16, 4, 4, "in_turn")
    write(a_file("NVIDIA H100", delta=(DeltaEntry(DELTA.problem, other),)), tmp_path)
    write(a_file(pointwise="dependent"), tmp_path)
    assert find("NVIDIA H200", (9, 0), tmp_path).delta == {DELTA.problem: DELTA.plan}
    assert find("NVIDIA H200", (9, 0), tmp_path).matmul == {MATMUL.problem: MATMUL.plan}
    assert find("NVIDIA H200", (9, 0), tmp_path).decode_attention == {HEADS: DECODING.plan}
    assert find("NVIDIA H200", (9, 0), tmp_path).prefill_attention == {HEADS: PROMPTS.plan}
    assert find("NVIDIA H200", (9, 0), tmp_path).dependent_pointwise
    assert find("NVIDIA GH200", (9, 0), tmp_path).delta == {DELTA.problem: other}
    assert find("NVIDIA A100", (8, 0), tmp_path).delta == {}
    assert find("NVIDIA A100", (8, 0), tmp_path / "none").delta == {}


def broken(change: str) -> dict[str, Any]:
    """A file's content with one fault."""
    content: dict[str, Any] = json.loads(msgspec.json.encode(a_file()))
    plan = content["delta"][0]["plan"]
    match change:
        case "unknown field":
            plan["stages"] = 3
        case "unknown field above":
            content["remark"] = ""
        case "missing field":
            del plan["launch"]
        case "unknown launch":
            plan["launch"] = "sideways"
        case "wrong type":
            plan["splits"] = "4"
        case "no power of two":
            plan["block_n"] = 96
        case "out of range":
            plan["splits"] = 32
        case "matmul out of range":
            content["matmul"][0]["plan"]["stages"] = 0
        case "attention without splits":
            content["decode_attention"][0]["plan"]["programs"] = 0
        case "attention of odd tiles":
            content["prefill_attention"][0]["plan"]["tokens"] = 48
        case "two plans":
            content["delta"] *= 2
        case "older card":
            content["capability"], plan["launch"] = [8, 0], "dependent"
        case "another format":
            content["format"] = 2
    return content


FAULTS = (
    *("unknown field", "unknown field above", "missing field", "unknown launch", "wrong type", "no power of two"),
    *(
        "attention without splits",
        "attention of odd tiles",
        "out of range",
        "matmul out of range",
        "two plans",
        "older card",
        "another format",
    ),
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    (tmp_path / "odd.json").write_text(json.dumps(broken(fault)))
    with pytest.raises(ValueError, match=r"odd\.json"):
        read(tmp_path / "odd.json")
    write(a_file("NVIDIA H100"), tmp_path)
    assert find("NVIDIA H200", (9, 0), tmp_path).delta
    assert "odd.json" in caplog.text
    assert "by rule" in caplog.text


def test_text_that_is_no_json_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cut.json").write_text('{"format": 1, ')
    assert not find("NVIDIA H200", (9, 0), tmp_path).delta
    assert "cut.json" in caplog.text


def test_files_of_the_package_can_be_read() -> None:
    from lora_serve.kernels.gpu import plan_table

    for path in plan_table.FOLDER.glob("*.json"):
        read(path)


def test_rows_share_a_plan_up_to_the_next_power_of_two() -> None:
    assert [rows_bucket(rows) for rows in (1, 2, 3, 32, 33, 2048, 100_000)] == [1, 2, 4, 32, 64, 2048, 8192]
